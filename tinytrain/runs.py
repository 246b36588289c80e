"""A run, put together once: blocks, model, optimiser, hyperparameters and callbacks.

Notebook 05 shows cell by cell what `train_recipe` does. `assemble` serves whatever else trains:
the probe that measures a few steps, short runs that compare hyperparameters, the benchmarks.

This module joins the others, as `steps` does; copy from those, not from here.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import evaluation, generation, results, steps, tokenization
from tinytrain.common import format_seconds, rank, setup_logging, world_size
from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

    from tinytrain.hardware import Precision

logger = logging.getLogger(__name__)


def fit_batches(recipe: Recipe, precision: str) -> Recipe:
    """Return the recipe with fewer and larger batches a step, if a GPU has memory to spare."""
    import torch

    from tinytrain import costs, hardware

    if not torch.cuda.is_available() or world_size() > 1:  # several would have to agree
        return recipe
    free, _ = torch.cuda.mem_get_info()
    return costs.larger_batches(recipe, hardware.Hardware("this GPU", free, precision, 0))


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

    On a GPU with memory to spare, the blocks of a step go through it in fewer and larger batches.

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

    recipe = fit_batches(recipe, precision)
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
    write: Callable[..., list[str]] | None = None,
    prompts: list[str] | None = None,
    spent: float = 0.0,
) -> list[TrainerCallback]:
    """Return the callbacks of notebook 05.

    The run's folder gets ``history.jsonl``, ``samples.jsonl`` and ``loss.png``; a file ``STOP`` in
    it ends the run. ``tokens_per_step`` counts all processes; by default it is the recipe's.
    ``write`` and ``prompts`` make the samples; by default they are two completions. ``spent`` are
    seconds of the recipe's ``hours`` that are gone already.
    """
    from tinytrain import callbacks
    from tinytrain.checkpoints import last_checkpoint

    tokens = tokens_per_step or recipe.tokens_per_step
    metadata = {"vocab_size": vocab_size, "name": recipe.name}
    reference = steps.reference_curve(recipe)
    write = write or partial(generation.complete, tokenizer=tokenizer, max_new_tokens=10)
    prompts = prompts or steps.get_prompts(recipe)[:2]
    return [
        *time_limit(recipe, spent),
        callbacks.ShareCores(),
        callbacks.LossGuard(tokenizer=tokenizer, find_checkpoint=last_checkpoint),
        callbacks.HistoryCallback(folder / "history.jsonl", tokens, **metadata),
        callbacks.VerboseTrainingCallback(tokens),
        callbacks.LivePlotCallback(folder / "loss.png", vocab_size, tokens, reference),
        callbacks.SampleCallback(write, prompts, recipe.sample_steps, folder / "samples.jsonl"),
        callbacks.StopCallback(folder / "STOP"),
    ]


def time_limit(recipe: Recipe, spent: float = 0.0) -> list[TrainerCallback]:
    """Return the clock of a recipe with ``hours``; nothing for one that goes by steps.

    ``spent`` are seconds that are gone, or needed afterwards. Time is left to measure the whole
    held-out set too: one of its blocks takes a third of the time of one that is trained on.
    """
    from tinytrain.callbacks import TimeLimit

    if recipe.hours is None:
        return []
    blocks = len(steps.get_blocks(recipe)["test"])
    measuring = blocks / 3 / (recipe.batch_size * recipe.gradient_accumulation)
    seconds, expected = 3600 * recipe.hours, max(2, recipe.max_steps)
    if spent > 0.9 * seconds:
        raise ValueError(
            f"{format_seconds(seconds)} is too short: starting and preparing the text have taken "
            f"{format_seconds(spent)} already. Name more hours, or take less text"
        )
    return [TimeLimit(seconds, recipe.warmup_steps, spent, measuring, expected)]


def get_optimizer(recipe: Recipe) -> Callable[..., Any] | None:
    """Return what makes the optimiser of a recipe, for `tinytrain.training.build_trainer`.

    None stands for the Trainer's own AdamW. The hyperparameters come from the Trainer's arguments.
    """
    if recipe.optimizer == "adamw":
        return None

    def make(model: Any, arguments: Any) -> Any:
        import torch

        from tinytrain.optimizer import muon_adamw

        half = torch.bfloat16 if arguments.bf16 else torch.float16
        return muon_adamw(
            model,
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            dtype=half if arguments.bf16 or arguments.fp16 else torch.float32,
        )

    return make


def probe(recipe: Recipe, precision: str, number: int = 6, real: bool = True) -> tuple[float, int]:
    """Train for a few real steps, to correct `tinytrain.costs.estimate`; keep nothing.

    Parameters
    ----------
    recipe : Recipe
        The recipe of the run.
    precision : {"float32", "bf16", "fp16"}
        What it will be trained in.
    number : int
        Steps to make, three at least: the first two are slower and not counted.
    real : bool
        Whether on the run's text, which has to be tokenized for it, or on random tokens.

    Returns
    -------
    step_seconds : float
        The median time of a step.
    peak_memory : int
        The most bytes in use meanwhile; see `tinytrain.hardware.peak_memory`.
    """
    import tempfile

    import numpy as np

    from tinytrain import hardware, modeling, training
    from tinytrain.callbacks import ShareCores

    clock = training.StepClock()
    with tempfile.TemporaryDirectory() as folder:
        short = {"max_steps": number, "save_strategy": "no", "eval_strategy": "no"}
        if not real:
            shape = number * recipe.tokens_per_step // recipe.context_length, recipe.context_length
            rows = np.random.default_rng(0).integers(recipe.vocab_size, size=shape)
            blocks = [{"input_ids": row} for row in rows]
            short["blocks"] = {"train": blocks, "test": blocks}
            short["model"] = steps.get_model(recipe, modeling.recipe_config(recipe))
        trainer = assemble(recipe, folder, precision, [ShareCores(), clock], **short)
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
    from tinytrain.callbacks import HistoryCallback, LossGuard, ShareCores
    from tinytrain.hardware import choose_precision

    recipe = replace(
        recipe,
        max_steps=number,
        hours=None,
        warmup_steps=min(recipe.warmup_steps, number // 10),
        logging_steps=max(1, number // 50),
        eval_blocks=recipe.eval_blocks or 64,
    )
    model = steps.get_model(recipe)
    metadata = {"vocab_size": model.config.vocab_size, "name": recipe.name}
    history = HistoryCallback(Path(folder) / "history.jsonl", recipe.tokens_per_step, **metadata)
    precision = choose_precision(recipe.precision).name
    watching = [LossGuard(), ShareCores(), history]
    rhythm = {"eval_steps": number, "save_strategy": "no"}
    trainer = assemble(recipe, folder, precision, watching, model, **rhythm)
    trainer.train()
    return trainer


def share_recipe(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe of one of several processes that make each optimiser step together.

    Per-device batch and accumulation become smaller, so that a step learns from the same blocks as
    in one process, and the same hyperparameters lead to the same result. Where the blocks of a
    step cannot be shared out evenly, there are a few more of them.

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> mine = share_recipe(RECIPES["wiki"], 2)  # 16 blocks, 4 times
    >>> mine.batch_size, mine.gradient_accumulation
    (16, 2)
    >>> mine = share_recipe(RECIPES["pocket"], 2)  # 8 blocks, once
    >>> mine.batch_size, mine.gradient_accumulation
    (4, 1)
    """
    blocks = math.ceil(recipe.batch_size * recipe.gradient_accumulation / processes)
    sizes = range(1, min(recipe.batch_size, blocks) + 1)
    batch_size = max(size for size in sizes if blocks % size == 0)
    return replace(recipe, batch_size=batch_size, gradient_accumulation=blocks // batch_size)


def train_recipe(
    recipe: Recipe, fresh: bool = False, fsdp: bool = False, spent: float = 0.0
) -> dict[str, Any]:
    """Train as notebook 05 does, cell by cell, in one process or in several.

    ``torchrun``, ``accelerate launch`` and, in a notebook, ``accelerate.notebook_launcher`` start
    the processes; each calls this function. A step learns from the same blocks however many
    processes share it, so a run may go on with another number of them. All read and write one
    folder. Only the first process writes and logs.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters of the run, as for one process; see `share_recipe`.
    fresh : bool
        Start over even though there is something to go on from; the earlier run is kept aside.
    fsdp : bool
        Give each process only a part of the weights (PyTorch's FSDP), for a model that is too
        large for one GPU. Needs several processes.
    spent : float
        Seconds of the recipe's ``hours`` that are gone when this function is called.

    Returns
    -------
    dict
        ``finished`` tells whether the run came to its end. If so, the first process adds what it
        writes to ``summary.json``. The model and its tokenizer are in ``model`` in the run's
        folder, be it finished or stopped.

    Raises
    ------
    ValueError
        If ``fsdp`` is asked of a process that no launcher has started.
    """
    import torch

    from tinytrain.checkpoints import train

    called = time.monotonic()
    # `accelerate launch --use_fsdp` says it so.
    fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp and "LOCAL_RANK" not in os.environ:  # which torchrun sets, for a single process too
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
    precision = agree_on_precision(recipe, fresh)
    questions = steps.get_questions(recipe)
    begun = time.monotonic()
    before = _shares_right(model, tokenizer, questions) if rank() == 0 else None
    spent += 2 + time.monotonic() - begun  # they are asked again at the end; and the model is saved

    mine = share_recipe(recipe, world_size())
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
    spent += time.monotonic() - called
    watching = watch(recipe, folder, tokenizer, model.config.vocab_size, tokens, spent=spent)
    arguments = {"fsdp": True} if fsdp else {}
    trainer = assemble(mine, folder / "checkpoints", precision, watching, model, **arguments)
    inputs, untrained = results.run_inputs(recipe, precision), partial(steps.get_model, recipe)
    train(trainer, inputs, fresh, recipe.halve_batch, untrained, results.result_files(recipe))

    results.save_trained(recipe, trainer, tokenizer, inputs)
    result = {"finished": trainer.state.global_step >= trainer.state.max_steps}
    if result["finished"]:
        loss = trainer.evaluate(blocks["test"], metric_key_prefix="full")["full_loss"]
        if rank() == 0:
            known = {"finished": True, "precision": precision}
            known |= {"cloze_before": before} if questions else {}
            result = _measure(recipe, tokenizer, loss, **known)
    # Or NCCL complains at the end. Gloo does not, and were it to go before the model that uses it,
    # the process might never end: PyTorch 2.13 then waits for a thread which waits for Python.
    if torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()
    return result


def _measure(recipe: Recipe, tokenizer: Any, held_out_loss: float, **known: Any) -> dict[str, Any]:
    """Measure the saved model of a finished run and write its summary."""
    from tinytrain.callbacks import read_history

    model, _ = results.load_trained(recipe)
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
        values["cloze_after"] = _shares_right(model, tokenizer, questions)
    results.save_summary(recipe, **values)
    return values


def _shares_right(model: Any, tokenizer: Any, questions: list[Any]) -> dict[str, float]:
    """Return the share of right answers to each kind of question."""
    answers = generation.answer_questions(model, tokenizer, questions)
    shares = evaluation.by_kind(questions, [answer.right for answer in answers])
    return {kind: part.value for kind, part in shares.items()}


def choose_precision(recipe: Recipe) -> Precision:
    """Return what to compute a run in: as before, if it goes on and this machine can do that."""
    from tinytrain import checkpoints, hardware

    checkpoint = checkpoints.last_checkpoint(steps.run_folder(recipe) / "checkpoints")
    kept = checkpoints.recorded_precision(checkpoint) if checkpoint else None
    if recipe.precision is None and kept and hardware.computes(kept):
        return hardware.Precision(kept, f"{checkpoint.name} was computed in it")
    return hardware.choose_precision(recipe.precision)


def agree_on_precision(recipe: Recipe, fresh: bool) -> str:
    """Return what to compute a run in, the same in all processes."""
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


def get_trained(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the trained model of a recipe and its tokenizer; train it if there is none.

    A model trained from other inputs, a changed recipe for example, is not taken for it. One whose
    training was stopped early is. The model is in float32, on the GPU if there is one.
    """
    if not results.is_trained(recipe):
        logger.info("there is no trained model of recipe %s yet: training it now", recipe.name)
        train_recipe(recipe)
    return results.load_trained(recipe)
