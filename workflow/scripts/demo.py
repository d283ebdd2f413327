"""Rule demo: write the built-in dataset."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.steps.demo import demo_dataset


def main(snakemake):
    demo_dataset(Path(snakemake.input.tissues), Path(snakemake.output.description).parent)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
