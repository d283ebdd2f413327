"""Rule mask: write the mask of a scan."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.mask import mask_scan


def main(snakemake):
    own = snakemake.input.get("own")
    mask_scan(
        Path(snakemake.input.image),
        Path(own) if own else None,
        Path(snakemake.output.mask),
        Path(snakemake.output.sidecar),
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
