"""What is claimed about speed and memory, as commands that anyone can run again.

Each module is run as ``python -m benchmarks.NAME``, prints a table and writes
``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinytrain.common import print_any_character

print_any_character()  # of tables in Chinese, into a file on Windows

ROOT = Path(__file__).resolve().parent.parent
# The shape of `pocket` in the hours of comparisons on real text, kept so that their numbers stay
# comparable. The recipe's own is smaller.
FOUR_LAYERS = {"num_hidden_layers": 4, "intermediate_size": 768}
FOUR_LAYERS |= {"lr_scheduler": "cosine", "attention": "eager"}


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: the chip, its cores, the GPU, and the versions."""
    import torch

    from tinytrain.hardware import cpu_flags

    names = ("torch", "transformers", "datasets", "tokenizers")
    wide = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in cpu_flags()]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {', '.join(wide) or 'no AVX'}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # not every benchmark needs all of them
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, rows: list[dict[str, Any]], quick: bool = False) -> None:
    """Print rows as a table, and keep them unless the run was only a quick look."""
    print(f"\n{'measure':58} {'ours':>12} {'peer':>12} {'ratio':>8}  goal")
    for row in rows:
        met = {True: "met", False: "MISSED", None: ""}[row["met"]]
        goal = "" if row["goal"] is None else f"{row['goal']} {met}"
        numbers = "".join(f"{_number(row[key]):>13}" for key in ("ours", "peer"))
        print(f"{row['measure']:58.58}{numbers}{_number(row['ratio']):>9}  {goal}")
        print(f"    peer: {row['peer_name']}")
    here = machine()
    print(f"\n{here['processor']}; GPU: {here['gpu']}; {here['versions']}")
    if quick:
        print("a quick look, nothing is kept")
        return
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    rows = [{"machine": here, **row} for row in rows]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"kept in {path.relative_to(ROOT)}")


def results(name: str) -> list[dict[str, Any]]:
    """Return the rows that a benchmark has kept, if it has."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
