"""Rules n4 and tune_n4: correct a scan."""

from n4flow.worker import do_step


def main(snakemake):
    # --resources gpu=0 is the switch to the CPU
    device = snakemake.config["device"] if snakemake.resources.gpu else "cpu"
    do_step(
        "n4flow.steps.correct:correct_scan",
        snakemake.log[0],
        on_gpu=device != "cpu",
        image=snakemake.input.image,
        mask=snakemake.input.mask,
        weights=snakemake.input.get("weights"),
        files=dict(snakemake.output.items()),
        parameters=snakemake.params.settings,
        device=device,
        threads=snakemake.threads,
        keep_dtype=snakemake.params.keep_dtype,
        plane_gains=snakemake.params.plane_gains,
    )


if __name__ == "__main__":
    main(snakemake)
