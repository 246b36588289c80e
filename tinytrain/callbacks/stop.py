"""Ends a training run in good order when you ask for it."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# What announces the end of this process: of the machine, the terminal or the console (Windows).
_FATAL = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, n)]


class StopCallback(TrainerCallback):
    """Ends a run in good order when asked: after the current step, with a checkpoint.

    The interrupt (■ in a notebook, or Ctrl-C) and ``stop_file`` (``touch`` it from anywhere) end
    the run with a checkpoint, an evaluation and a last drawing, and your program goes on; a second
    interrupt stops at once. After SIGTERM, by which a cloud machine announces its end, and SIGHUP
    (a closed window; SIGBREAK on Windows), there is time for a checkpoint only; then the signal
    ends the process in ``on_train_end``, so name this callback last. Asking one of several
    processes stops all.
    """

    def __init__(self, stop_file: str | Path | None = None):
        self.stop_file = Path(stop_file) if stop_file else None
        self.reason: str | None = None  # who asked
        self._fatal: int | None = None  # a signal that must end the process
        self._previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen to signals."""
        self._restore_handlers()  # an earlier run may have ended by an error
        self.reason, self._fatal, self._acknowledged = None, None, False
        self._last_look = -math.inf
        self._watched = self.stop_file if state.is_world_process_zero else None
        if self._watched and self._watched.exists():
            logger.info(f"{self._watched} is left from before and is removed")
            self._watched.unlink()
        # Python hears signals in its main thread only; elsewhere the file remains.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_FATAL):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._handle_signal)

    # A signal may arrive in the middle of writing a message: its handler must not write one.
    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_training(frame):  # a run that ended by an error has no on_train_end
            self._restore_handlers()
            signal.raise_signal(number)
        elif number in _FATAL:
            self.reason, self._fatal = signal.Signals(number).name, number
        elif self.reason:
            raise KeyboardInterrupt("interrupted a second time: stopped at once")
        else:
            self.reason = "the interrupt"

    def _is_training(self, frame: FrameType | None) -> bool:
        """Tell whether the signal came inside ``train()`` of a Trainer with this callback."""
        while frame is not None:
            if frame.f_code.co_name == "train":
                handler = getattr(frame.f_locals.get("self"), "callback_handler", None)
                if handler is not None and self in handler.callbacks:
                    return True
            frame = frame.f_back
        return False

    def _restore_handlers(self) -> None:
        while self._previous_handlers:
            number, handler = self._previous_handlers.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    def on_substep_end(self, args, state, control, **kwargs):
        """Log that the request was heard: a step may take a while."""
        if self.reason and not self._acknowledged:
            self._acknowledged = True
            logger.info(f"{self.reason}: the run will stop after this step")

    on_prediction_step = on_substep_end

    def on_step_end(self, args, state, control, **kwargs):
        """Ask the Trainer for a checkpoint, an evaluation and the end."""
        now = time.monotonic()
        # Once a second only: a look at a network drive takes a while.
        if self._watched and now - self._last_look >= 1:
            self._last_look = now
            if self._watched.exists():
                self._watched.unlink(missing_ok=True)
                self.reason = self.reason or f"the file {self._watched.name}"
        urgency = 2 if self._fatal else 1 if self.reason else 0
        # The most urgent request counts for all ranks; a signal that comes from here on waits for
        # the next step, since no other rank would hear of it in this one.
        if args.world_size > 1:
            urgency = int(gather(torch.tensor(urgency, device=args.device)).max())
        if urgency and state.global_step < state.max_steps:
            self.reason = self.reason or "another process"
            if urgency == 2:
                self._fatal = self._fatal or signal.SIGTERM
            self.on_substep_end(args, state, control)
            control.should_training_stop = True
            control.should_save = True
            control.should_log = True
            control.should_evaluate = urgency < 2 and args.eval_strategy != "no"

    def on_train_end(self, args, state, control, **kwargs):
        """Log what you can do now, and let a signal take its course."""
        if self.reason and state.global_step < state.max_steps:
            stopped = f"stopped at step {state.global_step} by {self.reason}"
            logger.info(f"{stopped}; a checkpoint is saved, the same call goes on from it")
        self.close()

    def close(self) -> None:
        """Stop listening, and let a signal that ends the process take its course."""
        self._restore_handlers()
        fatal, self._fatal = self._fatal, None
        if fatal:
            signal.raise_signal(fatal)
