#!/usr/bin/env bash
# The tests that touch decoding, on engines that guess ahead and have rounded weights: each kind of drafts
# and each scheme in one of two rounds. Answers do not depend on drafts and tiny models are drawn on the
# scheme's own numbers, so that what fails points at one of the two: repeat it with one option.
# `scripts/test_options.sh tests/parity` runs those paths, `-k name` those tests, in both rounds.
set -uo pipefail
cd "$(dirname "$0")/.."

# With a model in this process, or an engine around a simulated one.
short=(
  tests/integration/engine_servicer
  tests/integration/gateway/test_structured_output.py
  tests/integration/gateway/test_metrics.py
  tests/integration/jobs/test_publisher_of_students.py
  tests/integration/rpc/test_client_listener.py
  tests/integration/scale
  tests/parity/test_engine_*.py
  tests/parity/test_demo_model.py
  tests/parity/test_merges_against_peft.py
  tests/parity/test_peft_interop.py
)
# Whole systems of processes, which want the processors for themselves: those whose engines decode in ways that
# the tests above have not, answers that others end among them. Commands, pages and refusals are the same with
# any engine, and a CPU, which makes rounded weights whole for each product, would take an hour over them.
whole=(
  tests/e2e/test_seeds.py
  tests/e2e/test_cut_streams.py
  tests/e2e/test_inference_routes.py
  tests/e2e/test_swaps.py
  tests/e2e/test_training_jobs.py
  tests/e2e/test_distillation.py
  tests/e2e/test_faults.py
  tests/chaos/test_engines_and_gateways.py
  tests/chaos/test_network.py
  tests/chaos/test_stopped_services.py
)

paths=() arguments=()
for argument in "$@"; do
  if [[ -e ${argument%%::*} ]]; then paths+=("$argument"); else arguments+=("$argument"); fi
done
failed=0
run() {
  echo "== pytest $*"
  .venv/bin/python -m pytest "$@" "${arguments[@]}" || failed=1
}
for round in "--speculation mtp --quantization fp8" "--speculation ngram --quantization int4"; do
  # shellcheck disable=SC2086 # two options and their values
  if ((${#paths[@]})); then
    run $round "${paths[@]}"
  else
    run $round -n 2 --dist loadfile "${short[@]}"
    run $round "${whole[@]}"
  fi
done
exit $failed
