"""Rule qc: the page and the metrics of a scan."""

from pathlib import Path

from n4flow.worker import do_step


def main(snakemake):
    read = {role: path for role, path in snakemake.input.items() if role != "beside"}
    do_step(
        "n4flow.qc.pages:make_subject",
        snakemake.log[0],
        name=Path(snakemake.output.metrics).stem,
        crops=snakemake.params.crops,
        **read,
        **dict(snakemake.output.items()),
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    main(snakemake)
