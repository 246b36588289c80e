"""Load text, find what is wrong with it, and split it honestly.

``datasets.load_dataset`` reads most of these files too, but its messages about a broken one come
from three libraries down. Here the text is read a piece at a time, checked, and written to an
Arrow file that is mapped into memory: it may be larger than the memory, and errors name the line.
"""

from __future__ import annotations

import atexit
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinytrain.common import hash_file, new_axes, writing_to

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
_warn_once = cache(logger.warning)  # the files are asked for in each step

_Rows = Iterator[tuple[object, object]]  # each text, and its source

_TEXT_FIELDS = ("completion", "text", "content")
_FORMATS = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_PIECE = 1 << 18  # characters or bytes read at once
# What collections have beside their texts, under names like those of texts.
_NO_TEXT = re.compile(
    r"(?i)(readme|licen[cs]e|copying|changelog|requirements)(?![a-z]).*\.txt"
    r"|(config|configuration|dataset_infos?)\.json"
)
_OTHER_FILES = {
    b"\x1f\x8b": "a gzip file; let its name end in .gz",
    b"\xfd7zXZ": "an xz file; let its name end in .xz",
    b"PK\3\4": "a zip or .docx file; unpack it, or save its text as .txt",
    b"%PDF-": "a PDF; save its text as .txt",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the text itself",
}


def load_documents(
    path: str | Path, text_field: str | None = None, folder: str | Path | None = None
) -> Dataset:
    """Load the documents of a file, or of all files of a folder, in their order.

    Reads JSON arrays, JSON lines, plain text and parquet (``.json .jsonl .ndjson .txt .parquet``),
    each also with ``.gz`` or ``.xz`` behind. In plain text, blank lines separate the documents;
    without any, each line is one. Empty texts, and values that are not text, are left out and
    counted in one warning.

    Parameters
    ----------
    path : str or Path
        A file, a folder, or a pattern such as ``texts/part-*.jsonl.gz``; see `text_files`.
    text_field : str, optional
        The field that holds the text; by default the first of ``completion``, ``text`` and
        ``content`` that a file's first document has.
    folder : str or Path, optional
        Gets the file ``documents.arrow`` that the dataset is read from. By default a temporary
        folder until the program ends; name one for a large text: temporary ones may be in memory.

    Returns
    -------
    datasets.Dataset
        String columns ``text`` and ``source`` (by default the file's name).

    Raises
    ------
    FileNotFoundError
        If there is no such file; the message lists those that you could mean.
    ValueError
        If a file is not what it should be; the message names the place and what to do.
    """
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    files = text_files(path)
    with writing_to(folder or tempfile.gettempdir()):
        if folder is None:
            folder = tempfile.mkdtemp(prefix="tinytrain-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        target = Path(folder, "documents.arrow")
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f"{target.name}.{secrets.token_hex(4)}.building")
        try:
            rows = (row for file in files for row in _read_file(file, text_field))
            _write_documents(rows, building, path)
            os.replace(building, target)
        finally:
            building.unlink(missing_ok=True)
    # Without a fingerprint of our own, datasets would make one of the file's name and time.
    return Dataset(MemoryMappedTable.from_file(str(target)), fingerprint=hash_file(target))


def text_files(path: str | Path) -> list[Path]:
    """Return the files that `load_documents` reads for a path, in the order of their names.

    The path is a file, a folder, or a pattern with ``*``, ``?`` or ``**``. Of the last two, the
    files count whose names end like a format that can be read; licences, metadata, and a text's
    second copy do not. A folder without a text is searched two levels down.
    """
    path = Path(path)
    if path.is_file():
        if _format(path) is None:
            raise ValueError(
                f"{path}: cannot tell the format by the name; it has to end in one of "
                f"{' '.join(_FORMATS)}, perhaps followed by {' or '.join(_COMPRESSIONS)}"
            )
        return [path]
    if path.is_dir():  # downloads from a hub have "data" in between
        depths = (_choose(matching_files(path / below)) for below in ("*", "*/*", "*/*/*"))
        files, problem = next(filter(None, depths), []), f"{path} is a folder without a text"
        if len(parents := sorted({str(file.parent) for file in files})) > 1:
            several = f"{path} has texts in several folders: {', '.join(parents):.500}"
            raise FileNotFoundError(f"{several}; give the path of one, or {path / '**'} for all")
    else:
        files, problem = _choose(matching_files(path)), f"there is no file {path}"
    if not files:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        names = [file.name for file in _readable(nearest.iterdir())]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        there = f"there are: {', '.join(names[:5])}{more}" if names else "there are none"
        raise FileNotFoundError(f"{problem}; give the path of one; in {nearest} {there}")
    return files


