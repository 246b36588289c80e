"""Write the results of all benchmarks into the pages that show them, as tables.

``python -m benchmarks`` reads ``benchmarks/results/*.json`` and replaces what is between the
marks in README.md and docs/questions.md, and in their Chinese editions.
"""

from __future__ import annotations

import re
from functools import partial

from benchmarks import ROOT, gpu, results

PAGES = ("README.md", "README.zh-CN.md", "docs/questions.md", "docs/questions.zh-CN.md")
ORDER = ("train_step", "learning", "tokenization", "overhead", "estimate", "hours", "gpu")

# What is shown of each question: English head, Chinese head, how to write it.
VALUE = {
    "context": ("tokens of context", "上下文的词元数"),
    "heads": ("heads", "注意力头"),
    "rate": ("optimiser and rate", "优化器与学习率"),
    "vocabulary": ("vocabulary size", "词表大小"),
}
COLUMNS = {
    "bits": ("bits per character", "每字符比特数", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "词元/秒", "{:,.0f}"),
    "steps": ("steps", "步数", "{:,}"),
    "peak": ("peak memory, GB", "内存峰值，GB", "{:.2f}"),
    "parameters": ("parameters", "参数", "{:,}"),
    "tokens_per_character": ("tokens a character", "每字符词元数", "{:.2f}"),
    "kept_by_chunks": ("kept by whole chunks", "只留装满的片段能留下", "{:.1%}"),
}
SHOWN = {
    "context": ("bits", "tokens_per_second", "peak", "kept_by_chunks"),
    "heads": ("bits", "tokens_per_second", "parameters"),
    "rate": ("bits",),
    "vocabulary": ("bits", "steps", "parameters", "tokens_per_character"),
}


def question_table(question: str, chinese: bool) -> str:
    """Return what `benchmarks.questions` has found for one question as a Markdown table."""
    columns = SHOWN[question]
    heads = [VALUE[question][chinese], *(COLUMNS[key][chinese] for key in columns)]
    lines = [heads, ["---"] * len(heads)]
    for row in results("questions"):
        if row["question"] == question:
            found = [COLUMNS[key][2].format(row["run"][key]) for key in columns]
            name = row["peer_name"]
            if chinese:
                name = name.replace(", another seed", "，另一个种子")
            lines.append([name, *found])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def benchmark_table() -> str:
    """Return all rows that have a goal as a Markdown table, and the machines below it."""
    lines = ["| what | ours | beside | ratio | goal |", "|---|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for name in ORDER:
        rows = results(name)
        for row in rows[:1]:
            machines.setdefault(machine_of(row), []).append(name)
        for row in rows:
            if row["goal"] is not None:
                met = "yes" if row["met"] else "**no**"
                lines.append(
                    f"| {row['measure']} | {row['ours']:,} | {row['peer']:,} ({row['peer_name']}) "
                    f"| {row['ratio']:.3g} | {row['goal']}: {met} |"
                )
    kept = [(row["measure"], row["peer_name"]) for row in results("gpu")]
    for name, key, beside, goal, _ in gpu.COMPARISONS:
        measure = gpu.label(name, key)
        if goal and (measure, beside) not in kept:
            lines.append(f"| {measure} | not measured | ({beside}) | | {goal} |")
    lines += [""] + [f"{', '.join(names)}: {machine}." for machine, names in machines.items()]
    return "\n".join(lines)


def machine_of(row: dict) -> str:
    """Return on what a row was measured."""
    here = row["machine"]
    return f"{here['gpu'] or here['processor']}, torch {here['versions']['torch']}"


def with_tables(page: str, chinese: bool = False) -> str:
    """Return a page with what belongs between its marks."""
    tables = {question: partial(question_table, question, chinese) for question in SHOWN}
    tables |= {
        "benchmarks": benchmark_table,
        "machine": lambda: machine_of(results("questions")[0]),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in page:
            block = f"{begin}\n{table()}\n{end}"
            page = re.sub(f"{begin}.*?{end}", lambda _, b=block: b, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text, page.endswith(".zh-CN.md")), encoding="utf-8")
    print(benchmark_table())
