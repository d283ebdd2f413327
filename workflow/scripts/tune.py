"""Rule tune: corrections with different settings on one page."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.tune import TunedScan, make_comparison
from n4flow.steps.derivatives import CorrectionFiles


def main(snakemake):
    inputs, params = snakemake.input, snakemake.params
    references = dict(zip(params.referenced, map(Path, inputs.get("references", [])), strict=True))
    written = map(CorrectionFiles, *(map(Path, inputs[role]) for role in ("corrected", "sidecars", "fields")))
    scans = [
        TunedScan(name, Path(image), Path(mask), references.get(name), [next(written) for _ in params.combinations])
        for name, image, mask in zip(params.scans, inputs.images, inputs.masks, strict=True)
    ]
    make_comparison(
        scans,
        params.combinations,
        Path(snakemake.output.page),
        settings=params.settings,
        field_window_log=params.field_window_log,
        flags=params.flags,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