def matching_files(pattern: Path) -> list[Path]:
    """Return the files of a pattern; a folder that is there means itself, even if named ``[1]``."""
    folder = next(folder for folder in pattern.parents if folder.is_dir())
    below = Path(glob.escape(str(folder)), pattern.relative_to(folder))
    return [Path(file) for file in glob.glob(str(below), recursive=True)]


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path


def _format(path: Path) -> str | None:
    """Return the suffix that tells the format, if there is one."""
    suffix = _uncompressed(path).suffix.lower()
    return suffix if suffix in _FORMATS else None


def _readable(paths: Iterable[Path]) -> list[Path]:
    # Hidden files are not texts: some systems leave them beside each file.
    return sorted(p for p in paths if _format(p) and not p.name.startswith(".") and p.is_file())


def _choose(paths: Iterable[Path]) -> list[Path]:
    """Return the texts among files, each once, in the order of their names."""
    files = _readable(paths)
    texts = [file for file in files if not _NO_TEXT.fullmatch(file.name)]
    chosen = sorted({_uncompressed(file): file for file in reversed(texts)}.values())
    if left_out := sorted(file.name for file in {*files}.difference(chosen)):
        _warn_once(f"left out, no texts by their names or there twice: {', '.join(left_out):.500}")
    return chosen


def _read_file(path: Path, text_field: str | None) -> _Rows:
    """Read a file, and say what is wrong with it."""
    try:
        with _open(path) as file:
            start = file.read(4096)
        for first, kind in _OTHER_FILES.items():
            if start.startswith(first):
                raise ValueError(f"{path}: is {kind}")
        if _format(path) == ".txt":
            rows = ((text, None) for text in _read_text(path))
        elif _format(path) == ".parquet":
            rows = _read_parquet(path, text_field)
        else:
            rows = _read_json(path, text_field)
        for text, source in rows:
            yield text, path.name if source is None else source
    except MemoryError:
        raise ValueError(f"{path}: one of its lines or documents does not fit in memory") from None
    except UnicodeDecodeError:
        raise _wrong_encoding(path) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(
            f"{path}: cannot decompress it ({error}); the file is damaged or cut off, or is "
            f"no {path.suffix} file. Fetch or copy it again"
        ) from None
    except OSError as error:  # of a failing disk, it names no file
        raise OSError(f"{path}: cannot read it ({error.strerror or error})") from error


def _open(path: Path) -> IO[bytes]:
    return _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _open_text(path: Path) -> IO[str]:
    # Editors on Windows put a byte order mark first, which is no part of the text ("-sig"). Lines
    # end only at "\n": the other ends that Python knows may be inside a JSON string.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


def _wrong_encoding(path: Path) -> ValueError:
    """Say where a file stops being UTF-8, and how to convert it."""
    with _open(path) as file:
        lines = enumerate(file, 1)
        number, line = next(p for p in lines if p[1].decode(errors="ignore").encode() != p[1])
        likely = "utf-16" if b"\0" in line + file.read(1000) else "gb18030"
    opener = {".gz": "gzip.open", ".xz": "lzma.open"}.get(path.suffix.lower(), "open")
    plain = _uncompressed(path)
    new = str(plain.with_name(f"{plain.stem}-utf8{plain.suffix}"))
    return ValueError(
        f"{path}, line {number}: is not UTF-8. If the file is damaged, fetch or copy it again. If "
        f"it is in another encoding, convert it with these lines of Python, and load {new} in its "
        f"place; if what they show is no text, try another encoding than {likely}, such as big5:\n"
        "import gzip, lzma\n"
        f"old = {opener}({str(path)!r}, 'rt', encoding={likely!r}, errors='replace')\n"
        f"open({new!r}, 'w', encoding='utf-8').writelines(old)\n"
        f"print(open({new!r}, encoding='utf-8').read(200))"
    )


