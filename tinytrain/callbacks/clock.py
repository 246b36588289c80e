"""Ends a training run when its time is up, with a learning rate that goes by the clock."""

from __future__ import annotations

import math
import time

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback


class TimeLimit(TrainerCallback):
    """Trains for so many seconds: the learning rate falls to 0 just when the time is up.

    A schedule by steps has to know their number, which nobody can on a machine that does other work
    too. By the clock, a busy machine makes fewer steps, and the rate still falls to 0 in the last.
    `tinytrain.training.build_trainer` takes the rate from here; a Trainer of your own does so with
    ``optimizers=(optimizer, LambdaLR(optimizer, limit))``.

    The time used is stored in checkpoints, with the scheduler: a run that goes on has what was
    left. ``state.max_steps`` follows the present speed, so that plots and messages show how much is
    left to do.

    Parameters
    ----------
    seconds : float
        How long to train, evaluations and checkpoints included.
    warmup_steps : int
        Steps in which the rate rises.
    spent : float
        Seconds of it that are gone before the training begins.
    reserve : float
        Time to leave for what follows, such as measuring the held-out loss, in steps.
    expected_steps : int
        What to show before the first step tells the speed.

    Attributes
    ----------
    used : float
        Seconds used so far, over all sittings.
    """

    def __init__(
        self,
        seconds: float,
        warmup_steps: int = 0,
        spent: float = 0.0,
        reserve: float = 0.0,
        expected_steps: int = 10**9,
    ):
        # All numbers: a scheduler stores the attributes of what it calls, and reads them back.
        self.seconds, self.warmup_steps, self.reserve = seconds, warmup_steps, reserve
        self.used, self.step_seconds, self.max_steps = spent, 0.0, expected_steps

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, as a share of the highest."""
        end = self._end()
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * max(0.0, 1 - self.used / end)

    def _end(self) -> float:
        return max(self.seconds - self.reserve * self.step_seconds, 0.5 * self.seconds, 1e-9)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Go on with the time that a checkpoint had used."""
        self._start = time.monotonic() - self.used
        batches = len(train_dataloader) if train_dataloader is not None else 0
        self._epoch = max(1, batches // args.gradient_accumulation_steps)
        if not 0 < state.max_steps <= state.global_step:  # a finished run stays finished
            self._show(state)
        self._first = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        """Count the time that is left; end the run when there is none."""
        now = time.monotonic() - self._start
        if args.world_size > 1:  # all processes go by the clock of the first
            now = float(broadcast(torch.tensor(now, device=args.device, dtype=torch.float32)))
        last, self.used = now - self.used, now
        # Of some ten steps, so that a slow moment counts for little; the very first is always slow.
        if state.global_step > self._first:
            usual = self.step_seconds or last
            self.step_seconds = 0.9 * usual + 0.1 * min(last, 3 * usual)
        left = self.max_steps - state.global_step  # as expected, before the speed is known
        if self.step_seconds:
            left = (self._end() - now) / self.step_seconds
        done = left < 0.5 or now > self._end()
        # One more than the next, or the Trainer would end the run there by itself.
        self.max_steps = state.global_step + (0 if done else max(2, math.ceil(left)))
        self._show(state)
        if done:
            control.should_training_stop = control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"

    def _show(self, state) -> None:
        state.max_steps = self.max_steps
        state.seconds_left = max(0.0, self._end() - self.used)  # `common.Speedometer` tells it
        state.num_train_epochs = math.ceil(self.max_steps / self._epoch)
