"""The notebooks as they are committed; that they run is nbval's part of ``make test``."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tinytrain.encyclopedia import cloze_questions

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
EACH = pytest.mark.parametrize("name", NOTEBOOKS)
# The whole way in one notebook; it has no outputs, as nobody here has its GPU.
ALL = NOTEBOOKS | {"colab": nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)}
EACH_OF_ALL = pytest.mark.parametrize("name", ALL)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_they_are_all_here():
    names = ["01_gpu_check", "02_data_split", "03_tokenization", "04_model_config", "05_train_bf16"]
    names += ["06_evaluate", "07_look_inside", "08_chat", "09_scale_out", "10_experiments"]
    assert list(NOTEBOOKS) == names


@pytest.mark.parametrize("installed", [True, False])
def test_the_set_up_cell_installs_what_is_not_installed(installed, monkeypatch):
    """From the address in pyproject.toml; the cell is short, and the same in all notebooks."""
    (cell,) = {code(notebook)[0].source for notebook in ALL.values()}
    assert len([line for line in cell.splitlines() if line]) <= 4
    calls = []
    shell = SimpleNamespace(run_line_magic=lambda *call: calls.append(call))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    exec(TransformerManager().transform_cell(cell), {"get_ipython": lambda: shell})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pip = ("pip", f'install -q "tinytrain @ git+{project["urls"]["Repository"]}"')
    assert calls == ([] if installed else [pip])


def test_another_address_gets_everywhere_and_changes_nothing_else(tmp_path, monkeypatch):
    """Into set-up cells, links to Colab and the README, in both editions."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import run_all

    names = [f"{folder}/{PATHS[4].name}" for folder in ("notebooks", "notebooks/zh")]
    names += ["README.md", "README.zh-CN.md", "pyproject.toml"]
    (tmp_path / "notebooks" / "zh").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = project["urls"]["Repository"].removeprefix("https://github.com/").encode()
    toml = tmp_path / "pyproject.toml"
    toml.write_bytes(toml.read_bytes().replace(old, b"someone/else"))
    monkeypatch.setattr(run_all, "HERE", tmp_path / "notebooks")
    run_all.set_address()
    for name in names:
        before = (ROOT / name).read_bytes()
        assert old in before
        assert (tmp_path / name).read_bytes() == before.replace(old, b"someone/else"), name


@EACH_OF_ALL
def test_papermill_finds_the_cell_of_parameters(name):
    first, *others = code(ALL[name])
    assert first.metadata.tags == ["parameters"] and "\nrecipe = None " in first.source
    assert [cell for cell in others if "get_recipe(recipe, " in cell.source]
    assert not [cell for cell in others if cell.metadata.get("tags")]


def test_a_recipe_that_papermill_injects_is_used(tmp_path, monkeypatch):
    """As ``papermill -p recipe seed`` does: a cell after the one with the tag."""
    monkeypatch.setenv("TINYTRAIN_RECIPE", "smoke")
    notebook = nbformat.read(PATHS[3], as_version=4)
    first, second = code(notebook)[:2]
    notebook.cells = [first, nbformat.v4.new_code_cell('recipe = "seed"'), second, second]
    client = client_of(notebook)
    client.execute()
    assert second.outputs[0].text.startswith("recipe seed ")


def client_of(notebook):
    from nbclient import NotebookClient

    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, resources=place, timeout=300)
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, *client.km.kernel_spec.argv[1:]]
    return client


@EACH_OF_ALL
def test_valid_and_small(name):
    nbformat.validate(ALL[name])
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 500_000


@EACH
def test_committed_as_run_in_order_without_errors(name):
    cells = code(NOTEBOOKS[name])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert str(Path.home()) not in json.dumps(outputs)


@EACH
def test_short_cells_between_prose(name):
    notebook = NOTEBOOKS[name]
    for cell in code(notebook)[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 12, cell.source
    assert len(notebook.cells) <= 28
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert kinds.startswith("mcc") and kinds.endswith("m")
    assert "cccc" not in kinds  # never a wall of code


@EACH
def test_opening_and_close(name):
    texts = prose(NOTEBOOKS[name])
    assert texts[0].startswith(f"# {name[:2]} · ")
    for part in ("At the end of this notebook", "→", "*"):
        assert part in texts[0]
    whole = "\n".join(texts)
    for part in ("**Predict", "## What we learned", "## Try it"):
        assert part in whole
    following = [other for other in NOTEBOOKS if other > name]
    if following:
        assert f"]({following[0]}.ipynb)" in texts[-1]


@EACH_OF_ALL
@pytest.mark.parametrize("folder", ["notebooks", "notebooks/zh"])
def test_links_between_notebooks_lead_somewhere(name, folder):
    texts = prose(nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4))
    for link, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", "\n".join(texts)):
        file = ROOT / folder / link
        assert file.exists(), link
        if anchor:  # as GitHub makes them
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
            assert anchor in anchors


def test_the_first_notebook_quotes_what_its_samples_say():
    cells = NOTEBOOKS["01_gpu_check"].cells
    at = next(i for i, cell in enumerate(cells) if "samples = reference" in cell.source)
    quoted = re.findall("[\u4e00-\u9fff]{8,}", cells[at + 1].source)
    shown = cells[at].outputs[0].data["text/plain"]
    assert quoted and all(quote in shown for quote in quoted)


