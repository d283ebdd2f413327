"""Another workflow imports this one from a remote repository, as config/README.md shows it."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from study import ROOT, give_guide, head, raw_scan, results_of, save, snakemake, write_sheet

from n4flow.kernels.compiled import cache_folder

SCAN = replace(raw_scan("01"), image="raw/scan 1.nii")


def git(folder, *arguments):
    who = {f"GIT_{role}_{what}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **who}, check=True, capture_output=True)


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """What github.com is for these tests: the repository as it lies, with a tag."""
    folder = tmp_path_factory.mktemp("remote")
    repository = folder / "your-lab" / "n4flow"
    for name in ("workflow", "config", "envs"):
        shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(repository, "init", "-b", "main")
    git(repository, "add", "-A")
    git(repository, "commit", "-m", "x")
    git(repository, "tag", "v0.1.0")
    return folder


@pytest.fixture(scope="module")
def lab(remote, tmp_path_factory):
    """A working directory with the example of the manual, and files of its own."""
    folder = tmp_path_factory.mktemp("lab")
    manual = (ROOT / "config/README.md").read_text(encoding="utf-8")
    section = manual.split("## As a module of another workflow")[1].split("\n## ")[0]
    (folder / "Snakefile").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    (folder / "lab.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    for mouse in ("m1", "m2"):
        save(folder / f"mice/{mouse}.nii.gz", head())
        save(folder / f"mice/{mouse}_brain.nii.gz", head() > 300, dtype="uint8")
    save(folder / SCAN.image, head())
    write_sheet(folder / "sheet.tsv", [SCAN])
    return folder


@pytest.fixture
def from_remote(remote, tmp_path_factory, monkeypatch):
    """Let git take github.com for the folder beside, and Snakemake keep nothing of it."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{remote.as_uri()}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(Path(cache_folder()).parent))  # what is compiled stays
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)


def files_under(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("from_remote")
def test_example_of_the_manual_corrects_own_files_and_scans_of_the_sheet(lab):
    before = files_under(lab)
    page = results_of(SCAN, "derivatives/n4flow")["page"]
    done = snakemake(lab, "corrected/m1.nii.gz", page, "--cores", 2, workflow=lab)
    assert done.returncode == 0, done.stdout
    made = {path for path in files_under(lab) - before if not path.startswith(".snakemake/")}
    assert {path.split("/")[0] for path in made} == {"corrected", "derivatives"}
    names = (".nii.gz", ".json", "_field.json", "_field.nii.gz", ".log", ".tsv")
    assert {path for path in made if path.startswith("corrected/")} == {f"corrected/m1{name}" for name in names}
    assert {page, results_of(SCAN, "derivatives/n4flow")["corrected"]} < made
    log = (lab / "corrected/m1.log").read_text()
    assert "computing on CPU (asked for)" in log  # the config of the module
    all_of_it = snakemake(lab, "-n", "--quiet", "rules", workflow=lab)
    assert all_of_it.returncode == 0, all_of_it.stdout


@pytest.mark.usefixtures("from_remote")
def test_rules_alone_need_no_sheet(lab, tmp_path):
    for name in ("Snakefile", "mice"):
        (tmp_path / name).symlink_to(lab / name)
    config = yaml.safe_load((lab / "lab.yaml").read_text())
    config["n4flow"]["samples"] = ""
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(tmp_path, "corrected/m1.nii.gz", "-n", workflow=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "rule correct_mouse:" in done.stdout


@pytest.mark.usefixtures("from_remote")
def test_a_broken_scan_stops_no_other_where_the_workflow_is_deployed_with_the_flags_of_the_catalogue(lab, tmp_path):
    """As snakedeploy has it: a module, its own config, and the flags that the catalogue calls mandatory."""
    broken = raw_scan("02")
    save(tmp_path / broken.image, 0 * head())
    save(tmp_path / SCAN.image, head())
    write_sheet(tmp_path / "sheet.tsv", [broken, SCAN])
    (tmp_path / "mice").symlink_to(lab / "mice")
    (tmp_path / "Snakefile").write_text((lab / "Snakefile").read_text())
    config = yaml.safe_load((lab / "lab.yaml").read_text())
    config["n4flow"]["reference"] = {"scans": 0}
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(config))
    give_guide(tmp_path, "derivatives/n4flow")
    catalogue = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    flags = shlex.split(catalogue["usage"]["mandatory-flags"]["flags"])
    done = snakemake(tmp_path, "--cores", 2, *flags, workflow=tmp_path)
    assert done.returncode == 1
    assert f"{broken.image}: no voxel is above 0" in done.stdout
    made = results_of(SCAN, "derivatives/n4flow")
    assert [role for role in ("corrected", "page", "metrics") if not (tmp_path / made[role]).is_file()] == []
    assert (tmp_path / "corrected/m2.nii.gz").is_file()
