"""The benchmarks run; what they measure is told by running them, never by a timed test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import reference
from benchmarks.__main__ import PAGES, SHOWN, with_tables

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


NAMES = ["overhead", "train_step", "learning", "questions", "tokenization", "estimate"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_look_works_and_keeps_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    before = {path: path.read_bytes() for path in RESULTS}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "peer: " in shown.stdout and "nothing is kept" in shown.stdout
    assert {path: path.read_bytes() for path in RESULTS} == before


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_say_what_was_measured_and_where(path):
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows
    for row in rows:
        assert row["met"] in (True, False) or row["goal"] is None
        assert {"measure", "ours", "peer", "peer_name", "ratio", "goal", "met"} <= set(row)
        assert row["machine"]["processor"] and row["machine"]["versions"]["torch"]


def test_a_reference_curve_is_the_range_of_its_seeds():
    histories = [
        [{"step": 1, "loss": a}, {"step": 1, "eval_loss": 9.0}, {"step": 2, "loss": b}]
        for a, b in ((3.0, 1.0), (5.0, 2.0))
    ]
    assert reference.curve(histories, "loss") == {
        "step": [1, 2],
        "low": [3.0, 1.0],
        "mean": [4.0, 1.5],
        "high": [5.0, 2.0],
    }


def test_a_gpu_is_asked_for_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 1 and "needs a CUDA GPU" in shown.stderr


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_the_results_that_are_kept(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = ["benchmarks"] if "README" in page else [*SHOWN, "machine"]
    assert all(f"<!-- {name}: begin -->" in text for name in shown)
    assert with_tables(text, "zh" in page) == text
    assert with_tables(text.replace("|", "¦"), "zh" in page) != text.replace("|", "¦")
