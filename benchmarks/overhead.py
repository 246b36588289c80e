"""What watching costs: the share of a training run's time that goes into its callbacks.

``python -m benchmarks.overhead`` trains recipe ``pocket`` with all callbacks of
notebook 05, plot included, and counts the seconds that pass inside each of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from functools import partial, wraps
from pathlib import Path

from benchmarks import save
from tinytrain import callbacks, steps
from tinytrain.evaluation import complete
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.training import build_trainer, train, training_arguments


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


def measure(recipe, folder: Path) -> tuple[Counter, float, int]:
    """Train and return the seconds per callback, those of the whole run, and the redraws."""
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
    ]
    drawings = []
    draw = watching[3]._draw
    watching[3]._draw = lambda: drawings.append(draw())
    arguments = training_arguments(recipe, folder / "checkpoints", recipe.precision or "float32")
    few = blocks["test"].select(range(recipe.eval_blocks))
    model = build_model(config, seed=recipe.seed)
    trainer = build_trainer(model, arguments, blocks["train"], few, watching)
    spent: Counter = Counter()
    for callback in [*watching, trainer.guard]:
        count_time(callback, spent)
    start = time.perf_counter()
    train(trainer)
    return spent, time.perf_counter() - start, len(drawings)


def main() -> None:
    """Measure, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it works")
    quick = parser.parse_args().quick
    recipe = RECIPES["smoke" if quick else "pocket"]
    with tempfile.TemporaryDirectory() as folder:
        spent, seconds, drawings = measure(recipe, Path(folder))
    goals = {"LivePlotCallback": 0.01}
    rows = [
        {
            "measure": f"share of the wall time inside {name}",
            "ours": round(spent[name], 3),
            "peer": round(seconds, 1),
            "peer_name": "seconds of the whole run",
            "ratio": round(spent[name] / seconds, 4),
            "goal": goals.get(name),
            "met": spent[name] / seconds <= goals[name] if name in goals else None,
        }
        for name in sorted(spent)
    ]
    print(f"{drawings} drawings in {seconds:.0f} s, one every {seconds / drawings:.1f} s")
    save("overhead", rows, quick)


if __name__ == "__main__":
    main()
