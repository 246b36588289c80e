"""Training that goes on where it stopped, with any Hugging Face Trainer.

A checkpoint counts only once it is complete, and it records what it was made from, so that two
different runs never mix.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from filelock import FileLock, Timeout
from safetensors.torch import load_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from tinytrain.common import (
    damaged_file,
    full_disk,
    hash_files,
    one_line,
    rank,
    sync_to_disk,
    world_size,
    write_json,
    writing_to,
)

logger = logging.getLogger(__name__)

_COMPLETION_FILE = "complete.json"  # the last file written into a checkpoint

# Of the Trainer's arguments those that decide the outcome, beside batch and precision.
_DECISIVE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "seed", "data_seed"),
    *("dataloader_drop_last", "train_sampling_strategy", "num_train_epochs", "max_steps"),
)
_BATCH = "batch of a step"
_STEPS = {"max_steps", "epochs", "num_train_epochs"}  # may grow: a run can be made longer


class _CheckpointKeeper(TrainerCallback):
    """Marks each checkpoint when it is complete, and only then removes older ones.

    The Trainer alone leaves half a checkpoint after a crash, and tells old from new by the clock.
    """

    def __init__(self, limit: int | None, made_from: dict[str, Any]):
        self.limit = limit  # complete checkpoints to keep; None keeps all
        self.made_from = made_from

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Let a resumed run follow the arguments where the Trainer follows its checkpoint."""
        state.compute_steps(args, state.max_steps)  # the rhythm of logging and saving
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step >= state.max_steps or not checkpoint.is_dir():
            return
        planned = _state_of(checkpoint).max_steps
        if planned == state.max_steps or not isinstance(lr_scheduler, LambdaLR):
            return
        lr_scheduler.last_epoch -= 1
        lr_scheduler.step()  # to where it was, with the rate of a run of so many steps
        last = lr_scheduler.base_lrs[0] * lr_scheduler.lr_lambdas[0](state.max_steps - 1)
        logger.info(
            f"{state.max_steps:,} steps in place of {planned:,}: from here on the learning rate is "
            f"that of such a run, {lr_scheduler.get_last_lr()[0]:.2g} at step "
            f"{state.global_step + 1:,} and {last:.2g} at the last"
        )

    def on_save(self, args, state, control, model=None, **kwargs):
        """Mark the new checkpoint, then remove those that are too old or incomplete."""
        finite = _all_finite(model, args.device)
        PartialState().wait_for_everyone()  # each process writes a part of it
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        if not finite:
            logger.warning("%s is not kept: its weights are not finite", checkpoint.name)
            shutil.rmtree(checkpoint, ignore_errors=True)
            return
        _mark_complete(checkpoint, self.made_from)
        kept = 1
        for path in _newest_first(folder):
            if _step_of(path) < state.global_step:
                if _why_incomplete(path) or kept == self.limit:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    kept += 1


def _all_finite(model: torch.nn.Module, device: torch.device) -> bool:
    """Tell whether all weights, in all processes, are finite and far from overflowing."""
    norm = torch.nn.utils.get_total_norm(model.parameters())
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return bool(reduce(norm.to(device), "sum").isfinite())  # with FSDP each has a part of them


def _mark_complete(checkpoint: Path, made_from: dict[str, Any]) -> None:
    hashes = hash_files(checkpoint)
    hashes.pop(_COMPLETION_FILE, None)
    for name in hashes:
        with (checkpoint / name).open("rb+") as file:
            sync_to_disk(file)  # a machine that loses power may lose what is in memory
    sizes = {name: (checkpoint / name).stat().st_size for name in hashes}
    made_from = {**made_from, "files": sizes, "hashes": hashes}
    write_json(checkpoint / _COMPLETION_FILE, made_from, sync=True)


