"""Rule qc: the page and the metrics of a scan."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.pages import make_subject


def main(snakemake):
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
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
