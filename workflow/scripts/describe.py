"""Rule describe: the sidecar of a corrected store."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:describe_store",
        snakemake.log[0],
        store=snakemake.params.store,
        parts=list(snakemake.input.parts),
        output=snakemake.output.sidecar,
        channels=snakemake.params.channels,
        fields=list(snakemake.input.fields),
        coarse=list(snakemake.input.coarse),
        masks=list(snakemake.input.masks),
        pyramid_origin=snakemake.params.pyramid_origin,
        notes=snakemake.params.notes,
    )


if __name__ == "__main__":
    main(snakemake)
