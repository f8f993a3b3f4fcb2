#!/usr/bin/env bash
# Installs what is missing into .venv and nothing outside it: `install.sh` what Kiln runs on,
# `install.sh dev` the test tools and oracles as well. Does nothing when everything is in place.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
. scripts/uv_environment.sh

have() { command -v "$1" >/dev/null 2>&1; }
say() { printf '\033[2m%s\033[0m\n' "kiln setup: $*" >&2; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "kiln setup: Python 3.11 or newer is needed; PYTHON=/path/to/python3.12 make … chooses one" >&2
  exit 1
fi

stamp_of() { cat "$@" scripts/install.sh libs/*/pyproject.toml services/*/pyproject.toml cli/pyproject.toml | sha256sum | cut -d' ' -f1; }
is_current() { [ -f ".venv/$1.stamp" ] && [ "$(cat ".venv/$1.stamp")" = "$2" ]; }

install_torch() {
  .venv/bin/python -c 'import torch' 2>/dev/null && return
  local wanted='torch>=2.11,<2.14'
  if have nvidia-smi && nvidia-smi >/dev/null 2>&1; then
    say "installing torch (CUDA build: a GPU is here)"
    .venv/bin/uv pip install --quiet --python .venv/bin/python "$wanted"
  else
    say "installing torch (CPU build: no GPU is here)"
    # The plain name would bring several GB of CUDA. Local wheels, where there are any, are tried
    # first; then the CPU builds that uv knows where to find; then the plain name after all.
    { [ -n "$UV_FIND_LINKS" ] && .venv/bin/uv pip install --quiet --python .venv/bin/python "$wanted"; } ||
      .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "$wanted" ||
      .venv/bin/uv pip install --quiet --python .venv/bin/python "$wanted"
  fi
}

if [ ! -x .venv/bin/python ]; then
  say "creating .venv"
  "$python" -m venv .venv
fi
if [ ! -x .venv/bin/uv ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
fi

runtime=$(stamp_of requirements/runtime.txt)
if ! is_current runtime "$runtime"; then
  say "installing packages"
  .venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements/runtime.txt
  install_torch
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
    $(printf -- '-e %s ' libs/* services/* cli)
  echo "$runtime" >.venv/runtime.stamp
fi

if [ "${1:-}" = dev ]; then
  dev=$(stamp_of requirements/runtime.txt requirements/dev.txt)
  if ! is_current dev "$dev"; then
    say "installing test tools"
    .venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements/dev.txt
    echo "$dev" >.venv/dev.stamp
  fi
fi
