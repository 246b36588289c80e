"""Draws a training run: while it goes on, from its history, or several runs over one another.

Never with pyplot, whose figures the whole process shares: a widget's event in the middle of a
drawing would show half of it.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerCallback

from tinytrain.common import (
    DISPLAYS,
    NotebookOutput,
    Speedometer,
    atomic_write,
    format_count,
    format_seconds,
    in_notebook,
    new_axes,
    new_figure,
    plot_label,
    read_history,
)

_TRAIN_COLOR, _HELD_OUT_COLOR = "#2f6fde", "#e4572e"
_HALF_WINDOW = 4  # logged losses on either side


class LivePlotCallback(TrainerCallback):
    """Shows the run while it goes on: the loss plot, how far, how fast, how much memory.

    In a notebook this is one picture that is replaced; elsewhere only the file is kept. Drawing
    takes no more than a hundredth of the run's time, more of it at the beginning, which you watch
    most. The last state is always drawn.

    Parameters
    ----------
    path : str or Path
        Where the latest drawing is kept, usually ``loss.png`` in the run's folder.
    vocab_size : int, optional
        Adds a dotted line at ln(vocab_size), the loss of a uniform guess.
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    reference : dict, optional
        The loss of other ``seeds``, shown as a band: ``train`` holds ``step``, ``low``, ``high``.
    seconds : float
        The shortest time between two drawings.
    lines : mapping of str to float, optional
        Other losses, drawn as horizontal lines, for example ``{"counting tokens": 5.1}``.
    """

    rank_zero_only = True

    def __init__(
        self,
        path: str | Path,
        vocab_size: int | None = None,
        tokens_per_step: int = 0,
        reference: Mapping[str, Any] | None = None,
        seconds: float = 1.5,
        lines: Mapping[str, float] | None = None,
    ):
        self.path, self.vocab_size, self.tokens_per_step = Path(path), vocab_size, tokens_per_step
        self.reference, self.seconds, self.lines = reference, seconds, lines
        self.drawing_seconds = 0.0  # that drawing has taken
        self._state = None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Open the one output that later drawings replace."""
        self.close()  # an earlier run may have ended by an error
        start = time.monotonic()
        self._speed = Speedometer(self.tokens_per_step, state, args, train_dataloader)
        steps = max(state.max_steps, 1)
        average = self._speed.tokens(steps) / steps
        self._plot = _LossPlot(self.vocab_size, average, self.reference, self.lines)
        self._output = NotebookOutput() if in_notebook() else None
        if self._output:
            DISPLAYS.add(self)
        self.drawing_seconds = time.monotonic() - start
        self._state = state
        self._draw()

    def on_step_begin(self, args, state, control, **kwargs):
        """Draw if it is time: here the losses and the evaluation of the last step are known."""
        if time.monotonic() - self._last_drawing >= self.seconds:
            left = self._speed.seconds_left(state) or 0.0
            # Less than a hundredth of the time so far and of two fifths of the rest.
            if self.drawing_seconds <= 0.009 * (self._speed.seconds() + 0.4 * left):
                self._draw()

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state."""
        self.close()

    def close(self) -> None:
        """Draw the last state if that has not been done: a training may end by an error."""
        if self._state is not None:
            self._draw()
            DISPLAYS.discard(self)
            self._state = None

    def _draw(self) -> None:
        start = time.monotonic()
        state, left = self._state, self._speed.seconds_left(self._state)
        headline = f"step {state.global_step:,} of {state.max_steps:,}"
        if state.global_step >= state.max_steps:
            headline += ", done"
        elif left:
            headline += f", {format_seconds(left)} left"
        details = [f"{format_count(self._speed.tokens(state.global_step))} tokens seen"]
        if left is not None:
            details.append(f"{self._speed.tokens_per_second(state):,.0f} tokens/s")
        details.append(_memory_in_use())
        text = self._plot.update(state.log_history, headline, details, state.max_steps)
        png = self._plot.png()
        if self._output:
            self._output.show(text, png)
        atomic_write(self.path, png)
        self._last_drawing = time.monotonic()
        self.drawing_seconds += self._last_drawing - start


def replay(path: str | Path, follow: bool = False, seconds: float = 2.0) -> Figure:
    """Draw a past or a running run from its history: after a refresh, or from another notebook.

    Parameters
    ----------
    path : str or Path
        The run's folder, or its ``history.jsonl``; without one, it is a FileNotFoundError.
    follow : bool
        In a notebook, draw again whenever something was added, until the run ends or you interrupt
        the cell: a run that was killed never says that it ends.
    seconds : float
        How often to look.
    """
    output = NotebookOutput() if follow and in_notebook() else None
    history: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):
        while not history or (follow and "end" not in history[-1]):
            if history:
                time.sleep(seconds)
            if len(lines := read_history(path)) != len(history):
                history, plot = lines, _plot_history(lines)
                if output:
                    output.show(plot.figure.texts[0].get_text(), plot.png())
    return plot.figure


def plot_runs(paths: Mapping[str, str | Path]) -> Figure:
    """Draw several runs over one another: smoothed training loss as lines, held-out as points.

    ``paths`` holds what to call each run, and its folder or ``history.jsonl``. Runs with different
    tokenizers cannot be compared by their loss per token.
    """
    figure, axes = new_axes(8, 4.5)
    for name, path in paths.items():
        history = read_history(path)
        train = [line for line in history if "loss" in line]
        smoothed = _smooth([line["loss"] for line in train])
        (drawn,) = axes.plot([line["tokens"] for line in train], smoothed, linewidth=2, label=name)
        held_out = [(line["tokens"], line["eval_loss"]) for line in history if "eval_loss" in line]
        axes.plot(*zip(*held_out, strict=True), "o", color=drawn.get_color(), ms=5)
    axes.plot([], [], "o", color="#888888", label="held-out")
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.legend(edgecolor="none")
    return figure


def is_this_normal(history: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> str:
    """Compare the latest training losses with those of other seeds, in a sentence.

    A loss counts as normal within their band (see `LivePlotCallback`), widened by as much again on
    either side: a few seeds do not show the whole range.
    """
    lines = [line for line in history if "loss" in line]
    band = reference["train"]
    if not lines or lines[-1]["step"] < band["step"][0]:
        return "nothing to compare yet: no training loss has been logged"
    step = lines[-1]["step"]
    at = max(i for i, known in enumerate(band["step"]) if known <= step)
    loss = np.nanmean([line["loss"] for line in lines[-_HALF_WINDOW - 1 :]])
    latest = slice(max(0, at - _HALF_WINDOW), at + 1)
    low, high = np.mean(band["low"][latest]), np.mean(band["high"][latest])
    verdict = "normal"
    if loss < low - (high - low):
        verdict = "lower than usual: a better recipe, or text that was seen before?"
    elif loss > high + (high - low):
        verdict = "higher than usual: was something changed?"
    seeds = len(reference["seeds"])
    return f"step {step:,}: loss {loss:.2f}, {seeds} other seeds {low:.2f} to {high:.2f}: {verdict}"


class _LossPlot:
    """Losses above, the learning rate below; its lines are kept and moved, which is fast."""

    def __init__(
        self,
        vocab_size: int | None = None,
        tokens_per_step: float = 0,
        reference: Mapping[str, Any] | None = None,
        lines: Mapping[str, float] | None = None,
    ):
        self._background, self._background_limits = None, None
        self.figure = new_figure(8, 5, dpi=96, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._axes = self.figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        self.figure.subplots_adjust(left=0.1, right=0.97, top=0.87, bottom=0.13, hspace=0.1)
        self._headline = self.figure.text(0.1, 0.955, "", fontsize=12)
        self._details = self.figure.text(0.1, 0.91, "", fontsize=9, color="#444444")
        loss, rate = self._axes
        if reference:
            band = reference["train"]
            label = f"normal range ({len(reference['seeds'])} other seeds)"
            low, high = _smooth(band["low"]), _smooth(band["high"])
            # With edges: seeds differ by little, and the line of the run covers the middle.
            style = {"facecolor": "#f2b134", "edgecolor": "#c77f00", "linewidth": 1.5}
            loss.fill_between(band["step"], low, high, alpha=0.7, label=label, **style)
        label = "train, each logged loss"
        (raw,) = loss.plot([], [], color=_TRAIN_COLOR, alpha=0.3, linewidth=1, label=label)
        label = f"train, mean of the {2 * _HALF_WINDOW + 1} nearest losses"
        (smoothed,) = loss.plot([], [], color=_TRAIN_COLOR, linewidth=1.5, label=label)
        (held_out,) = loss.plot([], [], "o-", color=_HELD_OUT_COLOR, ms=5, label="held-out")
        (rates,) = rate.plot([], [], color="#555555", linewidth=1.5)
        self._drawn = {"loss": raw, "mean": smoothed, "eval_loss": held_out, "learning_rate": rates}
        if vocab_size:
            uniform = math.log(vocab_size)
            label = f"uniform guess: ln({vocab_size:,}) = {uniform:.2f}"
            loss.axhline(uniform, color="#888888", linestyle=":", label=label)
        for style, (name, value) in zip(itertools.cycle(("--", "-.")), (lines or {}).items()):
            loss.axhline(value, color="#555555", linestyle=style, label=f"{name}: {value:.2f}")
        for axis in self._axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        loss.set_ylabel("loss (nats per token)")
        loss.legend(loc="upper right", bbox_to_anchor=(1, 0.97), fontsize=8, edgecolor="none")
        rate.set_ylabel("learning rate", fontsize=8)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        rate.set_xlabel("step", fontsize=9)
        if tokens_per_step:
            rate.set_xlabel("step, and tokens seen", fontsize=9)
            rate.xaxis.set_major_formatter(
                lambda step, _: f"{step:g}\n{format_count(step * tokens_per_step)}"
            )

    def update(
        self, history: Sequence[Mapping[str, Any]], headline: str, details: list[str], steps: int
    ) -> str:
        """Move the lines to the points of a history, and return what is written above them."""
        points = {}
        for name in ("loss", "eval_loss", "learning_rate"):
            lines = [line for line in history if name in line]
            values = [line[name] if math.isfinite(line[name]) else math.nan for line in lines]
            points[name] = [line["step"] for line in lines], values
        points["mean"] = points["loss"][0], _smooth(points["loss"][1])
        for name, line in self._drawn.items():
            line.set_data(*points[name])
        latest = {"train": points["loss"][1], "held-out": points["eval_loss"][1]}
        latest = [f"{label} {values[-1]:.3f}" for label, values in latest.items() if values]
        text = " · ".join([*latest, *details])
        loss, rate = self._axes
        loss.relim()
        loss.autoscale_view()
        low, high = loss.get_ylim()
        loss.set_ylim(math.floor(low), math.ceil(high), auto=True)  # and again next time
        rate.set_ylim(0, 1.1 * max(points["learning_rate"][1], default=0) or 1)
        rate.set_xlim(0, max(steps, 1))
        self._headline.set_text(plot_label(headline))
        self._details.set_text(plot_label(text))
        return f"{headline} · {text}"

    def png(self) -> bytes:
        """Return the plot as a PNG image; axes and legend, slow to draw, are kept between calls."""
        canvas = self.figure.canvas
        moving = [*self._drawn.values(), self._headline, self._details]
        limits = [(*axis.get_xlim(), *axis.get_ylim()) for axis in self._axes]
        if limits != self._background_limits:
            for artist in moving:
                artist.set_animated(True)  # left out of the next drawing
            canvas.draw()
            for artist in moving:
                artist.set_animated(False)
            self._background = canvas.copy_from_bbox(self.figure.bbox)
            self._background_limits = limits
        canvas.restore_region(self._background)
        for artist in moving:
            artist.draw(canvas.get_renderer())
        png = io.BytesIO()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.save(png, format="PNG", compress_level=3)
        return png.getvalue()


def _plot_history(history: Sequence[Mapping[str, Any]]) -> _LossPlot:
    """Draw a whole history, whose first line holds its metadata."""
    first, last = history[0], history[-1]
    average = last.get("tokens", 0) / max(last["step"], 1) or first.get("tokens_per_step", 0)
    plot = _LossPlot(first.get("vocab_size"), average, lines=first.get("lines"))
    name = f"{first['name']}: " if "name" in first else ""
    end = f", {last['end']}" if "end" in last else ""
    headline = f"{name}step {last['step']:,} of {first['max_steps']:,}{end}"
    took = f"{format_seconds(last['seconds'])} of training"
    plot.update(history, headline, [took], first["max_steps"])
    return plot


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return the mean of each value and as many before as behind it, so that it does not lag."""
    known = np.isfinite(values)
    sums, counts = (np.cumsum([0, *each]) for each in (np.where(known, values, 0), known))
    at = np.arange(len(values))
    near = np.minimum(_HALF_WINDOW, np.minimum(at, at[::-1]))  # fewer towards either end
    first, last = at - near, at + near + 1
    with np.errstate(invalid="ignore"):  # NaN where none is known
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _memory_in_use() -> str:
    """Return the GPU memory that PyTorch has reserved, or this process's memory now."""
    import psutil
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB of GPU memory"
    if torch.backends.mps.is_available():  # Apple's
        return f"{torch.mps.driver_allocated_memory() / 1e9:.1f} GB of GPU memory"
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"
