"""Rule dataset: dataset_description.json and .bidsignore."""

from pathlib import Path

from n4flow.bids import describe_dataset
from n4flow.console import reporting


def main(snakemake):
    describe_dataset(snakemake.input.images, Path(snakemake.output.description), Path(snakemake.output.bidsignore))


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
