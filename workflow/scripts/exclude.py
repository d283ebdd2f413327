"""Rule exclude: the scans that a reviewer failed, and how raters agree."""

import json
from pathlib import Path

from n4flow.console import reporting
from n4flow.study.ratings import write_exclusions


def main(snakemake):
    metrics = [json.loads(Path(path).read_text(encoding="utf-8")) for path in snakemake.input.metrics]
    hashes = {values["name"]: values.get("report_hash") for values in metrics}
    write_exclusions(Path(snakemake.input.ratings), hashes, **snakemake.output)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
