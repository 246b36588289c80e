"""What recipe ``wiki`` learns from a text of yours on a GPU: seeds, fp16, and one and five minutes.

``python -m benchmarks.gpu_text FILE`` trains 400 steps with three seeds in bf16 and with one in
fp16, all beside each other, since nothing is timed there; then alone for one minute and for five.
A run that is done is not made again. Kept are the curve of the seeds, as a band; how many steps
fp16 skipped, because a gradient was too large for it; and what each model writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from transformers import TrainerCallback

from benchmarks import ROOT, machine, reference
from tinytrain import callbacks, runs, steps
from tinytrain.common import write_json
from tinytrain.evaluation import bits_per_character
from tinytrain.generation import generate
from tinytrain.hardware import choose_precision, peak_memory
from tinytrain.recipes import WIKI
from tinytrain.tokenization import tokens_per_character

FOLDER = ROOT / "build" / "gpu_text"
RESULT = ROOT / "benchmarks" / "results" / "gpu_text.json"
SHORT = {"max_steps": 400, "warmup_steps": 100}
BESIDE = {f"seed {seed}": {"seed": seed, **SHORT} for seed in range(3)}
BESIDE["fp16"] = {"precision": "fp16", **SHORT}
ALONE = {"1 minute": {"hours": 1 / 60}, "5 minutes": {"hours": 5 / 60}}
RHYTHM = {"logging_steps": 10, "eval_steps": 50, "eval_blocks": 512}


class _SkippedSteps(TrainerCallback):
    """Counts the steps that the loss scaler of fp16 left out."""

    number = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.number += bool(getattr(optimizer, "step_was_skipped", False))


def train(name: str, text: str) -> None:
    """Train one of them here, and keep what is told of it."""
    recipe = replace(WIKI, corpus=text, **RHYTHM, **(BESIDE | ALONE)[name])
    tokenizer, prompts = steps.get_tokenizer(recipe), steps.get_prompts(recipe)
    blocks = steps.get_blocks(recipe)
    skipped, path = _SkippedSteps(), FOLDER / name / "history.jsonl"
    history = callbacks.HistoryCallback(path, recipe.tokens_per_step)
    watching = [*runs.time_limit(recipe), callbacks.LossGuard(), history, skipped]
    precision = choose_precision(recipe.precision).name
    trainer = runs.assemble(recipe, FOLDER / name, precision, watching, save_strategy="no")
    trainer.train()
    loss = trainer.evaluate(blocks["test"], metric_key_prefix="full")["full_loss"]
    rate = tokens_per_character(tokenizer, steps.get_split(recipe)["test"]["text"])
    lines = callbacks.read_history(path)
    tuned = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
    texts = [generate(trainer.model, tokenizer, prompt, 60, **tuned) for prompt in prompts]
    told = {
        "precision": precision,
        "tokens": lines[-1]["tokens"],
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "skipped_steps": skipped.number,
        "batch_size": trainer.args.per_device_train_batch_size,
        "memory": peak_memory() / 1e9,
        "held_out_loss": loss,
        "bits_per_character": bits_per_character(loss, rate),
        "samples": list(zip(prompts, texts, strict=True)),
    }
    write_json(FOLDER / name / "told.json", told)


def main() -> None:
    """Train what is not done, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a file, as the command line's --corpus takes it")
    parser.add_argument("--only", nargs="+", choices=[*BESIDE, *ALONE], default=[*BESIDE, *ALONE])
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        train(options.only[0], options.text)
        return
    command = [sys.executable, "-m", "benchmarks.gpu_text", options.text, "--run", "--only"]
    environment = os.environ | {"TINYTRAIN_RUNS": str(FOLDER / "runs")}
    missing = [name for name in options.only if not (FOLDER / name / "told.json").is_file()]
    for together in ([n for n in missing if n in BESIDE], *([n] for n in missing if n in ALONE)):
        started = [subprocess.Popen([*command, n], cwd=ROOT, env=environment) for n in together]
        if any([process.wait() for process in started]):
            sys.exit("a training has failed; what is done stays, the same command does the rest")
        keep(Path(options.text).name)


def keep(text: str) -> None:
    """Write what is known so far."""
    done = [name for name in (BESIDE | ALONE) if (FOLDER / name / "told.json").is_file()]
    found = {n: json.loads((FOLDER / n / "told.json").read_text(encoding="utf-8")) for n in done}
    result = {"machine": machine(), "text": text, "runs": found}
    seeds = [callbacks.read_history(FOLDER / n / "history.jsonl") for n in done if "seed" in n]
    if seeds:
        names = {"train": "loss", "held_out": "eval_loss"}
        result |= {key: reference.curve(seeds, name) for key, name in names.items()}
    write_json(RESULT, result)
    print(f"kept in {RESULT.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
