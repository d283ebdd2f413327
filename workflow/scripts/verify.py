"""Compare results with the manifest of another run, or of another machine.

python workflow/scripts/verify.py results /from/elsewhere/manifest.json
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

from n4flow.device import available_cores
from n4flow.errors import InputError
from n4flow.study.manifest import CLOSE, DIFFERENT, EQUAL, verify


def main(arguments=None):
    """Print a line per scan; end with 1 if any is different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the folder of results to check")
    parser.add_argument("manifest", type=Path, help="manifest.json of the other run, or its folder of results")
    given = parser.parse_args(arguments)
    try:
        verdicts = verify(given.results, given.manifest, threads=available_cores())
    except InputError as error:
        sys.exit(f"n4flow: {error}")
    table = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    table.writerow(["scan", "verdict", "reason"])
    table.writerows(verdicts)
    counts = Counter(verdict.verdict for verdict in verdicts if verdict.scan != "dataset")
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in (EQUAL, CLOSE, DIFFERENT)), file=sys.stderr)
    sys.exit(any(verdict.verdict == DIFFERENT for verdict in verdicts))


if __name__ == "__main__":
    main()
