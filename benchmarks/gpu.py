"""On one CUDA GPU: the guide's model beside its own code, the share of the peak, and 16 GB.

``python -m benchmarks.gpu`` trains with random tokens, each contestant in a process of its own and
in turns. It needs torch and transformers with a CUDA device, and no data. The card's peak is looked
up in ``tinytrain.hardware.KNOWN_GPUS``, or given by ``--peak`` in TFLOP/s.
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
from tinytrain.hardware import KNOWN_GPUS
from tinytrain.modeling import flops_per_token, recipe_config
from tinytrain.recipes import RECIPES

ROUNDS = 3
WHOLE = replace(RECIPES["wiki"], vocab_size=None)
CONTESTANTS = {
    # how it is set up, the recipe, blocks in a batch, GB of memory it may have
    "guide": (plain, RECIPES["seed"], 16, None),
    "all words": (ours, WHOLE, 16, None),
    "wiki": (ours, RECIPES["wiki"], 16, None),
    "qwen-0.5b": (ours, RECIPES["qwen-0.5b"], RECIPES["qwen-0.5b"].batch_size, None),
    "qwen-0.5b in 16 GB": (ours, RECIPES["qwen-0.5b"], RECIPES["qwen-0.5b"].batch_size, 16),
}


def measure(name: str) -> dict[str, float]:
    """Train here; return tokens a second, the peak in GB and TFLOP/s of the model."""
    import torch

    set_up, recipe, batch, limit = CONTESTANTS[name]
    if limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
    found = train_step.measure(set_up, recipe, batch, recipe.context_length)
    flops = flops_per_token(recipe_config(recipe), recipe.context_length)["total"]
    return {**found, "tflops": found["tokens_per_second"] * flops / 1e12}


def main() -> None:
    """Measure in turns, print the table and keep it."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once")
    parser.add_argument("--peak", type=float, help="dense bf16 peak of the card in TFLOP/s")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA GPU, and there is none here")
    if options.run:
        print(json.dumps(measure(options.run)))
        return
    name = torch.cuda.get_device_name()
    known = [gpu.tflops for gpu in KNOWN_GPUS if gpu.name.split("-")[0] in name]
    peak = options.peak or (known[0] if known else None)
    found: dict[str, list[dict[str, float]]] = {key: [] for key in CONTESTANTS}
    for _ in range(1 if options.quick else ROUNDS):
        for key, results in found.items():
            command = [sys.executable, "-m", "benchmarks.gpu", "--run", key]
            shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if shown.returncode == 0:
                results.append(json.loads(shown.stdout.splitlines()[-1]))
            print(key, results[-1] if shown.returncode == 0 else "failed", flush=True)
    median = {
        key: {what: statistics.median(r[what] for r in results) for what in results[0]}
        for key, results in found.items()
        if results
    }
    rows = []

    def add(measure: str, mine: float, theirs: float, peer: str, goal: float | None, least: bool):
        ratio = mine / theirs
        met = None if goal is None else (ratio >= goal if least else ratio <= goal)
        numbers = {"ours": round(mine, 2), "peer": round(theirs, 2), "peer_name": peer}
        rows.append(
            {"measure": measure, **numbers, "ratio": round(ratio, 3), "goal": goal, "met": met}
        )

    guide = median.get("guide")
    for key in ("all words", "wiki"):
        if guide and key in median:
            words = f"guide's model, batch 16 x 512, {key}"
            speeds = (median[key]["tokens_per_second"], guide["tokens_per_second"])
            add(f"{words}: tokens/s", *speeds, "the guide's code", 2.0, True)
            peaks = (median[key]["peak"], guide["peak"])
            add(f"{words}: peak memory in GB", *peaks, "the guide's code", 0.35, False)
    for key in ("wiki", "qwen-0.5b"):
        if key in median and peak:
            words = f"{key}: TFLOP/s of the model, attention counted"
            add(words, median[key]["tflops"], peak, f"dense peak of the {name}", 0.45, True)
    key = "qwen-0.5b in 16 GB"
    if key in median:
        add(f"{key}: peak memory in GB", median[key]["peak"], 16.0, "16 GB", 1.0, False)
        print(f"{key}: {median[key]['tokens_per_second']:,.0f} tokens/s")
    save("gpu", rows, options.quick)


if __name__ == "__main__":
    main()
