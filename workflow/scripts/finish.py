"""Rule finish: the root metadata of a corrected store, with which it is complete."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:finish_store",
        snakemake.log[0],
        store=snakemake.params.store,
        target=snakemake.params.target,
        sidecar=snakemake.input.sidecar,
        output=snakemake.output.root,
        pyramid_origin=snakemake.params.pyramid_origin,
    )


if __name__ == "__main__":
    main(snakemake)
