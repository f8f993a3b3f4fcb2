#!/usr/bin/env bash
# Pins every third-party package for all supported Pythons, without recording where they come from.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/uv_environment.sh
lock() {
  .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
    --no-emit-find-links --no-header --no-annotate --override requirements/overrides.txt "$@"
}
lock libs/*/pyproject.toml services/*/pyproject.toml cli/pyproject.toml --output-file requirements/runtime.txt
lock requirements/dev.in --output-file requirements/dev.txt
for client in requirements/clients/*.in; do
  lock "$client" --output-file "${client%.in}.txt"
done
