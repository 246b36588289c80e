"""One training step: tokens a second and the peak of memory, beside what others would run.

``python -m benchmarks.train_step`` trains with random tokens (their values do not matter for the
time), each contestant in a process of its own and in turns:

- the guide's model, batch 4 x 512, as the guide's code trains it and as recipe ``wiki`` does, once
  with a row for each of the 151,665 tokens and once with as many as the recipe keeps;
- the model of recipe ``pocket``, by the Trainer with its defaults, by litgpt and by
  llms-from-scratch (see ``benchmarks/peers.py``; `make benchmark` installs them) and by ours, with
  AdamW like the others, once compiled as litgpt's is, and with the recipe's own optimiser; and in
  float32, for processors without bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace

from benchmarks import ROOT, peers, save

STEPS, ROUNDS = 5, 3
PEERS_PYTHON = ROOT / "build" / "peers" / "bin" / "python"
GUIDE, POCKET = {"batch": 4, "context": 512}, {"batch": 8, "context": 256}
QUICK = {"batch": 2, "context": 64}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024}


def plain(recipe, folder: str, batch: int, context: int, accumulation: int = 1):
    """Set up the Trainer with its defaults, and the guide's collator."""
    import tokenizers
    import torch
    from transformers import (
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
        Trainer,
        TrainingArguments,
    )

    from tinytrain.modeling import recipe_config

    # The collator only asks it what padding is.
    nothing = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=nothing, pad_token="<|endoftext|>")
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=2e-5,
        max_steps=STEPS,
        bf16=torch.cuda.is_available(),  # the guide's choice; the Trainer's default is float32
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=Qwen2ForCausalLM(recipe_config(recipe)),
        args=arguments,
        train_dataset=[
            {"input_ids": row["input_ids"].tolist()}  # as datasets hands them over
            for row in _blocks(recipe, batch * accumulation, context)
        ],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def ours(recipe, folder: str, batch: int, context: int, accumulation: int = 1, fixed: bool = True):
    """Set up the Trainer as notebook 05 does."""
    from tinytrain import runs, steps
    from tinytrain.hardware import choose_precision
    from tinytrain.modeling import recipe_config

    blocks = _blocks(recipe, batch * accumulation, context)
    # Else a GPU with memory to spare gets larger batches.
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return runs.assemble(
        recipe,
        folder,
        choose_precision(recipe.precision).name,
        model=steps.get_model(recipe, recipe_config(recipe)),
        blocks={"train": blocks, "test": blocks},
        max_steps=STEPS,
        save_strategy="no",
        eval_strategy="no",
        **(sizes if fixed else {}),
    )


def compiled(recipe, folder: str, batch: int, context: int, accumulation: int = 1):
    """Set up the same with a compiled loss and layers that keep all they need, as litgpt's do."""
    from tinytrain.loss import save_loss_memory
    from tinytrain.modeling import compile_layers

    trainer = ours(replace(recipe, loss_rows=None), folder, batch, context, accumulation)
    save_loss_memory(trainer.model, recipe.loss_rows, compiled=True)
    compile_layers(trainer.model)
    return trainer


def _blocks(recipe, blocks_per_step: int, context: int):
    import numpy as np

    shape = (blocks_per_step * STEPS, context)
    ids = np.random.default_rng(0).integers(recipe.vocab_size or 151_665, size=shape)
    return [{"input_ids": row} for row in ids]


def contestants(quick: bool) -> dict:
    """Return what is measured: name, how to set it up, the recipe, batch and context."""
    from tinytrain.recipes import RECIPES

    seed, wiki, pocket = (RECIPES[name] for name in ("seed", "wiki", "pocket"))
    rows = RECIPES["qwen-0.5b"].loss_rows  # the recipe that has as many tokens
    if quick:
        seed, wiki, pocket = (replace(recipe, **TINY) for recipe in (seed, wiki, pocket))
    # Muon pays at the recipe's batch, not at one of 4 blocks; the peers use AdamW too.
    wiki = replace(wiki, optimizer="adamw")
    large, small = (QUICK, QUICK) if quick else (GUIDE, POCKET)
    float32 = replace(pocket, optimizer="adamw", precision="float32")
    return {
        "guide": (plain, seed, large),
        "all tokens": (ours, replace(wiki, vocab_size=seed.vocab_size, loss_rows=rows), large),
        "kept tokens": (ours, wiki, large),
        "Trainer": (plain, pocket, small),
        "pocket": (ours, replace(pocket, optimizer="adamw"), small),
        "pocket, compiled": (compiled, replace(pocket, optimizer="adamw"), small),
        "pocket, its optimiser": (ours, pocket, small),
        "pocket in float32": (ours, float32, small),
        "pocket in float32, compiled": (compiled, float32, small),
        "litgpt": None,
        "litgpt in float32": None,
        "llms-from-scratch": None,
    }


