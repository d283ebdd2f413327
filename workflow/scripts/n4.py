"""Rule n4: correct a scan."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.derivatives import correct_scan
from n4flow.parameters import N4Parameters


def main(snakemake):
    bias = snakemake.output.get("bias")
    correct_scan(
        Path(snakemake.input.image),
        Path(snakemake.input.mask),
        Path(snakemake.output.corrected),
        Path(snakemake.output.sidecar),
        Path(snakemake.output.lattice),
        Path(bias) if bias else None,
        parameters=N4Parameters.from_mapping(snakemake.params.settings),
        # --resources gpu=0 is the switch to the CPU
        device=snakemake.params.device if snakemake.resources.gpu else "cpu",
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
