"""What one sees of a training run, and how one stops it.

The Trainer calls a callback at every event of the run. Small ones share the work:
`VerboseTrainingCallback` writes messages, `HistoryCallback` writes ``history.jsonl``,
`SampleCallback` lets the model write, `LivePlotCallback` draws, and `StopCallback` ends the run
in good order when someone asks for it. Any of them can be left out.

The plot is drawn with matplotlib's ``Figure``, never with pyplot: pyplot's figures are shared by
the whole process, and a widget's event that arrives in the middle of a drawing would show a
half-drawn one. A PNG is sent to one output that is replaced, so neither the notebook nor the
browser grows with the number of points.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tinytrain.common import (
    PROGRESS,
    Speedometer,
    atomic_write,
    display_begins,
    display_ends,
    format_count,
    format_seconds,
)
from tinytrain.recipes import DISPLAY_AND_SPEED_FIELDS, Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TRAIN_COLOR, HELD_OUT_COLOR = "#2f6fde", "#e4572e"
RUN_COLORS = ("#2f6fde", "#e4572e", "#2a9d5c", "#8e5bd0", "#c08a00", "#555555")


def memory_in_use() -> str:
    """Return the memory that this process uses, on its GPU if it has one, for reading.

    On a GPU it is the most that PyTorch has had reserved so far, which decides whether a run
    fits; elsewhere the resident memory of the process now. Either in GB (1e9 bytes).
    """
    import psutil
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB of GPU memory"
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"


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

    rank_zero_only = True  # of several processes, the first does it

    def __init__(self, tokens_per_step: int, seconds: float = 10.0):
        self.tokens_per_step = tokens_per_step
        self.seconds = seconds
        self.train_loss: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Say how large the model is and how long the way."""
        self._speed = Speedometer(self.tokens_per_step)
        self._speed.start(state)
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
        logger.info("epoch %d of %d", epoch, math.ceil(state.num_train_epochs), extra=PROGRESS)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log loss, learning rate, speed and the time left."""
        if not logs or "loss" not in logs:
            return  # an evaluation or the closing summary: they have events of their own
        self.train_loss.append(float(logs["loss"]))
        now = time.monotonic()
        if now - self._told < self.seconds and state.global_step < state.max_steps:
            return
        self._told = now
        left = self._speed.seconds_left(state)
        logger.info(
            "step %d/%d: loss %.3f, lr %.1e, %s tokens/s, %s left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            logs.get("learning_rate", float("nan")),
            f"{self._speed.tokens_per_second(state):,.0f}",
            "unknown" if left is None else format_seconds(left),
            extra=PROGRESS,
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Log the held-out loss."""
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            logger.info("step %d: held-out loss %.3f", state.global_step, loss, extra=PROGRESS)

    def on_train_end(self, args, state, control, **kwargs):
        """Say how long it took."""
        took = format_seconds(self._speed.seconds())
        logger.info("training ends at step %d after %s", state.global_step, took)


