#!/usr/bin/env bash
# From an empty machine to a trained and evaluated Mask R-CNN with WS + BCN at one image per step:
#   bash tools/quickstart.sh              Mask R-CNN, bbox and segm mAP
#   bash tools/quickstart.sh deeplabv3    DeepLabV3, mIoU
#
# Makes an environment (tools/setup_env.sh says how to choose another), draws the embedded dataset,
# trains from scratch in minutes, evaluates, writes pictures and curves to work_dirs/quickstart_*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
model=${1:-mask_rcnn}
case $model in
    mask_rcnn) config=configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py ;;
    deeplabv3) config=configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py ;;
    *) echo "usage: $0 [mask_rcnn|deeplabv3], got '$model'" >&2; exit 2 ;;
esac
python=$(bash tools/setup_env.sh)
work=work_dirs/quickstart_$model
run() { echo "+ $*"; "$@"; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

run "$python" -m wsbcn_mm.shapes data/shapes
run "$python" tools/train.py "$config" --work-dir "$work"
checkpoint=$(cat "$work/last_checkpoint")
run "$python" tools/test.py "$config" "$checkpoint" --work-dir "$work/test" --show-dir pictures
run "$python" tools/analysis_tools/report.py "$work" --started "$started"
echo "your own data, on one GPU: docs/your_data.md; $config is a config to begin with"