def _read_text(path: Path) -> Iterator[str]:
    """Cut plain text at blank lines, or at every line if no line is blank."""
    with _open_text(path) as lines:
        blank = [is_blank for is_blank, _ in islice(groupby(lines, str.isspace), 4)]
    with _open_text(path) as lines:
        if blank.count(False) == 2:
            parts = ("".join(part) for blank, part in groupby(lines, str.isspace) if not blank)
        else:
            parts = (line for line in lines if not line.isspace())
        for part in parts:  # of joined files, later ones have a mark too
            yield part.replace("\r\n", "\n").replace("\ufeff", "").strip("\n")


def _read_json(path: Path, text_field: str | None) -> _Rows:
    """Tell an array from lines by the first character, and read it."""
    with _open_text(path) as file:
        first = file.read(_PIECE).lstrip()[:1]
    if first and first not in "[{":
        raise ValueError(
            f"{path}: starts with {first!r}; a JSON file of documents is either one array "
            '[{"text": "..."}, ...] or one object {"text": "..."} on each line'
        )
    for place, row in _json_array(path) if first == "[" else _json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: is a {type(row).__name__}; every document has to be an object "
                'such as {"text": "..."}'
            )
        text_field = _find_field(row, f"{path}, {place}", text_field)
        yield row[text_field], row.get("source")


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if not line.isspace():
                    yield f"line {number}", json.loads(line.removeprefix("\ufeff"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON: {error.msg}. Each line has to be one "
                    "whole object; correct it, or fetch the file again"
                ) from None


_FIRST, _NEXT = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*(?:,\s*|(\]))")


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    """Read an array of objects a piece at a time.

    Not by ijson: it turns half an emoji into "?", refuses Python's NaN, and names no line.
    """
    decode, number = json.JSONDecoder().raw_decode, 0
    with _open_text(path) as file:
        text, at, line = file.read(_PIECE), 0, 1
        while True:
            try:
                sign = (_NEXT if number else _FIRST).match(text, at)
                if not sign:
                    place = len(text) - len(text[at:].lstrip())
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
                if sign[1]:
                    break
                row, end = decode(text, sign.end())
            except json.JSONDecodeError as error:
                # An error near the end, or a string without an end: perhaps only the piece ends.
                may_go_on = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                if may_go_on and (more := file.read(max(_PIECE, len(text) - at))):
                    line += text.count("\n", 0, at)
                    text, at = text[at:] + more, 0
                    continue
                raise ValueError(
                    f"{path}, line {line + error.lineno - 1}, document {number + 1}: not valid "
                    f"JSON: {error.msg}. Correct that place; if the file is cut off there, fetch "
                    "or copy it again"
                ) from None
            at, number = end, number + 1
            yield f"document {number}", row
        if (text[sign.end() :] + file.read()).strip():
            raise ValueError(f"{path}: goes on after the ] that ends its array; correct that place")


def _find_field(fields: Iterable[str], place: str, wanted: str | None) -> str:
    """Return the field that holds the text."""
    names = (wanted,) if wanted else _TEXT_FIELDS
    for name in names:
        if name in fields:
            return name
    raise ValueError(
        f"{place}: has no field {' or '.join(map(repr, names))}; it has "
        f"{', '.join(map(repr, fields)) or 'no fields'}. Choose one: --set text_field=... or, in "
        "notebooks, TINYTRAIN_TEXT_FIELD"
    )


def _read_parquet(path: Path, text_field: str | None) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            table = pq.ParquetFile(file, buffer_size=_PIECE, pre_buffer=False)
            names = table.schema_arrow.names
            text_field = _find_field(names, str(path), text_field)
            wanted = [name for name in names if name in (text_field, "source")]
            for batch in table.iter_batches(batch_size=100, columns=wanted):
                for row in batch.to_pylist():
                    yield row[text_field], row.get("source")
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot read it ({error}); the file is damaged or cut off, or is not what its "
            "name says. Fetch or write it again"
        ) from None


