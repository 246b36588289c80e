"""What ``--hours`` expects beside what you get, and what others reach in the same time.

``python -m benchmarks.hours --text my.jsonl --minutes 5 20 60`` trains for so long each, as a user
would, on a text that should not be one of the study's: bits per character, time, memory. ``--busy``
does it beside a program that computes all the time. ``--peers`` trains as long, on the same text
and measured on the same held-out documents: recipe ``pocket`` with four layers, its model with the
guide's numbers, and that model by the training commands of litgpt and llms-from-scratch (`make
benchmark` installs them).
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
from typing import Any

import numpy as np

from benchmarks import FOUR_LAYERS, ROOT, peers, results, save
from benchmarks.train_step import PEERS_PYTHON
from tinytrain import steps
from tinytrain.evaluation import bits_per_character
from tinytrain.generation import generate
from tinytrain.modeling import load_model
from tinytrain.recipes import POCKET
from tinytrain.tokenization import load_tokenizer, tokens_per_character

FOUR = "recipe pocket with four layers"
GUIDE = ("optimizer=adamw", "learning_rate=2e-5", "warmup_steps=200", "adam_beta2=0.999")
GOALS = {  # bits per character of ours, as a share of theirs
    FOUR: 0.9,
    "the guide's optimiser and rate": 0.75,
    "litgpt": 0.9,
    "llms-from-scratch": 0.9,
}


def train(folder: str, text: str, *options: str) -> dict[str, Any]:
    """Call the command; return how long it took, its peak of memory in GB, and its result."""
    command = [sys.executable, "-m", "tinytrain", "train", "--corpus", text, "--runs", folder]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the training has failed: {os.waitstatus_to_exitcode(status)}")
    taken = {"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss * 1024 / 1e9}
    [summary] = Path(folder).glob("*/summary.json")
    found = json.loads(summary.read_text(encoding="utf-8")) | taken
    found["samples"] = found.pop("completions")
    model, tokenizer = (load(summary.parent / "model") for load in (load_model, load_tokenizer))
    found["sampled"] = [
        (prompt, generate(model, tokenizer, prompt, 60, temperature=0.8, top_p=0.9, seed=1))
        for prompt, _ in found["samples"]
    ]
    return found


def train_peer(name: str, text: str, minutes: float, test_size: float) -> float:
    """Train as a peer does; return its bits per character."""
    if name not in peers.MODELS:
        options = ["--recipe", "pocket", "--set", f"hours={minutes / 60}", f"test_size={test_size}"]
        options += [f"{field}={value}" for field, value in FOUR_LAYERS.items()]
        options += GUIDE if name != FOUR else ()
        with tempfile.TemporaryDirectory() as folder:
            return train(folder, text, *options)["bits_per_character"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINYTRAIN_RUNS"] = folder
        recipe = replace(POCKET, **FOUR_LAYERS, corpus=text, test_size=test_size)
        blocks, file = steps.get_blocks(recipe), Path(folder) / "blocks.npz"
        np.savez(file, **{key: np.array(rows["input_ids"]) for key, rows in blocks.items()})
        command = [str(PEERS_PYTHON), peers.__file__, name, *peers.shape(recipe)]
        command += [str(file), str(60 * minutes)]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        held_out = steps.get_split(recipe)["test"]["text"]
        rate = tokens_per_character(steps.get_tokenizer(recipe), held_out)
    return bits_per_character(json.loads(shown.stdout.splitlines()[-1])["loss"], rate)


def row(measure: str, ours: float, peer: float, peer_name: str, goal: str | float) -> dict:
    """Return a row of the table; a goal that is a text says how near the two must be."""
    ratio = ours / peer
    near = float(goal.split()[-1].rstrip("%")) / 100 if isinstance(goal, str) else 0
    return {
        "measure": measure,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_name": peer_name,
        "ratio": round(ratio, 3),
        "goal": goal,
        "met": abs(ratio - 1) <= near if near else ratio <= goal,
    }


def compare(minutes: float, text: str, busy: bool, beside: bool) -> list[dict]:
    """Train for a time; return rows of what was expected and measured, and of what peers reach."""
    name = f"{minutes:g} minutes, {Path(text).name.split('.')[0]}"
    name += ", one busy program beside" if busy else ""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = train(folder, text, "--hours", str(minutes / 60))
            [file] = Path(folder).glob("*/plan.json")
            plan = json.loads(file.read_text(encoding="utf-8"))
        bits, test_size = found["bits_per_character"], plan["recipe"]["test_size"]
        memory = plan["memory"] / 1e9
        rows = [
            row(f"{name}: bits per character", plan["bits"], bits, "measured", "within 4%"),
            row(f"{name}: seconds", 60 * minutes, found["seconds"], "measured", "within 5%"),
            row(f"{name}: memory in GB", memory, found["memory"], "measured", "within 15%"),
        ]
        told = {key: found[key] for key in ("samples", "sampled")}
        rows[0] |= {**told, "expected": plan["expected"]}
        print(name, json.dumps(told, ensure_ascii=False), flush=True)
        for peer, goal in GOALS.items() if beside else ():
            theirs = train_peer(peer, text, minutes, test_size)
            print(f"{name}, {peer}: {theirs:.3f} bits per character", flush=True)
            peer_name = f"{peer}, trained as long"
            rows.append(row(f"{name}: bits per character", bits, theirs, peer_name, goal))
    finally:
        if other:
            other.kill()
    return rows


def main() -> None:
    """Train for each time, print the table and keep it beside earlier rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 20, 60])
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    text = str(Path(options.text).resolve())
    for minutes in options.minutes:
        rows = compare(minutes, text, options.busy, options.peers)
        names = {(row["measure"], row["peer_name"]) for row in rows}
        kept = [row for row in results("hours") if (row["measure"], row["peer_name"]) not in names]
        save("hours", kept + rows)


if __name__ == "__main__":
    main()
