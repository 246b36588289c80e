"""The Hugging Face Trainer, set up for pre-training.

The Trainer is kept rather than a loop of our own: it is what readers meet elsewhere, and it
carries accumulation, mixed precision, several devices and checkpoints. What is ours is thin: a
recipe becomes ``TrainingArguments``, packed blocks need no padding, and the optimiser may be any.
How a run goes on where it stopped is in `tinytrain.checkpoints`.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tinytrain.common import new_axes, rank, writing_to

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from tinytrain.recipes import Recipe

logger = logging.getLogger(__name__)

_ENDLESS = 10**9  # steps, of a run that a clock ends


def training_arguments(
    recipe: Recipe, output_dir: str | Path, precision: str = "float32", **overrides: Any
) -> TrainingArguments:
    """Turn a recipe into the Trainer's arguments.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters of the run.
    output_dir : str or Path
        Where checkpoints go.
    precision : {"float32", "bf16", "fp16"}
        What the matrix products are computed in; weights and optimiser stay float32.
    **overrides
        Any argument of ``transformers.TrainingArguments``: ``report_to="tensorboard"`` (or
        ``"swanlab"``, ``"wandb"``) if you watch your runs there, ``torch_compile=True``.

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
    if precision not in ("float32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r} is none of float32, bf16, fp16")
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "num_train_epochs": recipe.epochs,
        "max_steps": _ENDLESS if recipe.hours else recipe.max_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        # The Trainer refuses bf16 without a GPU unless it is told that the CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "seed": recipe.seed,
        "logging_steps": recipe.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        # Only the loss is needed: the logits of an evaluation would fill the memory.
        "prediction_loss_only": True,
        # A NaN must be seen, not replaced by the last loss that was a number.
        "logging_nan_inf_filter": False,
        # Blocks are ready-made rows of integers: workers would cost more than they help.
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere it only warns
        # Every weight has a gradient in every step: DDP need not look for those without.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,  # our callbacks show the progress
    }
    return TrainingArguments(**(arguments | overrides))


def total_steps(recipe: Recipe, blocks: int) -> int:
    """Return how many optimiser steps the Trainer will make on one device.

    Parameters
    ----------
    recipe : Recipe
        Its ``max_steps``, or else its ``epochs`` decide.
    blocks : int
        Blocks of the training set.
    """
    if recipe.max_steps > 0:
        return recipe.max_steps
    batches = math.ceil(blocks / recipe.batch_size)
    # The last batches of an epoch make a step too, even if they are too few to fill one.
    return math.ceil(recipe.epochs * max(1, math.ceil(batches / recipe.gradient_accumulation)))


