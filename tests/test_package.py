"""Rules of the house: modules can be copied, importing is cheap, a notebook has its modules."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinytrain

PACKAGE = Path(tinytrain.__file__).parent
NOTEBOOKS = sorted((PACKAGE.parent / "notebooks").glob("[0-9]*.ipynb"))
MODULES = sorted(PACKAGE.rglob("*.py"))
SHARED = {"recipes", "common"}
JOINS_THE_OTHERS = {
    f"{name}.py" for name in "steps runs results tuning planning widgets __main__".split()
}
JOINS_THE_OTHERS.add("callbacks/__init__.py")


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def imported_from_tinytrain(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "tinytrain":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("tinytrain."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinytrain."))


def python_of(path):
    """Return the code of a module or of a notebook's cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "\n".join("".join(c["source"]) for c in cells))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_never_reaches_sideways(path):
    if name_of(path) not in JOINS_THE_OTHERS:
        assert set(imported_from_tinytrain(path.read_text(encoding="utf-8"))) <= SHARED


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_read_in_one_sitting(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 650
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 60, node.name


def test_importing_is_cheap():
    heavy = "torch transformers datasets modelscope huggingface_hub matplotlib pandas gguf pyarrow"
    modules = "tinytrain, tinytrain.corpus, tinytrain.export, tinytrain.hub"
    code = f"import {modules}, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_uses_the_modules_that_mirror_it(path):
    (row,) = re.findall(rf"^{path.stem} +(``.*?``)  ", tinytrain.__doc__, flags=re.MULTILINE)
    used = set(imported_from_tinytrain(python_of(path)))
    used |= {"__main__"} if "-m tinytrain" in path.read_text(encoding="utf-8") else set()
    assert set(re.findall(r"``(\w+)``", row)) <= used


def test_a_wheel_holds_every_module_and_its_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(PACKAGE.parent)], check=True)
    from zipfile import ZipFile

    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("tinytrain/")}
    data = [path for path in (PACKAGE / "data").iterdir() if path.is_file()]
    assert {f"tinytrain/{name_of(path)}" for path in [*MODULES, *data]} <= packed


def test_nothing_unpickles_or_runs_code_from_elsewhere():
    """That a planted file is not executed is in test_modeling.py; this is about what is written."""
    root = PACKAGE.parent
    for path in [*MODULES, *NOTEBOOKS, *(root / "benchmarks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\W+True", text), path
        assert not re.search(r"(import|from) (c?[pP]ickle|dill|joblib)\b", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
        assert not re.search(r"\bload_dataset\(", text), path
        # Without it, a folder with code makes transformers ask at the terminal, and "y" runs it.
        for node in ast.walk(ast.parse(python_of(path))):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.fullmatch(r"Auto\w+\.from_pretrained", function):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") == "False" or None in given, (path, given)
