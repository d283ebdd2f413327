"""Rule divide: a part of a level divided by the fields of its channels."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:divide_part",
        snakemake.log[0],
        store=snakemake.params.store,
        target=snakemake.params.target,
        plan=snakemake.input.plan,
        output=snakemake.output.marker,
        channels=snakemake.params.channels,
        fields=list(snakemake.input.fields),
        coarse=list(snakemake.input.coarse),
        level=int(snakemake.wildcards.level),
        part=int(snakemake.wildcards.part),
        keep_saturated=snakemake.params.saturated == "keep",
        pyramid_origin=snakemake.params.pyramid_origin,
        threads=snakemake.threads,
    )


if __name__ == "__main__":
    main(snakemake)