def _completion(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _COMPLETION_FILE).read_text(encoding="utf-8"))


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _why_incomplete(checkpoint: Path, thorough: bool = False) -> str:
    """Return what a checkpoint lacks, or an empty string; read its files if it is thorough."""
    name = _COMPLETION_FILE
    if not (checkpoint / name).exists():
        return "its writing was not finished"
    try:
        completion = _completion(checkpoint)
        for name, size in completion["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} is damaged"
    except (OSError, ValueError):
        return f"{name} is missing or damaged"
    damaged = damaged_file(checkpoint, completion.get("hashes", {})) if thorough else None
    return f"{damaged} is damaged" if damaged else ""


def _newest_first(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, complete or not."""
    paths = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: str | Path, thorough: bool = False) -> Path | None:
    """Return the newest complete checkpoint, a folder ``checkpoint-<step>``, or None.

    One that was left half-written, or damaged since, is passed over with a warning. If it is
    ``thorough``, the hashes of all files are compared, and not only their sizes.
    """
    for path in _newest_first(Path(folder)):
        if not (problem := _why_incomplete(path, thorough)):
            return path
        logger.warning("%s is passed over: %s", path.name, problem)
    return None


def recorded_precision(checkpoint: str | Path) -> str | None:
    """Return what a complete checkpoint was computed in, if it says so."""
    completion = _completion(Path(checkpoint))
    return completion.get("arguments", completion["inputs"]).get("precision")


def longer_run(folder: str | Path, more: int) -> int:
    """Return the steps of a finished run that becomes longer; of an unfinished one, its own."""
    if more < 1:
        raise ValueError(f"a run cannot be made {more} steps longer: name 1 or more")
    checkpoint = last_checkpoint(folder)
    state = _state_of(checkpoint) if checkpoint else TrainerState()
    return state.max_steps + (more if state.global_step >= state.max_steps else 0)


def _made_from(trainer: Trainer, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Return what decides the outcome: the inputs and the Trainer's arguments."""
    args = trainer.args
    arguments = {name: getattr(args, name, None) for name in _DECISIVE}
    arguments["optim"] = str(args.optim.value).removesuffix("_fused")  # the same, computed faster
    arguments["precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    arguments["processes"] = args.world_size
    arguments[_BATCH] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    # As it will be read back.
    return json.loads(json.dumps({"inputs": inputs or {}, "arguments": arguments}))


def train(
    trainer: Trainer,
    inputs: dict[str, Any] | None = None,
    fresh: bool = False,
    halve_batch: bool = False,
    make_model: Callable[[], PreTrainedModel] | None = None,
    results: Sequence[Path] = (),
) -> None:
    """Train to the end, from the newest complete checkpoint if there is one.

    A run goes on only if its inputs, and the Trainer's arguments that decide the outcome, are the
    same; another one is moved aside, never deleted, and the log names the difference. Precision and
    number of processes may change, and more steps make a run longer. A finished run is only loaded,
    and its plot is shown again. At the end, callbacks that have a method ``close`` are closed.

    Parameters
    ----------
    trainer : transformers.Trainer
        ``args.output_dir`` holds the checkpoints. What callbacks write to, if they name it in an
        attribute ``path``, is moved aside with them, and so are the files and folders ``results``.
    inputs : dict, optional
        What else decides the outcome, as values that JSON can hold.
    fresh : bool
        Start over even though there is a checkpoint; the earlier run is kept aside.
    halve_batch : bool
        If the GPU runs out of memory, go on with half the per-device batch and twice the
        accumulation: the same tokens a step, a little slower.
    make_model : callable, optional
        Returns the model as it was before: needed to start over once it has been trained.

    Raises
    ------
    LossError, torch.OutOfMemoryError, OSError
        If a `tinytrain.callbacks.LossGuard` stops the run; if the GPU's memory is too small; if the
        disk is full or the folder cannot be written to.
    RuntimeError
        If another run trains in the folder, or ``make_model`` is needed and missing.
    """
    folder = Path(trainer.args.output_dir)
    made_from = _made_from(trainer, inputs)
    keeper = _CheckpointKeeper(trainer.args.save_total_limit, made_from)
    trainer.add_callback(keeper)
    trainer.args.save_total_limit = None  # the keeper removes them
    _quiet_transformers()
    try:
        with _opened_by_rank_zero(trainer, made_from, fresh, results) as checkpoint:
            while not _train_from(checkpoint, trainer, halve_batch, make_model):
                checkpoint = last_checkpoint(folder)
    except Exception as error:
        if _is_disk_full(error):
            raise OSError(errno.ENOSPC, _clear_full_disk(folder, error)) from error
        if world_size() > 1:
            # At once: the launcher may end this process before it can report anything else.
            last = last_checkpoint(folder)
            resume = f"goes on from {last.name}" if last else "starts over: no checkpoint yet"
            logger.error("rank %d ends (%s); the same command %s", rank(), one_line(error), resume)
        raise
    finally:
        trainer.remove_callback(keeper)
        trainer.args.save_total_limit = keeper.limit
        for callback in trainer.callback_handler.callbacks:  # StopCallback may end the process
            try:
                getattr(callback, "close", lambda: None)()
            except OSError as error:  # must not hide what ended the training
                logger.warning("%s: %s", type(callback).__name__, error)


def _train_from(
    checkpoint: Path | None, trainer: Trainer, halve_batch: bool, make_model: Callable | None
) -> bool:
    """Train to the end; return False if the memory was too small and the batch is halved now."""
    if checkpoint is None and trainer.state.global_step:  # trained before, in this session
        if make_model is None or trainer.is_fsdp_enabled:
            raise RuntimeError(
                "the model in memory is trained already: restart this program or notebook to start "
                "over, or give train(..., make_model=...) a function that makes the model"
            )
        trainer.model.load_state_dict(make_model().state_dict())
    elif checkpoint:
        state, before = _state_of(checkpoint), _completion(checkpoint).get("arguments", {})
        asked = {name: getattr(trainer.args, name) for name in ("max_steps", "num_train_epochs")}
        end = state.max_steps if asked.items() <= before.items() else _total_steps(trainer)
        if state.global_step >= end:  # the Trainer would make a step too many
            logger.info("this run is finished: its model is loaded, nothing is trained")
            load_model(trainer.model, checkpoint / "model.safetensors")
            trainer.state, handler = state, trainer.callback_handler
            handler.train_dataloader = trainer.get_train_dataloader()
            handler.on_train_begin(trainer.args, state, trainer.control)  # displays show it again
            handler.on_train_end(trainer.args, state, trainer.control)
            return True
        if any(checkpoint.glob("pytorch_model_fsdp*")) != trainer.is_fsdp_enabled:
            made = "without" if trainer.is_fsdp_enabled else "with"
            raise ValueError(
                f"{checkpoint.name} was made {made} FSDP: go on {made} it, or start over with "
                "fresh=True (`--fresh`)"
            )
    trainer.optimizer = trainer.lr_scheduler = None  # those of an earlier call know other steps
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        args, message = trainer.args, _explain_out_of_memory(trainer, error)
        # Several ranks would have to agree on it, and one is out of step already.
        if not halve_batch or world_size() > 1 or args.per_device_train_batch_size % 2:
            raise torch.OutOfMemoryError(message) from error
        logger.warning(message)
        args.per_device_train_batch_size //= 2
        args.per_device_eval_batch_size = args.per_device_train_batch_size
        args.gradient_accumulation_steps *= 2  # as many tokens a step as before
        trainer._train_batch_size = args.train_batch_size  # what Trainer.train() reads
        return False
    return True


def _total_steps(trainer: Trainer) -> int:
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _quiet_transformers() -> None:
    """Turn off its progress bars, one for each checkpoint, and two warnings that we expect."""
    transformers_logging.disable_progress_bar()
    for name in ("trainer", "trainer_utils"):
        logging.getLogger(f"transformers.{name}").addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    # A tied matrix is stored once; `on_train_begin` sets another rhythm of logging.
    expected = ("checkpoint model loaded: ['lm_head.weight']", "do not match the ones in")
    return not any(part in record.getMessage() for part in expected)


@contextmanager
def _opened_by_rank_zero(
    trainer: Trainer, made_from: dict, fresh: bool, results: Sequence[Path]
) -> Iterator[Path | None]:
    """Lock the folder and give all ranks the checkpoint, or the error, that rank 0 has found."""
    folder = Path(trainer.args.output_dir)
    files = [Path(c.path) for c in trainer.callback_handler.callbacks if getattr(c, "path", None)]
    files += results
    found: Path | Exception | None = None
    with ExitStack() as stack:
        if rank() == 0:
            try:
                with writing_to(folder.parent):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    # The system releases it even if this process is killed.
                    lock = FileLock(folder.with_name(folder.name + ".lock"))
                    stack.enter_context(lock.acquire(timeout=0))
                found = _open_run(trainer, made_from, fresh, files)
            except Timeout:
                found = RuntimeError(
                    f"another process trains in {folder.parent} (it holds {folder.name}.lock): "
                    "wait for its end, stop it, or take another folder (notebooks: TINYTRAIN_RUNS)"
                )
            except Exception as error:
                found = error
        found = broadcast_object_list([found])[0]
        if isinstance(found, Exception):
            raise found
        yield found


def _open_run(trainer: Trainer, made_from: dict, fresh: bool, files: Sequence[Path]) -> Path | None:
    """Return the checkpoint to resume; move the folder and the files of another run aside."""
    folder = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(folder, thorough=True)
    reason = ""
    if checkpoint:
        reason = "fresh=True" if fresh else _changes(checkpoint, made_from, trainer)
    elif any((path / _COMPLETION_FILE).exists() for path in _newest_first(folder)):
        reason = "none of its checkpoints is whole"
    if reason:
        aside = _move_aside(folder, files)
        logger.info("starting over (%s); the earlier run is kept as %s", reason, aside.name)
        checkpoint = None
    elif checkpoint:
        for path in takewhile(lambda path: path != checkpoint, _newest_first(folder)):
            (path / _COMPLETION_FILE).unlink(missing_ok=True)  # damaged, soon to be written over
        logger.info("going on from %s; fresh=True would start over", checkpoint.name)
        was, now = recorded_precision(checkpoint), made_from["arguments"]["precision"]
        if was not in (None, now):
            logger.info("computed in %s so far, from here on in %s", was, now)
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint


def _changes(checkpoint: Path, now: dict[str, Any], trainer: Trainer) -> str:
    """Say what forbids to go on from a checkpoint: what it was made from, and what is asked now."""
    before = _completion(checkpoint)
    changed: dict[str, tuple] = {}
    for part, new in now.items():
        for name, value in before.get(part, {}).items():  # of what both know
            if name in new and new[name] != value:
                changed.setdefault(name, (value, new[name]))
    changed.pop("precision", None)
    # Processes that cannot share a batch evenly take up to one row more each.
    processes = max(changed.pop("processes", (1, 1)))
    was, is_now = changed.get(_BATCH, (0, 0))
    if abs(was - is_now) < processes:
        changed.pop(_BATCH, None)
    if changed.keys() & _STEPS and _total_steps(trainer) >= _state_of(checkpoint).max_steps:
        changed = {name: values for name, values in changed.items() if name not in _STEPS}
    changes = [f"{name} was {was}, is {is_now}" for name, (was, is_now) in changed.items()]
    return f"{checkpoint.name}: {', '.join(changes[:3])}" if changes else ""


def _move_aside(folder: Path, files: Sequence[Path]) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    os.replace(folder, aside)
    for path in files:
        if path.exists():
            os.replace(path, aside / path.name)
    return aside


def _explain_out_of_memory(trainer: Trainer, error: torch.OutOfMemoryError) -> str:
    """Return what to say, after freeing what the failed step still holds."""
    details = str(error).split(" If reserved but")[0]
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    args, length = trainer.args, len(trainer.train_dataset[0]["input_ids"])
    batch = args.per_device_train_batch_size
    return (
        f"The GPU's memory is too small for batches of {batch} x {length} tokens ({details}). "
        f"Two changes help: batch_size={max(batch // 2, 1)} with "
        f"gradient_accumulation={args.gradient_accumulation_steps * 2}, which learns the same; "
        f"or context_length={length // 2}."
    )


def _is_disk_full(error: BaseException) -> bool:
    reports = ["No space left on device", "Disk quota exceeded"]
    reports += ["PytorchStreamWriter failed", "unexpected pos "]  # as torch.save says it
    return any(report in str(error) for report in reports)


def _clear_full_disk(folder: Path, error: Exception) -> str:
    """Remove the checkpoint that was being written, and return what to say."""
    full = full_disk(error, folder)
    full = folder if full.is_relative_to(folder) else full
    last = last_checkpoint(folder)
    for path in takewhile(lambda path: path != last, _newest_first(folder)):
        shutil.rmtree(path, ignore_errors=True)
    kept = f"{last.name} is complete" if last else "no checkpoint was finished before"
    return (
        f"the disk that holds {full} is full (the unfinished checkpoint is removed); {kept}. "
        "Make space and call the same again: it goes on from there"
    )