class HistoryCallback(TrainerCallback):
    """Writes one JSON line per logged loss and per evaluation, at once, so that a crash loses none.

    The first line says what `replay` needs to know: ``max_steps``, ``tokens_per_step`` and
    whatever else is given. Every other line holds ``step``, ``tokens`` (seen so far), ``seconds``
    (of training, over all sittings) and one of: ``loss`` with ``learning_rate`` and ``grad_norm``;
    ``eval_loss``; ``end``, when the training came to its end or was stopped.

    Parameters
    ----------
    path : str or Path
        Usually ``history.jsonl`` in the run's folder. A run that starts from nothing replaces the
        file; a run taken up again drops the lines after its checkpoint and goes on.
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    **about
        Kept in the first line, for example ``vocab_size=4096`` and ``name="pocket"``.
    """

    rank_zero_only = True  # of several processes, the first does it

    def __init__(self, path: str | Path, tokens_per_step: int, **about: Any):
        self.path = Path(path)
        self.tokens_per_step = tokens_per_step
        self.about = about

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what belongs to the steps already done."""
        kept = []
        if state.global_step and self.path.exists():
            kept = [
                line
                for line in read_history(self.path)
                if 0 < line["step"] <= state.global_step and "end" not in line
            ]
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._start = time.monotonic()
        first = {"step": 0, "tokens": 0, "seconds": 0.0, "max_steps": state.max_steps}
        first |= {"tokens_per_step": self.tokens_per_step, **self.about}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(
            self.path, "".join(json.dumps(line) + "\n" for line in [first, *kept]).encode()
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a training loss."""
        if logs and "loss" in logs:
            names = ("loss", "learning_rate", "grad_norm")
            self._write(state, {name: float(logs[name]) for name in names if name in logs})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Write a held-out loss."""
        if metrics and "eval_loss" in metrics and hasattr(self, "_start"):
            self._write(state, {"eval_loss": float(metrics["eval_loss"])})

    def on_train_end(self, args, state, control, **kwargs):
        """Write that nothing more comes."""
        finished = state.global_step >= state.max_steps
        self._write(state, {"end": "finished" if finished else "stopped"})
        del self._start  # an evaluation that comes later is not part of the run

    def _write(self, state, values: dict[str, Any]) -> None:
        seconds = self._seconds_before + time.monotonic() - self._start
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(seconds, 2),
            **values,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Read ``history.jsonl``; a last line that is still being written is left out.

    Parameters
    ----------
    path : str or Path
        A file written by `HistoryCallback`, or the folder that it is in.

    Returns
    -------
    list of dict
        One dictionary a line, in order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no run has written its history there yet")
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
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


class Curve:
    """The points of a curve, thinned so that they never become more than `limit`.

    When the limit is reached, neighbours are averaged in pairs, and from then on every point
    stands for twice as many values: on a plot some hundred pixels wide nothing is lost.

    Parameters
    ----------
    limit : int
        Points kept, an even number.
    """

    def __init__(self, limit: int = 1000):
        self.limit = limit
        self._x: list[float] = []
        self._y: list[float] = []
        self._values_per_point = 1
        self._open: list[tuple[float, float]] = []  # values that do not make a point yet

    def add(self, x: float, y: float) -> None:
        """Add a value; one that is not finite becomes a gap."""
        self._open.append((x, y if math.isfinite(y) else math.nan))
        if len(self._open) < self._values_per_point:
            return
        for values, value in zip((self._x, self._y), self._mean(), strict=True):
            values.append(value)
        self._open = []
        if len(self._x) == self.limit:
            for values in (self._x, self._y):
                values[:] = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
            self._values_per_point *= 2

    def _mean(self) -> tuple[float, float]:
        x, y = zip(*self._open, strict=True)
        return sum(x) / len(x), sum(y) / len(y)

    def points(self) -> tuple[list[float], list[float]]:
        """Return the x and the y of all points, the latest value always among them."""
        if not self._open:
            return self._x, self._y
        x, y = self._mean()
        return [*self._x, x], [*self._y, y]


class LossPlot:
    """A loss plot whose lines are kept and moved, so that drawing it again is cheap.

    Losses above, raw and smoothed, with the held-out loss as points; the learning rate below; x
    in steps and, under them, in tokens.

    Parameters
    ----------
    vocab_size : int, optional
        If given, a dotted line at ln(vocab_size): the loss of a model that knows nothing.
    max_steps : int
        Where the run will end, so that the x axis shows how far it is.
    tokens_per_step : int
        For the tokens on the x axis; 0 leaves them out.
    reference : dict, optional
        What `reference_curve` returns, shown as a band.
    learning_rate : float
        The highest, if it is known beforehand, so that its axis need not grow.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        max_steps: int = 0,
        tokens_per_step: int = 0,
        reference: Mapping[str, Any] | None = None,
        learning_rate: float = 0.0,
    ):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.figure: Figure = Figure(figsize=(8, 5), dpi=96, facecolor="white")
        FigureCanvasAgg(self.figure)
        loss, rate = self.figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        self._axes = (loss, rate)
        self._curves = {name: Curve() for name in ("loss", "eval_loss", "learning_rate")}
        if reference:
            band = reference["train"]
            label = f"normal: {len(reference['seeds'])} other seeds"
            low, high = smooth(band["low"]), smooth(band["high"])
            loss.fill_between(band["step"], low, high, color="#f2b134", alpha=0.35, label=label)
        (self._raw,) = loss.plot([], [], color=TRAIN_COLOR, alpha=0.3, linewidth=1)
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
        if tokens_per_step:
            rate.xaxis.set_major_formatter(
                lambda step, _: f"{step:g}\n{format_count(step * tokens_per_step)}"
            )
        rate.set_xlabel("step, and tokens seen" if tokens_per_step else "step", fontsize=9)
        self.figure.subplots_adjust(left=0.1, right=0.97, top=0.87, bottom=0.13, hspace=0.1)
        self._headline = self.figure.text(0.1, 0.955, "", fontsize=11, weight="bold")
        self._details = self.figure.text(0.1, 0.915, "", fontsize=9, color="#444444")
        self._bars = [
            Rectangle((0.1, 0.893), 0.87, 0.008, color=color, transform=self.figure.transFigure)
            for color in ("#e6e6e6", TRAIN_COLOR)
        ]
        for bar in self._bars:
            bar.set_visible(False)
            self.figure.add_artist(bar)
        self._background, self._background_limits = None, None

    def add(self, line: Mapping[str, Any]) -> None:
        """Take up a line of the history, as `HistoryCallback` writes it."""
        for name, curve in self._curves.items():
            if name in line:
                curve.add(line["step"], line[name])
        self.max_steps = max(self.max_steps, line["step"])

    def update(self, headline: str = "", details: str = "", done: float | None = None) -> Figure:
        """Move the lines to the points added so far.

        Parameters
        ----------
        headline, details : str
            The two lines above the plot.
        done : float, optional
            The share of the run that is done, between 0 and 1, shown as a bar.

        Returns
        -------
        matplotlib.figure.Figure
        """
        x, losses = self._curves["loss"].points()
        self._raw.set_data(x, losses)
        self._smooth.set_data(x, smooth(losses))
        self._held_out.set_data(*self._curves["eval_loss"].points())
        steps, rates = self._curves["learning_rate"].points()
        self._rate.set_data(steps, rates)
        # Limits that seldom change, so that the background seldom does.
        loss, rate = self._axes
        loss.relim()
        loss.autoscale_view()
        low, high = loss.get_ylim()
        loss.set_ylim(math.floor(low), math.ceil(high))
        rate.set_ylim(0, 1.1 * max([self.learning_rate, *rates]) or 1)
        rate.set_xlim(0, max(self.max_steps, 1))
        self._headline.set_text(headline)
        self._details.set_text(details)
        for bar in self._bars:
            bar.set_visible(done is not None)
        self._bars[1].set_width(0.87 * (done or 0))
        return self.figure

    def png(self) -> bytes:
        """Return the plot as a PNG image.

        Axes, labels and legend take most of the time and rarely change: they are drawn once and
        kept as a background, before which only the moving parts are drawn again.
        """
        from PIL import Image

        canvas = self.figure.canvas
        lines = [self._raw, self._smooth, self._held_out, self._rate]
        moving = [*lines, *self._bars, self._headline, self._details]
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
        buffer = io.BytesIO()
        Image.frombuffer(
            "RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()), "raw", "RGBA", 0, 1
        ).convert("RGB").save(buffer, format="PNG", compress_level=3)
        return buffer.getvalue()


