#!/usr/bin/env bash
# Installs one API client for the conformance tests, or trl for benchmarks/against_trl, into
# .venv-clients/NAME: they do not resolve together. Does nothing when it is in place.
# `install_client.sh anthropic`
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/uv_environment.sh
name=$1
folder=.venv-clients/$name
wanted=$(sha256sum <"requirements/clients/$name.txt" | cut -d' ' -f1)
[ -f "$folder/stamp" ] && [ "$(cat "$folder/stamp")" = "$wanted" ] && exit
.venv/bin/uv venv --quiet --clear --python .venv/bin/python "$folder"
# The lists are whole but for torch, which comes as the build that fits the machine: trl finds the
# project's own, behind its own packages.
.venv/bin/uv pip install --quiet --no-deps --python "$folder/bin/python" -r "requirements/clients/$name.txt"
if [ "$name" = trl ]; then
  packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  .venv/bin/python -c "$packages" >"$("$folder/bin/python" -c "$packages")/behind.pth"
fi
echo "$wanted" >"$folder/stamp"
