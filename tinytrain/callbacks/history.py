"""Messages about a training run, and its history as lines of JSON."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tinytrain.common import (
    PROGRESS,
    Speedometer,
    append_json_line,
    format_seconds,
    read_json_lines,
    write_json_lines,
)

logger = logging.getLogger(__name__)


class VerboseTrainingCallback(TrainerCallback):
    """Logs the course of a run: start, epochs, losses, evaluations, speed, time left, end.

    ``tokens_per_step`` are those of a whole optimiser step; the last of an epoch may have fewer.
    Between two messages about the loss are ``seconds`` at least, but the first and last always
    come.
    """

    rank_zero_only = True

    def __init__(self, tokens_per_step: int, seconds: float = 10.0):
        self.tokens_per_step, self.seconds = tokens_per_step, seconds
        self.train_loss: list[float] = []  # in nats per token, each the mean since the last

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Log how large the model is, and how many steps there are."""
        self._speed = Speedometer(self.tokens_per_step, state, args, train_dataloader)
        self._last_message = -math.inf
        parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            f"training starts: {parameters:,} parameters, "
            f"{state.max_steps:,} steps of {self._speed.tokens_per_step:,} tokens"
            + (f", resumed at step {state.global_step}" if state.global_step else "")
        )
        if state.max_steps <= (warmup := args.get_warmup_steps(state.max_steps)):
            logger.warning(
                f"the learning rate rises for {warmup:,} steps and the run has {state.max_steps:,}:"
                " it will not learn at the recipe's rate. Set warmup_steps lower, or train longer"
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Log which pass over the text begins."""
        epoch, epochs = int(state.epoch or 0) + 1, math.ceil(state.num_train_epochs)
        logger.info(f"epoch {epoch} of {epochs}", extra=PROGRESS)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log loss, learning rate, speed and the time left."""
        if not logs or "loss" not in logs:
            return  # an evaluation or the closing summary: they have events of their own
        self.train_loss.append(float(logs["loss"]))
        now = time.monotonic()
        if now - self._last_message < self.seconds and state.global_step < state.max_steps:
            return
        self._last_message = now
        left = format_seconds(self._speed.seconds_left(state) or 0)
        logger.info(
            f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.3f}, "
            f"lr {logs.get('learning_rate', math.nan):.1e}, "
            f"{self._speed.tokens_per_second(state):,.0f} tokens/s, {left} left",
            extra=PROGRESS,
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Log the held-out loss."""
        if metrics and "eval_loss" in metrics:
            message = f"step {state.global_step}: held-out loss {metrics['eval_loss']:.3f}"
            logger.info(message, extra=PROGRESS)

    def on_train_end(self, args, state, control, **kwargs):
        """Log how long it took."""
        took = format_seconds(self._speed.seconds())
        logger.info(f"training ends at step {state.global_step} after {took}")


class HistoryCallback(TrainerCallback):
    """Writes one JSON line per logged loss and per evaluation, at once, so that a crash loses none.

    The first line holds ``max_steps``, ``tokens_per_step`` and the metadata. Every other line holds
    ``step``, ``tokens`` (seen so far), ``seconds`` (of training, over all sittings) and one of:
    ``loss`` with ``learning_rate`` and ``grad_norm``; ``eval_loss``; ``end``, which is ``finished``
    or ``stopped``. A resumed run drops the lines after its checkpoint and goes on.
    """

    rank_zero_only = True

    def __init__(self, path: str | Path, tokens_per_step: int, **metadata: Any):
        self.path, self.tokens_per_step, self.metadata = Path(path), tokens_per_step, metadata
        self._running = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Keep the lines of the steps already done."""
        kept = []
        if state.global_step and self.path.exists():
            lines = [line for line in read_json_lines(self.path) if "end" not in line]
            kept = [line for line in lines if 0 < line.get("step", 0) <= state.global_step]
        self._seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self._speed = Speedometer(self.tokens_per_step, state, args, train_dataloader)
        self._running = True
        first = {"step": 0, "tokens": 0, "seconds": 0.0, "max_steps": state.max_steps}
        first |= {"tokens_per_step": self._speed.tokens_per_step, **self.metadata}
        write_json_lines(self.path, [first, *kept])

    def on_step_end(self, args, state, control, **kwargs):
        """Have the last loss logged too: a short run may end before its first `logging_steps`."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a training loss."""
        if logs and "loss" in logs:
            names = ("loss", "learning_rate", "grad_norm")
            self._write(state, {name: float(logs[name]) for name in names if name in logs})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Write a held-out loss."""
        if metrics and "eval_loss" in metrics and self._running:
            self._write(state, {"eval_loss": float(metrics["eval_loss"])})

    def on_train_end(self, args, state, control, **kwargs):
        """Write that the run has ended."""
        finished = state.global_step >= state.max_steps
        self._write(state, {"end": "finished" if finished else "stopped"})
        self._running = False  # an evaluation that comes later is not part of the run

    def _write(self, state, values: dict[str, Any]) -> None:
        line = {
            "step": state.global_step,
            "tokens": self._speed.tokens(state.global_step),
            "seconds": round(self._seconds_before + self._speed.seconds(), 2),
        }
        append_json_line(self.path, line | values)
