"""What ``--hours`` expects beside what you get: bits per character, time, memory.

``python -m benchmarks.hours --text my.jsonl --minutes 5 20 60`` trains for so long each, as a user
would, on a text that should not be one of the study's. ``--busy`` does it beside a program that
computes all the time; ``--pocket`` trains recipe ``pocket`` as long, to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ROOT, results, save


def train(folder: str, text: str, *options: str) -> dict[str, float]:
    """Call the command; return how long it took, its peak of memory in GB, and its result."""
    command = [sys.executable, "-m", "tinytrain", "train", "--corpus", text, "--runs", folder]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the training has failed: {os.waitstatus_to_exitcode(status)}")
    [summary] = Path(folder).glob("*/summary.json")
    found = json.loads(summary.read_text(encoding="utf-8"))
    found["samples"] = found.pop("completions")
    taken = {"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss * 1024 / 1e9}
    return found | taken


def measure(minutes: float, text: str, busy: bool, pocket: bool) -> list[dict]:
    """Train for a time; return rows of what was expected and what was measured."""
    name = f"{minutes:g} minutes, {Path(text).name.split('.')[0]}"
    name += ", one busy program beside" if busy else ""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    hours = str(minutes / 60)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = train(folder, text, "--hours", hours)
            [file] = Path(folder).glob("*/plan.json")
            plan = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            ("bits per character", plan["bits"], found["bits_per_character"], 0.04),
            ("seconds", 60 * minutes, found["seconds"], 0.05),
            ("memory in GB", plan["memory"] / 1e9, found["memory"], 0.15),
        ]
        print(name, json.dumps(found["samples"], ensure_ascii=False), flush=True)
        if pocket:
            with tempfile.TemporaryDirectory() as folder:
                same = f"hours={hours}", f"test_size={plan['recipe']['test_size']}"
                beside = train(folder, text, "--recipe", "pocket", "--set", *same)
    finally:
        if other:
            other.kill()
    rows = [
        {
            "measure": f"{name}: {what}",
            "ours": round(expected, 3),
            "peer": round(real, 3),
            "peer_name": "measured",
            "ratio": round(expected / real, 3),
            "goal": f"within {goal:.0%}",
            "met": abs(expected / real - 1) <= goal,
        }
        for what, expected, real, goal in rows
    ]
    if pocket:
        ratio = found["bits_per_character"] / beside["bits_per_character"]
        rows.append(
            {
                "measure": f"{name}: bits per character",
                "ours": round(found["bits_per_character"], 3),
                "peer": round(beside["bits_per_character"], 3),
                "peer_name": "recipe pocket, trained as long",
                "ratio": round(ratio, 3),
                "goal": 0.9,
                "met": ratio <= 0.9,
            }
        )
    return [row | {"samples": found["samples"]} for row in rows]


def main() -> None:
    """Train for each time, print the table and keep it beside earlier rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 20, 60])
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--pocket", action="store_true")
    options = parser.parse_args()
    text = str(Path(options.text).resolve())
    rows = []
    for minutes in options.minutes:
        rows += measure(minutes, text, options.busy, options.pocket)
    names = {row["measure"] for row in rows}
    save("hours", [row for row in results("hours") if row["measure"] not in names] + rows)


if __name__ == "__main__":
    main()
