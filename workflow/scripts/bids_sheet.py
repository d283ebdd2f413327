"""Turn a BIDS folder into a sample sheet: `n4flow sheet`, where it is not installed.

python workflow/scripts/bids_sheet.py /data/study --suffix T1w FLAIR --output config/study.tsv
"""

import sys

from n4flow.cli import main

if __name__ == "__main__":
    main(["sheet", *sys.argv[1:]])
