"""The Hugging Face Trainer, set up for pre-training, watched, and taken up where it stopped.

The Trainer is kept rather than a loop of our own: it is what readers meet elsewhere, and it
carries accumulation, mixed precision, several devices and checkpoints. What is ours is thin: a
recipe becomes ``TrainingArguments``; packed blocks need no padding; every loss is looked at before
it may change the weights; a checkpoint counts only once it is whole, and it remembers what it was
made from, so that two different runs never mix; and what ends a run early is said in a line.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from filelock import FileLock, Timeout
from safetensors.torch import load_model, save_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from tinytrain.callbacks.guard import LossGuard
from tinytrain.common import world_size, write_json
from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MARK = "complete.json"  # the last file written into a checkpoint


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
        Any argument of ``transformers.TrainingArguments``: ``report_to="tensorboard"`` (or
        ``"swanlab"``, ``"wandb"``) for those who watch their runs there, ``torch_compile=True``.

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
        # The Trainer refuses bf16 where there is no GPU unless it is told that the CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
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
        # Each weight has a gradient in every step: with several processes, none need be looked for.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,  # our callbacks show the progress
    }
    return TrainingArguments(**(arguments | overrides))


def total_steps(recipe: Recipe, blocks: int) -> int:
    """Return how many steps of the optimiser the Trainer will make, on one device.

    Parameters
    ----------
    recipe : Recipe
        Its ``max_steps``, or else its ``epochs`` decide.
    blocks : int
        Blocks of the training half.

    Returns
    -------
    int
    """
    if recipe.max_steps > 0:
        return recipe.max_steps
    batches = math.ceil(blocks / recipe.batch_size)
    # The last batches of an epoch make a step too, even if they are too few to fill one.
    return math.ceil(recipe.epochs * max(1, math.ceil(batches / recipe.gradient_accumulation)))


def learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """Return the learning rate of each step, from the very scheduler that the Trainer uses.

    Parameters
    ----------
    recipe : Recipe
        Its ``learning_rate``, ``lr_scheduler`` and ``warmup_steps`` decide.
    steps : int
        Steps of the run, from `total_steps`.

    Returns
    -------
    list of float
        In the order of the steps.

    Raises
    ------
    ValueError
        If there is no such scheduler, or if it goes by something else than the step.

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> rates = learning_rates(RECIPES["seed"], 1000)
    >>> rates[0], rates[200], rates[-1] < 1e-9
    (0.0, 2e-05, True)
    """
    from transformers import get_scheduler

    if steps < 1:
        raise ValueError(f"steps is {steps}; a run has at least one")
    if recipe.lr_scheduler in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"{recipe.lr_scheduler} goes by the loss: its rates are not known before")
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

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        As `learning_rates`.
    """
    from matplotlib.figure import Figure

    rates = learning_rates(recipe, steps)
    figure = Figure(figsize=(7, 2.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, steps + 1), rates, linewidth=2)
    if 0 < recipe.warmup_steps < steps and recipe.lr_scheduler != "constant":
        top = recipe.warmup_steps + 1  # the first step at the full rate
        axes.axvline(top, color="0.3", linestyle="--", linewidth=1)
        axes.text(top, 0.04 * max(rates), " end of the warm-up", color="0.3")
    axes.set_title(f"{recipe.lr_scheduler.replace('_', ' ')}, highest rate {max(rates):.2g}")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), ylim=(0, 1.1 * max(rates)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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
    input_ids = torch.stack([torch.as_tensor(row["input_ids"]).long() for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _over_all(value: float, args: TrainingArguments, operation: str = "max") -> float:
    """Return the largest, or the sum, of what all processes give; each waits for all others."""
    if world_size() == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=args.device)
    operations = {"max": torch.distributed.ReduceOp.MAX, "sum": torch.distributed.ReduceOp.SUM}
    torch.distributed.all_reduce(told, operations[operation])
    return told.item()


class StepClock(TrainerCallback):
    """Measures how long a step of the optimiser takes."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to count."""
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time, when the GPU too is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median time of a step; the first two, which are slower, do not count."""
        ends = self.times[2:] if len(self.times) > 3 else self.times
        return statistics.median(end - start for start, end in itertools.pairwise(ends))


class CheckpointKeeper(TrainerCallback):
    """Marks each checkpoint when it is whole, and only then removes older ones.

    The Trainer writes straight into a checkpoint's folder, so that a crash leaves a part of one,
    and it tells old from new by the clock, which may jump. Here the last thing written is
    ``complete.json``, with the size of every file and what the run was made from; age is told by
    the step.

    Parameters
    ----------
    limit : int, optional
        Complete checkpoints to keep; None keeps all.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.inputs: dict[str, Any] = {}

    def on_save(self, args, state, control, **kwargs):
        """Mark the new checkpoint, then remove what is too old or was never completed."""
        _over_all(0, args)  # each process writes a part of it
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        _mark_complete(folder / f"checkpoint-{state.global_step}", self.inputs)
        earlier = [path for path in _checkpoints(folder) if _step(path) < state.global_step]
        complete = [path for path in earlier if not checkpoint_problem(path)]
        keep = complete[: self.limit - 1] if self.limit else complete
        for path in earlier:
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)


def _mark_complete(checkpoint: Path, inputs: dict[str, Any]) -> None:
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARK:
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # a machine that loses power may lose what is in memory
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write_json(checkpoint / MARK, {"inputs": inputs, "files": sizes}, sync=True)


def checkpoint_problem(checkpoint: str | Path) -> str:
    """Return what keeps a checkpoint from being whole, or an empty string.

    Parameters
    ----------
    checkpoint : str or Path
        A folder written by the Trainer under a `CheckpointKeeper`.
    """
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return "its writing was not finished"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and not {size:,}"
    return ""


def _checkpoints(folder: str | Path) -> list[Path]:
    """Return all checkpoints of a folder, the newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if _step(path) is not None]
    return sorted(paths, key=_step, reverse=True)


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, or None.

    One that a crash left half-written, or that has lost something since, is passed over with a
    message.

    Parameters
    ----------
    folder : str or Path
        Holds folders ``checkpoint-<step>``; need not exist.

    Returns
    -------
    Path or None
    """
    for path in _checkpoints(folder):
        problem = checkpoint_problem(path)
        if not problem:
            return path
        logger.warning("%s is passed over: %s", path.name, problem)
    return None


class GuardedTrainer(Trainer):
    """The Trainer, which also shows every loss to a `LossGuard`.

    Parameters
    ----------
    *args, **kwargs
        As for ``transformers.Trainer``.
    guard : LossGuard
        Judges each step.
    make_optimizer : callable, optional
        Takes the model and the arguments, and returns the optimiser; by default the Trainer's.
    """

    def __init__(
        self,
        *args: Any,
        guard: LossGuard,
        make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.guard = guard
        self.make_optimizer = make_optimizer
        self.keeper = CheckpointKeeper(self.args.save_total_limit)
        self.args.save_total_limit = None  # the keeper's work
        self._first: tempfile.TemporaryDirectory | None = None
        self.add_callback(guard)
        self.add_callback(self.keeper)

    def create_accelerator_and_postprocess(self) -> None:
        """Let FSDP be on processors what it is on GPUs: accelerate knows it only there."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            self.accelerator.state.fsdp_plugin = plugin
            # Two objects, each with a copy of it.
            self.accelerator.state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def keep_first_weights(self) -> None:
        """Write down the weights that the model came with, once, for `start_anew`."""
        if self._first is None and world_size() == 1:
            self._first = tempfile.TemporaryDirectory(prefix="tinytrain-")
            save_model(self.model, os.path.join(self._first.name, "model.safetensors"))

    def start_anew(self) -> None:
        """Give the model its first weights again, should it have been trained meanwhile."""
        if self.state.global_step:
            if self._first is None:
                raise RuntimeError("with several processes, build a new model to start over")
            load_model(self.model, os.path.join(self._first.name, "model.safetensors"))

    def halve_batch(self) -> None:
        """Halve the micro-batch and double the accumulation: as many tokens a step as before."""
        self.args.per_device_train_batch_size //= 2
        self.args.per_device_eval_batch_size = self.args.per_device_train_batch_size
        self.args.gradient_accumulation_steps *= 2
        self._train_batch_size = self.args.train_batch_size  # what Trainer.train() goes by

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Make the optimiser, anew for each run."""
        if self.make_optimizer is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(model or self.model, self.args)
        return self.optimizer

    def _clip_grad_norm(self, model):
        """Tell the guard the norm that clipping needs, so that it need not measure it again."""
        self.guard.gradient_norm = super()._clip_grad_norm(model)
        return self.guard.gradient_norm


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_blocks: Dataset,
    eval_blocks: Dataset,
    callbacks: Iterable[TrainerCallback] = (),
    guard: LossGuard | None = None,
    make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> GuardedTrainer:
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
        Called in this order. Of several processes, only the first calls those with an attribute
        ``rank_zero_only`` that is true; under FSDP none calls those with ``needs_unsharded_model``.
    guard : LossGuard, optional
        By default one with its own defaults.
    make_optimizer : callable, optional
        ``make_optimizer(model, arguments)`` returns the optimiser, which is saved and taken up
        again like any other. By default the Trainer's own, fused AdamW.

    Returns
    -------
    GuardedTrainer
        A ``transformers.Trainer``.

    Raises
    ------
    ValueError
        If there is no block to train on or to evaluate.
    OSError
        If the folder of the checkpoints cannot be made.
    """
    from transformers import PrinterCallback
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook

    for name, blocks in (("training", train_blocks), ("held-out", eval_blocks)):
        if len(blocks) == 0:
            raise ValueError(
                f"the {name} text gives no full block: use more text or a shorter context_length"
            )
    with _writing_to(Path(arguments.output_dir)):  # the Trainer makes the folder at once
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    first = arguments.process_index == 0
    trainer = GuardedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collate,
        callbacks=[c for c in callbacks if first or not getattr(c, "rank_zero_only", False)],
        guard=guard or LossGuard(find_checkpoint=last_checkpoint),
        make_optimizer=make_optimizer,
    )
    for display in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(display)
    for callback in list(trainer.callback_handler.callbacks):
        if trainer.is_fsdp_enabled and getattr(callback, "needs_unsharded_model", False):
            trainer.remove_callback(callback)
            logger.info("%s is left out: FSDP shares the model out", type(callback).__name__)
    return trainer


def train(
    trainer: GuardedTrainer,
    inputs: dict[str, Any] | None = None,
    fresh: bool = False,
    halve_batch: bool = False,
) -> None:
    """Train to the end, going on from the newest complete checkpoint if there is one.

    Checkpoints are taken up only if they were made from the same inputs; others are moved aside,
    never deleted, and the log names the difference. A run that is finished is not trained
    further: its weights are loaded and its plot is shown again. However the training ends, the
    callbacks that have a method ``close`` are closed, the last first.

    Parameters
    ----------
    trainer : GuardedTrainer
        From `build_trainer`; its ``args.output_dir`` is where the checkpoints are.
    inputs : dict, optional
        What decides the outcome of the run, as values that JSON can hold: the recipe's numbers,
        fingerprints of text and tokenizer, the precision.
    fresh : bool
        Start over even though there is something to go on from; the earlier run is kept aside.
    halve_batch : bool
        If the GPU's memory is too small, go on with half the micro-batch and twice the
        accumulation: the same tokens a step, a little slower.

    Raises
    ------
    LossError
        If the loss is not a number, or spikes.
    torch.OutOfMemoryError
        If the GPU's memory is too small.
    OSError
        If the folder cannot be written to or the disk is full.
    RuntimeError
        If another run trains in the same folder.
    LostProcessError
        If another process of this run has ended before its time.
    """
    folder = Path(trainer.args.output_dir)
    inputs = json.loads(json.dumps(inputs or {}))  # as they will be read back
    callbacks = trainer.callback_handler.callbacks
    files = [callback.path for callback in callbacks if getattr(callback, "path", None)]
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one for every checkpoint, beside our display
    talkative = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    for their_logger in talkative:
        their_logger.addFilter(_not_news)
    try:
        with _opened(trainer.args, folder, inputs, fresh, files) as checkpoint:
            trainer.keeper.inputs = inputs
            trainer.keep_first_weights()
            if checkpoint is None:
                trainer.start_anew()
            while True:
                try:
                    _train(trainer, checkpoint)
                    break
                except torch.OutOfMemoryError as error:
                    message = _out_of_memory(trainer, error)
                    # Several processes would have to agree on it, and one is out of step already.
                    alone = world_size() == 1
                    if not (halve_batch and alone) or trainer.args.per_device_train_batch_size % 2:
                        raise torch.OutOfMemoryError(message) from error
                    logger.warning(message)
                trainer.halve_batch()
                checkpoint = last_checkpoint(folder)
                if checkpoint is None:
                    trainer.start_anew()
    except Exception as error:
        if _has_lost_another(error):
            message = _lost_another(folder)
            # Written at once: what started the processes may end this one before it is raised.
            logger.error(message)
            raise LostProcessError(message) from error
        if not _is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, _disk_full(folder)) from error
    finally:
        for their_logger in talkative:
            their_logger.removeFilter(_not_news)
        if shows_bars:
            transformers_logging.enable_progress_bar()
        for callback in reversed(callbacks):
            if hasattr(callback, "close"):
                try:
                    callback.close()
                except OSError as error:  # must not hide what ended the training
                    logger.warning("%s: %s", type(callback).__name__, error)


def _train(trainer: GuardedTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            # The Trainer itself would train one step too many.
            logger.info("this run is finished: its model is loaded, nothing is trained")
            load_model(trainer.model, checkpoint / "model.safetensors")
            trainer.state = state
            watching = trainer.callback_handler
            watching.on_train_begin(trainer.args, state, trainer.control)
            watching.on_train_end(trainer.args, state, trainer.control)
            return
        sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
        if sharded != trainer.is_fsdp_enabled:
            made, now = ("with", "without") if sharded else ("without", "with")
            raise ValueError(
                f"{checkpoint.name} was made {made} FSDP and cannot be taken up {now} it: go on "
                f"{made} FSDP, or start over with fresh=True (`--fresh`)"
            )
    trainer.optimizer = trainer.lr_scheduler = None  # those of an earlier call know other steps
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class LostProcessError(RuntimeError):
    """Another process of the run has ended before its time."""


def _has_lost_another(error: Exception) -> bool:
    if world_size() == 1:
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    lost = isinstance(error, torch.distributed.DistError)
    return lost or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _lost_another(folder: Path) -> str:
    last = last_checkpoint(folder)
    on = f"the same command goes on from {last.name}" if last else "there is no checkpoint yet"
    return (
        f"process {torch.distributed.get_rank()} has lost another process of this run, which was "
        f"killed or has failed; {on}"
    )


@contextmanager
def _opened(
    args: TrainingArguments, folder: Path, inputs: dict[str, Any], fresh: bool, files: list[Path]
) -> Iterator[Path | None]:
    """Let the first process open the run, and tell all where it goes on; see `open_run`."""
    problem, nothing, failed = None, -1, -2
    step = failed
    with ExitStack() as stack:
        if args.process_index == 0:
            try:
                stack.enter_context(_only_process(folder))
                checkpoint = open_run(folder, inputs, fresh, files)
                step = _step(checkpoint) if checkpoint else nothing
            except Exception as error:
                problem = error
        step = int(_over_all(step, args))
        if problem is not None:
            raise problem
        if step == failed:
            raise RuntimeError("the first process could not open the run: see its message")
        yield folder / f"checkpoint-{step}" if step >= 0 else None


def open_run(
    folder: str | Path,
    inputs: dict[str, Any],
    fresh: bool = False,
    files: Iterable[str | Path] = (),
) -> Path | None:
    """Return the checkpoint to go on from, or None for a start from nothing.

    Checkpoints of another run are refused: the folder is moved aside, never deleted, and the log
    names the difference.

    Parameters
    ----------
    folder : str or Path
        Where the checkpoints of this run are or will be.
    inputs : dict
        What decides the outcome of the run, as values that JSON can hold.
    fresh : bool
        Start over even though there is something to go on from.
    files : iterable of str or Path
        What else belongs to the run, such as its history: moved aside with the checkpoints.

    Returns
    -------
    Path or None

    Raises
    ------
    OSError
        If the folder cannot be written to.
    """
    folder = Path(folder)
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        before = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["inputs"]
        if not fresh and before == inputs:
            logger.info("going on from %s; fresh=True would start over", checkpoint.name)
            return checkpoint
        aside = _free_name(folder)
        os.replace(folder, aside)
        for path in map(Path, files):
            if path.is_file():
                os.replace(path, aside / path.name)
        reason = "fresh=True" if fresh else f"{checkpoint.name}: {_difference(before, inputs)}"
        logger.info("starting anew (%s); the earlier run is kept as %s", reason, aside.name)
    folder.mkdir(parents=True, exist_ok=True)
    return None


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return aside


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names[:3])


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold a lock beside the folder, which the system lets go of even if this process is killed."""
    lock = FileLock(folder.with_name(folder.name + ".lock"), timeout=0)
    try:
        with _writing_to(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another process trains in {folder.parent} (it holds {Path(lock.lock_file).name}): "
            "wait for its end, stop it, or choose another folder (notebooks: TINYTRAIN_RUNS)"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Say of an error of the file system where it happened and what to do."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {folder} ({error.strerror}): "
            "choose another folder (notebooks: TINYTRAIN_RUNS)",
        ) from error


def _not_news(record: logging.LogRecord) -> bool:
    """Keep back two warnings: of tied weights, which are stored once; of a batch halved by us."""
    text = record.getMessage()
    tied = "missing keys in the checkpoint" in text and "['lm_head.weight']" in text
    return not tied and "do not match the ones in the `trainer_state.json`" not in text


def _out_of_memory(trainer: GuardedTrainer, error: torch.OutOfMemoryError) -> str:
    """Return what to say, after letting go of what the broken step still holds."""
    numbers = str(error).split(" If reserved but")[0]
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(trainer.args.device).total_memory / 1e9
        numbers = f"{gigabytes:.1f} GB in all. {numbers}"
        torch.cuda.empty_cache()
    batch = trainer.args.per_device_train_batch_size
    accumulation = trainer.args.gradient_accumulation_steps
    length = len(trainer.train_dataset[0]["input_ids"])
    return (
        f"The GPU's memory is too small for batches of {batch} x {length} tokens ({numbers}). "
        f"Two changes help: batch_size={max(batch // 2, 1)} with "
        f"gradient_accumulation={accumulation * 2}, which learns the same; "
        f"or context_length={length // 2}."
    )


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and torch.save report it in words of their own.
    words = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos ")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(word in str(error) for word in words)


def _disk_full(folder: Path) -> str:
    """Return what to say, after removing the checkpoint that was being written."""
    last = last_checkpoint(folder)
    for path in _checkpoints(folder):
        if last is None or _step(path) > _step(last):
            shutil.rmtree(path, ignore_errors=True)
    kept = f"{last.name} is whole" if last else "no checkpoint was finished before"
    free = shutil.disk_usage(folder.parent).free / 1e6
    return (
        f"the disk that holds {folder} is full ({free:,.0f} MB free now that the unfinished "
        f"checkpoint is removed); {kept}. Make space and call the same again: it goes on from there"
    )
