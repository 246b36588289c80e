"""Leaves busy cores to other programs, which is faster for both."""

from __future__ import annotations

import logging
import os
import time

import psutil
import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class ShareCores(TrainerCallback):
    """Trains with as many threads as there are idle cores, and looks again every few seconds.

    PyTorch shares each operation out to one thread a core and waits for the slowest of them. If
    another program computes on one core, all wait for the thread that has to share it, thousands of
    times a second: a single thread is then faster than two. ``OMP_NUM_THREADS`` in the environment
    keeps the number as it is; on a GPU it does not matter.

    Parameters
    ----------
    seconds : float
        The time between two looks, over which the load is averaged.
    """

    def __init__(self, seconds: float = 5.0):
        self.seconds = seconds
        self._most = torch.get_num_threads()

    def on_train_begin(self, args, state, control, **kwargs):
        """Look for a moment, longer if others compute, before this process computes itself."""
        fixed = "OMP_NUM_THREADS" in os.environ or torch.accelerator.is_available()
        self._last = None if fixed else self._look()
        for moment in (0.1, 1.0, 1.0) if self._last else ():
            time.sleep(moment)
            self._share()
            if torch.get_num_threads() == self._most:  # if not, others may soon have finished
                break

    def on_step_end(self, args, state, control, **kwargs):
        """Look again, every few seconds."""
        if self._last and time.monotonic() - self._last[0] >= self.seconds:
            self._share()

    def _share(self) -> None:
        """Count the cores that others have used since the last look, and leave those."""
        before, self._last = self._last, self._look()
        passed, mine, all_ = (now - then for now, then in zip(self._last, before, strict=True))
        idle = psutil.cpu_count() - (all_ - mine) / passed
        threads = max(1, min(self._most, int(idle + 0.4)))  # a core that is mostly used is not idle
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            logger.info(
                f"training with {threads} of {self._most} threads: {idle:.1f} cores are free"
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Take all threads again."""
        self.close()

    def close(self) -> None:
        """Take all threads again."""
        torch.set_num_threads(self._most)

    @staticmethod
    def _look() -> tuple[float, float, float]:
        """Return the time, and the seconds that this process and all processes have computed."""
        times = psutil.cpu_times()
        waited = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "steal", 0.0)
        counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        mine = psutil.Process().cpu_times()
        now = time.monotonic()
        return now, mine.user + mine.system, sum(times) - waited - counted_twice
