"""Logging in one format, to the screen and to a file.

The messages of a long run are worth keeping: they are what is left when the browser tab is gone.
So the log goes to stdout, where a notebook shows it, and to ``training.log`` in the run's folder.
Messages that only tell the progress are left to the file while a plot or a progress bar shows the
same: a notebook would otherwise grow by a line every few seconds.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOG_FORMAT = "%(asctime)s - %(levelname)s: %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

_displays: set[int] = set()  # those that show the progress at this moment


def display_begins(display: object) -> None:
    """Keep messages off the screen that are marked ``extra={"progress": True}``."""
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
        super().emit(record)


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
    logger = logging.getLogger("tinytrain")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()

    handlers: list[logging.Handler] = [_StdoutHandler(sys.stdout)]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT, DATE_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level)
    # Colab gives the root logger a handler of its own, which would repeat every line.
    logger.propagate = False
    return logger
