"""What several modules share: logging, files, text to token ids, plots, sampling, speed.

A module that you copy into your own project may need this file beside it, and nothing else.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

EXPORT_MARK = ".tinytrain.json"  # in an exported folder: a hash of each file that we wrote there

PROGRESS = {"progress": True}  # logger.info(..., extra=PROGRESS): a display shows it as well
# What shows the progress now: a notebook would otherwise grow by a line every few seconds too.
DISPLAYS: WeakSet[Any] = WeakSet()

_BATCH_SIZE = 64  # rows that `continue_rows` continues at once


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is now: a notebook kernel and pytest replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (DISPLAYS and getattr(record, "progress", False)):
            self.stream = sys.stdout
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on in silence where nobody reads any more; the file has it all."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return safe_text(super().format(record))


def setup_logging(log_file: str | Path | None = None) -> logging.Logger:
    """Send what the logger ``tinytrain`` gets to stdout and to a file, and return the logger.

    The file, usually ``training.log``, is appended to, and its folder is made. Calling this again
    replaces the earlier set-up, so no message is ever shown twice.
    """
    print_any_character()
    logger = logging.getLogger("tinytrain")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_StdoutHandler()]
    if log_file is not None:
        with writing_to(folder := Path(log_file).parent):
            folder.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    formatter = _SafeFormatter("%(asctime)s - %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Colab gives the root logger a handler of its own, which would repeat every line.
    logger.propagate = False
    return logger


def print_any_character() -> None:
    """Print escapes for characters that the output's encoding lacks: on Windows it may be GBK."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # what it leads to may have changed or be gone
                stream.reconfigure(errors="backslashreplace")


# Control characters but tab and line end, signs that turn the direction of writing around, and
# lone surrogates, which cannot be encoded.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe_text(text: Any) -> str:
    """Return a text for a terminal or a log: a control character is shown, and does nothing."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def one_line(text: Any) -> str:
    """Return a text without line breaks and invisible characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def in_notebook() -> bool:
    """Tell whether this code runs in a Jupyter or Colab kernel, which can show pictures."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookOutput:
    """One output of a notebook's cell, which each later one replaces."""

    _handle = None

    def show(self, text: str, png: bytes | None = None) -> None:
        """Show a picture, or the text where there is none or it cannot be shown."""
        from IPython.display import display

        bundle = {"text/plain": text} | ({"image/png": png} if png else {})
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def rank() -> int:
    """Return the number of this process among those of a distributed run, from 0."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def atomic_write(path: str | Path, content: str | bytes, sync: bool = False) -> None:
    """Write a file, text as UTF-8, so that a reader finds the old content or the new, never a part.

    The folder is made. With `sync` wait for the disk, in case the machine loses power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: in a container it is often the same at every start.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if sync:
                sync_to_disk(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(file: IO[Any]) -> None:
    """Wait until the disk has what was written, where the file system knows how to."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Say of an error of the file system in which folder it happened and what to do."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers have errors of their own: "... (os error 28)".
        found = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
        if not found and not getattr(error, "errno", None):
            raise
        number, said = (int(found[2]), found[1]) if found else (error.errno, error.strerror)
        raise OSError(
            number,
            f"cannot write to {folder} ({said}): choose another folder (notebooks: TINYTRAIN_RUNS)",
        ) from error


def full_disk(error: BaseException, folder: str | Path) -> Path:
    """Return the folder whose disk is full: `folder`, or the temporary one that PyTorch uses."""
    if isinstance(getattr(error, "filename", None), str):
        return Path(error.filename).parent
    temporary, folder = Path(tempfile.gettempdir()), Path(folder)
    free, free_there = (shutil.disk_usage(place).free for place in (folder, temporary))
    return temporary if free_there < min(free, 2**24) else folder


def hash_file(path: str | Path) -> str:
    """Return a hash of a file's content: XXH3, fast, and made to find damage, not tampering."""
    import xxhash

    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def hash_files(folder: str | Path) -> dict[str, str]:
    """Return the `hash_file` of each file in a folder and below it, by its path from there."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


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
    """Read a file of JSON lines; one that is damaged or still being written is left out."""
    lines, texts = [], Path(path).read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            lines.append({**json.loads(text)})
        except (ValueError, TypeError):  # no UTF-8, no JSON, no object
            if text.strip() and number < len(texts):  # the last has no end yet
                _logger.warning("%s: line %d is damaged and left out", path, number)
    return lines


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Read the history of a run, past or still going on, from its folder or ``history.jsonl``."""
    path = Path(path)
    if path.is_dir():
        path = path / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no run has written its history there yet")
    return read_json_lines(path)


# A tokenizer holds some hundred bytes for each token of a call. So a long text goes through it in
# parts, of at least so many characters, and a call ends once it has so many in all.
_PART = 2**15
_CALL = 2**17

# A place to cut: pre-tokenizers end a piece between a letter and one of these, so the parts become
# the tokens of the whole. Normalization does not reach across it either.
_PLACE_TO_CUT = re.compile("(?<=[A-Za-z\u4e00-\u9fa5])(?=[\n 。，、；：？！])")


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a byte-level tokenizer's backend as it would be if nothing in a text were special.

    Called itself, a tokenizer turns ``<|im_start|>`` or ``<tool_call>`` in a text into a control
    token, which only a program should place. Call this one with ``add_special_tokens=False``.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    encoder = Tokenizer(backend.model)  # shared, not copied
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, part) is not None:
            setattr(encoder, part, getattr(backend, part))
    for _, token in sorted(backend.get_added_tokens_decoder().items()):  # each keeps its id
        if not token.special and (token.content[0].isalnum() or token.content.isspace()):
            encoder.add_tokens([token])  # ordinary text
        else:
            encoder.add_special_tokens([token])
    encoder.encode_special_tokens = True  # as ordinary text
    return encoder


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Return the token ids of each text; see `encode_each`, which needs less memory."""
    return [ids.tolist() for ids in encode_each(tokenizer, texts)]


def encode_each(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of each text as int32, none of them special: see `text_encoder`.

    A long text is cut after a letter, which changes no token of a byte-level tokenizer; only where
    32,000 characters have no such place, one or two a cut may differ.
    """
    import numpy as np

    encoder, begun = text_encoder(tokenizer), []
    for call in _calls(texts):
        found = encoder.encode_batch_fast([part for part, _ in call], add_special_tokens=False)
        for (_, ends), encoding in zip(call, found, strict=True):
            begun.append(np.array(encoding.ids, dtype=np.int32))
            if ends:
                yield np.concatenate(begun)
                begun = []


