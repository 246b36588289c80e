"""What learners ask about the hyperparameters of a run, answered by changing one of them at a time.

``python -m benchmarks.questions --text my.jsonl`` trains recipe ``pocket`` with four layers, each
time in a process of its own:

- context: 64 to 1,024 tokens, always 2,048 a step, and what of the text whole chunks of that length
  (the guide's, with Qwen2.5's tokenizer) would keep;
- heads: 4, 8 and 16 at the guide's width of 512, and 8 once more with another seed, which shows how
  large a difference has to be to mean something;
- rate: AdamW from the guide's 2e-5 upwards, and Muon at a quarter, once and four times ours;
- vocabulary: vocabularies of its own of three sizes, for equal time instead of equal steps, since a
  small one needs more tokens for the same text.

Without ``--text`` it reads the built-in text. ``python -m benchmarks`` writes what came of it into
docs/questions.md and its Chinese edition.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import FOUR_LAYERS, ROOT, save
from tinytrain.recipes import RECIPES, Recipe

STEPS, WIDE_STEPS, SECONDS = 200, 100, 60
OURS = {"context": "256", "heads": "8", "rate": "Muon 0.008", "vocabulary": "4096"}


def variants(text: str | None, quick: bool) -> dict[str, dict[str, Recipe]]:
    """Return the recipes to compare: by question, then by the value that is asked about."""
    corpus = text or "encyclopedia"
    # Some five million characters of prose: more than any of these runs reads.
    base = replace(RECIPES["pocket"], **FOUR_LAYERS, name="questions", corpus=corpus)
    base = replace(base, max_documents=1200)
    if quick:
        base = replace(base, max_documents=300, vocab_size=1024)
    wide = replace(base, hidden_size=512, intermediate_size=1536, learning_rate=4e-3)
    adamw = {rate: replace(base, optimizer="adamw", learning_rate=rate) for rate in
             (2e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}  # fmt: skip
    muon = {rate: replace(base, learning_rate=rate) for rate in (2e-3, 8e-3, 3.2e-2)}
    heads = {str(n): replace(wide, num_attention_heads=n, num_key_value_heads=n // 4) for n in
             (4, 8, 16)}  # fmt: skip
    found = {
        # Each length and each vocabulary keeps its blocks in a folder of its own.
        "context": {
            str(n): replace(base, name=f"context-{n}", context_length=n, batch_size=2048 // n)
            for n in (64, 128, 256, 512, 1024)
        },
        "heads": heads | {"8, another seed": replace(heads["8"], seed=43)},
        "rate": {f"AdamW {rate:g}": recipe for rate, recipe in adamw.items()}
        | {f"Muon {rate:g}": recipe for rate, recipe in muon.items()},
        "vocabulary": {
            str(n): replace(base, name=f"vocabulary-{n}", vocab_size=n)
            for n in (1024, 4096, 16_384)
        },
    }
    if quick:  # two questions; ours, and one beside it
        found = {question: found[question] for question in ("context", "vocabulary")}
        for question, recipes in found.items():
            other = next(value for value in recipes if value != OURS[question])
            found[question] = {value: recipes[value] for value in (OURS[question], other)}
    return found


def measure(question: str, recipe: Recipe, quick: bool) -> dict[str, float]:
    """Train here and tell what came of it."""
    from benchmarks.learning import held_out_bits
    from tinytrain import runs, steps
    from tinytrain.callbacks import read_history
    from tinytrain.hardware import peak_memory
    from tinytrain.qwen import qwen_tokenizer
    from tinytrain.tokenization import chunk_documents, tokens_per_character

    split = steps.get_split(recipe)
    steps.get_blocks(recipe)
    with tempfile.TemporaryDirectory() as folder:
        peak_memory(reset=True)
        if question == "vocabulary":
            trainer = runs.train_for(recipe, 2 if quick else SECONDS, folder)
        else:
            number = WIDE_STEPS if question == "heads" else STEPS
            trainer = runs.train_steps(recipe, 4 if quick else number, folder)
        peak, last = peak_memory() / 1e9, read_history(folder)[-1]
    kept = {}
    if question == "context":
        sample = split["train"].select(range(min(len(split["train"]), 2000)))
        qwen, length = qwen_tokenizer(), recipe.context_length
        tokens = sum(map(len, qwen(sample["text"][:])["input_ids"]))
        kept = {"kept_by_chunks": len(chunk_documents(sample, qwen, length)) * length / tokens}
    return kept | {
        "bits": held_out_bits(trainer.model, recipe),
        "tokens_per_second": last["tokens"] / last["seconds"],
        "peak": peak,
        "steps": last["step"],
        "parameters": trainer.model.num_parameters(),
        "tokens_per_character": tokens_per_character(
            steps.get_tokenizer(recipe), split["test"]["text"]
        ),
    }


def main() -> None:
    """Train all, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps each, to see it work")
    parser.add_argument("--text", help="a file with Chinese text; see TINYTRAIN_CORPUS")
    parser.add_argument("--only", nargs="*", help="these of the questions")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TINYTRAIN_RUNS", str(ROOT / "build" / "benchmarks"))
    asked = variants(options.text, options.quick)
    if options.run:
        question, value = options.run
        print(json.dumps(measure(question, asked[question][value], options.quick)))
        return
    rows = []
    for question in options.only or asked:
        found = {}
        for value in asked[question]:
            command = [sys.executable, "-m", "benchmarks.questions", *sys.argv[1:]]
            command += ["--run", question, value]
            shown = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found[value] = json.loads(shown.stdout.splitlines()[-1])
            print(question, value, found[value], flush=True)
        ours = found[OURS[question]]
        rows += [
            {
                "measure": f"{question}: held-out bits per character",
                "ours": round(ours["bits"], 3),
                "peer": round(found[value]["bits"], 3),
                "peer_name": value,
                "ratio": round(ours["bits"] / found[value]["bits"], 3),
                "goal": None,
                "met": None,
                "question": question,
                "text": Path(options.text or "encyclopedia").name,
                "run": found[value],
            }
            for value in found
        ]
    save("questions", rows, options.quick)


if __name__ == "__main__":
    main()
