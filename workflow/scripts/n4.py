"""Rules n4 and tune_n4: correct a scan, or take its correction from its batch."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.batches import take


def main(snakemake):
    from n4flow.parameters import N4Parameters
    from n4flow.steps.correct import correct_scan
    from n4flow.steps.derivatives import CorrectionFiles

    correct_scan(
        Path(snakemake.input.image),
        Path(snakemake.input.mask),
        CorrectionFiles(**{role: Path(path) for role, path in snakemake.output.items()}),
        parameters=N4Parameters.from_mapping(snakemake.params.settings),
        # --resources gpu=0 is the switch to the CPU
        device=snakemake.config["device"] if snakemake.resources.gpu else "cpu",
        threads=snakemake.threads,
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    job = snakemake  # noqa: F821
    settings, given, attempt = dict(job.params.items()), [job.input.mask], job.resources.get("attempt", 1)
    if not take(job.input.get("batch"), "n4", settings, job.output, job.log[0], given, attempt):
        with reporting(job.log[0]):
            main(job)