def _calls(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Yield what to encode in one call: parts of texts, each with whether it ends its text."""
    call, size = [], 0
    for part, ends in (each for text in texts for each in cut_text(text)):
        call.append((part, ends))
        size += len(part) + 1
        if size > _CALL:
            yield call
            call, size = [], 0
    yield call


def cut_text(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, which become the same tokens, and whether each is the last."""
    start = 0
    while len(text) - start > 2 * _PART:
        found = _PLACE_TO_CUT.search(text, start + _PART, start + 2 * _PART)
        end = found.start() if found else start + 2 * _PART
        yield text[start:end], False
        start = end
    yield text[start:], True


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: ``1 min 15 s``, ``2 h 01 min``, ``2.3 days``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86_400:.1f} days"


def format_count(number: float) -> str:
    """Return a large number with three digits: ``844k``, ``1.54M``."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


# Files of fonts with Chinese characters that Linux, Windows and macOS bring, without their endings.
CHINESE_FONTS = ("NotoSansCJK-Regular", "NotoSansCJKsc-Regular", "NotoSansSC-Regular")
CHINESE_FONTS += ("SourceHanSansSC-Regular", "wqy-microhei", "wqy-zenhei", "DroidSansFallbackFull")
CHINESE_FONTS += ("msyh", "simhei", "simsun", "Hiragino Sans GB", "STHeiti Medium", "PingFang")


@functools.cache
def chinese_font() -> str | None:
    """Return the name of an installed font that has Chinese characters, or None.

    From then on, plots fall back to it for what their own font lacks.
    """
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    # Not by the names that matplotlib keeps in its cache, where a font installed later is missing.
    installed = {Path(path).stem: path for path in findSystemFonts()}
    for path in (installed[name] for name in CHINESE_FONTS if name in installed):
        with suppress(OSError, RuntimeError):  # damaged, or of a kind that cannot be read
            fontManager.addfont(path)
            name = FontProperties(fname=path).get_name()
            rcParams["font.family"] = [*rcParams["font.family"], name]
            return name
    return None


def plot_label(text: str) -> str:
    """Return a label in Chinese for the notebooks of the folder ``zh``, where a font can write it.

    What has no translation in ``data/labels.zh.json``, such as a recipe's name, stays as it is.
    """
    if Path.cwd().name == "zh" and chinese_font():
        for pattern, chinese in _chinese_labels().items():
            text = re.sub(rf"(?<![A-Za-z]){pattern}(?![A-Za-z])", chinese, text)
    return text


@functools.cache
def _chinese_labels() -> dict[str, str]:
    file = Path(__file__).with_name("data") / "labels.zh.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Return a figure whose texts are written in the language of the notebook; sizes are in inches.

    Not by pyplot, which keeps every figure alive and chooses a backend for the whole program.
    """
    from matplotlib import figure, text, ticker

    class Names(ticker.FuncFormatter):  # names at the ticks are made while the figure is drawn
        def __call__(self, x, pos=None):
            return plot_label(super().__call__(x, pos))

    class Figure(figure.Figure):
        def draw(self, renderer):
            for label in self.findobj(text.Text):
                label.set_text(plot_label(label.get_text()))
            for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
                if type(names := axis.get_major_formatter()) is ticker.FuncFormatter:
                    names.__class__ = Names
            super().draw(renderer)

    chinese_font()
    return Figure(figsize=(width, height), **options)


