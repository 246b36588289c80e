"""On one CUDA GPU: the guide's model beside its own code, the share of the peak, and 16 GB.

``python -m benchmarks.gpu`` trains with random tokens, each contestant in a process of its own and
in turns, with the tokens a step of its recipe: an optimiser that makes a step seldom may cost more.
It needs torch and transformers with a CUDA device, and no data. What is known is kept at once,
so a run that is cut short leaves a result. The card's peak is looked up in
``tinytrain.hardware.KNOWN_GPUS``, or given by ``--peak`` in TFLOP/s. ``--quick`` does it once and
keeps nothing; without a GPU, with tiny models on the processor, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

from benchmarks import ROOT, save, train_step
from benchmarks.train_step import ours, plain
from tinytrain import loss
from tinytrain.costs import flops_per_token
from tinytrain.hardware import KNOWN_GPUS, matmul_tflops
from tinytrain.modeling import recipe_config
from tinytrain.recipes import RECIPES


def torch_loss(hidden, weight, labels, total, *_):
    """Compute what `tinytrain.loss.linear_cross_entropy` does, by PyTorch's own (from 2.13)."""
    import torch
    from torch.nn.functional import linear_cross_entropy

    dtype = torch.get_autocast_dtype(hidden.device.type)
    options = {"reduction": "sum", "options": torch.nn.LinearCrossEntropyOptions()}
    return linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels, **options) / total


def compiled_loss(hidden, weight, labels, total, *_):
    """Compute it from all logits at once, as torch.compile fuses it."""
    return _all_logits()(hidden, weight, labels) / total


@functools.cache
def _all_logits() -> Callable:
    import torch
    from torch.nn.functional import cross_entropy, linear

    def summed(hidden, weight, labels):
        return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")

    return torch.compile(summed)


