"""Rule qc: the page and the metrics of a scan, from its batch or made now."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.batches import clear, take


def main(snakemake):
    from n4flow.qc.pages import make_subject

    reference = {
        role: Path(snakemake.input[role])
        for role in ("reference_field", "reference_sidecar")
        if snakemake.input.get(role)
    }
    make_subject(
        name=Path(snakemake.output.metrics).stem,
        image=Path(snakemake.input.image),
        mask=Path(snakemake.input.mask),
        corrected=Path(snakemake.input.corrected),
        field=Path(snakemake.input.field),
        sidecar=Path(snakemake.input.sidecar),
        page=Path(snakemake.output.page),
        metrics=Path(snakemake.output.metrics),
        pictures=Path(snakemake.output.pictures),
        viewer=snakemake.output.get("viewer"),
        **reference,
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    job = snakemake  # noqa: F821
    pages, given = job.input.get("pages"), [job.input.mask, job.input.sidecar]
    if not take(pages, "qc", dict(job.params.items()), job.output, job.log[0], given, job.resources.attempt):
        with reporting(job.log[0]):
            main(job)
    # the last job of a scan
    for folder in (pages, job.input.get("fields")):
        clear(folder)
