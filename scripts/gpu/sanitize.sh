#!/usr/bin/env bash
# Runs small launches of every Triton kernel under compute-sanitizer, with the python on PATH. The GPU
# tests run once without it, which compiles and shows who launches what; then for each kernel the
# quickest of them run again with every allocation by itself, so that a byte out of bounds is seen.
#   OUT=/tmp/out PYTHONPATH=… scripts/gpu/sanitize.sh [memcheck racecheck …]
# TESTS names the test files. Exit status: 1 if the sanitizer found something or a kernel was missed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-/tmp/kiln-sanitize}
mkdir -p "$out"
for folder in libs/*/src services/*/src cli/src .; do PYTHONPATH="$PWD/$folder:${PYTHONPATH:-}"; done
export PYTHONPATH PYTHONUNBUFFERED=1
tests=${TESTS:-tests/kernels/test_triton_*.py}
read -ra tools <<<"${*:-memcheck}"
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 2; }
pytest=(python3 -m pytest -q -m gpu -p no:cacheprovider)

failed=0
# shellcheck disable=SC2086
KILN_KERNEL_COVERAGE=$out/coverage.json "${pytest[@]}" -p scripts.gpu.kernel_coverage $tests >"$out/tests.log" 2>&1
tail -1 "$out/tests.log"
python3 scripts/gpu/kernel_coverage.py "$out/coverage.json" >"$out/chosen.txt" 2>"$out/missing.txt" || failed=1
cat "$out/missing.txt"
mapfile -t chosen <"$out/chosen.txt"
echo "${#chosen[@]} tests launch every kernel that any test launches"
for tool in "${tools[@]}"; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${LIMIT:-600}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "${pytest[@]}" "${chosen[@]}" >"$out/$tool.log" 2>&1
  code=$?
  echo "$tool: exit $code; $(grep -E '^=+ (ERROR|RACECHECK) SUMMARY' "$out/$tool.log" | tail -1); $(grep -E '(passed|failed|error)' "$out/$tool.log" | tail -1)"
  [ $code -eq 0 ] || failed=1
done
exit $failed
