"""Rule reference: correct a scan with SimpleITK at its defaults."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.reference:reference_scan",
        snakemake.log[0],
        image=snakemake.input.image,
        mask=snakemake.input.mask,
        files=dict(snakemake.output.items()),
        keep_dtype=snakemake.params.keep_dtype,
        plane_gains=snakemake.params.plane_gains,
    )


if __name__ == "__main__":
    main(snakemake)
