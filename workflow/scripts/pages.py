"""Rules pages_*: pages and metrics of several scans."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.batches import BatchScan, place, run_batch


def batch_scan(entry, folder, snakemake):
    """What is to be done for a scan; outputs of this batch and of the one before stand in the entry by role."""
    settings = snakemake.params.settings
    # from the batch before, if its files still lie there
    given = {role: place(entry["fields"], path) for role, path in entry["given"].items()}
    given = {role: path if path.is_file() else Path(entry["given"][role]) for role, path in given.items()}
    made = {role: place(folder, path) for role, path in entry["outputs"].items()}

    def draw():
        from n4flow.qc.pages import make_subject

        for path in made.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        make_subject(name=folder.name, image=Path(entry["image"]), **given, **made, **settings["settings"])

    return BatchScan(
        folder,
        {"qc": settings},
        [],
        {"qc": draw} if all(path.is_file() for path in given.values()) else {},
        between=[(entry["given"][role], given[role]) for role in ("mask", "sidecar")],
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
