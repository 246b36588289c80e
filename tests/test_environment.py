"""pyproject.toml, constraints.txt and environment.yml say the same."""

import re
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
