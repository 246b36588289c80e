"""What is learned in equal time, beside what a reader would otherwise use.

``python -m benchmarks.learning --text my.jsonl`` trains recipe ``pocket`` with four layers and
models of the same shape on one text, five minutes of training each, in turns, and compares bits per
character on the held-out tenth. Every run plans its schedule from its own speed, so that a fast one
sees more text. Without ``--text`` it reads the built-in text, which is too easy to tell recipes
apart.

``--choices`` instead changes one number of the recipe at a time, which is how they were chosen;
with ``--width 512`` in a model of that width, its learning rate scaled as the recipes say.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import FOUR_LAYERS, ROOT, save
from tinytrain import runs, steps
from tinytrain.callbacks import read_history
from tinytrain.evaluation import bits_per_character
from tinytrain.recipes import RECIPES, Recipe
from tinytrain.tokenization import tokens_per_character

OURS = replace(RECIPES["pocket"], **FOUR_LAYERS)
# What both peers have in common: the Trainer's own loss and optimiser, float32 where no GPU is.
PLAIN = {"optimizer": "adamw", "precision": "float32", "loss_rows": None, "adam_beta2": 0.999}
PLAIN |= {"lr_scheduler": "cosine", "attention": "sdpa"}
PEERS = {
    # The guide's batch of 65,536 tokens would make some twenty steps in five minutes and never
    # end its warm-up; it gets our batch.
    "the guide's AdamW: 2e-5, cosine, 200 warm-up steps": PLAIN
    | {"learning_rate": 2e-5, "warmup_steps": 200, "weight_decay": 0.1},
    "AdamW at 1e-3 with cosine, 60 warm-up steps": PLAIN
    | {"learning_rate": 1e-3, "warmup_steps": 60, "weight_decay": 0.1},
}


def choices(base: Recipe) -> dict[str, dict]:
    """Return what is changed, one number at a time, and what it is then called."""
    return {
        "AdamW, 3e-3": {"optimizer": "adamw", "learning_rate": 3e-3 * 256 / base.hidden_size},
        "learning rate halved": {"learning_rate": base.learning_rate / 2},
        "learning rate doubled": {"learning_rate": base.learning_rate * 2},
        "batch halved": {"batch_size": base.batch_size // 2},
        "batch doubled": {"batch_size": base.batch_size * 2},
        "linear instead of cosine": {"lr_scheduler": "linear"},
        "no warm-up": {"warmup_steps": 0},
        "no weight decay": {"weight_decay": 0.0},
        "beta2 0.999 instead of 0.95": {"adam_beta2": 0.999},
        "float32": {"precision": "float32"},
    }


def held_out_bits(model, recipe: Recipe, blocks: int = 128) -> float:
    """Return bits per character on held-out blocks, computed in float32."""
    split, tokens = steps.get_split(recipe), steps.get_blocks(recipe)["test"]
    chosen = np.linspace(0, len(tokens) - 1, min(blocks, len(tokens))).astype(int)
    model.eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(chosen), 8):
            ids = torch.tensor(tokens[chosen[start : start + 8].tolist()]["input_ids"])
            losses.append(model(input_ids=ids, labels=ids).loss.item() * len(ids))
    rate = tokens_per_character(steps.get_tokenizer(recipe), split["test"]["text"])
    return bits_per_character(sum(losses) / len(chosen), rate)


def learn(recipe: Recipe, seconds: float) -> dict[str, float]:
    """Train for so many seconds and tell what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = runs.train_for(recipe, seconds, folder)
        last = read_history(folder)[-1]
    return {
        "bits": held_out_bits(trainer.model, recipe),
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "steps": last["step"],
    }


def show(name: str, found: dict[str, float]) -> None:
    """Print what came of a run."""
    print(
        f"{name:52} {found['bits']:.3f} bits per character after {found['seconds']:.0f} s, "
        f"{found['steps']} steps, {found['tokens_per_second']:,.0f} tokens/s",
        flush=True,
    )


def main() -> None:
    """Train all in turns, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seconds each, to see it work")
    parser.add_argument("--text", help="a file with Chinese text; see TINYTRAIN_CORPUS")
    parser.add_argument("--seconds", type=float, default=300, help="training time of each run")
    parser.add_argument("--choices", action="store_true", help="change one number at a time")
    parser.add_argument("--width", type=int, default=OURS.hidden_size, help="of the model")
    parser.add_argument("--only", nargs="*", help="these of the choices, by name")
    options = parser.parse_args()
    os.environ.setdefault("TINYTRAIN_RUNS", str(ROOT / "build" / "benchmarks"))
    base = replace(OURS, name="learning", corpus=options.text or OURS.corpus)
    if options.quick:
        base, options.seconds = replace(base, max_documents=300, vocab_size=1024), 2
    width = options.width
    base = replace(
        base,
        hidden_size=width,
        intermediate_size=OURS.intermediate_size * width // OURS.hidden_size,
        num_attention_heads=width // 64,
        learning_rate=OURS.learning_rate * OURS.hidden_size / width,
    )
    peers = choices(base) if options.choices else PEERS
    ours = learn(base, options.seconds)
    show("ours", ours)
    goals = dict(zip(PEERS, (0.75, 0.90), strict=True))
    measure = f"four layers: held-out bits per character after {options.seconds:.0f} s"
    rows = []
    for name in options.only or peers:
        found = learn(replace(base, **peers[name]), options.seconds)
        show(name, found)
        ratio = ours["bits"] / found["bits"]
        rows.append(
            {
                "measure": measure,
                "ours": round(ours["bits"], 3),
                "peer": round(found["bits"], 3),
                "peer_name": name,
                "ratio": round(ratio, 3),
                "goal": goals.get(name),
                "met": ratio <= goals[name] if name in goals else None,
                "text": Path(base.corpus).name,
                "width": width,
                "runs": {"ours": ours, "peer": found},
            }
        )
    name = f"choices-{width}" if options.choices else "learning"
    save(name, rows, options.quick)


if __name__ == "__main__":
    main()