def plot_history(
    history: Sequence[Mapping[str, Any]],
    vocab_size: int | None = None,
    title: str = "",
    reference: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw the losses and the learning rate of a run, past or still running.

    Parameters
    ----------
    history : sequence of dict
        What `read_history` returns.
    vocab_size : int, optional
        Adds a dotted line at ln(vocab_size), where an untrained model stands; by default what
        the history's first line says.
    title : str
        The line above the plot; by default how far the run is.
    reference : dict, optional
        What `reference_curve` returns, shown as a band.

    Returns
    -------
    matplotlib.figure.Figure
    """
    about = history[0] if history and history[0]["step"] == 0 else {}
    plot = LossPlot(
        vocab_size or about.get("vocab_size"),
        about.get("max_steps", 0),
        about.get("tokens_per_step", 0),
        reference,
    )
    for line in history:
        plot.add(line)
    step = history[-1]["step"] if history else 0
    end = f", {history[-1]['end']}" if history and "end" in history[-1] else ""
    name = f"{about['name']}: " if "name" in about else ""
    headline = title or f"{name}step {step:,} of {plot.max_steps:,}{end}"
    details = [
        f"{label} {values[-1]:.3f}"
        for key, label in (("loss", "train"), ("eval_loss", "held-out"))
        if (values := [line[key] for line in history if key in line])
    ]
    if history and history[-1].get("seconds"):
        details.append(f"{format_seconds(history[-1]['seconds'])} of training")
    return plot.update(headline, " · ".join(details), step / max(plot.max_steps, 1))


def replay(path: str | Path, follow: bool = False, seconds: float = 2.0) -> Figure:
    """Draw a past or a running run from its history: after a refresh, or from another notebook.

    Parameters
    ----------
    path : str or Path
        The run's folder, or its ``history.jsonl``.
    follow : bool
        In a notebook, draw again whenever something was added, until the run ends or the cell is
        interrupted. A run that was killed never says that it ends.
    seconds : float
        How often to look.

    Returns
    -------
    matplotlib.figure.Figure
        The last state.

    Raises
    ------
    FileNotFoundError
        If no run has written a history there.

    Examples
    --------
    >>> figure = replay("runs/pocket")  # doctest: +SKIP
    """
    history = read_history(path)
    figure = plot_history(history)
    if not follow:
        return figure
    screen = _NotebookScreen() if in_notebook() else None
    with suppress(KeyboardInterrupt):
        while True:
            if screen:
                screen.show(_png(figure), figure.texts[0].get_text())
            if history and "end" in history[-1]:
                break
            while len(now := read_history(path)) == len(history):
                time.sleep(seconds)
            history, figure = now, plot_history(now)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plot_runs(paths: Mapping[str, str | Path], x: str = "tokens") -> Figure:
    """Draw several runs over one another: smoothed training loss as lines, held-out as points.

    Runs with different tokenizers cannot be compared by their loss per token.

    Parameters
    ----------
    paths : mapping of str to str or Path
        What to call each run, and its folder or ``history.jsonl``.
    x : {"tokens", "seconds", "step"}
        What the runs are laid side by side at: the same text seen, the same time, or the same
        number of steps.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If ``x`` is none of the three.

    Examples
    --------
    >>> plot_runs({"guide": "runs/seed", "ours": "runs/wiki"}, x="seconds")  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {"tokens": "tokens seen", "seconds": "seconds of training", "step": "step"}
    if x not in labels:
        raise ValueError(f"x={x!r} is none of {', '.join(labels)}")
    figure = Figure(figsize=(8, 4.5), dpi=96, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, path) in enumerate(paths.items()):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        curves = {"loss": Curve(), "eval_loss": Curve()}
        for line in read_history(path):
            for key, curve in curves.items():
                if key in line:
                    curve.add(line[x], line[key])
        at, losses = curves["loss"].points()
        axes.plot(at, smooth(losses), color=color, linewidth=2, label=name)
        axes.plot(*curves["eval_loss"].points(), "o", color=color, ms=5)
    axes.plot([], [], "o", color="#888888", label="held-out")
    axes.set_xlabel(labels[x])
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none")
    return figure


def reference_curve(recipe: Recipe) -> dict[str, Any] | None:
    """Return what is normal for a recipe: the course of its loss with several other seeds.

    Made by ``python -m benchmarks.reference``, which also says what machine it ran on.

    Parameters
    ----------
    recipe : Recipe
        The recipe of one's own run.

    Returns
    -------
    dict or None
        ``train`` and ``held_out``, each with lists of equal length: ``step``, and the ``low``,
        ``mean`` and ``high`` of the loss of all ``seeds``. None if there is no reference for
        these numbers; the seed and what one only watches may differ.
    """
    path = Path(__file__).parents[1] / "data" / "reference.json"
    reference = json.loads(path.read_text(encoding="utf-8"))
    same = all(
        reference["recipe"].get(name) == value
        for name, value in asdict(recipe).items()
        if name not in DISPLAY_AND_SPEED_FIELDS and name != "seed"
    )
    return reference if same else None


def is_this_normal(history: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> str:
    """Say in a sentence where the latest training losses stand beside those of other seeds.

    Parameters
    ----------
    history : sequence of dict
        What `read_history` returns.
    reference : dict
        What `reference_curve` returns.

    Returns
    -------
    str
        With the smoothed loss, the band at this step, and the verdict. A loss within the band
        widened by as much again on either side counts as normal: a few seeds do not show the
        whole range.
    """
    lines = [line for line in history if "loss" in line]
    band = reference["train"]
    if not lines or lines[-1]["step"] < band["step"][0]:
        return "nothing to compare yet: no training loss has been logged"
    step = lines[-1]["step"]
    at = max(i for i, known in enumerate(band["step"]) if known <= step)
    loss = smooth([line["loss"] for line in lines])[-1]
    low, high = smooth(band["low"])[at], smooth(band["high"])[at]
    margin = high - low
    if loss < low - margin:
        verdict = "lower than usual: a better recipe, or text that was seen before?"
    elif loss > high + margin:
        verdict = "higher than usual: was something changed?"
    else:
        verdict = "normal"
    seeds = len(reference["seeds"])
    return f"step {step:,}: loss {loss:.2f}, {seeds} other seeds {low:.2f} to {high:.2f}: {verdict}"


def in_notebook() -> bool:
    """Tell whether this code runs in a Jupyter or Colab kernel, which can show pictures."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class _NotebookScreen:
    """One output of a notebook, replaced by every later one."""

    def __init__(self):
        self._handle = None

    def show(self, png: bytes | None, text: str, share: float = 0.0) -> None:
        from IPython.display import display

        bundle = {"text/plain": text} | ({"image/png": png} if png else {})
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def close(self) -> None:
        pass


class _TerminalScreen:
    """The headline, the numbers and a progress bar, on the last lines of a terminal."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(file=sys.stdout), auto_refresh=False)
        self._live.start()

    def show(self, png: bytes | None, text: str, share: float = 0.0) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        headline, _, details = text.partition(" · ")
        bar = ProgressBar(total=1.0, completed=share)
        self._live.update(Group(Text(headline, "bold"), Text(details), bar), refresh=True)

    def close(self) -> None:
        self._live.stop()


class LivePlotCallback(TrainerCallback):
    """Shows the run while it goes on: the loss plot, how far, how fast, how much memory.

    In a notebook this is one picture that is replaced; in a terminal a progress bar with the same
    numbers; elsewhere only the file is kept. Drawing stops the training for its time. It is
    therefore done at most every `seconds`, and more rarely where it is slow: no more than one
    hundredth of the run's time goes into it, setting up included, and two fifths of that may be
    spent at once, since the beginning is what one watches most. The last state is always drawn.

    Parameters
    ----------
    path : str or Path
        Where the latest drawing is kept, usually ``loss.png`` in the run's folder.
    vocab_size : int, optional
        Adds a dotted line at ln(vocab_size), where an untrained model stands.
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    history : str or Path, optional
        The run's ``history.jsonl``: a run that is taken up again shows its first part from there.
        Name this callback after the `HistoryCallback` that writes the file.
    reference : dict, optional
        What `reference_curve` returns, shown as a band behind one's own curve.
    seconds : float
        The shortest time between two drawings.

    Attributes
    ----------
    drawing_seconds : float
        The time that drawing has taken so far.
    """

    rank_zero_only = True  # of several processes, the first does it

    def __init__(
        self,
        path: str | Path,
        vocab_size: int | None = None,
        tokens_per_step: int = 0,
        history: str | Path | None = None,
        reference: Mapping[str, Any] | None = None,
        seconds: float = 1.5,
    ):
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokens_per_step = tokens_per_step
        self.history_path = Path(history) if history else None
        self.reference = reference
        self.seconds = seconds
        self._state = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the one output that later drawings replace."""
        start = time.monotonic()
        self.plot = LossPlot(
            self.vocab_size,
            state.max_steps,
            self.tokens_per_step,
            self.reference,
            getattr(args, "learning_rate", 0.0),
        )
        self._latest: dict[str, float] = {}
        if state.global_step and self.history_path and self.history_path.exists():
            for line in read_history(self.history_path):
                self._take(line)
        self._speed = Speedometer(self.tokens_per_step)
        self._speed.start(state)
        self._screen = None
        if in_notebook():
            self._screen = _NotebookScreen()
        elif sys.stdout.isatty():
            self._screen = _TerminalScreen()
        if self._screen:
            display_begins(self)
        self.drawing_seconds = time.monotonic() - start
        self._state = state
        self._draw()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Take up a training loss."""
        if logs and "loss" in logs:
            names = ("loss", "learning_rate")
            values = {name: float(logs[name]) for name in names if name in logs}
            self._take({"step": state.global_step, **values})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Take up a held-out loss."""
        if metrics and "eval_loss" in metrics and self._state is not None:
            self._take({"step": state.global_step, "eval_loss": float(metrics["eval_loss"])})

    def on_step_begin(self, args, state, control, **kwargs):
        """Draw if it is time: here the losses and the evaluation of the last step are known."""
        if time.monotonic() - self._drawn >= self.seconds:
            left = self._speed.seconds_left(state) or 0.0
            if self.drawing_seconds <= 0.009 * (self._speed.seconds() + 0.4 * left):
                self._draw()

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state."""
        self.close()

    def close(self) -> None:
        """Draw the last state if that has not been done: a training may end by an error."""
        if self._state is None:
            return
        self._draw()
        if self._screen:
            self._screen.close()
            display_ends(self)
        self._state = None

    def _take(self, line: Mapping[str, Any]) -> None:
        self.plot.add(line)
        names = ("loss", "eval_loss", "learning_rate")
        self._latest |= {name: line[name] for name in names if name in line}

    def _draw(self) -> None:
        start = time.monotonic()
        words, share = self._words(), self._share()
        self.plot.update(words[0], " · ".join(words[1:]), share)
        png = self.plot.png()
        if self._screen:
            self._screen.show(png, " · ".join(words), share)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, png)
        self._drawn = time.monotonic()
        self.drawing_seconds += self._drawn - start

    def _share(self) -> float:
        return self._state.global_step / max(self._state.max_steps, 1)

    def _words(self) -> list[str]:
        """Return the headline and the numbers below it."""
        state = self._state
        headline = f"step {state.global_step:,} of {state.max_steps:,}"
        left = self._speed.seconds_left(state)
        if left:
            headline += f", {format_seconds(left)} left"
        elif state.global_step >= state.max_steps:
            headline += ", done"
        words = [headline]
        for name, label in (("loss", "train"), ("eval_loss", "held-out")):
            if name in self._latest:
                words.append(f"{label} {self._latest[name]:.3f}")
        words.append(f"{format_count(state.global_step * self.tokens_per_step)} tokens seen")
        if left is not None:
            words.append(f"{self._speed.tokens_per_second(state):,.0f} tokens/s")
        if "learning_rate" in self._latest:
            words.append(f"lr {self._latest['learning_rate']:.1e}")
        return [*words, memory_in_use()]


class SampleCallback(TrainerCallback):
    """Lets the model complete the same few prompts again and again, so one sees language appear.

    Parameters
    ----------
    write : callable
        ``write(model, prompts)`` returns a continuation for each prompt, for example
        ``functools.partial(complete, tokenizer=tokenizer, max_new_tokens=16)``.
    prompts : sequence of str
        The beginnings.
    every : int
        Steps between two samples; another one follows at the end.
    path : str or Path, optional
        Usually ``samples.jsonl``: a line per sample with ``step`` and ``texts``. A run taken up
        again drops the lines after its checkpoint and goes on.
    rows : int
        The most samples shown per prompt; the file keeps all.
    """

    rank_zero_only = True  # of several processes, the first does it
    needs_unsharded_model = (
        True  # one that FSDP has shared out writes only if all processes take part
    )

    def __init__(
        self,
        write: Callable[..., list[str]],
        prompts: Sequence[str],
        every: int,
        path: str | Path | None = None,
        rows: int = 10,
    ):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.write = write
        self.prompts = list(prompts)
        self.every = every
        self.path = Path(path) if path else None
        self.rows = rows

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what belongs to the steps already done."""
        self.samples: list[dict[str, Any]] = []
        if self.path:
            if state.global_step and self.path.exists():
                kept = read_history(self.path)
                self.samples = [line for line in kept if line["step"] <= state.global_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(_sample_line(sample) for sample in self.samples)
            atomic_write(self.path, text.encode("utf-8"))
        self._screen = _NotebookScreen() if in_notebook() else None
        if self._screen:
            display_begins(self)
        self._show()

    def close(self) -> None:
        """Leave messages to the screen again."""
        display_ends(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Let the model write, every so many steps."""
        if state.global_step % self.every == 0:
            self._sample(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Let the model write once more."""
        if not self.samples or self.samples[-1]["step"] != state.global_step:
            self._sample(state, model)

    def _sample(self, state, model) -> None:
        texts = self.write(model, prompts=self.prompts)
        sample = {"step": state.global_step, "texts": texts}
        self.samples.append(sample)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_sample_line(sample))
        for prompt, text in zip(self.prompts, texts, strict=True):
            shown = f"{prompt} → {_one_line(text)}"
            logger.info("step %d: %s", state.global_step, shown, extra=PROGRESS)
        self._show()

    def _show(self) -> None:
        if self._screen:
            self._screen.show(None, self.table() or "(what the model writes will stand here)")

    def table(self) -> str:
        """Return the samples for reading, under each prompt a row per step."""
        shown = self.samples
        if len(shown) > self.rows:  # evenly, the first and the last among them
            last = len(shown) - 1
            shown = [shown[round(i * last / (self.rows - 1))] for i in range(self.rows)]
        blocks = []
        for number, prompt in enumerate(self.prompts):
            rows = [f"{s['step']:>8,}  {_one_line(s['texts'][number])}" for s in shown]
            blocks.append("\n".join([prompt, *rows]))
        return "\n\n".join(blocks) if shown else ""


def _sample_line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


class StopCallback(TrainerCallback):
    """Ends a run in good order when asked: after the current step, with a checkpoint.

    Asking is possible in four ways. The kernel's interrupt (the square button, or Ctrl-C) and a
    stop file end the run with checkpoint, evaluation and last drawing, so that the next cells
    work; a second interrupt stops at once. So does a button, where the front end can deliver its
    click. SIGTERM, with which a cloud machine announces its end, leaves time for a checkpoint
    alone, after which the signal takes its usual course.

    If there are several processes, what one of them hears stops all after the same step.

    Name it first among the callbacks: `tinytrain.checkpoints.train` closes them in reverse order,
    and nothing should be left to do when a SIGTERM takes its course.

    Parameters
    ----------
    stop_file : str or Path, optional
        ``touch`` it from anywhere, in Colab through the file browser. One that is left from
        before is removed when the training begins.
    button : bool
        Whether to show a button in a notebook.

    Attributes
    ----------
    reason : str or None
        Who asked, once somebody has.
    """

    def __init__(self, stop_file: str | Path | None = None, button: bool = False):
        self.stop_file = Path(stop_file) if stop_file else None
        self.button = button
        self.reason: str | None = None
        self._handlers: dict[int, Any] = {}
        self._widget = None

    def ask(self, reason: str = "a call of ask()") -> None:
        """Ask for the end; may be called from any thread."""
        self.reason = self.reason or reason

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen."""
        self.reason, self._told = None, False
        self._looked = -math.inf
        if self._looks(state) and self.stop_file.exists():
            logger.info("%s is left from before and is removed", self.stop_file)
            self.stop_file.unlink()
        # Python hears signals in its main thread only; elsewhere the file and the button remain.
        if threading.current_thread() is threading.main_thread():
            for number, heard in (
                (signal.SIGINT, self._interrupted),
                (signal.SIGTERM, self._told_to_end),
            ):
                self._handlers[number] = signal.signal(number, heard)
        if self.button and in_notebook():
            self._show_button()

    def _looks(self, state) -> bool:
        """Tell whether this process is the one that looks for the stop file."""
        return self.stop_file is not None and state.is_world_process_zero

    # A signal may arrive in the middle of writing a message: its handler must not write one.
    def _interrupted(self, number, frame):
        if self.reason:
            raise KeyboardInterrupt("interrupted a second time: stopped at once")
        self.ask("the interrupt")

    def _told_to_end(self, number, frame):
        self.reason = "SIGTERM"

    def on_substep_end(self, args, state, control, **kwargs):
        """Say that it was heard."""
        self._acknowledge()

    def on_prediction_step(self, args, state, control, **kwargs):
        """Say that it was heard."""
        self._acknowledge()

    def _acknowledge(self) -> None:
        if self.reason and not self._told:
            self._told = True
            logger.info("%s: the run will stop after this step", self.reason)

    def on_step_end(self, args, state, control, **kwargs):
        """Ask the Trainer for a checkpoint, an evaluation and the end."""
        now = time.monotonic()
        # Once a second only: a look at a network drive takes a while.
        if self._looks(state) and now - self._looked >= 1:
            self._looked = now
            if self.stop_file.exists():
                self.stop_file.unlink(missing_ok=True)
                self.ask(f"the file {self.stop_file.name}")
        self._hear_others(args)
        if self.reason and state.global_step < state.max_steps:
            self._acknowledge()
            control.should_training_stop = True
            control.should_save = True
            control.should_log = True
            control.should_evaluate = self.reason != "SIGTERM"

    def _hear_others(self, args) -> None:
        """Take up what another process was asked; all of them call this after the same step."""
        import torch

        group = torch.distributed
        if not group.is_available() or not group.is_initialized():
            return
        urgency = 2 if self.reason == "SIGTERM" else 1 if self.reason else 0
        told = torch.tensor(urgency, device=args.device)
        group.all_reduce(told, group.ReduceOp.MAX)
        if told.item() > urgency:
            self.reason = "SIGTERM" if told.item() == 2 else "another process"

    def on_train_end(self, args, state, control, **kwargs):
        """Say what one can do now."""
        if self.reason and state.global_step < state.max_steps:
            logger.info(
                "stopped at step %d by %s; a checkpoint is saved, the same call goes on from it",
                state.global_step,
                self.reason,
            )

    def close(self) -> None:
        """Stop listening, and let a SIGTERM take its course."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}
        if self._widget is not None:
            self._widget.close()
            self._widget = None
        if self.reason == "SIGTERM":
            self.reason = None
            signal.raise_signal(signal.SIGTERM)

    def _show_button(self) -> None:
        from IPython.display import display

        problem = button_problem()
        if problem:
            others = "■ in the toolbar"
            if self.stop_file:
                others += f", or a file {self.stop_file}"
            display({"text/plain": f"No Stop button: {problem}. Use {others}."}, raw=True)
            return
        import ipywidgets

        self._widget = ipywidgets.Button(description="Stop", icon="stop", tooltip="as ■ does")
        self._widget.on_click(lambda _: self.ask("the Stop button"))
        display(self._widget)
        # ipykernel 7.4 hands a click to the thread that last spoke to the widget, which is the
        # busy one; without this note it uses the second thread, as the front end asks it to.
        vars(self._widget.comm).pop("_reply_subshell_id", None)


def button_problem() -> str | None:
    """Return why a click on a widget would not reach this kernel while it is busy, or None.

    A busy kernel hears a widget only in a second thread (a subshell), which needs ipykernel 7
    and a front end that asks for it: JupyterLab and Notebook do from 4.4 and 7.4 on.
    """
    version = importlib.metadata.version("ipykernel")
    if int(version.split(".")[0]) < 7:
        return f"ipykernel {version} hears no widget while a cell runs (7 does)"
    if "google.colab" in sys.modules:
        return "Colab delivers no click while a cell runs"
    if any(name.startswith("VSCODE_") for name in os.environ):
        return "VS Code delivers no click while a cell runs"
    return None
