#!/usr/bin/env bash
# On a machine with a GPU: the gpu tests, then what GPU and CPU need for the same estimate.
# Prints a Markdown table; takes a few minutes. Needs envs/requirements-test.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
"$python" -m pytest -m gpu tests/gpu -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --error-exitcode 1 "$python" -m pytest -m gpu tests/gpu -k "odd_shapes" -p no:cacheprovider
fi
"$python" tests/benchmarks/gpu.py
