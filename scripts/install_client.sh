#!/usr/bin/env bash
# Installs one API client for the conformance tests into .venv-clients/NAME: real clients do not
# resolve together. Does nothing when it is in place. `install_client.sh anthropic`
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/uv_environment.sh
name=$1
folder=.venv-clients/$name
wanted=$(sha256sum <"requirements/clients/$name.txt" | cut -d' ' -f1)
[ -f "$folder/stamp" ] && [ "$(cat "$folder/stamp")" = "$wanted" ] && exit
.venv/bin/uv venv --quiet --clear --python .venv/bin/python "$folder"
.venv/bin/uv pip install --quiet --python "$folder/bin/python" -r "requirements/clients/$name.txt"
echo "$wanted" >"$folder/stamp"
