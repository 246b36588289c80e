"""pyproject.toml, constraints.txt and environment.yml say the same."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]


def pins(file="constraints.txt"):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)) for r in requirements}


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_the_ranges_admit_colab(requirement):
    brought = {name: pin.version for name, pin in pins("tests/colab.txt").items()}
    brought["torch"] = "2.11.0"  # there; the tests have the newer one that is pinned here
    name = canonicalize_name(requirement.name)
    assert name not in brought or requirement.specifier.contains(brought[name])


@pytest.mark.parametrize("file", ["constraints.txt", "tests/colab.txt"])
def test_constraints_carry_no_addresses(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert all(pin.operator == "==" for pin in pins(file).values())


def test_conda_installs_the_project_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, by_pip = environment["dependencies"]
    allowed, needed = SpecifierSet(python.removeprefix("python")), PROJECT["requires-python"]
    for minor in range(8, 20):
        version = Version(f"3.{minor}")
        assert SpecifierSet(needed).contains(version) or not allowed.contains(version)
    assert pip == "pip"
    assert by_pip["pip"] == ["--constraint constraints.txt", "--editable .[notebook,test]"]
    extras = set(re.search(r"\[(.*)\]", by_pip["pip"][1])[1].split(","))
    assert extras == set(PROJECT["optional-dependencies"])


def test_the_makefile_installs_the_same():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--constraint constraints.txt --editable '.[notebook,test]'" in makefile


def test_what_is_installed_here_is_what_is_pinned():
    """Guards the tests themselves: they speak of the pinned versions."""
    from importlib.metadata import version

    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not run in .venv, whose versions are pinned")
    for name, pin in pins().items():
        if name in {canonicalize_name(requirement.name) for requirement in DECLARED}:
            assert Version(version(name)).public == pin.version, name


@pytest.mark.skipif(sys.platform == "win32", reason="make is for Linux and macOS")
def test_a_python_that_is_too_old_gets_one_clear_line(tmp_path):
    old = tmp_path / "python-old"  # answers as an old Python would
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys, builtins\n'
        'class V(tuple): pass\nsys.version_info = (3, 9, 1)\nexec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    result = subprocess.run(
        ["make", "tutorial", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    first = result.stderr.splitlines()[0]
    assert first.startswith("tinytrain needs Python 3.11 or newer") and "3.9" in first
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="make is for Linux and macOS")
def test_make_help_lists_the_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("tutorial", "test", "browser-test", "colab-test", "lab"):
        assert re.search(rf"^{target} +\w", shown.stdout, re.M)


NAMES = ["我 的 空格/tiny train", '我 的 $HOME/it\'s `a` "tiny" #train']


@pytest.mark.skipif(sys.platform == "win32", reason="make is for Linux and macOS")
@pytest.mark.parametrize("name", NAMES)
def test_the_targets_in_a_folder_of_any_name(name, tmp_path):
    """Neighbours, whose names are the first words of the path, survive; nothing lands elsewhere."""
    checkout = tmp_path / name
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for neighbour in (tmp_path / "我", checkout.parent / "tiny", checkout.parent / "train"):
        neighbour.mkdir()
    (checkout / "build" / "test-runs" / "smoke").mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml", "constraints.txt", "notebooks", "docs", "README.md"):
        (checkout / file).symlink_to(ROOT / file)
    python = checkout / ".venv" / "bin" / "python"  # writes down how it is called
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$TINYTRAIN_RUNS" "$@" >>called\n')
    python.chmod(0o755)
    (checkout / ".venv" / "bin" / "ruff").symlink_to("python")
    (checkout / ".venv" / "ready").touch()
    before = sorted(tmp_path.glob("*")) + sorted(checkout.parent.glob("*"))

    def make(*arguments, **environment):
        result = subprocess.run(
            ["make", *arguments], cwd=checkout, env=os.environ | environment, capture_output=True
        )
        assert result.returncode == 0, result.stderr.decode()
        called = checkout / "called"
        lines = called.read_text(encoding="utf-8").splitlines() if called.exists() else []
        called.unlink(missing_ok=True)
        return lines

    runs = str(checkout / "build" / "test-runs")
    assert make("test-notebooks").count(runs) == 3
    assert not (checkout / "build" / "test-runs").exists()
    for target in ("tutorial", "lint", "test-package", "notebooks", "sync"):
        assert make(target)
    opened = make("lab", "EDITION=zh")
    assert "runs/notebooks/zh/01_gpu_check.ipynb" in opened
    assert "--ServerApp.root_dir=runs" in opened  # or links to docs lead out of it
    mine = checkout.parent / "其他 $HOME runs"
    assert f"{mine}/notebooks/01_gpu_check.ipynb" in make("lab", TINYTRAIN_RUNS=str(mine))
    make("lab", TINYTRAIN_RUNS="~/mine", HOME=str(checkout / "home"))
    for folder in (checkout / "runs", mine, checkout / "home" / "mine"):
        assert len(list((folder / "notebooks").rglob("*.ipynb"))) == 20  # ten, in two editions
        assert (folder / "docs" / "glossary.md").is_file() and (folder / "README.md").is_file()
    shutil.rmtree(mine)
    make("clean")
    assert not (checkout / ".venv").exists() and (checkout / "runs").exists()
    assert sorted(tmp_path.glob("*")) + sorted(checkout.parent.glob("*")) == before
