"""Rule apply: divide a scan by the field of another one."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.apply:apply_scan",
        snakemake.log[0],
        image=snakemake.input.image,
        field=snakemake.input.field,
        files=dict(snakemake.output.items()),
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    main(snakemake)
