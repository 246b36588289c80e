"""What several modules share: logging, files written whole, numbers for reading, a plot's axes.

A module that you copy into your own project may need this file beside it, and nothing else.

The log of a long run is worth keeping: it is what remains when the browser tab is gone. So it goes
to stdout, where a notebook shows it, and to ``training.log`` in the run's folder. Progress messages
go to the file alone while a plot shows the same: a notebook would otherwise grow
by a line every few seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

_LOG_FORMAT = "%(asctime)s - %(levelname)s: %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

PROGRESS = {"progress": True}  # logger.info(..., extra=PROGRESS): a display shows it as well
_displays: set[int] = set()  # those that show the progress at this moment


def display_begins(display: object) -> None:
    """Keep messages marked ``extra=PROGRESS`` off the screen while a display shows the same."""
    _displays.add(id(display))


def display_ends(display: object) -> None:
    """Undo `display_begins`; harmless if there is nothing to undo."""
    _displays.discard(id(display))


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is now: a notebook kernel and pytest replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if _displays and getattr(record, "progress", False):
            return
        self.stream = sys.stdout
        if self.stream:  # None if it was closed before the start
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on in silence where nobody reads any more; the file has it all."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def print_any_character() -> None:
    """Print escapes for characters that the output's encoding lacks: on Windows it may be GBK."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def setup_logging(log_file: str | Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send the messages of ``tinytrain`` to stdout and, if a path is given, to a file.

    Calling it again replaces the earlier set-up, so no message is ever shown twice.

    Parameters
    ----------
    log_file : str or Path, optional
        A file to append to, usually ``training.log``; its folder is made.
    level : int
        The least severe level that is shown.

    Returns
    -------
    logging.Logger
        The logger named ``tinytrain``.

    Examples
    --------
    >>> logger = setup_logging()
    >>> logger.info("ready")  # doctest: +SKIP
    2026-01-31 12:00:00 - INFO: ready
    """
    print_any_character()
    logger = logging.getLogger("tinytrain")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()

    handlers: list[logging.Handler] = [_StdoutHandler(sys.stdout)]
    if log_file is not None:
        with writing_to(Path(log_file).parent):
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_LOG_FORMAT, _DATE_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level)
    # Colab gives the root logger a handler of its own, which would repeat every line.
    logger.propagate = False
    return logger


def rank() -> int:
    """Return the number of this process among those of a distributed run, from 0."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def atomic_write(path: str | Path, content: str | bytes, sync: bool = False) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Parameters
    ----------
    path : str or Path
        The file; its folder is made.
    content : str or bytes
        Text is written as UTF-8, with line ends as they are.
    sync : bool
        Wait until the disk has it: a machine that loses power may lose what is only in memory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: in a container it is often the same at every start.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Say of an error of the file system in which folder it happened and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {folder} ({error.strerror}): "
            "choose another folder (notebooks: TINYTRAIN_RUNS)",
        ) from error


def full_disk(error: BaseException, folder: str | Path) -> Path:
    """Return the folder whose disk is full: `folder`, or the temporary one that PyTorch uses."""
    if isinstance(getattr(error, "filename", None), str):
        return Path(error.filename).parent
    temporary, folder = Path(tempfile.gettempdir()), Path(folder)
    free, free_there = (shutil.disk_usage(place).free for place in (folder, temporary))
    return temporary if free_there < min(free, 2**24) else folder


def hash_files(folder: str | Path) -> dict[str, str]:
    """Return a hash of each file in a folder and below it, by its path from there.

    XXH3 tells damage as well as SHA-256 does, at the speed of the disk; it is no protection
    against somebody who wants to deceive.
    """
    import xxhash

    hashes = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
            hashes[path.relative_to(folder).as_posix()] = digest
    return hashes


def damaged_file(folder: str | Path, hashes: dict[str, str]) -> str | None:
    """Return the first file that is missing or differs from its `hash_files`; None if all agree."""
    now = hash_files(folder)
    return next((name for name, value in hashes.items() if now.get(name) != value), None)


def write_json(path: str | Path, values: Any, sync: bool = False) -> None:
    """Write values as indented JSON, by `atomic_write`."""
    atomic_write(path, json.dumps(values, indent=1, ensure_ascii=False), sync)


def write_json_lines(path: str | Path, lines: Iterable[Any]) -> None:
    """Write a file of JSON lines, by `atomic_write`."""
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def append_json_line(path: str | Path, line: Any) -> None:
    """Add a line to a file of JSON lines; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that is still being written is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Read the history of a run, past or still going on.

    Parameters
    ----------
    path : str or Path
        The run's folder, or its ``history.jsonl``.

    Returns
    -------
    list of dict
        The lines that `tinytrain.callbacks.HistoryCallback` wrote.

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
    return read_json_lines(path)


def in_notebook() -> bool:
    """Tell whether this code runs in a Jupyter or Colab kernel, which can show pictures."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class NotebookOutput:
    """One output of a notebook's cell, which each later one replaces."""

    def __init__(self):
        self._handle = None

    def show(self, text: str, png: bytes | None = None) -> None:
        """Show a picture, or the text where there is none or it cannot be shown."""
        from IPython.display import display

        bundle = {"text/plain": text} | ({"image/png": png} if png else {})
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    Examples
    --------
    >>> format_seconds(75), format_seconds(7300), format_seconds(200_000)
    ('1 min 15 s', '2 h 01 min', '2.3 days')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86_400:.1f} days"


def format_count(number: float) -> str:
    """Return a large number with three digits.

    Examples
    --------
    >>> format_count(843_776), format_count(1_536_000)
    ('844k', '1.54M')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def one_line(text: Any) -> str:
    """Return a text without line breaks and invisible characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def new_axes(width: float = 7, height: float = 3) -> tuple[Figure, Axes]:
    """Return a figure and its axes in the style of all plots here; sizes are in inches.

    Not by pyplot, which keeps every figure alive and chooses a backend for the whole program.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off, and restore the model's mode whatever happens."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Speedometer:
    """The speed of a run since `start`; evaluations and checkpoints count as time.

    Parameters
    ----------
    tokens_per_step : int
        Tokens that one optimiser step learns from.
    """

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step

    def start(self, state: Any) -> None:
        """Begin to count, from the step that the ``TrainerState`` is at."""
        self._start, self._first_step = time.monotonic(), state.global_step

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def tokens_per_second(self, state: Any) -> float:
        """Return the tokens learned from in a second."""
        return (state.global_step - self._first_step) * self.tokens_per_step / self.seconds()

    def seconds_left(self, state: Any) -> float | None:
        """Return how long the rest will take at this speed; None before the first step."""
        done = state.global_step - self._first_step
        return (state.max_steps - state.global_step) * self.seconds() / done if done else None
