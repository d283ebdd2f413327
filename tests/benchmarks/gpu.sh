#!/usr/bin/env bash
# On a machine with a GPU: the gpu tests, the tables of gpu.py in Markdown, and compute-sanitizer where it is on the PATH.
# Takes less than 8 minutes. Needs envs/requirements-test.txt; for the comparison n4ax and jax[cuda12] too.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
failed=0

"$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider || failed=1
"$python" tests/benchmarks/gpu.py || failed=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        echo "compute-sanitizer, $tool:"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/benchmarks/gpu.py --small || failed=1
    done
else
    echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit"
fi
exit "$failed"
