#!/usr/bin/env bash
# From an empty machine to a trained and evaluated network with WS + BCN at one image per step:
#   bash tools/quickstart.sh                 Mask R-CNN, bbox and segm mAP
#   bash tools/quickstart.sh deeplabv3       DeepLabV3, mIoU
#   bash tools/quickstart.sh classification  ResNet-18, top-1 accuracy
#   bash tools/quickstart.sh tsm             a network for videos, top-1 accuracy
#   bash tools/quickstart.sh single_frame    the same on single frames, which tell nothing
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
    classification) config=configs/quick/quick_resnet18_ws-bcn_1xb1_pictures.py ;;
    tsm) config=configs/quick/quick_tsm_r18_ws-bcn_1xb1_shapes.py ;;
    single_frame) config=configs/quick/quick_tsm_r18_ws-bcn_1xb1_single-frame.py ;;
    *)
        echo "usage: $0 [mask_rcnn|deeplabv3|classification|tsm|single_frame], got '$model'" >&2
        exit 2
        ;;
esac
python=$(bash tools/setup_env.sh)
work=work_dirs/quickstart_$model
run() { echo "+ $*"; "$@"; }
# Threads that wait do not spin: beside another program that would take a core from each step, alone
# it gains nothing.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

case $model in
    tsm | single_frame)
        shown=data/clips/videos/val
        run "$python" -m wsbcn_mm.shapes --clips data/clips
        ;;
    classification)
        if [ -d data/cifar10/train ]; then # class folders of real images, where they are
            config=configs/quick/quick_resnet18_ws-bcn_1xb1_cifar10.py
            shown=data/cifar10/val
        else
            shown=data/pictures/val
            run "$python" -m wsbcn_mm.shapes --pictures data/pictures
        fi
        ;;
    *) run "$python" -m wsbcn_mm.shapes data/shapes ;;
esac
run "$python" tools/train.py "$config" --work-dir "$work"
checkpoint=$(cat "$work/last_checkpoint")
case $model in
    # MMAction2's own hook cannot draw what 2d networks see, and MMPretrain's writes over small pictures
    tsm | single_frame | classification)
        run "$python" tools/test.py "$config" "$checkpoint" --work-dir "$work/test"
        run "$python" tools/infer.py "$config" "$checkpoint" "$shown" -o "$work/infer"
        ;;
    *) run "$python" tools/test.py "$config" "$checkpoint" --work-dir "$work/test" --show-dir pictures ;;
esac
run "$python" tools/analysis_tools/report.py "$work" --started "$started"
echo "your own data, on one GPU: docs/your_data.md; $config is a config to begin with"
