"""How good a small model becomes from its size and its text: the measurements behind ``--hours``.

``python -m benchmarks.scaling --text prose=FILE`` trains models of all sizes on a text of yours and
on the built-in one, with `tinytrain`'s own Trainer, each in a process with one thread. It can be
stopped and called again: a run goes on from its last checkpoint, and what is finished is not done
twice. ``--fit`` fits the law to what there is and tells how well it predicts runs left out of
the fit. Results are kept in ``benchmarks/results/scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from benchmarks import ROOT, machine, results
from tinytrain import planning
from tinytrain.recipes import POCKET

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
FOLDER = ROOT / "build" / "scaling"
EVAL_BLOCKS = 512  # 131,072 held-out tokens, the same for all models of a text and vocabulary


class Point(NamedTuple):
    """A run of the study."""

    text: str
    layers: int
    hidden: int
    tokens: float  # in millions
    vocabulary: int = 4096
    batch: int = 8  # blocks of 256 tokens
    rate: float = 1.0  # times that of `planning.sized_recipe`
    characters: float | None = None  # millions, of the text that is taken; None: all

    @property
    def name(self) -> str:
        """Return a name for its folder."""
        return "-".join(str(value) for value in self)

    @property
    def work(self) -> float:
        """Return about how long it takes: tokens times parameters, embeddings included."""
        return self.tokens * self.hidden * (12 * self.layers * self.hidden + self.vocabulary)


SIZES = {"XS": (2, 64), "S": (3, 128), "M": (4, 256), "L": (6, 384), "XL": (8, 512)}
# What a text is named in the rows is the name given with --text.
PLAN = [
    ("prose", "XS", (0.5, 2, 8, 20)), ("prose", "S", (0.5, 2, 4, 8, 20)),
    ("prose", "M", (0.5, 2, 8)), ("prose", "L", (1, 2)),
    ("news", "XS", (0.5,)), ("news", "S", (0.5, 2)), ("news", "M", (0.5,)),
    ("english", "XS", (0.5,)), ("english", "S", (0.5,)), ("encyclopedia", "S", (0.5, 2)),
]  # fmt: skip
PLAN = [Point(text, *SIZES[size], tokens) for text, size, some in PLAN for tokens in some]
# One number changed at a time: the vocabulary, the batch, the rate.
PLAN += [Point("prose", *SIZES["S"], 2, vocabulary=size, rate=2.0) for size in (2048, 8192)]
PLAN += [
    Point("prose", *SIZES["S"], tokens, batch=size)
    for tokens, size in ((0.5, 4), (8, 16), (20, 32))
]
PLAN += [Point("prose", *SIZES["S"], 2, rate=rate) for rate in (0.5, 2.0, 4.0)]
PLAN += [Point("prose", *SIZES["XS"], 2, rate=rate) for rate in (2.0, 4.0)]
# A short text read many times: 300,000 characters, and 50,000.
PLAN += [
    Point("prose", *SIZES[size], tokens, characters=0.3)
    for size, some in (("XS", (1, 2)), ("S", (0.5, 1, 2)), ("M", (0.5, 1)))
    for tokens in some
]
PLAN += [
    Point("prose", *SIZES["S"], tokens, vocabulary, batch, characters=0.05)
    for tokens, vocabulary, batch in [
        (0.06, 1024, 2), (0.125, 1024, 2), (0.25, 4096, 8), (0.5, 4096, 8)
    ]
]  # fmt: skip
PLAN.sort(key=lambda point: point.work)  # the cheap ones first


def base_recipe(point: Point, corpus: str):
    """Return the recipe of a run without its length: its text, tokenizer and model."""
    sized = planning.sized_recipe(POCKET, point.hidden)
    return replace(
        sized,
        name="text",
        corpus=corpus,
        test_size=0.01 if point.text == "prose" else 0.1,
        max_characters=point.characters and round(point.characters * 1e6),
        vocab_size=point.vocabulary,
        num_hidden_layers=point.layers,
        num_key_value_heads=max(1, sized.num_attention_heads // 2),
        learning_rate=sized.learning_rate * point.rate,
        batch_size=point.batch,
    )


def run(point: Point, corpus: str, place: Path = FOLDER) -> dict[str, Any]:
    """Train one model, or go on with it, and return what was measured."""
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = f"{point.text}-{point.vocabulary}-{point.characters}"
    os.environ["TINYTRAIN_RUNS"] = str(place / "texts" / kept)
    import torch

    from tinytrain import callbacks, runs, steps
    from tinytrain.checkpoints import train
    from tinytrain.evaluation import bits_per_character
    from tinytrain.hardware import choose_precision
    from tinytrain.tokenization import tokens_per_character

    torch.set_num_threads(1)
    recipe = base_recipe(point, corpus)
    tokenizer = steps.get_tokenizer(recipe)
    blocks = steps.get_blocks(recipe, tokenizer)
    held_out = steps.get_split(recipe)["test"]["text"]
    per_character = tokens_per_character(tokenizer, held_out)
    training = blocks["train"]
    test = blocks["test"].select(range(min(EVAL_BLOCKS, len(blocks["test"]))))
    steps_ = round(point.tokens * 1e6 / recipe.tokens_per_step)
    recipe = replace(
        recipe,
        max_steps=steps_,
        warmup_steps=min(recipe.warmup_steps, steps_ // 10),
        logging_steps=max(1, steps_ // 100),
        save_steps=500,
        save_total_limit=1,
    )
    folder = place / "runs" / point.name
    folder.mkdir(parents=True, exist_ok=True)
    history = callbacks.HistoryCallback(folder / "history.jsonl", recipe.tokens_per_step)
    precision = choose_precision(recipe.precision).name
    model = steps.get_model(recipe, steps.get_config(recipe, tokenizer))
    trainer = runs.assemble(
        recipe,
        folder / "checkpoints",
        precision,
        [history],
        model,
        {"train": training, "test": test},
        eval_strategy="no",
    )
    train(trainer, make_model=lambda: steps.get_model(recipe))
    loss = trainer.evaluate()["eval_loss"]
    return {
        **point._asdict(),
        "parameters": model.num_parameters(),
        "steps": steps_,
        "tokens_per_character": per_character,
        "pair_bits": planning.measure_text(recipe).pair_bits,
        "text_tokens": len(training) * recipe.context_length,
        "loss": loss,
        "bits_per_character": bits_per_character(loss, per_character),
        "precision": precision,
        "processor": machine()["processor"],
    }


def _run(task: tuple[Point, str]) -> tuple[Point, dict[str, Any]]:
    return task[0], run(*task)


def law(constants, rows) -> np.ndarray:
    """Return the bits per character that `tinytrain.planning.expected_bits` gives for runs."""
    values = planning.LAW | dict(zip(LIMITS, constants, strict=True))
    return np.array(
        [
            planning.expected_bits(
                row["pair_bits"], row["parameters"], row["tokens"] * 1e6, row["text_tokens"], values
            )
            for row in rows
        ]
    )


# Few runs leave several sets of constants equally good, so that some end at a limit.
LIMITS = {"rest": (0.2, 0.7), "size": (1e-4, 100), "size_power": (0.1, 1)}
LIMITS |= {"read": (1e-4, 100), "read_power": (0.1, 1), "again": (0.3, 100)}


def fit(rows: list[dict[str, Any]], start) -> np.ndarray:
    """Return the constants that come nearest, by the logarithm, with little weight on outliers."""
    real = np.log([row["bits_per_character"] for row in rows])

    def errors(logarithms):
        return np.log(law(np.exp(logarithms), rows)) - real

    limits = np.log(list(LIMITS.values())).T
    start = np.clip(np.log(start), *(limits + [[1e-3], [-1e-3]]))
    found = least_squares(errors, start, bounds=limits, loss="soft_l1", f_scale=0.02)
    return np.exp(found.x)


def fitted_rows() -> list[dict[str, Any]]:
    """Return the runs of the law: real text, enough, not read too often, as a plan would train."""
    most = planning.MOST_PASSES + 0.5
    rows = [row for row in results("scaling") if row["text"] != "encyclopedia"]
    rows = [row for row in rows if row["rate"] == 1 and row["tokens"] >= 0.25]
    rows = [row for row in rows if row["tokens"] * 1e6 < most * row["text_tokens"]]
    rows = [row for row in rows if row["batch"] in (8, planning.batch_size(row["tokens"] * 1e6))]
    # Where larger batches were not tried, the run with 8 blocks a step is all there is.
    same = ("text", "hidden", "tokens", "vocabulary", "characters")
    rows.sort(key=lambda row: row["batch"])
    return list({tuple(row[name] for name in same): row for row in rows}.values())


def report() -> None:
    """Fit the law, and predict each run from the others."""
    rows = fitted_rows()
    constants = fit(rows, [planning.LAW[name] for name in LIMITS])
    named = zip(LIMITS, constants, strict=True)
    print(f"{len(rows)} runs:", {name: round(float(value), 4) for name, value in named})
    errors = []
    for number, (row, near) in enumerate(zip(rows, law(constants, rows), strict=True)):
        others = rows[:number] + rows[number + 1 :]
        [without] = law(fit(others, constants), [row])
        real = row["bits_per_character"]
        errors.append(without / real - 1)
        both = f"fitted {near / real - 1:+.1%}, left out {errors[-1]:+.1%}"
        print(f"{row['name']:42} {real:.3f}, {both}")
    print(
        f"left out: {np.sqrt(np.mean(np.square(errors))):.1%} root mean square, "
        f"{np.abs(errors).max():.1%} at most"
    )


def main() -> None:
    """Train what is missing, or fit the law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", metavar="NAME=FILE", action="append", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--fit", action="store_true", help="only fit what is there")
    parser.add_argument("--quick", action="store_true", help="one small run, kept nowhere")
    options = parser.parse_args()
    if options.quick:
        point = Point("encyclopedia", *SIZES["XS"], 0.02)
        with tempfile.TemporaryDirectory() as folder:
            print(run(point, "encyclopedia", Path(folder)))
        return print("a quick look, nothing is kept")
    if options.fit:
        return report()
    named = dict(text.split("=", 1) for text in options.text)
    texts = {name: str(Path(path).resolve()) for name, path in named.items()}
    texts["encyclopedia"] = "encyclopedia"
    done = {row["name"] for row in results("scaling")}
    tasks = [(p, texts[p.text]) for p in PLAN if p.text in texts and p.name not in done]
    print(f"{len(done)} runs are done, {len(tasks)} of {len(PLAN)} can be made", flush=True)
    context = multiprocessing.get_context("spawn")  # each loads torch itself, with one thread
    with context.Pool(options.workers, maxtasksperchild=1) as pool:
        for point, row in pool.imap_unordered(_run, tasks):
            rows = [*results("scaling"), {"name": point.name, **row}]
            RESULT.write_text(
                "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8"
            )
            print(point.name, f"{row['bits_per_character']:.3f} bits per character", flush=True)


if __name__ == "__main__":
    main()
