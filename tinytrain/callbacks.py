"""What one sees of a training run: messages, a history on disk, and a plot that moves.

The Trainer calls a callback at every event of the run. Three small ones share the work:
`VerboseTrainingCallback` writes messages, `HistoryCallback` writes ``history.jsonl``, and
`LivePlotCallback` draws. Only the last needs a notebook, and even that falls back to a file.

The plot is drawn with matplotlib's ``Figure``, never with pyplot: pyplot's figures are shared by
the whole process, and a widget's event that arrives in the middle of a drawing would show a
half-drawn one. A PNG is sent to one output that is replaced, so neither the notebook nor the
browser grows with the number of points.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TRAIN_COLOR, HELD_OUT_COLOR = "#2f6fde", "#e4572e"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    Examples
    --------
    >>> format_seconds(75)
    '1 min 15 s'
    >>> format_seconds(7300)
    '2 h 01 min'
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class VerboseTrainingCallback(TrainerCallback):
    """Logs the course of a run: start, epochs, losses, evaluations, speed, time left, end.

    Parameters
    ----------
    tokens_per_step : int
        Tokens that one optimiser step learns from, for the speed in tokens a second.
    seconds : float
        The shortest time between two messages about the loss; the first and the last always come.

    Attributes
    ----------
    train_loss : list of float
        The logged training losses in nats per token, each the mean since the last.
    """

    def __init__(self, tokens_per_step: int, seconds: float = 10.0):
        self.tokens_per_step = tokens_per_step
        self.seconds = seconds
        self.train_loss: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Say how large the model is and how long the way."""
        self._start, self._first_step = time.monotonic(), state.global_step
        self._told = -math.inf
        logger.info(
            "training starts: %s parameters, %s steps of %s tokens%s",
            f"{model.num_parameters():,}",
            f"{state.max_steps:,}",
            f"{self.tokens_per_step:,}",
            f", taken up at step {state.global_step}" if state.global_step else "",
        )

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Say which pass over the text begins."""
        epoch = int(state.epoch or 0) + 1
        logger.info("epoch %d of %d", epoch, math.ceil(state.num_train_epochs))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log loss, learning rate, speed and the time left."""
        if not logs or "loss" not in logs:
            return  # an evaluation or the closing summary: they have events of their own
        self.train_loss.append(float(logs["loss"]))
        now = time.monotonic()
        if now - self._told < self.seconds and state.global_step < state.max_steps:
            return
        self._told = now
        seconds = max(now - self._start, 1e-9)
        steps_per_second = (state.global_step - self._first_step) / seconds
        left = (state.max_steps - state.global_step) / max(steps_per_second, 1e-9)
        logger.info(
            "step %d/%d: loss %.3f, lr %.1e, %s tokens/s, %s left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            logs.get("learning_rate", float("nan")),
            f"{steps_per_second * self.tokens_per_step:,.0f}",
            format_seconds(left),
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Log the held-out loss."""
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            logger.info("step %d: held-out loss %.3f", state.global_step, loss)

    def on_train_end(self, args, state, control, **kwargs):
        """Say how long it took."""
        seconds = time.monotonic() - self._start
        logger.info("training ends at step %d after %s", state.global_step, format_seconds(seconds))


class HistoryCallback(TrainerCallback):
    """Writes one JSON line per logged loss and per evaluation, at once, so that a crash loses none.

    A line holds ``step``, ``tokens`` (seen so far), ``seconds`` (of training, over all sittings)
    and either ``loss``, ``learning_rate`` and ``grad_norm`` or ``eval_loss``.

    Parameters
    ----------
    path : str or Path
        Usually ``history.jsonl`` in the run's folder. A run that starts at step 0 replaces the
        file; a run taken up again drops the lines after its checkpoint and goes on.
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    """

    def __init__(self, path: str | Path, tokens_per_step: int):
        self.path = Path(path)
        self.tokens_per_step = tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what belongs to the steps already done."""
        kept = []
        if state.global_step and self.path.exists():
            kept = [line for line in read_history(self.path) if line["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        before = kept[-1]["seconds"] if kept else 0.0
        self._start = time.monotonic() - before

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a training loss."""
        if logs and "loss" in logs:
            names = ("loss", "learning_rate", "grad_norm")
            self._write(state, {name: float(logs[name]) for name in names if name in logs})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Write a held-out loss."""
        if metrics and "eval_loss" in metrics and hasattr(self, "_start"):
            self._write(state, {"eval_loss": float(metrics["eval_loss"])})

    def _write(self, state, values: dict[str, float]) -> None:
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(time.monotonic() - self._start, 2),
            **values,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Read ``history.jsonl``; a last line that is still being written is left out.

    Parameters
    ----------
    path : str or Path
        A file written by `HistoryCallback`.

    Returns
    -------
    list of dict
        One dictionary a line, in order.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Return the exponential moving average of a curve, unbiased at its start.

    The average starts from zero, which would pull the first values down; dividing by the weights
    spent so far takes that out, as Adam does (Kingma & Ba, 2015, section 3).

    Examples
    --------
    >>> smooth([2.0, 2.0])
    [2.0, 2.0]
    """
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed


class LossPlot:
    """A loss plot whose lines are kept and moved, so that drawing it again is cheap.

    Parameters
    ----------
    vocab_size : int, optional
        If given, a dotted line at ln(vocab_size): the loss of a model that knows nothing.
    """

    def __init__(self, vocab_size: int | None = None):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure: Figure = Figure(figsize=(8, 4.5), dpi=96, facecolor="white")
        FigureCanvasAgg(self.figure)
        loss, rate = self.figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        self._axes = (loss, rate)
        (self._raw,) = loss.plot([], [], color=TRAIN_COLOR, alpha=0.35, linewidth=1)
        (self._smooth,) = loss.plot([], [], color=TRAIN_COLOR, linewidth=2, label="train, smoothed")
        (self._held_out,) = loss.plot([], [], "o-", color=HELD_OUT_COLOR, ms=5, label="held-out")
        (self._rate,) = rate.plot([], [], color="#555555", linewidth=1.5)
        if vocab_size:
            untrained = math.log(vocab_size)
            label = f"knows nothing: ln({vocab_size:,}) = {untrained:.2f}"
            loss.axhline(untrained, color="#888888", linestyle=":", label=label)
        loss.set_ylabel("loss (nats per token)")
        loss.legend(loc="upper right", bbox_to_anchor=(1, 0.93), fontsize=9, edgecolor="none")
        rate.set_ylabel("learning rate", fontsize=8)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in self._axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        rate.set_xlabel("step")
        self.figure.subplots_adjust(left=0.11, right=0.97, top=0.9, bottom=0.11, hspace=0.1)

    def update(self, history: Sequence[dict[str, float]], title: str = "", last_step: int = 0):
        """Move the lines to a history, as `read_history` returns it.

        Parameters
        ----------
        history : sequence of dict
            The lines of ``history.jsonl``.
        title : str
            The line above the plot.
        last_step : int
            Where the run will end, so that the x axis shows how far it is.

        Returns
        -------
        matplotlib.figure.Figure
        """
        train = [line for line in history if "loss" in line]
        held_out = [line for line in history if "eval_loss" in line]
        steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
        rated = [line for line in train if "learning_rate" in line]
        self._raw.set_data(steps, losses)
        self._smooth.set_data(steps, smooth(losses))
        self._held_out.set_data(
            [line["step"] for line in held_out], [line["eval_loss"] for line in held_out]
        )
        self._rate.set_data(
            [line["step"] for line in rated], [line["learning_rate"] for line in rated]
        )
        for axis in self._axes:
            axis.relim()
            axis.autoscale_view()
        last_step = max([last_step, 1, *(line["step"] for line in history)])
        self._axes[1].set_xlim(0, last_step)
        if history and history[-1].get("tokens"):
            per_step = history[-1]["tokens"] / history[-1]["step"]
            self._axes[1].set_xlabel(f"step, of {per_step:,.0f} tokens")
        self._axes[0].set_title(title, fontsize=10, loc="left")
        return self.figure

    def png(self) -> bytes:
        """Return the plot as a PNG image."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_history(
    history: Sequence[dict[str, float]], vocab_size: int | None = None, title: str = ""
) -> Figure:
    """Draw the losses and the learning rate of a run, past or still running.

    Parameters
    ----------
    history : sequence of dict
        What `read_history` returns.
    vocab_size : int, optional
        Adds a dotted line at ln(vocab_size), where an untrained model stands.
    title : str
        The line above the plot.

    Returns
    -------
    matplotlib.figure.Figure
    """
    return LossPlot(vocab_size).update(history, title)


def in_notebook() -> bool:
    """Tell whether this code runs in a Jupyter or Colab kernel, which can show pictures."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


class LivePlotCallback(TrainerCallback):
    """Draws the loss while the cell runs, and keeps the last drawing as a file.

    Drawing stops the training for its time. It is therefore done at most every `seconds`, and
    more rarely where it is slow: never more than one hundredth of the time goes into it. The last
    state is always drawn.

    Parameters
    ----------
    path : str or Path
        Where the plot is kept, usually ``loss.png`` in the run's folder.
    vocab_size : int, optional
        Adds a dotted line at ln(vocab_size), where an untrained model stands.
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    history : str or Path, optional
        The run's ``history.jsonl``: a run that is taken up again shows its first part from there.
        Name this callback after the `HistoryCallback` that writes the file.
    seconds : float
        The shortest time between two drawings.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_size: int | None = None,
        tokens_per_step: int = 0,
        history: str | Path | None = None,
        seconds: float = 1.5,
    ):
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokens_per_step = tokens_per_step
        self.history_path = Path(history) if history else None
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the one output that later drawings replace."""
        self.history: list[dict[str, float]] = []
        if state.global_step and self.history_path and self.history_path.exists():
            self.history = read_history(self.history_path)
        self.plot = LossPlot(self.vocab_size)
        self._start, self._first_step = time.monotonic(), state.global_step
        self._pause = self.seconds
        self._handle = None
        if in_notebook():
            from IPython.display import display

            self._handle = display(self._bundle(state), raw=True, display_id=True)
        self._drawn = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Take up a training loss."""
        if logs and "loss" in logs:
            names = ("loss", "learning_rate")
            values = {name: float(logs[name]) for name in names if name in logs}
            self._add(state, values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Take up a held-out loss."""
        if metrics and "eval_loss" in metrics and hasattr(self, "plot"):
            self._add(state, {"eval_loss": float(metrics["eval_loss"])})

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state and keep it as a file."""
        bundle = self._draw(state)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(bundle["image/png"])
        os.replace(temporary, self.path)

    def _add(self, state, values: dict[str, float]) -> None:
        tokens = state.global_step * self.tokens_per_step
        self.history.append({"step": state.global_step, "tokens": tokens, **values})
        if time.monotonic() - self._drawn >= self._pause:
            self._draw(state)

    def _draw(self, state) -> dict[str, Any]:
        start = time.monotonic()
        bundle = self._bundle(state)
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
        self._drawn = time.monotonic()
        self._pause = max(self.seconds, 100 * (self._drawn - start))
        return bundle

    def _bundle(self, state) -> dict[str, Any]:
        """Return the drawing and, for places without pictures, the same in words."""
        title = self._summary(state)
        self.plot.update(self.history, title, state.max_steps)
        return {"image/png": self.plot.png(), "text/plain": title}

    def _summary(self, state) -> str:
        words = [f"step {state.global_step:,} of {state.max_steps:,}"]
        for name, label in (("loss", "train"), ("eval_loss", "held-out")):
            values = [line[name] for line in self.history if name in line]
            if values:
                words.append(f"{label} {values[-1]:.3f}")
        seconds = time.monotonic() - self._start
        done = state.global_step - self._first_step
        if done:
            words.append(f"{done * self.tokens_per_step / seconds:,.0f} tokens/s")
            left = (state.max_steps - state.global_step) * seconds / done
            words.append(f"{format_seconds(left)} left" if left else "done")
        return "   ·   ".join(words)
