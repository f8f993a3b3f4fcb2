#!/usr/bin/env bash
# Installs gateway, registry and cli with exactly their declared dependencies into an environment of
# their own, and imports every module of theirs there. Torch must be neither installed nor imported.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/uv_environment.sh
environment=.venv-torch-free
[ -x $environment/bin/python ] || .venv/bin/uv venv --quiet --python .venv/bin/python $environment
.venv/bin/uv pip install --quiet --python $environment/bin/python -c requirements/runtime.txt \
  -e libs/kiln_client -e libs/kiln_common -e services/gateway -e services/registry -e cli
$environment/bin/python - <<'PY'
import importlib, importlib.metadata, importlib.util, pkgutil, sys

assert importlib.util.find_spec("torch") is None, "torch came in as a dependency"
count = 0
for name in ("kiln", "kiln_common", "kiln_gateway", "kiln_registry", "kiln_cli"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
assert "torch" not in sys.modules
print(f"imported {count} modules without torch")
PY
