"""The command n4flow as people install it: from a wheel, in an environment of its own, far from the clone."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from study import (
    AFFINE,
    ROOT,
    describe_raw,
    environment_over_this,
    head,
    load,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

import n4flow
from n4flow.images.fields import load_field
from n4flow.study.provenance import package_digest

#: What somebody else may have installed under the same name.
ANOTHER = {
    "__init__.py": "__version__ = '99'\n",
    "worker.py": "def do_step(*_, **__):\n    raise SystemExit('another n4flow does the step')\n",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of the commands of an environment with the wheel, whose dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    # hatchling is one of the packages of the tests: nothing is fetched
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    python, packages = environment_over_this(folder / "env")
    subprocess.run([*pip, "--python", python, "install", *offline, *folder.glob("*.whl")], check=True)
    assert (packages / "n4flow" / "cli.py").is_file()
    return python.parent


def run(installed, folder, command):
    """Type a command in a folder, in a shell; what it says on the terminal is in ``stdout``."""
    places = [installed, Path(sys.executable).parent, os.environ["PATH"]]
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(map(str, places))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_there_is_one_version(installed):
    (found,) = importlib.metadata.distributions(
        name="n4flow", path=[str(*installed.parent.glob("lib/*/site-packages"))]
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found.version == n4flow.__version__ == citation["version"]
    assert run(installed, "/", "n4flow --version").stdout == f"n4flow {n4flow.__version__}\n"


def test_the_wheel_holds_the_package_and_the_workflow_and_no_leftovers(installed):
    (packages,) = installed.parent.glob("lib/*/site-packages")
    listed = (ROOT / "workflow/scripts/n4flow/files.txt").read_text().split()
    for place in ("n4flow", "n4flow_workflow/workflow/scripts/n4flow"):
        assert [name for name in listed if not (packages / place / name).is_file()] == []
    places = ["workflow", "profiles", "envs/*.yaml", "config/*.yaml", "config/*.tsv", "Snakefile"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *places]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    there = {
        path.relative_to(packages / "n4flow_workflow").as_posix()
        for path in (packages / "n4flow_workflow").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if not tracked:
        pytest.skip("not in a git checkout")
    assert there == set(tracked)


# ---------------------------------------------------------------- the recipes of the manual, as they stand there


def recipe(title):
    """The commands below a heading of the manual."""
    manual = (ROOT / "config/README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]
    (section,) = re.findall(rf"^### {re.escape(title)}\n(.*?)(?=^### |\Z)", manual, re.DOTALL | re.MULTILINE)
    (commands,) = re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return commands


def test_every_recipe_is_run_here():
    manual = (ROOT / "config/README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]
    here = Path(__file__).read_text(encoding="utf-8")
    titles = re.findall(r"^### (.*)\n\n```bash", manual, re.MULTILINE)
    assert len(titles) == 5
    assert [title for title in titles if f'recipe("{title}")' not in here] == []


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    """A folder with a head at 2 mm, a mask of it, two coarser echoes, and what SimpleITK makes of the head."""
    folder = tmp_path_factory.mktemp("one")
    values = head((80, 88, 72))
    fine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    inside = values > 200
    save(folder / "head.nii.gz", values, affine=fine)
    save(folder / "brain.nii.gz", inside, affine=fine, dtype=np.uint8)
    save(folder / "echo-1.nii.gz", values, affine=fine)
    for number in (2, 3):
        save(folder / f"echo-{number}.nii.gz", 0.8**number * values[::2, ::2, ::2])
    image, mask = (sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("head", "brain"))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.Execute(sitk.Shrink(image, [4] * 3), sitk.Cast(sitk.Shrink(mask, [4] * 3), sitk.sitkUInt8))
    old = image / sitk.Exp(n4.GetLogBiasFieldAsImage(image))
    sitk.WriteImage(old, str(folder / "old.nii.gz"))
    return folder


def test_recipe_of_one_file(installed, one_head):
    done = run(installed, one_head, recipe("One file"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("n4flow: done in ")
    original, corrected, field = (load(one_head / f"{name}.nii.gz") for name in ("head", "corrected", "field"))
    assert np.allclose(corrected * field, original, rtol=1e-5)
    assert load_field(one_head / "field.json").image_shape == original.shape
    assert json.loads((one_head / "corrected.json").read_text())["Sources"] == ["head.nii.gz"]
    assert "<h1>head</h1>" in (one_head / "page.html").read_text()


def test_recipe_of_echoes_keeps_their_ratios(installed, one_head):
    done = run(installed, one_head, recipe("Echoes, or contrasts that share a field"))
    assert done.returncode == 0, done.stdout
    raw, divided = ([load(one_head / f"echo-{n}{end}.nii.gz") for n in (2, 3)] for end in ("", "_N4"))
    assert np.allclose(divided[1] / divided[0], raw[1] / raw[0], rtol=1e-6)
    first = load(one_head / "echo-1_N4.nii.gz") / load(one_head / "echo-1.nii.gz")
    assert np.allclose(divided[0] / raw[0], first[::2, ::2, ::2], rtol=1e-5), "where they lie in the same place"


def test_recipe_of_a_comparison_finds_the_method_that_is_the_same(installed, one_head):
    done = run(installed, one_head, recipe("Comparing with my old pipeline"))
    assert done.returncode == 0, done.stdout
    same, ours = (float(found) for found in re.findall(r": log fields differ by (\S+) \(rms\)", done.stdout))
    assert same < 0.01 < ours, "SimpleITK stretches its spline over the image, and takes other voxels of every 4"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A BIDS folder of a subject with two contrasts, and of one that comes later."""
    folder = tmp_path_factory.mktemp("study")
    describe_raw(folder)
    for number, modality in enumerate(("T1w", "FLAIR")):
        save(folder / raw_scan("01", modality).image, head(seed=number))
    (folder / "raw").rename(folder / "study")
    (folder / "n4flow").symlink_to(ROOT)
    return folder


