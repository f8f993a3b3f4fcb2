"""Generated from protos/kiln/v1 by scripts/generate_protos.sh; do not edit."""
