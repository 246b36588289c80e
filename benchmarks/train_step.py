"""One training step of the guide's model, as the guide's code makes it and as ours does.

``python -m benchmarks.train_step`` trains both for some steps with the Trainer, each run in a
process of its own and in turns, and compares tokens a second and the peak of memory. Batch
4 x 512, the real vocabulary, random tokens: their values do not matter for the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import ROOT, save

BATCH, CONTEXT, STEPS, ROUNDS = 4, 512, 3, 3
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def guide(folder: str, quick: bool):
    """Set up the Trainer as the guide does: its model, its collator, bf16 only on a GPU."""
    import torch
    from transformers import (
        DataCollatorForLanguageModeling,
        Qwen2ForCausalLM,
        Trainer,
        TrainingArguments,
    )

    from tinytrain.tokenization import qwen_tokenizer

    model = Qwen2ForCausalLM(_config(quick))
    tokenizer = qwen_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        max_steps=STEPS,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=_blocks(),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def ours(folder: str, quick: bool):
    """Set up the Trainer as recipe ``wiki`` does, in the precision that suits this machine."""
    from tinytrain.hardware import choose_precision
    from tinytrain.loss import save_loss_memory
    from tinytrain.modeling import build_model
    from tinytrain.recipes import RECIPES
    from tinytrain.training import build_trainer, training_arguments

    recipe = RECIPES["wiki"]
    model = build_model(_config(quick))
    save_loss_memory(model, recipe.loss_rows)
    arguments = training_arguments(
        recipe,
        folder,
        choose_precision(recipe.precision).name,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        save_strategy="no",
        eval_strategy="no",
    )
    return build_trainer(model, arguments, _blocks(), _blocks())


def _config(quick: bool):
    from tinytrain import steps
    from tinytrain.recipes import RECIPES

    config = steps.get_config(RECIPES["seed"])  # the guide's, with the repair that lets it save
    if quick:
        config.update(QUICK | {"layer_types": config.layer_types[:2]})
    return config


def _blocks():
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(0).integers(151_643, size=(BATCH * STEPS, CONTEXT))
    return Dataset.from_dict({"input_ids": ids})


def measure(name: str, quick: bool) -> dict[str, float]:
    """Train here; return the tokens a second, without the first step, and the peak in GB."""
    import torch
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = {"guide": guide, "ours": ours}[name](folder, quick)
        trainer.add_callback(Clock())
        trainer.train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"tokens_per_second": BATCH * CONTEXT / seconds, "peak": peak}


def main() -> None:
    """Measure in turns, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--run", choices=["guide", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options.quick)))
        return
    results: dict[str, list[dict[str, float]]] = {"guide": [], "ours": []}
    for _ in range(1 if options.quick else ROUNDS):
        for name, found in results.items():
            command = [sys.executable, "-m", "benchmarks.train_step", "--run", name]
            command += ["--quick"] if options.quick else []
            shown = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(shown.stdout.splitlines()[-1]))
            print(name, found[-1], flush=True)
    rows = []
    for key, what, goal, better in (
        ("tokens_per_second", "tokens/s", 2.5, lambda ratio, goal: ratio >= goal),
        ("peak", "peak memory in GB", 0.4, lambda ratio, goal: ratio <= goal),
    ):
        mine, theirs = (statistics.median(r[key] for r in results[n]) for n in ("ours", "guide"))
        rows.append(
            {
                "measure": f"guide's model, batch {BATCH} x {CONTEXT}: {what}",
                "ours": round(mine, 2),
                "peer": round(theirs, 2),
                "peer_name": "the guide's code, with the repair that lets it save",
                "ratio": round(mine / theirs, 3),
                "goal": goal,
                "met": better(mine / theirs, goal),
            }
        )
    save("train_step", rows, options.quick)


if __name__ == "__main__":
    main()
