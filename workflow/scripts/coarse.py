"""Rule coarse: one level of a channel of an OME-Zarr image, as NIfTI."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:coarse_scan",
        snakemake.log[0],
        store=snakemake.params.store,
        output=snakemake.output.image,
        sidecar=snakemake.output.sidecar,
        channel=snakemake.params.channel,
        t=snakemake.params.t,
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    main(snakemake)
