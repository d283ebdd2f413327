"""Rule dataset: dataset_description.json and .bidsignore."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.bids import describe_dataset


def main(snakemake):
    describe_dataset(snakemake.input.sources, Path(snakemake.output.description), Path(snakemake.output.bidsignore))


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
