#!/usr/bin/env bash
# Runs small launches of every Triton kernel under compute-sanitizer, with the python on PATH:
#   OUT=/tmp/out scripts/gpu/sanitize.sh [memcheck racecheck …]
# Triton's interpreter finds out, without the GPU, which tests launch which kernel (COVERAGE names the
# answers of an earlier run); for each kernel the quickest of them run on the GPU, once to compile and
# then under the sanitizer, every allocation by itself, so that a byte out of bounds is seen.
# Exit status: 1 if the sanitizer or a test found something, or no test launches a kernel.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-/tmp/kiln-sanitize}
mkdir -p "$out"
for folder in libs/*/src services/*/src cli/src .; do PYTHONPATH="$PWD/$folder:${PYTHONPATH:-}"; done
export PYTHONPATH PYTHONUNBUFFERED=1
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 2; }
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck)
pytest=(python3 -m pytest -q -p no:cacheprovider)
failed=0

if [ -z "${COVERAGE:-}" ]; then
  for file in $(grep -lE 'on_triton|run_under_interpreter' tests/kernels/test_*.py); do
    name=$(basename "$file" .py)
    TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 KILN_KERNEL_COVERAGE=$out/$name.coverage.json \
      "${pytest[@]}" -p scripts.gpu.kernel_coverage "$file" >"$out/$name.log" 2>&1 &
  done
  wait
  COVERAGE=$(echo "$out"/*.coverage.json)
fi
# Some cases exist in the interpreter alone.
"${pytest[@]}" --collect-only tests/kernels >"$out/collected.txt"
# shellcheck disable=SC2086
python3 scripts/gpu/kernel_coverage.py --among "$out/collected.txt" $COVERAGE >"$out/chosen.txt" || failed=1
mapfile -t chosen <"$out/chosen.txt"
echo "${#chosen[@]} tests launch every kernel that any test launches"
"${pytest[@]}" --durations=5 "${chosen[@]}" >"$out/compile.log" 2>&1
tail -1 "$out/compile.log"

for tool in "${tools[@]}"; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${LIMIT:-900}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "${pytest[@]}" "${chosen[@]}" >"$out/$tool.log" 2>&1
  code=$?
  found=$(grep -E '^=+ (ERROR|RACECHECK) SUMMARY' "$out/$tool.log" | tail -1)
  echo "$tool: exit $code; $found; $(grep -E ' (passed|failed|errors?)' "$out/$tool.log" | tail -1)"
  [ $code -eq 0 ] || failed=1
done
exit $failed
