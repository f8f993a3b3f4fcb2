#!/usr/bin/env bash
# Sharing a GPU, checked and measured, with the python on PATH: the gpu-marked tests of weight
# sharing, partitions and MPS, and the table of serving while training. Writes its logs under $OUT.
#   OUT=/tmp/out scripts/gpu/sharing.sh [MODEL_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-/tmp/kiln-sharing}
mkdir -p "$out"
for folder in libs/*/src services/*/src cli/src .; do PYTHONPATH="$PWD/$folder:${PYTHONPATH:-}"; done
export PYTHONPATH PYTHONUNBUFFERED=1
export KILN_BENCH_RESULTS=${KILN_BENCH_RESULTS:-$out}
model=${1:-/tmp/kiln-bench-4b}
failed=0

echo "== weights, partitions, MPS"
timeout 170 python3 -m pytest -q -m gpu -p no:cacheprovider --durations=8 tests/kernels/test_cuda_sharing.py \
  tests/integration/trainer_backend/test_gpu_partitions.py tests/kernels/test_mps.py 2>&1 |
  tee "$out/pytest.log" | tail -40 || failed=1

echo "== serving while training"
[ -f "$model/config.json" ] || python3 scripts/gpu/make_random_checkpoint.py --shape 4b --out "$model"
timeout 400 python3 -m benchmarks.sharing --model "$model" 2>&1 | tee "$out/sharing.log" || failed=1
exit $failed
