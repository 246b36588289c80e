"""How near estimates come to what runs really take.

``python -m benchmarks.estimate`` estimates recipe ``pocket``, and some steps of the guide's model,
by arithmetic and after a probe of a few steps; then it runs both, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import ROOT, save
from benchmarks.overhead import watched_trainer
from tinytrain import hardware, steps
from tinytrain.checkpoints import train
from tinytrain.modeling import estimate
from tinytrain.recipes import RECIPES


def recipes(quick: bool) -> dict:
    """Return the runs by name: pocket as it is, and the guide's model on the built-in text."""
    if quick:
        return {"smoke": RECIPES["smoke"]}
    numbers = {"corpus": "encyclopedia", "batch_size": 4, "gradient_accumulation": 1}
    numbers |= {"max_steps": 10, "eval_steps": 10, "eval_blocks": 4}
    return {
        "pocket": RECIPES["pocket"],
        "wiki on the built-in text": replace(RECIPES["wiki"], **numbers),
    }


def foresee(name: str, quick: bool) -> dict[str, float]:
    """Estimate a run by arithmetic, then with a probe."""
    recipe = recipes(quick)[name]
    here = hardware.this_hardware()
    config = steps.get_config(recipe)
    first = estimate(recipe, here, config)
    seconds, peak = steps.probe(recipe, hardware.choose_precision(recipe.precision).name)
    then = estimate(recipe, here, config, step_seconds=seconds, peak_memory=peak)
    return {
        "parameters": first.parameters["total"],
        "memory_by_arithmetic": first.memory["total"] / 1e9,
        "memory": then.memory["total"] / 1e9,
        "seconds_by_arithmetic": first.seconds,
        "seconds": then.seconds,
    }


def run(name: str, quick: bool) -> dict[str, float]:
    """Train as notebook 05 does and tell what it took."""
    recipe = recipes(quick)[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = watched_trainer(recipe, Path(folder))
        hardware.peak_memory(reset=True)
        start = time.perf_counter()
        train(trainer)
        seconds = time.perf_counter() - start
    return {
        "parameters": trainer.model.num_parameters(),
        "memory": hardware.peak_memory() / 1e9,
        "seconds": seconds,
    }


def elsewhere(what: str, name: str, quick: bool) -> dict[str, float]:
    """Call `foresee` or `run` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.estimate", "--do", what, name]
    command += ["--quick"] if quick else []
    shown = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(shown.stdout.splitlines()[-1])


def main() -> None:
    """Estimate, run, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="recipe smoke")
    parser.add_argument("--do", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TINYTRAIN_RUNS", str(ROOT / "build" / "benchmarks"))
    if options.do:
        what, name = options.do
        print(json.dumps({"foresee": foresee, "run": run}[what](name, options.quick)))
        return
    rows = []
    for name in recipes(options.quick):
        foreseen = elsewhere("foresee", name, options.quick)
        real = elsewhere("run", name, options.quick)
        print(name, "foreseen", foreseen, "real", real, flush=True)
        for key, of, goal, words in (
            ("parameters", "parameters", 0.0, "parameters"),
            ("memory", "memory", 0.10, "peak memory in GB, after a probe"),
            ("memory_by_arithmetic", "memory", None, "peak memory in GB, by arithmetic"),
            ("seconds", "seconds", 0.15 if name == "pocket" else None, "seconds, after a probe"),
            ("seconds_by_arithmetic", "seconds", None, "seconds, by arithmetic"),
        ):
            ratio = foreseen[key] / real[of]
            rows.append(
                {
                    "measure": f"{name}: {words}",
                    "ours": round(foreseen[key], 2),
                    "peer": round(real[of], 2),
                    "peer_name": "what the run took",
                    "ratio": round(ratio, 3),
                    "goal": None if goal is None else f"within {goal:.0%}",
                    "met": None if goal is None else abs(ratio - 1) <= goal,
                }
            )
    save("estimate", rows, options.quick)


if __name__ == "__main__":
    main()