def _learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """Return the learning rate of each step, from the scheduler that the Trainer uses."""
    from transformers import get_scheduler

    if steps < 1:
        raise ValueError(f"steps is {steps}; a run has at least one")
    if recipe.lr_scheduler in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"{recipe.lr_scheduler} follows the loss: its rates cannot be known ahead")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    scheduler = get_scheduler(recipe.lr_scheduler, optimizer, recipe.warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()  # without a gradient it changes nothing; the scheduler wants it first
        scheduler.step()
    return rates


def plot_learning_rate(recipe: Recipe, steps: int) -> Figure:
    """Draw the learning rate over a run.

    Parameters
    ----------
    recipe : Recipe
        Its ``learning_rate``, ``lr_scheduler`` and ``warmup_steps`` decide.
    steps : int
        Steps of the run, from `total_steps`.

    Raises
    ------
    ValueError
        If there is no such scheduler, or if it follows the loss and not the step.
    """
    rates = _learning_rates(recipe, steps)
    figure, axes = new_axes(7, 2.6)
    axes.plot(range(1, steps + 1), rates, linewidth=2)
    if 0 < recipe.warmup_steps < steps and recipe.lr_scheduler != "constant":
        top = recipe.warmup_steps + 1  # the first step at the full rate
        axes.axvline(top, color="0.3", linestyle="--", linewidth=1)
        axes.text(top, 0.04 * max(rates), " end of the warm-up", color="0.3")
    axes.set_title(f"{recipe.lr_scheduler.replace('_', ' ')}, highest rate {max(rates):.2g}")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), ylim=(0, 1.1 * max(rates)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks of equal length into a batch; without labels, those are the tokens themselves.

    The model shifts the labels by one. Packed blocks are full: no padding, no mask.
    (``DataCollatorForLanguageModeling`` would take every end-of-text token for padding, and the
    model would never learn to stop.)
    """
    names = ("input_ids", "labels", "position_ids")
    columns = {n: [torch.as_tensor(row[n]).long() for row in rows] for n in names if n in rows[0]}
    batch = {name: torch.stack(column) for name, column in columns.items()}
    return {"labels": batch["input_ids"].clone(), **batch}


class StepClock(TrainerCallback):
    """Measures how long an optimiser step takes."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time once the GPU has finished the step too."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median time of a step, without the first two, which are slower."""
        return statistics.median(end - start for start, end in itertools.pairwise(self.times[2:]))


class _PretrainingTrainer(Trainer):
    """A Trainer with an optimiser of your own, whose callbacks learn the gradient's norm."""

    make_optimizer: Callable[..., torch.optim.Optimizer] | None = None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.make_optimizer is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(model or self.model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Take the rate from a clock, if there is one among the callbacks."""
        clocks = [c for c in self.callback_handler.callbacks if callable(c)]
        if clocks and self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, clocks[0])
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return 0 and not 0 / 0 for a step without a label that counts."""
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        """Hand the norm that clipping needs to the callbacks, so that they need not measure it."""
        norm = super()._clip_grad_norm(model)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "gradient_norm"):
                callback.gradient_norm = norm
        return norm

    def evaluation_loop(self, dataloader, *arguments, metric_key_prefix="eval", **options):
        """Count every held-out block once, however many processes share them.

        The Trainer fills the last batch of each with blocks from the beginning, which would change
        its mean: so the last few are measured one by one.
        """
        blocks, args, name = dataloader.dataset, self.args, f"{metric_key_prefix}_loss"
        options["metric_key_prefix"] = metric_key_prefix
        last = len(blocks) % (args.eval_batch_size * args.world_size)
        if args.world_size == 1 or not last or args.per_device_eval_batch_size == 1:
            return super().evaluation_loop(dataloader, *arguments, **options)
        size, total = args.per_device_eval_batch_size, 0.0
        try:
            for few, part in ((size, range(len(blocks) - last)), (1, range(len(blocks))[-last:])):
                if part:
                    args.per_device_eval_batch_size = few
                    loader = self.get_eval_dataloader(blocks.select(part))
                    result = super().evaluation_loop(loader, *arguments, **options)
                    total += result.metrics[name] * len(part)
        finally:
            args.per_device_eval_batch_size = size
        result.metrics[name] = total / len(blocks)
        return result._replace(num_samples=len(blocks))


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_blocks: Dataset,
    eval_blocks: Dataset,
    callbacks: Iterable[TrainerCallback] = (),
    make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> Trainer:
    """Build the Trainer, with our callbacks in place of its own progress display.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    arguments : transformers.TrainingArguments
        From `training_arguments`.
    train_blocks, eval_blocks : datasets.Dataset
        Rows with ``input_ids`` of equal length, and perhaps ``labels`` and ``position_ids``.
    callbacks : iterable of transformers.TrainerCallback
        Called in this order. Those with a true attribute ``rank_zero_only`` are called in the first
        process only, those with ``needs_unsharded_model`` not under FSDP. One that can be called,
        as `tinytrain.callbacks.TimeLimit`, gives the learning rate. Before each step, those
        with an attribute ``gradient_norm`` get the norm there, where the Trainer clips gradients.
    make_optimizer : callable, optional
        ``make_optimizer(model, arguments)`` returns the optimiser, which is saved and restored
        like any other. By default the Trainer's own, fused AdamW.

    Raises
    ------
    ValueError
        If there is no block to train on or to evaluate, or if FSDP is asked for without GPUs.
    OSError
        If the folder of the checkpoints cannot be made.
    """
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook

    for name, blocks in (("training", train_blocks), ("held-out", eval_blocks)):
        if len(blocks) == 0:
            raise ValueError(
                f"the {name} text gives no full block: use more text or a shorter context_length"
            )
    if hasattr(train_blocks, "with_format"):  # lists of Python's numbers would take longer to make
        train_blocks = train_blocks.with_format("numpy")
    with writing_to(arguments.output_dir):  # the Trainer makes the folder at once
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    trainer = _PretrainingTrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=_collate,
        callbacks=[c for c in callbacks if rank() == 0 or not getattr(c, "rank_zero_only", False)],
    )
    trainer.make_optimizer = make_optimizer
    if arguments.fsdp and not trainer.is_fsdp_enabled:  # accelerate would go on without it
        raise ValueError("FSDP needs a GPU for each process; without GPUs, leave `--fsdp` out")
    for display in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(display)
    for callback in list(trainer.callback_handler.callbacks):
        if trainer.is_fsdp_enabled and getattr(callback, "needs_unsharded_model", False):
            trainer.remove_callback(callback)
            logger.info("%s is left out: FSDP shards the model", type(callback).__name__)
    return trainer
