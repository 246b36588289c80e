"""What a training leaves in its run's folder, and the use of it.

A model is kept with what it was made from, in ``inputs.json`` beside the weights, and is not taken
for another one. This module joins the others, as `steps` does; copy from those, not from here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import export, hardware, modeling, steps, tokenization
from tinytrain.common import hash_file, hash_files, rank, read_history, write_json
from tinytrain.recipes import CHAT_FIELDS, DISPLAY_AND_SPEED_FIELDS, POCKET, RECIPES, Recipe

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainingArguments,
    )


def run_inputs(recipe: Recipe, precision: str) -> dict[str, Any]:
    """Return what decides the outcome of a training run, for `tinytrain.checkpoints.train`."""
    return {
        **recipe_inputs(recipe),
        "precision": precision,
        "text": steps.text_hash(steps.get_text(recipe)),
        "blocks": steps.blocks_hash(recipe),
        "tokenizer_fingerprint": tokenization.fingerprint(steps.get_tokenizer(recipe)),
    }


def recipe_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that decide an outcome; a text counts by its content, not by its place."""
    left_out = {"corpus", *DISPLAY_AND_SPEED_FIELDS, *CHAT_FIELDS}
    return {name: value for name, value in asdict(recipe).items() if name not in left_out}


def result_files(recipe: Recipe) -> list[Path]:
    """Return what a run leaves besides its checkpoints, which another run must not be taken for."""
    return [steps.run_folder(recipe) / name for name in ("model", "summary.json")]


def save_trained(
    recipe: Recipe,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    run: Path | None = None,
) -> Path:
    """Save a trained model, its tokenizer, and what it was made from, to ``model`` in the run.

    ``inputs`` are what `run_inputs` returned before the training; they tell `load_trained` what the
    model is. ``run`` is another folder than the recipe's. Returns the model's folder.
    """
    folder = (run or steps.run_folder(recipe)) / "model"
    if rank() == 0:
        (folder / "inputs.json").unlink(missing_ok=True)  # until all the rest is written
    trainer.save_model(str(folder))
    if rank() == 0:
        tokenizer.save_pretrained(folder)
        state, overrides = trainer.state, _overrides(inputs, trainer.args)
        _write_inputs(folder, inputs, state.global_step, state.max_steps, overrides)
    return folder


def _write_inputs(
    folder: Path, inputs: dict[str, Any], step: int, max_steps: int, overrides: dict | None = None
) -> None:
    files = {n: value for n, value in hash_files(folder).items() if n != "inputs.json"}
    made = {"inputs": inputs, "overrides": overrides or {}, "step": step, "max_steps": max_steps}
    write_json(folder / "inputs.json", {**made, "files": files})


def _overrides(inputs: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Return the fields of the recipe for which the Trainer was given other values."""
    names = ("learning_rate", "warmup_steps", "weight_decay", "adam_beta2", "seed")
    given = {name: getattr(args, name) for name in names}
    if not inputs["hours"]:  # then there is a number of steps
        given |= {"max_steps": args.max_steps, "epochs": args.num_train_epochs}
        given["lr_scheduler"] = args.lr_scheduler_type.value
    accumulation = args.gradient_accumulation_steps
    blocks = args.train_batch_size * accumulation * args.world_size
    if blocks != inputs["batch_size"] * inputs["gradient_accumulation"]:
        given |= {"batch_size": args.train_batch_size, "gradient_accumulation": accumulation}
    return {name: value for name, value in given.items() if value != inputs[name]}


def weights_hash(folder: Path) -> str:
    """Return a hash of the weights in a folder and of their tokenizer."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"]
    return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()[:16]


def is_trained(recipe: Recipe) -> bool:
    """Tell whether the run has an undamaged model, finished or stopped, of these inputs."""
    folder = steps.run_folder(recipe) / "model"
    made = steps.read_inputs(folder)
    damaged = made is None or steps.find_damage(folder)
    return not damaged and not differences(made, run_inputs(recipe, ""))


