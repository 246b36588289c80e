"""Write the results of all benchmarks into the README, as a table.

``python -m benchmarks`` reads ``benchmarks/results/*.json`` and replaces what stands between the
two marks in README.md.
"""

from __future__ import annotations

import json
import re

from benchmarks import ROOT

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ORDER = ("train_step", "learning", "tokenization", "overhead", "estimate", "gpu")


def table() -> str:
    """Return all rows that have a goal as a Markdown table, and the machines below it."""
    lines = ["| what | ours | beside | ratio | goal |", "|---|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for name in ORDER:
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))
        here = rows[0]["machine"]
        words = f"{here['gpu'] or here['processor']}, torch {here['versions']['torch']}"
        machines.setdefault(words, []).append(name)
        for row in rows:
            if row["goal"] is not None:
                met = "yes" if row["met"] else "**no**"
                lines.append(
                    f"| {row['measure']} | {row['ours']:,} | {row['peer']:,} ({row['peer_name']}) "
                    f"| {row['ratio']:.2f} | {row['goal']}: {met} |"
                )
    lines += [""] + [f"{', '.join(names)}: {words}." for words, names in machines.items()]
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """Return the README with the table between its marks."""
    block = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())