def measure(set_up, recipe, batch: int, context: int, accumulation: int = 1) -> dict[str, float]:
    """Train here; return the tokens a second, without the first steps, and the peak in GB."""
    from tinytrain.hardware import peak_memory
    from tinytrain.training import StepClock

    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = set_up(recipe, folder, batch, context, accumulation)
        trainer.add_callback(clock)
        trainer.train()
    # As the Trainer has it, should a setting have been lost on the way.
    tokens = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * context
    return {"tokens_per_second": tokens / clock.seconds(), "peak": peak_memory() / 1e9}


def measured_elsewhere(name: str, quick: bool) -> dict[str, float]:
    """Measure in a process of its own, with the peers' Python where it is one of theirs."""
    if name in peers.MODELS:
        from tinytrain.recipes import RECIPES

        command = [str(PEERS_PYTHON), peers.__file__, name, *peers.shape(RECIPES["pocket"])]
    else:
        command = [sys.executable, "-m", "benchmarks.train_step", "--run", name]
        command += ["--quick"] if quick else []
    shown = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(shown.stdout.splitlines()[-1])


FLOAT32 = "pocket's model in float32"
COMPARISONS = [
    # ours, peer, what is compared, goal, what it is called
    ("all tokens", "guide", "tokens_per_second", 2.5, "guide's model, all 151,665 tokens"),
    ("all tokens", "guide", "peak", 0.4, "guide's model, all 151,665 tokens"),
    ("kept tokens", "guide", "tokens_per_second", 2.5, "guide's model, wiki's vocabulary"),
    ("kept tokens", "guide", "peak", 0.4, "guide's model, wiki's vocabulary"),
    ("pocket", "Trainer", "tokens_per_second", 1.5, "pocket's model"),
    ("pocket, compiled", "litgpt", "tokens_per_second", 1.3, "pocket's model, compiled as well"),
    ("pocket", "llms-from-scratch", "tokens_per_second", 1.3, "pocket's model"),
    ("pocket, its optimiser", "Trainer", "tokens_per_second", None, "pocket's model with Muon"),
    ("pocket in float32", "Trainer", "tokens_per_second", 1.3, FLOAT32),
    ("pocket in float32", "llms-from-scratch", "tokens_per_second", 1.3, FLOAT32),
    (
        "pocket in float32, compiled",
        "litgpt in float32",
        "tokens_per_second",
        1.3,
        f"{FLOAT32}, compiled as well",
    ),
]
PEER_NAMES = {
    "guide": "the guide's code, with the repair that lets it save",
    "Trainer": "the Trainer with its defaults",
    "litgpt": "litgpt, as its pretrain does on a CPU: bf16, compiled",
    "litgpt in float32": "litgpt, compiled",
    "llms-from-scratch": "llms-from-scratch, its Llama with its training step",
}


def main() -> None:
    """Measure in turns, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, once")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        set_up, recipe, shape = contestants(options.quick)[options.run]
        print(json.dumps(measure(set_up, recipe, **shape)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contestants(options.quick)}
    for name in peers.MODELS:
        if options.quick or not PEERS_PYTHON.exists():
            print(f"{name} is left out: `make benchmark` installs it in build/peers")
            del results[name]
    for _ in range(1 if options.quick else ROUNDS):
        for name, found in results.items():
            if options.quick and name != "guide":  # a start of Python each is most of a quick look
                set_up, recipe, shape = contestants(True)[name]
                found.append(measure(set_up, recipe, **shape))
            else:
                found.append(measured_elsewhere(name, options.quick))
            print(name, found[-1], flush=True)
    rows = []
    for mine, theirs, key, goal, model in COMPARISONS:
        if theirs not in results:
            continue
        numbers = [statistics.median(r[key] for r in results[name]) for name in (mine, theirs)]
        ratio = numbers[0] / numbers[1]
        fast = key == "tokens_per_second"
        rows.append(
            {
                "measure": f"{model}: {'tokens/s' if fast else 'peak memory in GB'}",
                "ours": round(numbers[0], 2),
                "peer": round(numbers[1], 2),
                "peer_name": PEER_NAMES[theirs],
                "ratio": round(ratio, 3),
                "goal": goal,
                "met": None if goal is None else (ratio >= goal if fast else ratio <= goal),
            }
        )
    save("train_step", rows, options.quick)


if __name__ == "__main__":
    main()
