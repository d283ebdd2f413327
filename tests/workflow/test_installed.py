"""The command n4flow as people install it: from a wheel, in an environment of its own, far from the clone."""

import json
import subprocess

from study import (
    environment_over_this,
    head,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

import n4flow
from n4flow.study.provenance import package_digest

#: What somebody else may have installed under the same name.
ANOTHER = {
    "__init__.py": "__version__ = '99'\n",
    "worker.py": "def do_step(*_, **__):\n    raise SystemExit('another n4flow does the step')\n",
}


def test_the_workflow_has_its_own_copy_where_another_n4flow_is_installed(tmp_path):
    """Snakemake appends to the path of a script: a package that is installed would come first."""
    python, packages = environment_over_this(tmp_path / "env")
    (packages / "n4flow").mkdir()
    for name, text in ANOTHER.items():
        (packages / "n4flow" / name).write_text(text)
    there = [python, "-c", "import n4flow; print(n4flow.__version__)"]
    assert subprocess.run(there, capture_output=True, text=True, check=True).stdout == "99\n"
    scan = raw_scan("01")
    save(tmp_path / scan.image, head())
    write_sheet(tmp_path / "config/samples.tsv", [scan])
    write_config(tmp_path, {"device": "cpu"})
    made = results_of(scan)
    done = snakemake(tmp_path, made["corrected"], "dataset", "--cores", 2, python=python)
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / made["sidecar"]).read_text())["Provenance"]
    assert (facts["n4flow"], facts["PackageDigest"]) == (n4flow.__version__, package_digest())
