"""The package is a stack of rooms: each imports only those above it."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from n4flow.study import provenance

#: From top to bottom: modules of the package itself, and folders.
ROOMS = ["__init__", "errors", "console", "worker", "parameters", "device"]
ROOMS += ["core", "kernels", "estimate", "images", "correction", "study", "steps", "qc", "cli"]


def room_of(module):
    return module.partition(".")[0]


def imports_of(path):
    """Modules of the package that one of them imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "n4flow":
            base = (node.module or "").partition(".")[2]
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & set(MODULES)
            yield from inner or {base or "__init__"}
        elif isinstance(node, ast.Import):
            yield from (n.name.partition(".")[2] for n in node.names if n.name.startswith("n4flow."))


def name_of(path):
    parts = path.relative_to(provenance.PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in provenance.PACKAGE.rglob("*.py")}


def test_every_module_lies_in_a_room():
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_rooms_above_it(module):
    below = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    assert [used for used in imports_of(MODULES[module]) if room_of(used) in below] == []


def test_modules_import_each_other_in_one_direction():
    """Within a room, too: a module that another one stands on does not import it in turn."""
    sorter = graphlib.TopologicalSorter(
        {module: set(imports_of(path)) & set(MODULES) for module, path in MODULES.items()}
    )
    sorter.prepare()


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room_of(module) in ("core", "kernels")))
def test_the_core_touches_no_files(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (nibabel|json|gzip|csv)\b", text, re.MULTILINE)


#: What the workflow itself may import.
FOR_THE_WORKFLOW = ["console", "worker", "errors", "parameters", "images.files", "images.ngff", "images.remote"]
FOR_THE_WORKFLOW += [
    f"study.{name}"
    for name in ("bids", "config", "failures", "outputs", "progress", "provenance", "ratings", "sheet", "stores")
]


def test_the_workflow_itself_needs_no_numeric_library(pytestconfig):
    """With conda environments, Snakemake's own holds none of them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('numpy', 'nibabel', 'isal', 'SimpleITK', 'threadpoolctl'): sys.modules[name] = None\n"
        f"import {', '.join(f'n4flow.{name}' for name in FOR_THE_WORKFLOW)}\n"
    )
    subprocess.run([sys.executable, "-c", code, pytestconfig.rootpath / "workflow" / "scripts"], check=True)


@pytest.mark.parametrize("name", ["words.smk", "common.smk", "run.smk", "inputs.smk"])
def test_the_workflow_itself_imports_only_what_was_tried_above(pytestconfig, name):
    text = (pytestconfig.rootpath / "workflow" / "rules" / name).read_text(encoding="utf-8")
    top_level = {line.split()[1] for line in text.splitlines() if line.startswith("from n4flow")}
    assert top_level <= {f"n4flow.{module}" for module in FOR_THE_WORKFLOW}


LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def documents(root):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not in a git checkout")
    return {name: root / name for name in listed if name.endswith(".md")}, set(listed)


def anchors_of(document):
    """What GitHub makes of the headings of a document."""
    without_code = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_leads_to_a_file_of_the_repository_and_to_a_heading(pytestconfig):
    root = pytestconfig.rootpath
    found, listed = documents(root)
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    broken, links = [], 0
    for name, document in found.items():
        for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
            links += 1
            path = document.parent.joinpath(target).resolve() if target else document
            within = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
            if within not in listed | folders or (anchor and anchor not in anchors_of(path)):
                broken.append(f"{name}: {target}#{anchor}")
    assert broken == []
    assert links > 50


def test_the_tissue_maps_are_in_the_repository(pytestconfig):
    listed = documents(pytestconfig.rootpath)[1]
    assert "workflow/resources/mni152/tissues_2mm.nii.gz.base64" in listed
