"""Rule mask: find the foreground of a scan, or adopt the mask of the sheet."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.mask:mask_scan",
        snakemake.log[0],
        image=snakemake.input.image,
        own_mask=snakemake.input.get("own"),
        found_on=snakemake.input.get("found_on"),
        output=snakemake.output.mask,
        sidecar=snakemake.output.sidecar,
        plane_gains=snakemake.params.plane_gains,
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    main(snakemake)