@EACH
@pytest.mark.parametrize("folder", ["notebooks", "notebooks/zh"])
def test_in_colab_a_notebook_leads_to_itself_and_its_neighbours(name, folder):
    """Where links to other files lead nowhere."""
    texts = prose(nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4))
    found = re.findall(r"\]\(https://colab[^)]*/blob/main/([^)]*)\)", "\n".join(texts))
    names = list(NOTEBOOKS)
    at = names.index(name)
    there = [name, *names[max(0, at - 1) : at], *names[at + 1 : at + 2]]
    assert found == [f"{folder}/{each}.ipynb" for each in there]


def test_the_readme_leads_to_each_notebook_here_and_in_colab():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"].replace("https://github.com/", "")
    for name in ALL:
        assert f"](notebooks/{name}.ipynb)" in readme
        assert f"/github/{address}/blob/main/notebooks/{name}.ipynb)" in readme


@pytest.mark.parametrize("folder", ["notebooks", "notebooks/zh"])
def test_the_questions_that_the_text_shows_are_asked(folder):
    """An example such as 法国定都＿＿ is a real question, of the kind in bold before it."""
    kinds = {question.prompt: question.kind for question in cloze_questions()}
    readme = "README.zh-CN.md" if folder.endswith("zh") else "README.md"
    texts = [(ROOT / readme).read_text(encoding="utf-8")]
    for path in sorted((ROOT / folder).glob("[0-9]*.ipynb")):
        texts += prose(nbformat.read(path, as_version=4))
    shown = re.findall(r"(?:\*\*(\w+)\*\*[^\n]*?)?([\u4e00-\u9fff]+)＿＿", "\n".join(texts))
    assert {"told", "reworded", "reversed"} <= {kind for kind, _ in shown}
    for kind, prompt in shown:
        assert prompt in kinds and kind in ("", kinds[prompt]), prompt


def test_the_tutorials_command_on_recipe_smoke(tmp_path):
    """The Chinese edition: progress, results, report, and no trace in the checkout."""
    environment = os.environ | {"TINYTRAIN_RECIPE": "smoke", "TINYTRAIN_RUNS": str(tmp_path)}
    command = [sys.executable, str(ROOT / "notebooks" / "run_all.py"), "--edition", "zh"]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    shown, number = result.stdout, len(NOTEBOOKS)
    for words in (
        f"notebook 1 of {number}: 01_gpu_check",
        f"notebook {number} of {number}: 10_experiments",
        "cell  1/",
        "training starts",
        "step 20 of 20, done",
        "train loss",
        "held-out loss",
        "法国的首都是 →",
    ):
        assert words in shown
    assert shown.split("completes:")[1].count(" → ") == 5
    run = tmp_path / "smoke"
    for name in ("report.html", "loss.png", "model/model.safetensors", "training.log"):
        assert (run / name).stat().st_size > 0
    assert len(list((run / "notebooks").glob("*.ipynb"))) == number
    report = (run / "report.html").read_text(encoding="utf-8")
    assert report.count("<h1") == number and "image/png" in report
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["cloze_before"].values()) == {0} and summary["parameters"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_in_the_terminal_interrupts_the_cell_and_not_the_tutorial(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from run_all import run_notebook

    busy = tmp_path / "busy"
    cell = (
        f"import pathlib, time\npathlib.Path({str(busy)!r}).touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('stopped in good order')"
    )
    cells = [nbformat.v4.new_code_cell(source) for source in (cell, "print('the next cell')")]
    path = tmp_path / "busy.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)

    def press():
        while not busy.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    notebook = run_notebook(path, time.monotonic())
    thread.join()
    texts = [cell.outputs[0]["text"].strip() for cell in notebook.cells]
    assert texts == ["stopped in good order", "the next cell"]


@pytest.mark.parametrize("name", ["03_tokenization", "06_evaluate", "07_look_inside"])
def test_any_notebook_can_be_opened_first(name, tmp_path):
    """Alone, in an empty folder of runs, on a short text of your own."""
    text = own_text(tmp_path)
    client = client_of(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))
    environment = os.environ | {
        "TINYTRAIN_RECIPE": "smoke",
        "TINYTRAIN_CORPUS": str(text),
        "TINYTRAIN_RUNS": str(tmp_path / "runs"),
    }
    client.execute(env=environment)
    assert list((tmp_path / "runs").glob("smoke-mine-*/blocks/inputs.json"))


def own_text(folder):
    """Ten documents, of which one is held out."""
    text = folder / "mine.txt"
    days = [f"第{n}天，我走了{n * 3}公里，看见了{n % 9 + 1}条河和一座小城。" for n in range(200)]
    documents = ["\n".join(days[n::10]) for n in range(10)]
    text.write_text("\n\n".join(documents), encoding="utf-8")
    return text


def test_the_readmes_command_on_a_text_of_your_own(tmp_path):
    """All notebooks; paths as one writes them, an old encoding, and the usual port is taken."""
    own_text(tmp_path)
    environment = os.environ | {
        "TINYTRAIN_RECIPE": "smoke",
        "TINYTRAIN_RUNS": "我的 runs",
        "TINYTRAIN_CORPUS": "mine.txt",
        "PYTHONIOENCODING": "gbk",
    }
    command = [sys.executable, str(ROOT / "notebooks" / "run_all.py")]
    with socket.socket() as taken:
        with suppress(OSError):  # if it is taken already, so much the better
            taken.bind(("", 29500))
            taken.listen()
        result = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode("gbk", "replace")
    (run,) = (tmp_path / "我的 runs").glob("smoke-mine*")
    assert len(list((run / "notebooks").glob("*.ipynb"))) == len(NOTEBOOKS)
    environment["TINYTRAIN_CORPUS"] = "nowhere.txt"
    result = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith(b"the corpus 'nowhere.txt' is neit")