def _write_documents(rows: Iterable[tuple[object, object]], target: Path, path: str | Path) -> None:
    """Write the documents that have a text to an Arrow file, and say how many have none."""
    import pyarrow as pa

    kept, left_out = 0, Counter()
    usable = _usable(rows, left_out)
    schema = pa.schema({"text": pa.string(), "source": pa.string()})
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(usable, 100)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            kept += len(batch)

    counts = ", ".join(f"{count:,} {problem}" for problem, count in left_out.most_common())
    if not kept:
        with_text = f" with text ({counts})" if counts else ""
        raise ValueError(
            f"{path} holds no documents{with_text}; choose another file, or another field with "
            "--set text_field=..."
        )
    if left_out:
        all_ = kept + left_out.total()
        logger.warning(f"{path}: left out {left_out.total():,} of {all_:,} documents: {counts}")
    logger.info(f"{Path(path).name}: {kept:,} documents")


def _usable(
    rows: Iterable[tuple[object, object]], left_out: Counter[str]
) -> Iterator[dict[str, bytes]]:
    """Yield text and source as UTF-8, and count what is left out."""
    for text, source in rows:
        if not isinstance(text, str):
            left_out["null" if text is None else "not a string"] += 1
        elif not text.strip().strip("\0"):  # a crash leaves NUL bytes
            left_out["empty"] += 1
        else:
            try:
                # Names may hold halves of characters too, which no file can store.
                yield {"text": text.encode(), "source": str(source).encode(errors="replace")}
            except UnicodeEncodeError:  # "\ud83d" in a JSON file: one half of an emoji
                left_out["with half a character"] += 1


def split_documents(documents: Dataset, test_size: float = 0.1, seed: int = 2222) -> DatasetDict:
    """Split the documents at random into a training set, ``train``, and a held-out set, ``test``.

    The latter has the share `test_size` of the documents; the same seed gives the same split.
    """
    if len(documents) < 2:
        raise ValueError(
            f"cannot split {len(documents)} document(s): one is needed to train on and one to "
            "hold out. If this is one long text, put blank lines between its parts"
        )
    split = documents.train_test_split(test_size=test_size, seed=seed)
    share = document_lengths(split["test"]).sum() / max(document_lengths(documents).sum(), 1)
    if not test_size / 10 < share < test_size + 0.2:
        logger.warning(
            f"held out: {test_size:.1%} of the documents, {share:.2%} of the characters. They are "
            "few or differ much in length; cut long ones into parts, or choose another split_seed"
        )
    return split


def document_lengths(documents: Dataset) -> np.ndarray:
    """Return the number of characters of each document, as int64."""
    import numpy as np

    batches = documents.select_columns("text").iter(batch_size=100)
    lengths = (len(text) for batch in batches for text in batch["text"])
    return np.fromiter(lengths, np.int64, len(documents))


def plot_lengths(split: DatasetDict, mark: float | None = None, mark_label: str = "") -> Figure:
    """Draw how long the documents of both sets are; a line may mark a length in characters."""
    import numpy as np
    from matplotlib.ticker import LogLocator

    sets = [document_lengths(split[name]) for name in ("train", "test")]
    everything = np.concatenate(sets)
    bins = np.geomspace(max(everything.min(), 1), everything.max() + 1, 50)

    figure, axes = new_axes()
    styles = (("training", "#4477aa"), ("held out", "#ee6677"))
    for values, (name, color) in zip(sets, styles, strict=True):
        # Percentages, not counts: the sets differ in size, and should not differ in shape.
        weights = np.full(len(values), 100 / len(values))
        label = f"{name} ({len(values):,})"
        style = {"facecolor": color + "33", "edgecolor": color, "linewidth": 1.5}
        axes.hist(values, bins, weights=weights, histtype="stepfilled", label=label, **style)
    if mark is not None:
        axes.axvline(mark, color="0.3", linestyle="--", linewidth=1, label=mark_label)
    axes.set(xscale="log", xlabel="characters in a document", ylabel="documents (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(frameon=False)
    return figure
