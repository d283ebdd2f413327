"""Turn a BIDS folder into a sample sheet.

python workflow/scripts/bids_sheet.py /data/study --suffix T1w FLAIR --output config/study.tsv
"""

import argparse
import csv
import io
import logging
import sys
from pathlib import Path

from n4flow.errors import InputError
from n4flow.images.files import atomic_text
from n4flow.study.bids import DATATYPE_OF, index_dataset

COLUMNS = ["subject", "session", "image", "mask", "modality"]

#: Written where a scan has something there.
FURTHER_COLUMNS = ["mask_image"]


ONE_FIELD = (
    "One field for several contrasts or echoes: add a column field_from, and name there the modality of the scan whose "
    "field they take, such as echo-1_MEGRE (config/README.md)."
)


def sheet_of(scans):
    """The sheet as text."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    columns = COLUMNS + [column for column in FURTHER_COLUMNS if any(getattr(scan, column) for scan in scans)]
    writer.writerow(columns)
    writer.writerows([getattr(scan, column) for column in columns] for scan in scans)
    return text.getvalue()


def main(arguments=None):
    """Index the folder and write the sheet to a file or to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=ONE_FIELD)
    parser.add_argument("folder", type=Path, help="the BIDS dataset: the folder that holds sub-*")
    parser.add_argument(
        "--suffix", nargs="+", default=["T1w"], metavar="SUFFIX", help=f"which scans: {' '.join(DATATYPE_OF)}"
    )
    parser.add_argument("--participant", nargs="+", default=[], metavar="LABEL", help="these alone, such as 01 02")
    parser.add_argument("--session", nargs="+", default=[], metavar="LABEL", help="these alone, such as baseline")
    parser.add_argument(
        "--entity",
        nargs="+",
        default=[],
        metavar="ENTITY",
        help="what names must hold, such as acq-mprage run-1 run-2: one of those with the same key",
    )
    parser.add_argument("--output", type=Path, help="the sheet to write; standard output by default")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="n4flow: %(message)s")
    try:
        scans = index_dataset(
            given.folder,
            given.suffix,
            participants=given.participant,
            sessions=given.session,
            entities=given.entity,
        )
    except InputError as error:
        sys.exit(f"n4flow: {error}")
    except OSError as error:
        sys.exit(f"n4flow: {error.filename}: cannot be read ({error.strerror}); check its permissions")
    if not given.output:
        sys.stdout.write(sheet_of(scans))
        return
    try:
        with atomic_text(given.output) as file:
            file.write(sheet_of(scans))
    except InputError as error:
        sys.exit(f"n4flow: {error}")
    if any("echo-2" in scan.entities.split("_") for scan in scans):
        print(f"Each echo gets a field of its own, which changes their ratios. {ONE_FIELD}", file=sys.stderr)
    print(f"{len(scans)} scans; next: snakemake --cores 8 --config samples={given.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
