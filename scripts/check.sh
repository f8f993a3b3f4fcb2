#!/usr/bin/env bash
# Every static check, each with one line; the first that fails ends it with its output.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

step() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    printf '  ok  %s\n' "$name"
  else
    printf 'FAIL  %s\n%s\n' "$name" "$output"
    exit 1
  fi
}

step "ruff check" $bin/ruff check .
step "ruff format" $bin/ruff format --check .
step "mypy" $bin/mypy libs/kiln_client/src libs/kiln_common/src libs/kiln_nn/src services/gateway/src services/engine/src services/trainer/src services/registry/src cli/src
step "import contracts" $bin/lint-imports
step "gateway, registry and cli run without torch" scripts/check_torch_free.sh
step "protobuf code is up to date" scripts/generate_protos.sh --check
step "the blocking client is up to date" $bin/python scripts/generate_sync_client.py --check
step "docs are up to date" $bin/python scripts/generate_docs.py --check
step "the built dashboard is up to date" scripts/build_dashboard.sh --check
step "compose files" $bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml deploy/compose.mps.yml deploy/compose.gpus.yml
step "Dockerfiles" $bin/hadolint deploy/docker/Dockerfile.slim deploy/docker/Dockerfile.cuda
