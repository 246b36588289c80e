"""Load text, find what is wrong with it, and split it honestly.

``datasets.load_dataset`` reads most of these files too, but its messages about a broken one come
from three libraries down. Here the text is read a piece at a time, checked, and written to an
Arrow file that is mapped into memory: it may be larger than the memory, and errors name the line.
The price is that file, as large as the text without compression.
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

_TEXT_FIELDS = ("completion", "text", "content")
_FORMATS = (".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
_PIECE = 1 << 18  # characters or bytes read at once
# What collections have beside their texts, under names like those of texts.
_NO_TEXT = re.compile(
    r"(?i)(readme|licen[cs]e|copying|changelog|requirements)(?![a-z]).*\.txt"
    r"|(config|configuration|dataset_(info|infos|dict)|state)\.json"
)
_OTHER_FILES = {
    b"\x1f\x8b": "a gzip file; let its name end in .gz",
    b"\xfd7zXZ": "an xz file; let its name end in .xz",
    b"PAR1\x15": "a parquet file; let its name end in .parquet",
    b"PK\3\4": "a zip or .docx file; unpack it, or save its text as .txt",
    b"BZh9": "a bzip2 file; unpack it",
    b"%PDF-": "a PDF; save its text as .txt",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the text itself",
}
_ENCODINGS = ("gb18030", "big5-hkscs", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
# Frequent characters that simplified and traditional Chinese have in common: a third of any text.
_COMMON = frozenset(
    "的一是了不在人有我他上大地中你生年就那和要她出也得自以家可下而能小多然心好看起成只如事把用想"
    "作面最女但前些所同日手又行意方它回位分老因很名法世什使身者被高已其此常正感明力理文本公特做外"
    "相西果走十全信重三工物真打太新比才便夫再部水像等加主海受表德少代先口由死安性光白或住教命花色"
    "之去道月天子於二四山王市城古食友立民平化北南京入原合政思放星春河清百石秋空科各任何元直雨落里"
)


def load_documents(
    path: str | Path, text_field: str | None = None, folder: str | Path | None = None
) -> Dataset:
    """Load the documents of a file, or of all files of a folder, in their order.

    Reads JSON arrays, JSON lines, plain text, parquet (``.json .jsonl .ndjson .txt .parquet``) and
    what ``datasets`` saves, each also with ``.gz`` or ``.xz`` behind. In plain text, blank lines
    separate the documents; without any, each line is one. Empty texts, and values that are not
    text, are left out and counted in one warning. The text may be larger than the memory.

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
        String columns ``text`` and ``source`` (by default the file's name). Its fingerprint
        depends on the content alone, so that `datasets` finds cached results again.

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
    """Return the files that `load_documents` reads for a path.

    Parameters
    ----------
    path : str or Path
        A file, a folder, or a pattern with ``*``, ``?`` or ``**``. Of the last two, the files count
        whose names end like a format that can be read; licences, metadata, and a text's second
        copy do not. A folder without a text is searched two levels down.

    Returns
    -------
    list of Path
        In the order of their names, letter by letter: ``part-10`` comes before ``part-2``.
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
        raise FileNotFoundError(f"{problem}; {_candidates(nearest)}")
    return files


def matching_files(pattern: Path) -> list[Path]:
    """Return the files of a pattern; a folder that is there means itself, even if named ``[1]``."""
    folder = next(folder for folder in pattern.parents if folder.is_dir())
    below = Path(glob.escape(str(folder)), pattern.relative_to(folder))
    return [Path(file) for file in glob.glob(str(below), recursive=True)]


def _format(path: Path) -> str | None:
    """Return the suffix that tells the format, if there is one."""
    suffix = _uncompressed(path).suffix.lower()
    return suffix if suffix in _FORMATS else None


def _is_table(path: Path) -> bool:
    return _format(path) in (".parquet", ".arrow")


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path


def _converted(path: Path) -> Path:
    """Return the name for a file in UTF-8 that is read in place of this one."""
    plain = _uncompressed(path)
    return plain.with_name(f"{plain.stem}-utf8{plain.suffix}")


def _readable(paths: Iterable[Path]) -> list[Path]:
    # Hidden files are not texts: some systems leave them beside each file.
    return sorted(p for p in paths if _format(p) and not p.name.startswith(".") and p.is_file())


def _choose(paths: Iterable[Path]) -> list[Path]:
    """Return the texts among files, each once, in the order of their names."""
    files = _readable(paths)
    texts = [f for f in files if not _NO_TEXT.fullmatch(f.name) and not _converted(f).exists()]
    chosen = sorted({_uncompressed(file): file for file in reversed(texts)}.values())
    if left_out := sorted(file.name for file in {*files}.difference(chosen)):
        _warn_once(f"left out, no texts by their names or there twice: {', '.join(left_out):.500}")
    return chosen


def _candidates(folder: Path) -> str:
    """Name the files of a folder that can be read."""
    names = [file.name for file in _readable(folder.iterdir())]
    if not names:
        return f"{folder} holds no {', '.join(_FORMATS)} file; give the path of one"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"give the path of one; in {folder} there are: {', '.join(names[:5])}{more}"


def _read_file(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    """Read a file, and say what is wrong with it."""
    try:
        _check_start(path)
        if _format(path) == ".txt":
            rows = ((text, None) for text in _read_text(path))
        else:
            rows = (_read_table if _is_table(path) else _read_json)(path, text_field)
        for text, source in rows:
            yield text, path.name if source is None else source
    except MemoryError:
        raise ValueError(f"{path}: one of its lines or documents does not fit in memory") from None
    except (*_DAMAGED, ValueError) as error:
        _check_compression(path)  # what is decompressed wrongly has other errors, too
        if isinstance(error, UnicodeDecodeError):
            raise _wrong_encoding(path) from None
        raise
    except OSError as error:  # of a failing disk, it names no file
        raise OSError(f"{path}: cannot read it ({error.strerror or error})") from error


def _check_start(path: Path) -> None:
    """Refuse what the first bytes show to be no text."""
    with _open(path) as file:
        start = file.read(4096)
    for first, kind in _OTHER_FILES.items():
        if start.startswith(first) and (first[:3] != b"PAR" or _format(path) != ".parquet"):
            raise ValueError(f"{path}: is {kind}")
    if 10 * start.count(0) > len(start) and not _is_table(path):
        raise _another_encoding(path, f"{path}: is full of NUL bytes", start)


def _check_compression(path: Path) -> None:
    try:
        with _open(path) as file:
            while file.read(_PIECE):
                pass
    except _DAMAGED as error:
        raise ValueError(
            f"{path}: cannot decompress it ({error}); the file is damaged or cut off, or is "
            f"no {path.suffix} file. Fetch or copy it again"
        ) from None


def _open(path: Path) -> IO[bytes]:
    return _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _open_text(path: Path) -> IO[str]:
    # Editors on Windows put a byte order mark first, which is no part of the text ("-sig"). Lines
    # end only at "\n": the other ends that Python knows may be inside a JSON string.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


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


def _read_json(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    """Tell an array from lines by the first character, and read it."""
    with _open_text(path) as file:
        first = _ArrayReader(path, file).peek()
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
            if line.isspace():
                continue
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON: {getattr(error, 'msg', error)}. Each "
                    "line has to be one whole object; correct it, or fetch the file again"
                ) from None
            yield f"line {number}", row


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as file:
        for number, row in enumerate(_ArrayReader(path, file).elements(), start=1):
            yield f"document {number}", row


class _ArrayReader:
    """Reads a JSON array an element at a time, with the syntax and the messages of ``json``.

    Not ijson: it turns half an emoji into "?", refuses Python's NaN, and names no line.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0  # the part in memory, and where to read on in it
        self.before, self.line, self.column = 0, 1, 1  # where that part begins in the file
        self.decode = json.JSONDecoder().raw_decode

    def elements(self) -> Iterator[object]:
        self.take("[")
        if not self.take("]"):
            yield self.value()
            while self.take(","):
                yield self.value()
            if not self.take("]"):
                raise self.error("Expecting ',' delimiter", self.at)
        if self.peek():
            raise self.error("Extra data", self.at)

    def take(self, character: str) -> bool:
        """Tell whether this character follows, and step over it."""
        follows = self.peek() == character
        self.at += follows
        return follows

    def peek(self) -> str:
        """Skip white space and return the character that follows, or ``""`` at the end."""
        while True:
            self.at = json.decoder.WHITESPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at : self.at + 1]

    def value(self) -> object:
        self.peek()
        while True:
            nearly_all = len(self.text) - 16  # longer than any literal or escape
            try:
                value, end = self.decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                message, at = getattr(error, "msg", str(error)), getattr(error, "pos", self.at)
                # If only the part ends too early, the error is near its end, or is a string
                # without an end.
                is_cut = at > nearly_all or message.startswith("Unterminated")
                if not is_cut or not self.read_on():
                    raise self.error(message, at) from None
            else:  # "1e" is 1, and perhaps the beginning of 1e5
                if end <= nearly_all or not self.read_on():
                    self.at = end
                    return value

    def read_on(self) -> bool:
        """Drop what has been used and read as much again as is left; tell whether there was any."""
        more = self.file.read(max(_PIECE, len(self.text) - self.at))
        if more:
            self.line, self.column = self.place(self.at)
            self.before += self.at
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def place(self, at: int) -> tuple[int, int]:
        """Return the line and the column in the file."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rindex("\n", 0, at) if lines else self.column + at
        return self.line + lines, column

    def error(self, message: str, at: int) -> ValueError:
        """Say what is wrong, and where in the whole file."""
        (line, column), last = self.place(at), self.text.rstrip()[-1:]
        while piece := self.file.read(_PIECE):
            last = piece.rstrip()[-1:] or last
        advice = "Correct that place"
        if last != "]":
            advice = "The file seems to be cut off: it does not end in ]. Fetch or copy it again"
        return ValueError(
            f"{self.path}: not valid JSON: {message}: line {line} column {column} "
            f"(char {self.before + at}). {advice}"
        )


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


def _read_table(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = _format(path)[1:]
    with _open(path) as file:
        try:
            if kind == "arrow":
                batches = pa.ipc.open_stream(file)
                names = batches.schema.names
            else:
                parquet = pq.ParquetFile(file, buffer_size=_PIECE, pre_buffer=False)
                names = parquet.schema_arrow.names
            text_field = _find_field(names, str(path), text_field)
            wanted = [name for name in names if name in (text_field, "source")]
            if len(wanted) > len(set(wanted)):
                raise ValueError(f"{path}: has two columns of one name: {wanted}; rename one")
            if kind == "parquet":
                batches = parquet.iter_batches(batch_size=100, columns=wanted)
            for batch in batches:
                for row in batch.select(wanted).to_pylist():
                    yield row[text_field], row.get("source")
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot read it as {kind} ({error}); the file is damaged or cut off, or "
                "is something else. Fetch or write it again"
            ) from None


def _wrong_encoding(path: Path) -> ValueError:
    """Say where a file stops being UTF-8, and what it looks like."""
    start = number = 0
    with _open(path) as file:
        for line in file:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError as error:
                bad, is_cut = error.start, error.reason == "unexpected end of data"
                break
            start += len(line)
        sample = (line + file.read(_PIECE))[:100_000]
        file.seek(0)
        before = file.read(min(start, _PIECE))
    place = f"{path}: byte {start + bad} (line {number}), 0x{line[bad]:02x}, is not UTF-8"
    if is_cut:  # only a last line without an end can be
        return ValueError(f"{place}: the file is cut off there. Fetch or copy it again")
    if _common_share(before, "utf-8") > 0.2:
        place, sample = f"{place}, while all before is", b""  # two files in one
    return _another_encoding(path, place, sample, start)


def _another_encoding(path: Path, place: str, sample: bytes, start: int = 0) -> ValueError:
    """Say which encoding it seems to be, and how to convert it."""
    shares = {name: _common_share(sample, name, start) for name in _ENCODINGS}
    encoding = max(shares, key=shares.get)
    if not start and (marked := json.detect_encoding(sample)) in ("utf-16", "utf-32"):
        encoding = marked
    elif shares[encoding] < 0.2:
        return ValueError(
            f"{place}, and its encoding could not be recognised. Repair that place, fetch the "
            "file again, or save it as UTF-8 with an editor that shows the text right"
        )
    opener = {".gz": "gzip.open", ".xz": "lzma.open"}.get(path.suffix.lower(), "open")
    target = _converted(path)
    return ValueError(
        f"{place}; it looks like {encoding.upper()}. Convert it with these lines of Python, then "
        f"load {target}:\nimport gzip, lzma, os; new = {str(target)!r}\n"
        f"old = {opener}({str(path)!r}, 'rt', encoding={encoding!r}, errors='replace')\n"
        "open(new + '.part', 'w', encoding='utf-8').writelines(old)\n"
        "os.replace(new + '.part', new); text = open(new, encoding='utf-8')\n"
        "print(sum(line.count('\\ufffd') for line in text), 'characters could not be read')"
    )


def _common_share(sample: bytes, encoding: str, start: int = 0) -> float:
    """Return how many of the letters are frequent in Chinese; a wrong encoding gives rare ones."""
    if encoding in _ENCODINGS[2:]:  # characters begin only at each second or fourth byte
        letters = sample[-start % 4 :].decode(encoding, errors="replace")
    else:  # they all write ASCII alike
        letters = re.sub(r"[\0-\x7f]", "", sample.decode(encoding, errors="replace"))
    letters = [char for char in letters if char.isalnum() or char in "\0\ufffd"]
    return sum(char in _COMMON or "0" <= char <= "z" for char in letters) / max(len(letters), 8)


def _write_documents(rows: Iterable[tuple[object, object]], target: Path, path: str | Path) -> None:
    """Write the documents that have a text to an Arrow file, and say how many have none."""
    import pyarrow as pa

    kept, left_out = 0, Counter()
    schema = pa.schema({"text": pa.string(), "source": pa.string()})
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch, size = [], 0
        for row in _usable(rows, left_out):
            batch.append(row)
            kept, size = kept + 1, size + len(row["text"])
            if len(batch) == 1000 or size > _PIECE:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))

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
        if text is None:
            left_out["null"] += 1
        elif not isinstance(text, str):
            left_out["not a string"] += 1
        elif not text.strip().strip("\0"):  # a crash leaves NUL bytes
            left_out["empty"] += 1
        else:
            try:
                # Names may hold halves of characters too, which no file can store.
                yield {"text": text.encode(), "source": str(source).encode(errors="replace")}
            except UnicodeEncodeError:  # "\ud83d" in a JSON file: one half of an emoji
                left_out["with half a character"] += 1


def split_documents(documents: Dataset, test_size: float = 0.1, seed: int = 2222) -> DatasetDict:
    """Split the documents at random into a training set and a held-out set.

    Parameters
    ----------
    documents : datasets.Dataset
    test_size : float
        Share that is held out, between 0 and 1.
    seed : int
        The same seed gives the same split.

    Returns
    -------
    datasets.DatasetDict
        With ``train`` and ``test``.
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
    """Draw how long the documents of the training set and of the held-out set are.

    Parameters
    ----------
    split : datasets.DatasetDict
        With ``"train"`` and ``"test"``, each with a column ``text``.
    mark : float, optional
        A length in characters to mark with a line, for example that of one context.
    mark_label : str
        The label of that line.
    """
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
        axes.axvline(mark, color="0.3", linestyle="--", linewidth=1)
        at_top = {"va": "top", "transform": axes.get_xaxis_transform()}
        side = "left" if mark < everything.max() else "right"  # of the text that meets the line
        axes.text(mark, 0.98, f" {mark_label} ", ha=side, color="0.3", parse_math=False, **at_top)
    axes.margins(y=0.15)
    axes.set(xscale="log", xlabel="characters in a document", ylabel="documents (%)")
    wide = everything.max() > 20 * max(everything.min(), 1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else range(1, 10)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(frameon=False)
    return figure
