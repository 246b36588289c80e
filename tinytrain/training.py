"""The Hugging Face Trainer, set up for pre-training, and taken up again where it stopped.

The Trainer is kept rather than a loop of our own: it is what readers meet elsewhere, and it
carries accumulation, mixed precision, several devices and checkpoints. What is ours is thin: a
recipe becomes ``TrainingArguments``, packed blocks need no padding, and a run folder remembers
what it was made from, so that checkpoints of two different runs never mix.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)


def training_arguments(
    recipe: Recipe, output_dir: str | Path, precision: str = "float32", **overrides: Any
) -> TrainingArguments:
    """Turn a recipe into the Trainer's arguments.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run.
    output_dir : str or Path
        Where checkpoints go.
    precision : {"float32", "bf16", "fp16"}
        What the matrix products are computed in; weights and optimiser stay float32.
    **overrides
        Any argument of ``transformers.TrainingArguments``, for example ``report_to="tensorboard"``
        or ``torch_compile=True``.

    Returns
    -------
    transformers.TrainingArguments

    Raises
    ------
    ValueError
        If the precision is none of the three.

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> training_arguments(RECIPES["seed"], "checkpoints").learning_rate
    2e-05
    """
    import torch
    from transformers import TrainingArguments

    if precision not in ("float32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r} is none of float32, bf16, fp16")
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "seed": recipe.seed,
        "logging_steps": recipe.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        # Only the loss is wanted: the logits of an evaluation would fill the memory.
        "prediction_loss_only": True,
        # A loss that is not a number is to be seen, not replaced by the last one that was.
        "logging_nan_inf_filter": False,
        # Blocks are ready-made rows of numbers; processes to fetch them would cost more than help.
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere it only warns
        "report_to": "none",
        "disable_tqdm": True,  # our callbacks show the progress
    }
    return TrainingArguments(**(arguments | overrides))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks of equal length into a batch whose labels are the tokens themselves.

    The model shifts the labels by one, so that each position learns the next token. No padding
    and no mask: packed blocks are full. (``DataCollatorForLanguageModeling`` would take every
    end-of-text token for padding and never teach the model to stop.)

    Parameters
    ----------
    rows : sequence of dict
        Each with ``input_ids``: a list of ints, or a tensor of shape (context_length,).

    Returns
    -------
    dict of torch.Tensor
        ``input_ids`` and ``labels``, int64 of shape (batch, context_length).
    """
    import torch

    input_ids = torch.stack([torch.as_tensor(row["input_ids"]).long() for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_blocks: Dataset,
    eval_blocks: Dataset,
    callbacks: Iterable[TrainerCallback] = (),
) -> Trainer:
    """Build the Trainer, with our callbacks in place of its own progress display.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    arguments : transformers.TrainingArguments
        From `training_arguments`.
    train_blocks, eval_blocks : datasets.Dataset
        Rows with ``input_ids`` of equal length.
    callbacks : iterable of transformers.TrainerCallback
        Called in this order.

    Returns
    -------
    transformers.Trainer

    Raises
    ------
    ValueError
        If there is no block to train on or to evaluate.
    """
    from transformers import PrinterCallback, ProgressCallback, Trainer
    from transformers.utils.notebook import NotebookProgressCallback

    for name, blocks in (("training", train_blocks), ("held-out", eval_blocks)):
        if len(blocks) == 0:
            raise ValueError(
                f"the {name} text gives no full block: use more text or a shorter context_length"
            )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    for display in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(display)
    return trainer


def train(trainer: Trainer, checkpoint: str | Path | None = None) -> None:
    """Train to the end, from a checkpoint if one is given.

    A checkpoint at the last step means that the run is finished: then its weights are loaded and
    its plot is shown again. (The Trainer itself would train one step too many.)

    Parameters
    ----------
    trainer : transformers.Trainer
        From `build_trainer`.
    checkpoint : str or Path, optional
        From `open_run`.
    """
    from safetensors.torch import load_model
    from transformers import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            logger.info("this run is finished: its model is loaded, nothing is trained")
            load_model(trainer.model, Path(checkpoint) / "model.safetensors")
            trainer.state = state
            watching = trainer.callback_handler
            watching.on_train_begin(trainer.args, state, trainer.control)
            watching.on_train_end(trainer.args, state, trainer.control)
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, or None.

    A checkpoint that a crash left half-written lacks ``trainer_state.json``, which the Trainer
    writes last; it is passed over with a message.

    Parameters
    ----------
    folder : str or Path
        Holds folders ``checkpoint-<step>``; need not exist.

    Returns
    -------
    Path or None
    """
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit():
            steps[int(number)] = path
    for step in sorted(steps, reverse=True):
        if (steps[step] / "trainer_state.json").is_file():
            return steps[step]
        logger.warning("%s is incomplete and is passed over", steps[step])
    return None


def open_run(folder: str | Path, inputs: dict[str, Any], fresh: bool = False) -> Path | None:
    """Return the checkpoint to go on from, or None for a start from nothing.

    Checkpoints are taken up only if they were made from the same inputs; others are moved aside,
    never deleted, and the log names the difference.

    Parameters
    ----------
    folder : str or Path
        Where the checkpoints of this run are or will be.
    inputs : dict
        What decides the outcome of the run, as values that JSON can hold: the recipe's numbers,
        fingerprints of text and tokenizer, the precision.
    fresh : bool
        Start over even though there is something to go on from.

    Returns
    -------
    Path or None
        For `train`.
    """
    folder = Path(folder)
    inputs = json.loads(json.dumps(inputs))  # as they will be read back
    note = folder / "inputs.json"
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    # The Trainer makes the folder as soon as it is built; an empty one holds no earlier run.
    if folder.exists() and any(folder.iterdir()) and (fresh or before != inputs):
        number = 1
        while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        os.replace(folder, aside)
        reason = "fresh=True" if before == inputs else _difference(before or {}, inputs)
        logger.info("starting anew (%s); the earlier run is kept as %s", reason, aside.name)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(inputs, indent=1, ensure_ascii=False), encoding="utf-8")
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        logger.info("going on from %s; fresh=True would start over", checkpoint.name)
    return checkpoint


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names[:3])
