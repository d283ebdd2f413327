"""Rules fields_*: masks and corrections of several scans."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.batches import BatchScan, place, run_batch


def batch_scan(entry, folder, snakemake):
    """What is to be done for a scan; its outputs stand in the entry under the names of the rules' own."""
    params = snakemake.params
    made = {role: place(folder, path) for role, path in entry["outputs"].items()}

    def make_mask():
        from n4flow.steps.mask import mask_scan

        for path in made.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        own = Path(entry["mask"]) if entry["mask"] else None
        mask_scan(Path(entry["image"]), own, made["mask"], made["mask_sidecar"], **params.settings["mask"]["settings"])

    def correct():
        from n4flow.parameters import N4Parameters
        from n4flow.steps.correct import correct_scan
        from n4flow.steps.derivatives import CorrectionFiles

        settings = params.settings["n4"]
        correct_scan(
            Path(entry["image"]),
            made["mask"],
            CorrectionFiles(*(made.get(role) for role in ("corrected", "sidecar", "field", "bias"))),
            parameters=N4Parameters.from_mapping(settings["settings"]),
            device=snakemake.config["device"] if snakemake.resources.gpu else "cpu",
            threads=snakemake.threads,
            keep_dtype=settings["keep_dtype"],
        )

    steps = {"mask": make_mask} | ({"n4": correct} if "corrected" in made else {})
    return BatchScan(
        folder,
        {key: part for key, part in params.settings.items() if key == "mask" or "n4" in steps},
        [path for path in (entry["image"], entry["mask"]) if path],
        steps,
        between=[(entry["outputs"]["mask"], made["mask"])],
    )


def main(snakemake):
    scans = [
        batch_scan(entry, Path(folder), snakemake)
        for entry, folder in zip(snakemake.params.scans, snakemake.output, strict=True)
    ]
    run_batch(scans, snakemake.resources.attempt)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