@pytest.fixture(scope="module")
def first_run(installed, study):
    return run(installed, study, recipe("A BIDS study"))


def test_recipe_of_a_study_makes_a_derivative_dataset(first_run, study):
    assert first_run.returncode == 0, first_run.stdout
    out = study / "study/derivatives/n4flow"
    assert {path.name for path in out.iterdir()} == {
        "code", "sub-01", "qc", "manifest.json", "dataset_description.json", ".bidsignore"
    }  # fmt: skip
    assert {path.name for path in (out / "code").iterdir()} == {"config", "logs", "benchmarks", ".snakemake"}
    assert re.search(r"^2 of 2 scans are done, (none|[12]) flagged\. The report: ", first_run.stdout, re.MULTILINE)
    report = re.escape(
        f"n4flow run study study/derivatives/n4flow participant --suffix T1w FLAIR -- --report {out}/code/"
    )
    assert re.search(rf"^Next: .*; {report}report\.zip packs it for a colleague$", first_run.stdout, re.MULTILINE)
    for scan in (raw_scan("01"), raw_scan("01", "FLAIR")):
        facts = json.loads((out / results_of(scan, ".")["sidecar"]).read_text())
        assert facts["Provenance"]["PackageDigest"] == package_digest()
        assert facts["Sources"][0] == f"bids:raw:{scan.image.removeprefix('raw/')}"
        assert (out / facts["Sources"][1].removeprefix("bids::")).is_file()


@pytest.mark.usefixtures("first_run")
def test_a_second_run_adds_what_is_new_and_keeps_what_was_written(installed, study):
    save(study / "study" / raw_scan("02").image.removeprefix("raw/"), head(seed=2))
    code = study / "study/derivatives/n4flow/code"
    settings, sheet = code / "config/config.yaml", code / "config/samples.tsv"
    settings.write_text(f"# mine\n{settings.read_text()}")
    before = settings.read_text(), sheet.read_text()
    done = run(installed, study, "n4flow run study study/derivatives/n4flow participant -- --dry-run")
    assert done.returncode == 0, done.stdout
    assert f"n4flow: {sheet}: 3 scans, 1 of them new\n" in done.stdout
    assert (settings.read_text(), sheet.read_text()[: len(before[1])]) == before
    assert "1 of 3 scans would be done, with these jobs:\n" in done.stdout
    assert dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))["mask"] == "1"
    assert len(done.stdout) < 1200, "not a word of single jobs"


@pytest.mark.usefixtures("first_run")
def test_a_run_for_one_participant_works_on_no_other(installed, study):
    """After the run before, the sheet holds sub-02, too."""
    save(study / "study" / raw_scan("03").image.removeprefix("raw/"), head(seed=3))
    out = study / "study/derivatives/n4flow"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*") if path.is_file()}
    command = "n4flow run study study/derivatives/n4flow participant --participant-label 03 --cores 2"
    done = run(installed, study, command)
    assert done.returncode == 0, done.stdout
    assert "scans, 1 of them new; this run is for 03 alone\n" in done.stdout
    assert re.findall(r"^\[.*\] (\S+): done in", done.stdout, re.MULTILINE) == ["sub-03_T1w"]
    last = "The report over all scans: the same without --participant-label\n"
    assert re.search(rf"^1 of 1 scans are done, (none|1) flagged\. {last}", done.stdout, re.MULTILINE)
    made = {results_of(raw_scan("03"), out)[role] for role in ("corrected", "page", "mask", "field")}
    assert [path for path in made if not Path(path).is_file()] == []
    assert {path: path.stat().st_mtime_ns for path in out.glob("*") if path.is_file()} == before, (
        "nothing over all scans"
    )


def test_recipe_of_a_cluster_submits_the_jobs_of_the_study(installed, study, tmp_path):
    for name in ("study", "n4flow"):
        (tmp_path / name).symlink_to(study / name)
    commands = recipe("A cluster").replace("study/derivatives", "derivatives").rstrip()
    done = run(installed, tmp_path, f"{commands} --dry-run")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^(\d+) of \1 scans would be done, with these jobs:$", done.stdout, re.MULTILINE), done.stdout


# ---------------------------------------------------------------- what else may be installed


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
