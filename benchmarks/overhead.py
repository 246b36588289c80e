"""What is not training: the share of a run's time outside forward, backward and optimiser.

``python -m benchmarks.overhead`` trains recipe ``pocket`` with all callbacks of notebook 05, plot
included, and counts the seconds that pass inside each of them. Evaluations count as forward passes.
It also times ``import tinytrain``, in a Python of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial, wraps
from pathlib import Path

from benchmarks import ROOT, save
from tinytrain import callbacks, steps
from tinytrain.callbacks.guard import LossGuard
from tinytrain.checkpoints import last_checkpoint, train
from tinytrain.evaluation import complete
from tinytrain.hardware import choose_precision
from tinytrain.recipes import RECIPES
from tinytrain.training import build_trainer, training_arguments


def count_time(callback, spent: Counter) -> None:
    """Let every event of a callback count the seconds that it takes."""
    name = type(callback).__name__
    for event in [*filter(lambda name: name.startswith("on_"), dir(callback)), "close"]:
        method = getattr(callback, event, None)
        if method is not None:
            setattr(callback, event, _timed(method, name, spent))


def _timed(method, name: str, spent: Counter):
    @wraps(method)
    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = method(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return timed


def watched_trainer(recipe, folder: Path):
    """Return the Trainer as notebook 05 builds it, and its callbacks."""
    blocks, tokenizer = steps.get_blocks(recipe), steps.get_tokenizer(recipe)
    config = steps.get_config(recipe)
    tokens, history = recipe.tokens_per_step, folder / "history.jsonl"
    write = partial(complete, tokenizer=tokenizer, max_new_tokens=10)
    prompts = steps.get_prompts(recipe)[:2]
    watching = [
        callbacks.StopCallback(folder / "STOP"),
        callbacks.HistoryCallback(history, tokens),
        callbacks.VerboseTrainingCallback(tokens),
        callbacks.LivePlotCallback(folder / "loss.png", config.vocab_size, tokens, history),
        callbacks.SampleCallback(write, prompts, recipe.sample_steps),
        LossGuard(find_checkpoint=last_checkpoint),
    ]
    arguments = training_arguments(
        recipe, folder / "checkpoints", choose_precision(recipe.precision).name
    )
    few = blocks["test"].select(range(recipe.eval_blocks))
    make = steps.get_optimizer(recipe)
    model = steps.get_model(recipe)
    trainer = build_trainer(model, arguments, blocks["train"], few, watching, make_optimizer=make)
    return trainer, watching


def measure(recipe, folder: Path) -> tuple[Counter, float, int]:
    """Train and return the seconds per callback, those of the whole run, and the redraws."""
    trainer, watching = watched_trainer(recipe, folder)
    drawings = []
    draw = watching[3]._draw
    watching[3]._draw = lambda: drawings.append(draw())
    spent: Counter = Counter()
    for callback in watching:
        count_time(callback, spent)
    trainer.training_step = _timed(trainer.training_step, "training", spent)
    trainer.prediction_step = _timed(trainer.prediction_step, "training", spent)
    create = trainer.create_optimizer

    def create_timed(*args):
        optimizer = create(*args)
        optimizer.step = _timed(optimizer.step, "training", spent)
        return optimizer

    trainer.create_optimizer = create_timed
    start = time.perf_counter()
    train(trainer)
    return spent, time.perf_counter() - start, len(drawings)


def seconds_of(code: str) -> float:
    """Return how long a Python takes that runs some code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it works")
    quick = parser.parse_args().quick
    recipe = RECIPES["smoke" if quick else "pocket"]
    with tempfile.TemporaryDirectory() as folder:
        spent, seconds, drawings = measure(recipe, Path(folder))
    goals = {"LivePlotCallback": 0.01, "outside": 0.05}
    spent["outside"] = seconds - spent.pop("training")
    rows = [
        {
            "measure": f"share of the wall time inside {name}"
            if name != "outside"
            else "share of the wall time outside forward, backward and optimiser",
            "ours": round(spent[name], 3),
            "peer": round(seconds, 1),
            "peer_name": "seconds of the whole run",
            "ratio": round(spent[name] / seconds, 4),
            "goal": goals.get(name),
            "met": spent[name] / seconds <= goals[name] if name in goals else None,
        }
        for name in sorted(spent, key=lambda name: (name != "outside", name))
    ]
    imports, bare = (
        statistics.median(seconds_of(code) for _ in range(1 if quick else 7))
        for code in ("import tinytrain", "pass")
    )
    rows.append(
        {
            "measure": "import tinytrain: seconds, with the start of Python",
            "ours": round(imports, 3),
            "peer": round(bare, 3),
            "peer_name": "Python alone",
            "ratio": round(imports / bare, 2),
            "goal": 0.3,
            "met": imports < 0.3,
        }
    )
    print(f"{drawings} drawings in {seconds:.0f} s, one every {seconds / drawings:.1f} s")
    save("overhead", rows, quick)


if __name__ == "__main__":
    main()
