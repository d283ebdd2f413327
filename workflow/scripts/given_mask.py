"""Rule given_mask: the mask of the sheet on the grid of a coarse volume."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:place_mask",
        snakemake.log[0],
        image=snakemake.input.image,
        mask=snakemake.params.mask,
        output=snakemake.output.mask,
        pyramid_origin=snakemake.params.pyramid_origin,
        t=snakemake.params.t,
    )


if __name__ == "__main__":
    main(snakemake)
