"""Rule crops: an OME-Zarr image at full resolution, before and after."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.qc.crops:draw_crops",
        snakemake.log[0],
        store=snakemake.params.image,
        corrected=snakemake.params.corrected,
        plan=snakemake.input.plan,
        mask=snakemake.input.mask,
        sidecar=snakemake.input.sidecar,
        told=snakemake.input.told,
        output=snakemake.output.crops,
        channel=snakemake.params.channel,
        t=snakemake.params.t,
        pyramid_origin=snakemake.params.pyramid_origin,
    )


if __name__ == "__main__":
    main(snakemake)