def differences(made: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    """Return the names of inputs that a model was not made from; its precision may be any."""
    kept = made["inputs"]
    inputs = json.loads(json.dumps(inputs))  # as they were read back
    return [n for n in inputs if n != "precision" and kept.get(n) != inputs[n]]


def trained_recipe(recipe: Recipe, asked: Collection[str] | None = None) -> Recipe:
    """Return the recipe that the model in a run's folder was trained with.

    The model must agree with the given recipe in the fields ``asked``, by default all that decide
    an outcome; the others are taken from the model. A FileNotFoundError says that there is no
    model, a ValueError that it is damaged or was made from something else.
    """
    folder = steps.run_folder(recipe) / "model"
    again = f"`{shell_command(recipe)}`"
    made = steps.read_inputs(folder)
    if made is None and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no trained model in {folder}: notebook 05 makes one, or {again}"
        )
    if damaged := steps.find_damage(folder):
        raise ValueError(
            f"{folder / damaged} is missing or damaged: {again} makes the model again, in "
            "seconds if its last checkpoint is good"
        )
    inputs = recipe_inputs(recipe)
    if recipe.corpus == "encyclopedia":  # the Wikipedia is one file; your own text has its folder
        inputs["text"] = steps.text_hash(steps.get_text(recipe))
    changed = [n for n in differences(made, inputs) if asked is None or n in {"text", *asked}]
    if changed:
        other = ", ".join(f"{name}={made['inputs'].get(name)}" for name in changed)
        raise ValueError(
            f"the model in {folder.parent} was trained with {other}, and that is not what is asked "
            f"for: leave the change out, or train such a model with {again}"
        )
    known = {n: made["inputs"].get(n) for n in recipe_inputs(recipe) if n != "precision"}
    return replace(recipe, **known)


def check_held_out(recipe: Recipe, folder: Path) -> None:
    """Raise a ValueError if a model was trained on documents that the recipe holds out."""
    made = steps.read_inputs(folder)
    if made and made["inputs"]["text"] == steps.text_hash(steps.get_text(recipe)):
        for name in ("max_documents", "test_size", "split_seed"):
            kept = made["inputs"][name]
            if kept != getattr(recipe, name):
                raise ValueError(
                    f"{folder} was trained with {name}={kept}: documents that are held out here "
                    f"were in its training set. Add --set {name}={kept}"
                )


def shell_command(recipe: Recipe, step: str = "train") -> str:
    """Return the command of a step, with all in which the recipe differs from its original."""
    plain = RECIPES.get(recipe.name, recipe)
    planned = recipe.name.startswith("hours-")
    named = recipe.name.replace("hours-", "--hours ") if planned else f"--recipe {recipe.name}"
    command = f"python -m tinytrain {step} {named}"
    if recipe.corpus != (POCKET.corpus if planned else plain.corpus):
        command += f" --corpus {shlex.quote(recipe.corpus)}"
    changed = [n for n, value in asdict(recipe).items() if value != getattr(plain, n)]
    values = [f"{n}={getattr(recipe, n)}" for n in changed if n not in ("name", "corpus")]
    command += f" --set {shlex.join(values)}" if values else ""
    if runs := os.environ.get("TINYTRAIN_RUNS"):
        command += f" --runs {shlex.quote(runs)}"
    return command


