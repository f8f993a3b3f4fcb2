#!/usr/bin/env bash
# Everything that needs a CUDA device, with the python that is on PATH: the gpu-marked tests, the
# demonstration on the GPU, and the loop on a random 4B-shaped model. Writes its logs under $OUT.
#   OUT=/tmp/out PYTHONPATH=… scripts/gpu/run_checks.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-/tmp/kiln-gpu}
mkdir -p "$out"
for folder in libs/*/src services/*/src cli/src .; do PYTHONPATH="$PWD/$folder:${PYTHONPATH:-}"; done
export PYTHONPATH PYTHONUNBUFFERED=1

echo "== gpu-marked tests"
timeout 200 python3 -m pytest -q -m gpu -p no:cacheprovider $(grep -rl "mark.gpu" tests) 2>&1 | tee "$out/pytest.log" | tail -15

echo "== the demonstration on the GPU"
timeout 150 python3 -m kiln_cli demo --rounds 6 --state-dir /tmp/kiln-demo >"$out/demo.log" 2>&1
tail -1 "$out/demo.log"
cp -r /tmp/kiln-demo/logs "$out/demo-logs" 2>/dev/null

echo "== the loop on a random 4B-shaped model"
python3 scripts/gpu/make_random_checkpoint.py --shape 4b --out /tmp/random-4b
timeout 200 python3 scripts/gpu/mismatch.py --model /tmp/random-4b 2>&1 | tee "$out/mismatch.log" | tail -11
timeout 200 python3 scripts/gpu/loop_on_random_model.py /tmp/random-4b 2>&1 | tee "$out/loop.log" | tail -30
