"""Rules of the house: modules can be copied, importing is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinytrain

MODULES = sorted(Path(tinytrain.__file__).parent.glob("*.py"))
SHARED = {"recipes", "common"}
JOINS_THE_OTHERS = {"steps.py", "widgets.py", "__main__.py"}


def imported_from_tinytrain(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "tinytrain":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("tinytrain."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinytrain."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_never_reaches_sideways(path):
    if path.name not in JOINS_THE_OTHERS:
        assert set(imported_from_tinytrain(path)) <= SHARED


def test_importing_is_cheap():
    heavy = "torch transformers datasets modelscope huggingface_hub matplotlib pandas"
    code = f"import tinytrain, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_module_mirrors_each_notebook():
    table = tinytrain.__doc__
    notebooks = (Path(tinytrain.__file__).parent.parent / "notebooks").glob("[0-9]*.ipynb")
    for notebook in notebooks:
        assert notebook.stem in table


def test_nothing_unpickles_or_runs_code_from_elsewhere():
    """That a planted file is not executed is in test_training.py; this is about what is written."""
    root = Path(tinytrain.__file__).parent.parent
    sources = [*MODULES, *(root / "notebooks").glob("*.ipynb"), *(root / "benchmarks").glob("*.py")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert not re.search(r"(import|from) (c?[pP]ickle|dill|joblib)\b", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
