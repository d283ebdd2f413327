"""Rule mask: the mask of a scan, from its batch or made now."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.batches import take


def main(snakemake):
    from n4flow.steps.mask import mask_scan

    own = snakemake.input.get("own")
    mask_scan(
        Path(snakemake.input.image),
        Path(own) if own else None,
        Path(snakemake.output.mask),
        Path(snakemake.output.sidecar),
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    job = snakemake  # noqa: F821
    if not take(
        job.input.get("batch"), "mask", dict(job.params.items()), job.output, job.log[0], attempt=job.resources.attempt
    ):
        with reporting(job.log[0]):
            main(job)
