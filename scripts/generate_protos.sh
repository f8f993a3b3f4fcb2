#!/usr/bin/env bash
# Writes the committed protobuf code into libs/kiln_common/src/kiln_common/pb, or with --check says
# whether it is up to date. The generator has its own environment, pinned below the runtimes we
# support: generated code refuses a protobuf runtime older than its generator.
set -euo pipefail
cd "$(dirname "$0")/.."
generator=.venv-protos
target=libs/kiln_common/src/kiln_common/pb
if [ ! -x "$generator/bin/python" ]; then
  python3 -m venv "$generator"
  "$generator/bin/pip" install --quiet 'grpcio-tools==1.71.2' 'setuptools<81'
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$generator/bin/python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/kiln/v1/*.proto
sed -i 's/^from kiln\.v1 import /from kiln_common.pb import /' "$out"/kiln/v1/*.py "$out"/kiln/v1/*.pyi
echo '"""Generated from protos/kiln/v1 by scripts/generate_protos.sh; do not edit."""' >"$out/kiln/v1/__init__.py"
if [ "${1:-}" = "--check" ]; then
  diff -r -x __pycache__ "$out/kiln/v1" "$target" || {
    echo "generated protobuf code is out of date: run scripts/generate_protos.sh" >&2
    exit 1
  }
else
  mkdir -p "$target"
  cp "$out"/kiln/v1/* "$target/"
fi