def liger_loss(hidden, weight, labels, total, *_):
    """Compute it by Liger Kernel's, which is written in Triton (pip install liger-kernel)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels) / total


def with_loss(function: Callable) -> Callable:
    """Return what sets up training as `ours`, with this function for the loss."""

    def set_up(*arguments, **named):
        loss.linear_cross_entropy = function
        return ours(*arguments, **named, fixed=False)

    return set_up


ROUNDS = 2
SEED, WIKI, QWEN = (RECIPES[name] for name in ("seed", "wiki", "qwen-0.5b"))
as_it_comes = functools.partial(ours, fixed=False)  # in as few batches as the memory allows
CONTESTANTS = {
    # how it is set up, the recipe, GB of memory that it may have
    "the guide's code": (plain, SEED, None),
    "guide's model": (ours, replace(WIKI, vocab_size=None, loss_rows=QWEN.loss_rows), None),
    "wiki": (as_it_comes, WIKI, None),
    "qwen-0.5b": (as_it_comes, QWEN, None),
    "qwen-0.5b in 16 GB": (ours, QWEN, 15.5),  # CUDA itself takes half a GB
    "wiki in fp16": (as_it_comes, replace(WIKI, precision="fp16"), None),  # as a T4 has to
    "wiki with torch's loss": (with_loss(torch_loss), WIKI, None),
    "wiki with a compiled loss": (with_loss(compiled_loss), WIKI, None),
    "wiki with Liger's loss": (with_loss(liger_loss), WIKI, None),
}
ON_GPU_ONLY = ("wiki in fp16", "wiki with a compiled loss", "wiki with Liger's loss")
COMPARISONS = [
    # ours, what is compared, beside which contestant or number, the goal, at least or at most
    ("guide's model", "tokens_per_second", "the guide's code", 2.0, "least"),
    ("guide's model", "peak", "the guide's code", 0.35, "most"),
    ("wiki", "tokens_per_second", "the guide's code", 2.0, "least"),
    ("wiki", "tflops", "the card's dense bf16 peak", 0.45, "least"),
    ("qwen-0.5b", "tflops", "the card's dense bf16 peak", 0.45, "least"),
    ("qwen-0.5b in 16 GB", "peak", "16 GB", 1.0, "most"),
    ("wiki in fp16", "tokens_per_second", "wiki", None, "least"),
    ("wiki", "tokens_per_second", "wiki with torch's loss", 1.0, "least"),
    ("wiki", "tokens_per_second", "wiki with a compiled loss", 1.0, "least"),
    ("wiki", "peak", "wiki with a compiled loss", 1.0, "most"),
    ("wiki", "tokens_per_second", "wiki with Liger's loss", 1.0, "least"),
    ("wiki", "peak", "wiki with Liger's loss", 1.0, "most"),
]
UNITS = {
    "tokens_per_second": "tokens/s",
    "peak": "peak memory in GB",
    "tflops": "TFLOP/s of the model, attention counted",
}


def measure(name: str) -> dict[str, float]:
    """Train here; return tokens a second, the peak in GB and TFLOP/s of the model."""
    import torch

    set_up, recipe, limit = CONTESTANTS[name]
    train_step.STEPS = 20 if torch.cuda.is_available() else 5  # there a step takes no time
    if not torch.cuda.is_available():
        tiny = {"batch_size": 2, "gradient_accumulation": 2, "context_length": 64}
        recipe, limit = replace(recipe, **train_step.TINY, **tiny, compile=False), None
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


def label(name: str, key: str) -> str:
    """Return what a row of the table is called."""
    return f"{name}, on a GPU: {UNITS[key]}"


def table(found: dict[str, list[dict[str, float]]], peak: float) -> list[dict]:
    """Return the rows of the result, from the medians of what was measured so far.

    Parameters
    ----------
    found : dict
        Of each contestant, what `measure` returned; a contestant that failed has nothing.
    peak : float
        The card's dense peak in bf16, in TFLOP/s.
    """
    median = {
        name: {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        for name, runs in found.items()
        if runs
    }
    numbers, rows = {"the card's dense bf16 peak": peak, "16 GB": 16.0}, []
    for name, key, beside, goal, bound in COMPARISONS:
        if name not in median or beside not in {**median, **numbers}:
            continue
        mine, theirs = median[name][key], numbers.get(beside) or median[beside][key]
        ratio = mine / theirs
        shown = [round(x, 2 if x < 1000 else None) for x in (mine, theirs)]
        row = {"measure": label(name, key), "ours": shown[0], "peer": shown[1]}
        row |= {"peer_name": beside, "ratio": round(ratio, 3), "goal": goal}
        rows.append(row | {"met": goal and (ratio >= goal if bound == "least" else ratio <= goal)})
    return rows


def main() -> None:
    """Measure in turns, print the table and keep it."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, and keep nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", type=float, help="dense bf16 peak of the card in TFLOP/s")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.quick and not options.run:
        sys.exit("benchmarks.gpu needs a CUDA GPU, and here is none; --quick tries it without")
    if options.run:
        print(json.dumps(measure(options.run)))
        return
    if on_gpu:
        card = torch.cuda.get_device_name()
        known = [gpu.tflops for gpu in KNOWN_GPUS if gpu.name.split("-")[0] in card]
        peak = options.peak or (known[0] if known else None)
        if peak is None:
            parser.error(f"the peak of {card} is not known: look it up, and give it as --peak")
    else:
        peak = matmul_tflops("bf16")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(1 if options.quick else options.rounds):
        for name, runs in found.items():
            if name in ON_GPU_ONLY and not on_gpu:
                print(f"{name} is left out: only a GPU can do that")
                continue
            command = [sys.executable, "-m", "benchmarks.gpu", "--run", name]
            shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if shown.returncode == 0:
                runs.append(json.loads(shown.stdout.splitlines()[-1]))
            print(name, runs[-1] if shown.returncode == 0 else "failed", flush=True)
            if not options.quick:  # at once: a lent GPU may be gone any time
                save("gpu", table(found, peak))
    if options.quick:
        save("gpu", table(found, peak), quick=True)


if __name__ == "__main__":
    main()
