"""Compare results with the manifest of another run, or of another machine: `n4flow verify`, where it is not installed.

python workflow/scripts/verify.py results /from/elsewhere/manifest.json
"""

import sys

from n4flow.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
