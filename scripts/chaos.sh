#!/usr/bin/env bash
# All faults with outages of 30 s, and an hour of everything at once; `scripts/chaos.sh 600` soaks ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export KILN_CHAOS_OUTAGE_S=30 KILN_SOAK_S="${1:-3600}"
exec .venv/bin/python -m pytest tests/chaos -s --timeout 600
