"""The package is a stack of rooms: each imports only those above it."""

import ast
import re
import subprocess
import sys

import pytest

from n4flow import provenance

ROOMS = [
    "__init__", "errors", "files", "console", "parameters", "device", "affine", "bspline", "fit", "sharpening", "field",
    "samples", "kernels.protocol", "kernels.plain", "kernels.instructions", "kernels.compiled", "kernels.cuda",
    "kernels", "quadrature", "estimate", "volume", "bids", "inputs", "ratings", "provenance", "manifest", "batches",
    "mask", "correction", "derivatives", "reference", "phantom", "metrics", "qc", "qc.rendering", "qc.definitions",
    "qc.multiqc", "qc.panels", "qc.viewer", "qc.pages", "qc.dataset", "qc.figures", "qc.guide", "qc.tune",
]  # fmt: skip


def name_of(path):
    parts = path.relative_to(provenance.PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "n4flow":
            base = (node.module or "").partition(".")[2]
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & set(ROOMS)
            yield from inner or {base or "__init__"}


MODULES = {name_of(path): path for path in provenance.PACKAGE.rglob("*.py")}


def test_every_module_is_a_room():
    assert set(MODULES) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    assert {used for used in imports_of(MODULES[room]) if ROOMS.index(used) >= ROOMS.index(room)} == set()


def test_the_workflow_itself_needs_no_numeric_library(pytestconfig):
    """With conda environments, Snakemake's own holds none of them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('numpy', 'nibabel', 'isal', 'SimpleITK', 'threadpoolctl'): sys.modules[name] = None\n"
        "import n4flow.bids, n4flow.console, n4flow.errors, n4flow.inputs, n4flow.provenance, n4flow.files\n"
        "import n4flow.ratings, n4flow.batches, n4flow.parameters\n"
    )
    subprocess.run([sys.executable, "-c", code, pytestconfig.rootpath / "workflow" / "scripts"], check=True)


def test_common_smk_imports_only_what_was_tried_above(pytestconfig):
    text = (pytestconfig.rootpath / "workflow" / "rules" / "common.smk").read_text(encoding="utf-8")
    top_level = {line.split()[1] for line in text.splitlines() if line.startswith("from n4flow")}
    assert top_level <= {
        f"n4flow.{name}"
        for name in ("batches", "bids", "console", "errors", "inputs", "parameters", "provenance", "files", "ratings")
    }


def test_every_file_that_the_documents_link_to_is_in_the_repository(pytestconfig):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not in a git checkout")
    for document in ("README.md", "config/README.md", "docs/cluster.md"):
        text = (pytestconfig.rootpath / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            path = (pytestconfig.rootpath / document).parent.joinpath(target).resolve()
            assert path.relative_to(pytestconfig.rootpath).as_posix() in listed
    assert "workflow/resources/mni152/tissues_2mm.nii.gz.base64" in listed
