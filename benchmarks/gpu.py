"""On one CUDA GPU: the guide's model beside its own code, the share of the peak, and 16 GB.

``python -m benchmarks.gpu`` trains with random tokens, each contestant in a process of its own and
in turns, with the batch and the accumulation of its recipe: an optimiser that makes a step seldom
may cost more. It needs torch and transformers with a CUDA device, and no data. What is known is
kept after every round, so a run that is cut short leaves a result. The card's peak is looked up in
``tinytrain.hardware.KNOWN_GPUS``, or given by ``--peak`` in TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace

from benchmarks import ROOT, save, train_step
from benchmarks.train_step import ours, plain
from tinytrain.costs import flops_per_token
from tinytrain.hardware import KNOWN_GPUS
from tinytrain.modeling import recipe_config
from tinytrain.recipes import RECIPES

ROUNDS = 3
SEED, WIKI, QWEN = (RECIPES[name] for name in ("seed", "wiki", "qwen-0.5b"))
CONTESTANTS = {
    # how it is set up, the recipe, GB of memory that it may have
    "guide": (plain, SEED, None),
    "all tokens": (ours, replace(WIKI, vocab_size=None, loss_rows=QWEN.loss_rows), None),
    "wiki": (ours, WIKI, None),
    "qwen-0.5b": (ours, QWEN, None),
    # The recipes' batches suit small cards; as many tokens a step in fewer and larger ones leave a
    # large card idle less often.
    "wiki, 64 at once": (ours, replace(WIKI, batch_size=64, gradient_accumulation=1), None),
    "qwen-0.5b, 16 at once": (ours, replace(QWEN, batch_size=16, gradient_accumulation=4), None),
    "qwen-0.5b in 16 GB": (ours, QWEN, 15.5),  # CUDA itself takes half a GB
}


def measure(name: str) -> dict[str, float]:
    """Train here; return tokens a second, the peak in GB and TFLOP/s of the model."""
    import torch

    set_up, recipe, limit = CONTESTANTS[name]
    if limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
    found = train_step.measure(
        set_up,
        recipe,
        recipe.batch_size,
        recipe.context_length,
        recipe.gradient_accumulation,
    )
    flops = flops_per_token(recipe_config(recipe), recipe.context_length)["total"]
    return {**found, "tflops": found["tokens_per_second"] * flops / 1e12}


def table(found: dict[str, list[dict[str, float]]], card: str, peak: float) -> list[dict]:
    """Return the rows of the result, from the medians of what was measured so far.

    Parameters
    ----------
    found : dict
        Of each contestant, what `measure` returned; a contestant that failed has nothing.
    card : str
        The card's name.
    peak : float
        Its dense peak in bf16, in TFLOP/s.
    """
    median = {
        name: {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        for name, runs in found.items()
        if runs
    }
    rows = []

    def add(measure: str, mine: float, theirs: float, peer: str, goal: float, least: bool):
        ratio = mine / theirs
        numbers = {"ours": round(mine, 2), "peer": round(theirs, 2), "peer_name": peer}
        met = ratio >= goal if least else ratio <= goal
        shown = {"ratio": round(ratio, 3), "goal": goal, "met": met}
        rows.append({"measure": measure, **numbers, **shown})

    guide = median.get("guide")
    for name in ("all tokens", "wiki"):
        if guide and name in median:
            label = f"guide's model on a GPU, {name}"
            speeds = (median[name]["tokens_per_second"], guide["tokens_per_second"])
            add(f"{label}: tokens/s", *speeds, "the guide's code", 2.0, True)
            peaks = (median[name]["peak"], guide["peak"])
            add(f"{label}: peak memory in GB", *peaks, "the guide's code", 0.35, False)
    for name in ("wiki", "wiki, 64 at once", "qwen-0.5b", "qwen-0.5b, 16 at once"):
        if name in median:
            label = f"{name}: TFLOP/s of the model, attention counted"
            add(label, median[name]["tflops"], peak, f"dense bf16 peak of {card}", 0.45, True)
    name = "qwen-0.5b in 16 GB"
    if name in median:
        speed = f"{median[name]['tokens_per_second']:,.0f} tokens/s"
        add(f"{name}, {speed}: peak memory in GB", median[name]["peak"], 16.0, "16 GB", 1.0, False)
    return rows


def main() -> None:
    """Measure in turns, print the table and keep it."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, and keep nothing")
    parser.add_argument("--peak", type=float, help="dense bf16 peak of the card in TFLOP/s")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA GPU, and there is none here")
    if options.run:
        print(json.dumps(measure(options.run)))
        return
    card = torch.cuda.get_device_name()
    known = [gpu.tflops for gpu in KNOWN_GPUS if gpu.name.split("-")[0] in card]
    peak = options.peak or (known[0] if known else None)
    if peak is None:
        parser.error(f"the peak of {card} is not known: look up its dense bf16 peak, give --peak")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(1 if options.quick else ROUNDS):
        for name, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.gpu", "--run", name]
            shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if shown.returncode == 0:
                runs.append(json.loads(shown.stdout.splitlines()[-1]))
            print(name, runs[-1] if shown.returncode == 0 else "failed", flush=True)
        save("gpu", table(found, card, peak), options.quick)


if __name__ == "__main__":
    main()
