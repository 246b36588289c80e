"""What the run of the notebooks in ``make test`` has learned, beside the reference curve."""

import json
import os
from pathlib import Path
from statistics import fmean

import pytest

import tinytrain
from tinytrain.callbacks import read_history


def test_the_cut_run_learns_as_the_reference_does():
    """The warm-up of recipe ``pocket`` takes 60 steps, so that a run of 60 has the same rates."""
    folder = Path(os.environ.get("TINYTRAIN_RUNS", "")) / "pocket"
    if "TINYTRAIN_RUNS" not in os.environ or not (folder / "history.jsonl").is_file():
        pytest.skip("looks at the run that `make test` makes before")
    data = Path(tinytrain.__file__).parent / "data" / "reference.json"
    band = json.loads(data.read_text(encoding="utf-8"))["train"]
    losses = {line["step"]: line["loss"] for line in read_history(folder) if "loss" in line}
    assert max(losses) == 60
    # Means over 15 steps: single losses scatter with the order of the blocks.
    for first in (20, 35, 50):
        at = [i for i, step in enumerate(band["step"]) if first <= step <= first + 10]
        low, high = (fmean(band[end][i] for i in at) for end in ("low", "high"))
        margin = high - low
        loss = fmean(losses[band["step"][i]] for i in at)
        assert low - margin <= loss <= high + margin, f"steps {first} to {first + 10}"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["cloze_before"] < 0.02 < 1 < summary["held_out_loss"] < losses[5]
