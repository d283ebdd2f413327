"""Rule plan: the arrays of a corrected store."""

from n4flow.worker import do_step


def main(snakemake):
    do_step(
        "n4flow.steps.pyramid:plan_store",
        snakemake.log[0],
        store=snakemake.params.store,
        target=snakemake.params.target,
        output=snakemake.output.plan,
        **snakemake.params.settings,
    )


if __name__ == "__main__":
    main(snakemake)