def load_trained(
    recipe: Recipe, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a saved model, in float32 and on the GPU if there is one, and its tokenizer.

    By default it is that of the recipe's run, as in `trained_recipe`, with the same errors.
    """
    import torch

    if folder is None:
        trained_recipe(recipe)
        folder = steps.run_folder(recipe) / "model"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = modeling.load_model(folder).to(device)
    return model, tokenization.load_tokenizer(folder)


def load_tuned(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the run's model that was tuned on conversations, whatever it was tuned from.

    A FileNotFoundError says that there is none, or that it is damaged.
    """
    folder = steps.chat_folder(recipe) / "model"
    if damaged := steps.find_damage(folder):
        raise FileNotFoundError(
            f"there is no model to talk to: {folder / damaged} is missing or damaged. "
            f"`{shell_command(recipe, 'tune')}` makes one"
        )
    return load_trained(recipe, folder)


def save_summary(recipe: Recipe, **values: Any) -> None:
    """Write the results of a run, which JSON can hold, to ``summary.json`` in its folder."""
    folder = steps.run_folder(recipe)
    facts = {"recipe": recipe.name, "corpus": recipe.corpus, "machine": hardware.machine_name()}
    step = (steps.read_inputs(folder / "model") or {}).get("step")  # of the model it tells about
    write_json(folder / "summary.json", {**facts, "step": step, **values})


def _run_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what the folder of a run tells about it, for the model card."""
    folder = steps.run_folder(recipe)
    made = steps.read_inputs(folder / "model")
    split = steps.get_split(recipe)
    own = "byte-level byte pairs, trained on the text"
    kind = own if recipe.tokenizer == "own" else "Qwen2.5's"
    if steps.is_reduced(recipe):
        kind += ", reduced to the tokens that the text uses most"
    facts: dict[str, Any] = {
        **_summary(folder, made),
        "name": f"tinytrain-{folder.name}",
        "text": recipe.corpus,
        "documents": (len(split["train"]), len(split["test"])),
        "tokenizer": kind,
        "vocab_size": len(steps.get_tokenizer(recipe)),
        "recipe": {n: v for n, v in recipe_inputs(recipe).items() if n != "name"}
        | made.get("overrides", {}),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if made["step"] < made["max_steps"]:
        facts["stopped"] = f"{made['step']:,} of {made['max_steps']:,}"
    if (folder / "history.jsonl").is_file():
        for line in read_history(folder):
            if line.get("step", 0) <= made["step"]:  # it may have gone on since
                facts |= {name: line[name] for name in ("seconds", "tokens") if name in line}
    return facts


def _summary(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of this model; nothing if that is missing or of another step."""
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if summary.pop("step", None) == made["step"]:
            return summary
    return {}


def _chat_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what the folder of a run tells about its tuned model, for the model card."""
    run, tuned = steps.run_folder(recipe), steps.chat_folder(recipe)
    made, base = (steps.read_inputs(folder / "model") for folder in (tuned, run))
    facts: dict[str, Any] = {"name": f"tinytrain-{run.name}"}
    if base and made["inputs"]["base"] == weights_hash(run / "model"):  # not another model
        facts = _run_facts(trained_recipe(recipe, ()))
        for name in ("held_out_loss", "bits_per_character", "cloze_after", "completions"):
            facts.pop(name, None)  # before the tuning
    return facts | _summary(tuned, made) | {"name": f"{facts['name']}-chat"}


def export_run(
    recipe: Recipe, dtype: str = "float32", gguf: bool = False, chat: bool = False, **facts: Any
) -> Path:
    """Export the trained model of a run to ``export`` in its folder, and return that path.

    ``gguf`` adds ``model.gguf``; ``chat`` exports the model that was tuned on conversations, to
    ``export-chat``; ``facts`` are for the card: what the run's folder does not hold, or holds
    wrongly. See `tinytrain.export.export_model` for ``dtype``.
    """
    run = steps.run_folder(recipe)
    model, tokenizer = load_tuned(recipe) if chat else load_trained(recipe)
    facts = {**(_chat_facts(recipe) if chat else _run_facts(recipe)), **facts}
    finish = None
    if gguf:
        from tinytrain.gguf_file import write_gguf

        facts["gguf"] = "model.gguf"
        finish = partial(write_gguf, name=facts["name"])
    made = steps.chat_folder(recipe) if chat else run
    files = (made / "loss.png", made / "history.jsonl")
    target = run / ("export-chat" if chat else "export")
    return export.export_model(model, tokenizer, target, facts, dtype, files, finish)
