"""A run, put together once: blocks, model, optimiser, hyperparameters and callbacks.

Notebook 05 shows cell by cell what `train_recipe` does. `assemble` serves whatever else trains:
the probe that measures a few steps, short runs that compare hyperparameters, the benchmarks.

This module joins the others, as `steps` does; copy from those, not from here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import evaluation, export, generation, modeling, qwen, steps, tokenization
from tinytrain.common import hash_files, rank, setup_logging, world_size, write_json
from tinytrain.recipes import DISPLAY_AND_SPEED_FIELDS, RECIPES, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

    from tinytrain.hardware import Precision

logger = logging.getLogger(__name__)


def assemble(
    recipe: Recipe,
    folder: str | Path,
    precision: str,
    callbacks: Iterable[TrainerCallback] = (),
    model: PreTrainedModel | None = None,
    blocks: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """Put a run together, ready for its ``train()``.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters of the run.
    folder : str or Path
        Where checkpoints go.
    precision : {"float32", "bf16", "fp16"}
        What the matrix products are computed in.
    callbacks : iterable of transformers.TrainerCallback
        For example those of `watch`.
    model : transformers.PreTrainedModel, optional
        By default that of `tinytrain.steps.get_model`.
    blocks : mapping, optional
        ``train`` and ``test``; by default those of `tinytrain.steps.get_blocks`, of which an
        evaluation measures ``recipe.eval_blocks``.
    **arguments
        For ``transformers.TrainingArguments``, in place of what the recipe says.

    Returns
    -------
    transformers.Trainer
    """
    from tinytrain import training

    if blocks is None:
        blocks = steps.get_blocks(recipe)
        few = min(len(blocks["test"]), recipe.eval_blocks or len(blocks["test"]))
        blocks = {"train": blocks["train"], "test": blocks["test"].select(range(few))}
    return training.build_trainer(
        model or steps.get_model(recipe),
        training.training_arguments(recipe, folder, precision, **arguments),
        blocks["train"],
        blocks["test"],
        callbacks,
        make_optimizer=get_optimizer(recipe),
    )


def watch(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    tokens_per_step: int | None = None,
) -> list[TrainerCallback]:
    """Return the callbacks of notebook 05.

    The run's folder gets ``history.jsonl``, ``samples.jsonl`` and ``loss.png``; a file ``STOP`` in
    it ends the run. ``tokens_per_step`` counts all processes; by default it is the recipe's.
    """
    from tinytrain import callbacks
    from tinytrain.checkpoints import last_checkpoint

    tokens = tokens_per_step or recipe.tokens_per_step
    metadata = {"vocab_size": vocab_size, "name": recipe.name}
    reference = steps.reference_curve(recipe)
    write = partial(generation.complete, tokenizer=tokenizer, max_new_tokens=10)
    prompts, every = steps.get_prompts(recipe)[:2], recipe.sample_steps
    return [
        callbacks.LossGuard(tokenizer=tokenizer, find_checkpoint=last_checkpoint),
        callbacks.HistoryCallback(folder / "history.jsonl", tokens, **metadata),
        callbacks.VerboseTrainingCallback(tokens),
        callbacks.LivePlotCallback(folder / "loss.png", vocab_size, tokens, reference),
        callbacks.SampleCallback(write, prompts, every, folder / "samples.jsonl"),
        callbacks.StopCallback(folder / "STOP"),
    ]


def get_optimizer(recipe: Recipe) -> Callable[..., Any] | None:
    """Return what makes the optimiser of a recipe, for `tinytrain.training.build_trainer`.

    None stands for the Trainer's own AdamW. The hyperparameters come from the Trainer's arguments.
    """
    if recipe.optimizer == "adamw":
        return None

    def make(model: Any, arguments: Any) -> Any:
        import torch

        from tinytrain.optimizer import muon_adamw

        return muon_adamw(
            model,
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        )

    return make


def probe(recipe: Recipe, precision: str, steps: int = 6) -> tuple[float, int]:
    """Train for a few real steps, to correct `tinytrain.costs.estimate`; keep nothing.

    Parameters
    ----------
    recipe : Recipe
        The recipe of the run.
    precision : {"float32", "bf16", "fp16"}
        What it will be trained in.
    steps : int
        Steps to make, three at least: the first two are slower and not counted.

    Returns
    -------
    step_seconds : float
        The median time of a step.
    peak_memory : int
        The most bytes in use meanwhile; see `tinytrain.hardware.peak_memory`.
    """
    import tempfile

    from tinytrain import hardware, training

    clock = training.StepClock()
    with tempfile.TemporaryDirectory() as folder:
        short = {"max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
        trainer = assemble(recipe, folder, precision, [clock], **short)
        hardware.peak_memory(reset=True)
        trainer.train()
    return clock.seconds(), hardware.peak_memory()


def train_for(recipe: Recipe, seconds: float, folder: str | Path) -> Trainer:
    """Train a fresh model for about so many seconds, to compare recipes at equal time.

    A probe tells how many steps fit in; the rest is as in `train_steps`.
    """
    from tinytrain.hardware import choose_precision

    step_seconds, _ = probe(recipe, choose_precision(recipe.precision).name)
    return train_steps(recipe, max(2, round(seconds / step_seconds)), folder)


def train_steps(recipe: Recipe, number: int, folder: str | Path) -> Trainer:
    """Train a fresh model for so many steps, to compare recipes at equal work.

    The learning rate reaches its end in the last step; a warm-up takes at most a tenth of them.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters; its ``max_steps`` and ``epochs`` are not used.
    number : int
        Steps to train.
    folder : str or Path
        Gets ``history.jsonl``; nothing else is kept.

    Returns
    -------
    transformers.Trainer
        Its ``model`` is trained; its ``evaluate()`` returns the held-out loss.
    """
    from tinytrain.callbacks import HistoryCallback, LossGuard
    from tinytrain.hardware import choose_precision

    recipe = replace(
        recipe,
        max_steps=number,
        warmup_steps=min(recipe.warmup_steps, number // 10),
        logging_steps=max(1, number // 50),
        eval_blocks=recipe.eval_blocks or 64,
    )
    model = steps.get_model(recipe)
    metadata = {"vocab_size": model.config.vocab_size, "name": recipe.name}
    history = HistoryCallback(Path(folder) / "history.jsonl", recipe.tokens_per_step, **metadata)
    precision = choose_precision(recipe.precision).name
    watching = [LossGuard(), history]
    rhythm = {"eval_steps": number, "save_strategy": "no"}
    trainer = assemble(recipe, folder, precision, watching, model, **rhythm)
    trainer.train()
    return trainer


def _share_recipe(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe of one of several processes that make each optimiser step together.

    Per-device batch and accumulation become smaller, so that a step learns from the same blocks as
    in one process, and the same hyperparameters lead to the same result. Where the blocks of a
    step cannot be shared out evenly, there are a few more of them.

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> mine = _share_recipe(RECIPES["wiki"], 2)  # 16 blocks, 4 times
    >>> mine.batch_size, mine.gradient_accumulation
    (16, 2)
    >>> mine = _share_recipe(RECIPES["pocket"], 2)  # 8 blocks, once
    >>> mine.batch_size, mine.gradient_accumulation
    (4, 1)
    """
    blocks = math.ceil(recipe.batch_size * recipe.gradient_accumulation / processes)
    sizes = range(1, min(recipe.batch_size, blocks) + 1)
    batch_size = max(size for size in sizes if blocks % size == 0)
    return replace(recipe, batch_size=batch_size, gradient_accumulation=blocks // batch_size)


def train_recipe(recipe: Recipe, fresh: bool = False, fsdp: bool = False) -> dict[str, Any]:
    """Train as notebook 05 does, cell by cell, in one process or in several.

    ``torchrun``, ``accelerate launch`` and, in a notebook, ``accelerate.notebook_launcher`` start
    the processes; each calls this function. A step learns from the same blocks however many
    processes share it, so a run may go on with another number of them. All read and write one
    folder. Only the first process writes and logs.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters of the run, as for one process; see `_share_recipe`.
    fresh : bool
        Start over even though there is something to go on from; the earlier run is kept aside.
    fsdp : bool
        Give each process only a part of the weights (PyTorch's FSDP), for a model that is too
        large for one GPU. Needs several processes.

    Returns
    -------
    dict
        ``finished`` tells whether the run came to its end. If so, the first process adds what it
        writes to ``summary.json``. The model and its tokenizer are in ``model`` in the run's
        folder, be it finished or stopped.

    Raises
    ------
    ValueError
        If ``fsdp`` is asked of a single process.
    """
    import torch

    from tinytrain.checkpoints import train

    # `accelerate launch --use_fsdp` says it so.
    fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp and world_size() == 1:
        raise ValueError(
            "FSDP shares a model out to several processes and here is one: start them with "
            "`torchrun --standalone --nproc-per-node 2 -m tinytrain train --fsdp`"
        )
    folder = steps.run_folder(recipe)
    if rank() == 0:
        setup_logging(folder / "training.log")
    # Before the processes are connected: however long it takes, no connection can time out.
    tokenizer = steps.get_tokenizer(recipe)
    blocks = steps.get_blocks(recipe, tokenizer)
    model = steps.get_model(recipe, steps.get_config(recipe, tokenizer))
    precision = _choose_precision(recipe, fresh)
    questions = steps.get_questions(recipe)
    before = _share_right(model, tokenizer, questions) if rank() == 0 else None

    mine = _share_recipe(recipe, world_size())
    tokens = mine.tokens_per_step * world_size()
    if world_size() > 1:
        logger.info(
            "%d processes share each step: %d x %d blocks each, %s tokens in all%s",
            world_size(),
            mine.gradient_accumulation,
            mine.batch_size,
            f"{tokens:,}",
            "" if tokens == recipe.tokens_per_step else f" (alone: {recipe.tokens_per_step:,})",
        )
    watching = watch(recipe, folder, tokenizer, model.config.vocab_size, tokens)
    arguments = {"fsdp": True} if fsdp else {}
    trainer = assemble(mine, folder / "checkpoints", precision, watching, model, **arguments)
    inputs, untrained = run_inputs(recipe, precision), partial(steps.get_model, recipe)
    train(trainer, inputs, fresh, recipe.halve_batch, untrained, run_results(recipe))

    save_trained(recipe, trainer, tokenizer, inputs)
    result = {"finished": trainer.state.global_step >= trainer.state.max_steps}
    if result["finished"]:
        loss = trainer.evaluate(blocks["test"], metric_key_prefix="full")["full_loss"]
        if rank() == 0:
            known = {"finished": True, "precision": precision}
            known |= {"cloze_before": before} if questions else {}
            result = _measure(recipe, tokenizer, loss, **known)
    # Or NCCL complains at the end. Gloo does not, and were it to go before the model that uses it,
    # the process might never end: PyTorch 2.13 then waits for a thread which waits for Python.
    if world_size() > 1 and "nccl" in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()
    return result


def _measure(recipe: Recipe, tokenizer: Any, held_out_loss: float, **known: Any) -> dict[str, Any]:
    """Measure the saved model of a finished run and write its summary."""
    from tinytrain.callbacks import read_history

    model, _ = load_trained(recipe)
    prompts, questions = steps.get_prompts(recipe), steps.get_questions(recipe)
    losses = [line["loss"] for line in read_history(steps.run_folder(recipe)) if "loss" in line]
    last = losses[-10:]
    texts = steps.get_split(recipe)["test"]["text"]
    rate = tokenization.tokens_per_character(tokenizer, texts)
    completions = generation.complete(model, tokenizer, prompts, 12)
    values = {
        "parameters": model.num_parameters(),
        "train_loss": sum(last) / len(last) if last else None,
        "held_out_loss": held_out_loss,
        "bits_per_character": evaluation.bits_per_character(held_out_loss, rate),
        "completions": list(zip(prompts, completions, strict=True)),
        **known,
    }
    if questions:
        values["cloze_after"] = _share_right(model, tokenizer, questions)
    save_summary(recipe, **values)
    return values


def _share_right(model: Any, tokenizer: Any, questions: list[Any]) -> float:
    return generation.accuracy(generation.answer_questions(model, tokenizer, questions))


def choose_precision(recipe: Recipe) -> Precision:
    """Return what to compute a run in: as before, if it goes on and this machine can do that."""
    from tinytrain import checkpoints, hardware

    checkpoint = checkpoints.last_checkpoint(steps.run_folder(recipe) / "checkpoints")
    kept = checkpoints.recorded_precision(checkpoint) if checkpoint else None
    if recipe.precision is None and kept and hardware.computes(kept):
        return hardware.Precision(kept, f"{checkpoint.name} was computed in it")
    return hardware.choose_precision(recipe.precision)


def _choose_precision(recipe: Recipe, fresh: bool) -> str:
    """Return the same precision in all processes."""
    import torch

    from tinytrain import hardware

    chosen = hardware.choose_precision(recipe.precision) if fresh else choose_precision(recipe)
    name = chosen.name
    if world_size() > 1 and not torch.accelerator.is_available():
        # On a processor the choice is measured, and may come out differently in each process.
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState(cpu=True)
        name = broadcast_object_list([name])[0]
    return name


def run_inputs(recipe: Recipe, precision: str) -> dict[str, Any]:
    """Return what decides the outcome of a training run, for `tinytrain.checkpoints.train`."""
    return {
        **_recipe_inputs(recipe),
        "precision": precision,
        "text": steps.text_hash(steps.get_text(recipe)),
        "blocks": steps.blocks_hash(recipe),
        "tokenizer_fingerprint": tokenization.fingerprint(steps.get_tokenizer(recipe)),
    }


def _recipe_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that decide an outcome; a text counts by its content, not by its place."""
    left_out = {"corpus", *DISPLAY_AND_SPEED_FIELDS}
    return {name: value for name, value in asdict(recipe).items() if name not in left_out}


def run_results(recipe: Recipe) -> list[Path]:
    """Return what a run leaves besides its checkpoints, which another run must not be taken for."""
    return [steps.run_folder(recipe) / name for name in ("model", "summary.json")]


def save_trained(
    recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any]
) -> Path:
    """Save a trained model, its tokenizer, and what it was made from, to ``model`` in the run.

    Parameters
    ----------
    recipe : Recipe
        Whose folder is used.
    trainer : transformers.Trainer
        With the model, trained to its end or stopped.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    inputs : dict
        What `run_inputs` returned before the training. They go into ``inputs.json``, with the step
        that was reached and hashes of the files, and tell `load_trained` what the model is.

    Returns
    -------
    Path
        The folder.
    """
    folder = steps.run_folder(recipe) / "model"
    if rank() == 0:
        (folder / "inputs.json").unlink(missing_ok=True)  # until all the rest is written
    trainer.save_model(str(folder))
    if rank() == 0:
        tokenizer.save_pretrained(folder)
        _write_inputs(folder, inputs, trainer.state.global_step, trainer.state.max_steps)
    return folder


def _write_inputs(folder: Path, inputs: dict[str, Any], step: int, max_steps: int) -> None:
    files = {n: value for n, value in hash_files(folder).items() if n != "inputs.json"}
    made = {"inputs": inputs, "step": step, "max_steps": max_steps, "files": files}
    write_json(folder / "inputs.json", made)


def get_trained(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the trained model of a recipe and its tokenizer; train it if there is none.

    A model trained from other inputs, a changed recipe for example, is not taken for it. One whose
    training was stopped early is. The model is in float32, on the GPU if there is one.
    """
    folder = steps.run_folder(recipe) / "model"
    made = steps.read_inputs(folder)
    if not made or steps.find_damage(folder) or _differences(made, run_inputs(recipe, "")):
        logger.info("there is no trained model of recipe %s yet: training it now", recipe.name)
        train_recipe(recipe)
    return load_trained(recipe)


def _differences(made: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    """Return the names of inputs that a model was not made from.

    The precision is none of them: it depends on the machine, and a model may come from another.
    """
    kept = made["inputs"]
    inputs = json.loads(json.dumps(inputs))  # as they were read back
    return [n for n in inputs if n != "precision" and kept.get(n) != inputs[n]]


def trained_recipe(recipe: Recipe, asked: Collection[str] | None = None) -> Recipe:
    """Return the recipe that the model in a run's folder was trained with.

    Parameters
    ----------
    recipe : Recipe
        Tells the folder, and what must be true of the model.
    asked : collection of str, optional
        The fields in which the model must agree with the recipe; by default all that decide an
        outcome. The others are taken from the model.

    Returns
    -------
    Recipe

    Raises
    ------
    FileNotFoundError
        If there is no model.
    ValueError
        If the model is incomplete or damaged, or was made from something else.
    """
    folder = steps.run_folder(recipe) / "model"
    again = f"`{_training_command(recipe)}`"
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
    inputs = _recipe_inputs(recipe)
    if recipe.corpus == "encyclopedia":  # the Wikipedia is one file; your own text has its folder
        inputs["text"] = steps.text_hash(steps.get_text(recipe))
    changed = [n for n in _differences(made, inputs) if asked is None or n in {"text", *asked}]
    if changed:
        other = ", ".join(f"{name}={made['inputs'].get(name)}" for name in changed)
        raise ValueError(
            f"the model in {folder.parent} was trained with {other}, and that is not what is asked "
            f"for: leave the change out, or train such a model with {again}"
        )
    known = {n: made["inputs"].get(n) for n in _recipe_inputs(recipe) if n != "precision"}
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


def _training_command(recipe: Recipe) -> str:
    """Return the command that trains a recipe, with all that differs from the recipe's own."""
    plain = RECIPES.get(recipe.name, recipe)
    command = f"python -m tinytrain train --recipe {recipe.name}"
    if recipe.corpus != plain.corpus:
        command += f" --corpus {shlex.quote(recipe.corpus)}"
    changed = [n for n, value in asdict(recipe).items() if value != getattr(plain, n)]
    values = [f"{n}={getattr(recipe, n)}" for n in changed if n not in ("name", "corpus")]
    command += f" --set {' '.join(values)}" if values else ""
    if runs := os.environ.get("TINYTRAIN_RUNS"):
        command += f" --runs {shlex.quote(runs)}"
    return command


def load_trained(
    recipe: Recipe, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a saved model, in float32 and on the GPU if there is one, and its tokenizer.

    By default it is the one that notebook 05 or `train_recipe` has saved in the recipe's run.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged or was trained with another recipe; see `trained_recipe`.
    """
    import torch

    if folder is None:
        trained_recipe(recipe)
        folder = steps.run_folder(recipe) / "model"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = modeling.load_model(folder).to(device)
    return model, tokenization.load_tokenizer(folder)


def save_summary(recipe: Recipe, **values: Any) -> None:
    """Write the results of a run, which JSON can hold, to ``summary.json`` in its folder."""
    from tinytrain.hardware import machine_name

    folder = steps.run_folder(recipe)
    facts = {"recipe": recipe.name, "corpus": recipe.corpus, "machine": machine_name()}
    step = (steps.read_inputs(folder / "model") or {}).get("step")  # of the model it tells about
    write_json(folder / "summary.json", {**facts, "step": step, **values})


def _run_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what the folder of a run tells about it, for the model card.

    A run without ``summary.json`` or ``history.jsonl`` has fewer facts.
    """
    from importlib.metadata import version

    from tinytrain.callbacks import read_history

    folder = steps.run_folder(recipe)
    made = steps.read_inputs(folder / "model")
    tokenizer, split = steps.get_tokenizer(recipe), steps.get_split(recipe)
    if recipe.tokenizer == "own":
        kind = "byte-level byte pairs, trained on the text"
    else:
        kind = "Qwen2.5's"
        if steps.is_reduced(recipe):
            kind += ", reduced to the tokens that the text uses most"
    left_out = {"name", "corpus", *DISPLAY_AND_SPEED_FIELDS}
    facts: dict[str, Any] = {
        "name": f"tinytrain-{folder.name}",
        "text": recipe.corpus,
        "documents": (len(split["train"]), len(split["test"])),
        "tokenizer": kind,
        "vocab_size": len(tokenizer),
        "recipe": {name: value for name, value in asdict(recipe).items() if name not in left_out},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if made["step"] < made["max_steps"]:
        facts["stopped"] = f"{made['step']:,} of {made['max_steps']:,}"
    if (folder / "history.jsonl").is_file():
        for line in read_history(folder):
            if line.get("step", 0) <= made["step"]:  # it may have gone on since
                facts |= {name: line[name] for name in ("seconds", "tokens") if name in line}
    with suppress(OSError, ValueError):  # a summary that is missing or damaged
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if summary.pop("step", None) == made["step"]:
            facts |= {name: summary[name] for name in summary if name not in ("recipe", "corpus")}
    return facts


def export_run(
    recipe: Recipe,
    dtype: str = "float32",
    gguf: bool = False,
    whole_vocabulary: bool = False,
    **facts: Any,
) -> Path:
    """Export the trained model of a run to ``export`` in its folder.

    Parameters
    ----------
    recipe : Recipe
        The recipe of a run whose model notebook 05 has saved.
    dtype : {"float32", "bfloat16"}
        Number format of the weights.
    gguf : bool
        Add ``model.gguf``; see `tinytrain.gguf_file.write_gguf`.
    whole_vocabulary : bool
        For a reduced Qwen2.5 vocabulary: give the model all tokens again, so that it works with
        Qwen2.5's own tokenizer; see `tinytrain.modeling.expand_vocabulary`. Goes to
        ``export-whole``.
    **facts
        For the card: what the run's folder does not hold, or holds wrongly.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If there is no trained model.
    ValueError
        If it was trained with another recipe, or if ``whole_vocabulary`` is asked for and the
        vocabulary is not a reduced one.
    """
    run = steps.run_folder(recipe)
    model, tokenizer = load_trained(recipe)
    facts = {**_run_facts(recipe), **facts}
    if whole_vocabulary:
        if not steps.is_reduced(recipe):
            raise ValueError(
                f"recipe {recipe.name!r} has no reduced Qwen2.5 vocabulary that could be completed"
            )
        model, tokenizer = _with_whole_vocabulary(recipe, model, tokenizer)
        facts |= {
            "tokenizer": "Qwen2.5's, in full; trained with a part of it",
            "vocab_size": len(tokenizer),
            "parameters": model.num_parameters(),
        }
    finish = None
    if gguf:
        from tinytrain.gguf_file import write_gguf  # if gguf is missing, it is said before the work

        facts["gguf"] = "model.gguf"
        finish = partial(write_gguf, name=facts["name"])
    folder = run / ("export-whole" if whole_vocabulary else "export")
    files = (run / "loss.png", run / "history.jsonl")
    return export.export_model(model, tokenizer, folder, facts, dtype, files, finish)


def _with_whole_vocabulary(recipe: Recipe, model: Any, reduced: Any) -> tuple[Any, Any]:
    """Return the model with a row for each token of Qwen2.5, and Qwen2.5's tokenizer."""
    full = qwen.qwen_tokenizer()
    blocks = steps.get_blocks(recipe, reduced)["train"]
    # Ten tokens for each number of the row that is searched, evenly from the whole text.
    number = min(len(blocks), 1 + 10 * model.config.hidden_size // recipe.context_length)
    some = blocks.select(range(0, len(blocks), len(blocks) // number))["input_ids"]
    ids = qwen.original_ids(reduced, full)
    return modeling.expand_vocabulary(model, ids, len(full), list(some)), full
