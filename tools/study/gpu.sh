#!/usr/bin/env bash
# The study at the width of a ResNet-50 on one GPU, several runs at once:
#
#   bash tools/study/gpu.sh OUT [MINUTES]
#
#   PYTHON=...    an environment with the package (default: python)
#   WORKERS=4     runs at once on the GPU
#   DEVICE=cuda   cpu: to see that it works
#   GRID=FILE     default: tools/study/grids/gpu.yaml
#
# Records go to OUT/results, tables and pictures of what is finished to OUT. No run starts after MINUTES
# (default: 10); call it again to go on. It has not been run on a GPU yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \?//' >&2; exit 2; }
out=$1 minutes=${2:-10} python=${PYTHON:-python} grid=${GRID:-$here/grids/gpu.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=()
trap 'kill "${workers[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < ${WORKERS:-4}; i++)); do
    "$python" "$here/run_grid.py" "$grid" -o "$out/results" \
        --device "${DEVICE:-cuda}" --minutes "$minutes" &
    workers+=($!)
done
status=0
for worker in "${workers[@]}"; do wait "$worker" || status=$?; done
workers=()
[ $status = 0 ] || exit $status
"$python" "$here/make_report.py" "$grid" -r "$out/results" -o "$out" >/dev/null
echo "tables and pictures: $out" >&2
