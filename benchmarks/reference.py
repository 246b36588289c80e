"""Train recipe ``pocket`` with several seeds, to know what is normal.

``python -m benchmarks.reference`` writes ``tinytrain/data/reference.json``, which the live plot
shows behind your own curve, and notebook 01 as what you will have at the end; and prints how many
questions were answered. Each seed takes as long as the tutorial; a seed that is done is not trained
again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import ROOT, machine
from tinytrain import callbacks, runs, steps
from tinytrain.common import one_line, read_json_lines, write_json
from tinytrain.evaluation import by_kind
from tinytrain.generation import Answer, answer_questions, complete
from tinytrain.hardware import choose_precision
from tinytrain.recipes import RECIPES

RESULT = ROOT / "tinytrain" / "data" / "reference.json"
SAMPLE_TOKENS = 16


def train_one(recipe, folder: Path, precision: str) -> list[dict[str, float]]:
    """Train with one seed and return its history."""
    path = folder / "history.jsonl"
    if not (folder / "done").is_file():
        history = callbacks.HistoryCallback(path, recipe.tokens_per_step)
        tokenizer, prompts = steps.get_tokenizer(recipe), steps.get_prompts(recipe)
        write = partial(complete, tokenizer=tokenizer, max_new_tokens=SAMPLE_TOKENS)
        file = folder / "samples.jsonl"
        writing = callbacks.SampleCallback(write, prompts, recipe.sample_steps, file)
        trainer = runs.assemble(recipe, folder, precision, [history, writing], save_strategy="no")
        trainer.train()
        answers = answer_questions(trainer.model, tokenizer, steps.get_questions(recipe))
        write_json(folder / "answers.json", answers)
        (folder / "done").touch()
    return callbacks.read_history(path)


def curve(histories: list[list[dict[str, float]]], name: str) -> dict[str, list[float]]:
    """Return the lowest, mean and highest value of all seeds at each logged step."""
    kept = [[line for line in history if name in line] for history in histories]
    values = np.array([[line[name] for line in history] for history in kept])
    numbers = {"low": values.min(0), "mean": values.mean(0), "high": values.max(0)}
    rounded = {key: [round(float(x), 4) for x in row] for key, row in numbers.items()}
    return {"step": [line["step"] for line in kept[0]], **rounded}


def samples(recipe, folder: Path) -> list[dict[str, Any]]:
    """Return what one seed's model writes after each prompt: untrained (step 0), then trained."""
    prompts, tokenizer = steps.get_prompts(recipe), steps.get_tokenizer(recipe)
    untrained = complete(steps.get_model(recipe), tokenizer, prompts, SAMPLE_TOKENS)
    lines = [{"step": 0, "texts": untrained}, *read_json_lines(folder / "samples.jsonl")]
    texts = [dict(zip(prompts, map(one_line, line["texts"]), strict=True)) for line in lines]
    return [{"step": line["step"], "texts": text} for line, text in zip(lines, texts, strict=True)]


def right_answers(recipe, folder: Path) -> dict[tuple[str, str], float]:
    """Return one seed's share of right answers by domain ("all" too) and kind of question."""
    questions = steps.get_questions(recipe)
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    right = [Answer(*answer).right for answer in answers]
    found = {("all", kind): part.value for kind, part in by_kind(questions, right).items()}
    both = [(*question[:3], question[2:]) for question in questions]  # domain and kind as one
    return found | {pair: part.value for pair, part in by_kind(both, right).items()}


def table(seeds: list[dict[tuple[str, str], float]]) -> pd.DataFrame:
    """Return the mean of all seeds and their range, a row for each domain."""
    shares = pd.DataFrame(seeds).agg(["mean", "min", "max"]).T
    shares.index = pd.MultiIndex.from_tuples(shares.index)
    cells = [f"{mean:.1%} ({low:.1%} to {high:.1%})" for mean, low, high in shares.to_numpy()]
    return pd.Series(cells, shares.index).unstack(fill_value="")[["told", "reworded", "reversed"]]


def main() -> None:
    """Train all seeds and write what they have in common."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "reference")
    options = parser.parse_args()
    recipe = replace(RECIPES["pocket"], eval_steps=25)
    precision = choose_precision(recipe.precision).name
    histories, right = [], []
    for seed in range(options.seeds):
        folder = options.runs / f"seed-{seed}"
        histories.append(train_one(replace(recipe, seed=seed), folder, precision))
        last = [line["eval_loss"] for line in histories[-1] if "eval_loss" in line][-1]
        print(f"seed {seed}: held-out loss {last:.3f}", flush=True)
        right.append(right_answers(recipe, folder))
    result = {
        "recipe": asdict(RECIPES["pocket"]),
        "seeds": list(range(options.seeds)),
        "precision": precision,
        "machine": machine(),
        "train": curve(histories, "loss"),
        "held_out": curve(histories, "eval_loss"),
        "samples": samples(replace(recipe, seed=0), options.runs / "seed-0"),
    }
    RESULT.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(right).to_string())
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
