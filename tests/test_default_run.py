"""What recipe ``pocket`` has learned: in ``make test`` cut to 60 steps, in ``make tutorial`` whole.

``TINYTRAIN_RUNS`` names the folder of runs to look at.
"""

import json
import os
from pathlib import Path
from statistics import fmean

import pytest

import tinytrain
from tinytrain.callbacks import read_history


@pytest.fixture
def run():
    """The losses by step and the summary of the run that is looked at."""
    folder = Path(os.environ.get("TINYTRAIN_RUNS", "")) / "pocket"
    if "TINYTRAIN_RUNS" not in os.environ or not (folder / "summary.json").is_file():
        pytest.skip("looks at the run that `make test` or `make tutorial` makes before")
    losses = {line["step"]: line["loss"] for line in read_history(folder) if "loss" in line}
    return losses, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_the_first_steps_are_those_of_the_reference(run):
    """The warm-up takes 60 steps, so that the rates of a run cut there are the same."""
    losses, summary = run
    data = Path(tinytrain.__file__).parent / "data" / "reference.json"
    band = json.loads(data.read_text(encoding="utf-8"))["train"]
    for first in (20, 35, 50):  # means of three: single losses scatter with the order of the blocks
        at = [i for i, step in enumerate(band["step"]) if first <= step <= first + 10]
        low, high = (fmean(band[end][i] for i in at) for end in ("low", "high"))
        loss = fmean(losses[band["step"][i]] for i in at)
        assert 2 * low - high <= loss <= 2 * high - low, f"steps {first} to {first + 10}"
    assert max(summary["cloze_before"].values()) < 0.02


def test_the_whole_run_knows_its_facts(run):
    losses, summary = run
    if max(losses) < 600:
        pytest.skip("the run is cut")
    assert summary["held_out_loss"] < 1.2
    assert summary["cloze_after"]["told"] >= 0.95
    assert summary["cloze_after"]["reworded"] >= 0.8