def new_axes(width: float = 7, height: float = 3) -> tuple[Figure, Axes]:
    """Return a figure and its axes in the style of all plots here; sizes are in inches."""
    figure = new_figure(width, height, dpi=100, layout="constrained")
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


def context_of(model: PreTrainedModel) -> int:
    """Return how many tokens a model sees at once."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    stops: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Let a model write after these token ids, sampling each token, and return the new text.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers and its tokenizer.
    ids, stops : sequence of int
        Fewer than the model's context, and the tokens that end the text.
    max_new_tokens : int
        Where to stop if the model does not; it also stops where its context is full.
    temperature : float
        Below 1, likely tokens become likelier; above 1, rare ones do. 0 is greedy.
    top_k, top_p
        Sample only from so many of the likeliest tokens (0: from all), and only from those that
        together have this probability (Holtzman et al., 2020, arXiv:1904.09751).
    repetition_penalty : float
        Above 1, makes every token that is already in the text less likely (Keskar et al., 2019,
        arXiv:1909.05858).
    seed : int, optional
        The same seed writes the same text; torch's random state is left as it was.
    on_text : callable, optional
        Receives each piece of text as it is written: ``partial(print, end="", flush=True)``.
    """
    import torch
    from transformers import TextStreamer

    check_sampling(temperature, top_k, top_p, repetition_penalty)
    options = {"do_sample": temperature > 0, "repetition_penalty": float(repetition_penalty)}
    if temperature > 0:
        options |= {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    if on_text:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: text and on_text(text)
        options["streamer"] = streamer
    input_ids = torch.tensor([list(ids)], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None), evaluating(model):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, context_of(model) - len(ids)),
            eos_token_id=list(stops),
            pad_token_id=stops[-1],
            **options,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def continue_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    stops: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """Continue rows of token ids greedily, in batches, and return the new text of each."""
    import torch

    texts: dict[int, str] = {}
    # Shortest first: a batch then holds rows of similar length, and little padding.
    ordered = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(ordered), _BATCH_SIZE):
        batch = ordered[start : start + _BATCH_SIZE]
        width = len(rows[batch[-1]])
        # Padding goes on the left, so that every row ends where its continuation begins.
        padding = [width - len(rows[n]) for n in batch]
        padded = [[stops[-1]] * empty + [*rows[n]] for n, empty in zip(batch, padding, strict=True)]
        mask = [[0] * empty + [1] * (width - empty) for empty in padding]
        with evaluating(model):
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=min(max_new_tokens, max(1, context_of(model) - width)),
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=stops[-1],
            )
        written = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        texts.update(zip(batch, written, strict=True))
    return [texts[number] for number in range(len(rows))]


def check_sampling(
    temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0
) -> None:
    """Raise a ValueError if a parameter of `sample` is out of its range."""
    checks = (
        (temperature >= 0, f"temperature {temperature} is below 0; 0 is greedy, 1 changes nothing"),
        (top_k >= 0, f"top_k {top_k} is below 0; 0 samples from all tokens"),
        (0 < top_p <= 1, f"top_p {top_p} is not between 0 and 1; 1 samples from all tokens"),
        (repetition_penalty > 0, f"repetition_penalty {repetition_penalty} is not above 0"),
    )
    for passed, message in checks:
        if not passed:
            raise ValueError(message)


class Speedometer:
    """The speed of a run since this was made; evaluations and checkpoints count as time.

    Of packed blocks, the Trainer's `args` and `train_dataloader` tell the tokens that a step learns
    from, also of the last and shorter one of an epoch; of other data `tokens_per_step` does.
    """

    def __init__(
        self, tokens_per_step: int, state: Any, args: Any = None, train_dataloader: Any = None
    ):
        self.tokens_per_step = tokens_per_step
        self._start, self._first_step = time.monotonic(), state.global_step
        self._epoch = 1, tokens_per_step  # its steps and tokens
        data = getattr(train_dataloader, "dataset", None)
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            return  # a stream
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = {len(data[i].get("input_ids", ())) for i in (0, len(data) - 1)}
        if len(lengths) == 1:  # packed
            self.tokens_per_step = rows * lengths.pop()
        steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        seen = min(len(data) * self.tokens_per_step // rows, steps * self.tokens_per_step)
        self._epoch = steps, seen

    def tokens(self, step: int) -> int:
        """Return the tokens seen from the first step of the run to this one."""
        steps, tokens = self._epoch
        return step // steps * tokens + min(step % steps * self.tokens_per_step, tokens)

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def tokens_per_second(self, state: Any) -> float:
        """Return the tokens learned from in a second."""
        return (self.tokens(state.global_step) - self.tokens(self._first_step)) / self.seconds()

    def seconds_left(self, state: Any) -> float | None:
        """Return how long the rest will take at this speed, or by the clock; None at the start."""
        if hasattr(state, "seconds_left"):  # of `tinytrain.callbacks.TimeLimit`
            return state.seconds_left
        done = state.global_step - self._first_step
        return (state.max_steps - state.global_step) * self.seconds() / done if done else None
