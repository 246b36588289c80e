"""Load text, find what is wrong with it, and split it honestly.

``datasets.load_dataset`` reads most of these files too, but its messages about a broken one come
from three libraries down. Here the text is read a piece at a time, checked, and written to an
Arrow file that is mapped into memory, so it may be larger than the memory; errors still name the
line. The price is that file: as much disk as the text has bytes without compression.
"""

from __future__ import annotations

import atexit
import codecs
import glob
import gzip
import io
import json
import logging
import lzma
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinytrain.common import new_axes

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_TEXT_FIELDS = ("completion", "text", "content")
_FORMATS = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
_PIECE = 1 << 18  # characters or bytes read at once


def load_documents(
    path: str | Path, text_field: str | None = None, folder: str | Path | None = None
) -> Dataset:
    """Load the documents of a file, or of all files of a folder, in their order.

    Reads JSON arrays, JSON lines, plain text and parquet (``.json .jsonl .ndjson .txt .parquet``),
    each also with ``.gz`` or ``.xz`` behind. In plain text, blank lines separate the documents;
    without any, each line is a document. Empty texts, and values that are not text, are left out
    and counted in one warning. The text may be larger than the memory.

    Parameters
    ----------
    path : str or Path
        A file, a folder, or a pattern such as ``texts/part-*.jsonl.gz``; see `text_files`.
    text_field : str, optional
        The field that holds the text; by default the first of ``completion``, ``text`` and
        ``content`` that a file's first document has.
    folder : str or Path, optional
        Gets the file ``documents.arrow`` that the dataset is read from. By default a temporary
        folder until the program ends; name one for a large text, as those may be in memory.

    Returns
    -------
    datasets.Dataset
        String columns ``text`` and ``source`` (by default the file's name). The fingerprint
        depends on the content alone, so that results cached for a text are found again.

    Raises
    ------
    FileNotFoundError
        If there is no such file; the message lists those that you could mean.
    ValueError
        If a file cannot be read; the message names the place and what to do.

    Examples
    --------
    >>> load_documents("poems.jsonl.gz", text_field="body")  # doctest: +SKIP
    Dataset({features: ['text', 'source'], num_rows: 320})
    """
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    files = text_files(path)
    if folder is None:
        folder = tempfile.mkdtemp(prefix="tinytrain-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "documents.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f"{target.name}.{os.getpid()}.building")
    try:
        rows = (row for file in files for row in _read_file(file, text_field))
        fingerprint = _write_documents(rows, building, path)
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)
    # Without a fingerprint of our own, datasets would make one of the file's name and time.
    return Dataset(MemoryMappedTable.from_file(str(target)), fingerprint=fingerprint)


def text_files(path: str | Path) -> list[Path]:
    """Return the files that `load_documents` reads for a path.

    Parameters
    ----------
    path : str or Path
        A file, or a folder or a pattern with ``*``, ``?`` or ``**``, of which the files count
        whose names end like a format that can be read.

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
    if path.is_dir():
        files, problem = _readable(path.iterdir()), f"{path} is a folder without a text"
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        files, problem = _readable(found), f"there is no file {path}"
    if not files:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        raise FileNotFoundError(f"{problem}; {_candidates(nearest)}")
    return files


def _format(path: Path) -> str | None:
    """Return the suffix that tells the format; None if the name does not tell."""
    name = path.name.lower()
    for suffix in _COMPRESSIONS:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in _FORMATS if name.endswith(suffix)), None)


def _readable(paths: Iterable[Path]) -> list[Path]:
    # Hidden files are not texts: some systems leave them beside each file.
    return sorted(p for p in paths if _format(p) and not p.name.startswith(".") and p.is_file())


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
        if _format(path) == ".parquet":
            rows = _read_parquet(path, text_field)
        elif _format(path) == ".txt":
            rows = zip(_read_text(path), repeat(None), strict=False)
        else:
            rows = _read_json(path, text_field)
        for text, source in rows:
            yield text, path.name if source is None else source
    except (*_DAMAGED, ValueError) as error:
        if damage := _damage(path):  # what is decompressed wrongly has other errors, too
            raise ValueError(
                f"{path}: cannot decompress it ({damage}); the file is damaged or cut off, or is "
                f"no {path.suffix} file. Fetch or copy it again"
            ) from None
        if isinstance(error, UnicodeDecodeError):
            raise _wrong_encoding(path) from None
        raise


def _open(path: Path) -> IO[bytes]:
    return _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _open_text(path: Path) -> IO[str]:
    # Editors on Windows put a byte order mark first, which is no part of the text ("-sig"). Lines
    # end only at "\n": the other ends that Python knows may be inside a JSON string.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


def _read_text(path: Path) -> Iterator[str]:
    """Cut plain text at blank lines, or at every line if no line is blank."""
    with _open_text(path) as lines:
        paragraphs = (True for is_blank, _ in groupby(lines, str.isspace) if not is_blank)
        has_several = len(list(islice(paragraphs, 2))) == 2
    with _open_text(path) as lines:
        if has_several:
            parts = ("".join(group) for blank, group in groupby(lines, str.isspace) if not blank)
        else:
            parts = (line for line in lines if not line.isspace())
        for part in parts:
            yield part.replace("\r\n", "\n").strip("\n")


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
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON: {getattr(error, 'msg', error)}. Each "
                    "line has to be one whole object; correct this one, or fetch the file again if "
                    "it is the last"
                ) from None
            yield f"line {number}", row


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as file:
        for number, row in enumerate(_ArrayReader(path, file).elements(), start=1):
            yield f"document {number}", row


class _ArrayReader:
    """Reads a JSON array an element at a time, with the syntax and the messages of ``json``.

    ijson would turn half an emoji into "?", refuses the NaN that Python writes, and names no line.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0  # the part in memory; what is before this place has been used
        self.before, self.line, self.column = 0, 1, 1  # characters before that part, and its place
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
                # A value that the end of the part cuts gives an error near that end, or in a string
                # without an end. All others are real, and no reason to read on.
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
            used, rest = self.text[: self.at], self.text[self.at :]
            self.before += self.at
            self.line += used.count("\n")
            self.column = self.at - used.rindex("\n") if "\n" in used else self.column + self.at
            self.text, self.at = rest + more, 0
        return bool(more)

    def error(self, message: str, at: int) -> ValueError:
        """Say what is wrong, and where in the whole file."""
        used, last = self.text[:at], self.text.rstrip()[-1:]
        line = self.line + used.count("\n")
        column = at - used.rindex("\n") if "\n" in used else self.column + at
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
        f"{', '.join(map(repr, fields)) or 'no fields'}. Say which holds the text: text_field=..."
    )


def _read_parquet(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as whole:
        try:
            file = pq.ParquetFile(whole, buffer_size=_PIECE, pre_buffer=False)
            names = file.schema_arrow.names
            text_field = _find_field(names, str(path), text_field)
            wanted = [name for name in names if name in (text_field, "source")]
            for batch in file.iter_batches(batch_size=100, columns=wanted):
                for row in batch.to_pylist():
                    yield row[text_field], row.get("source")
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot read it as parquet ({error}); the file is damaged or cut off, or "
                "is something else. Fetch or write it again"
            ) from None


def _damage(path: Path) -> Exception | None:
    """Return the error that decompressing a file ends in, if any."""
    try:
        with _open(path) as file:
            while file.read(_PIECE):
                pass
    except _DAMAGED as error:
        return error
    return None


def _wrong_encoding(path: Path) -> ValueError:
    """Say where a file stops being UTF-8, and what it looks like."""
    start = number = 0
    with _open(path) as file:
        for line in file:
            number += 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = error.start
                break
            start += len(line)
        sample = (line + file.read(_PIECE))[:100_000]
    place = f"{path}: byte {start + bad} (line {number}) is not UTF-8"
    encoding = _guess_encoding(sample)
    if encoding is None:
        return ValueError(f"{place}: 0x{line[bad]:02x}; repair that place or save it as UTF-8")
    opener = {".gz": "gzip.open", ".xz": "lzma.open"}.get(path.suffix.lower(), "open")
    plain = path if opener == "open" else path.with_suffix("")
    target = plain.with_name(f"{plain.stem}-utf8{plain.suffix}")
    return ValueError(
        f"{place}; it looks like {encoding.upper()}. Convert it with these lines of Python, then "
        f"load {target}:\n"
        f"import gzip, lzma; text = {opener}({str(path)!r}, 'rt', encoding='{encoding}')\n"
        f"open({str(target)!r}, 'w', encoding='utf-8').writelines(text)"
    )


def _guess_encoding(sample: bytes) -> str | None:
    """Tell, from a bad line on, another encoding from UTF-8 with a few bad bytes.

    charset_normalizer takes short Chinese for Big5, and gives up if the sample ends in a character.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    as_utf8 = sample.decode("utf-8", errors="replace")
    if 2 * as_utf8.count("\ufffd") < sum(char > "\x7f" for char in as_utf8):
        return None
    # Everyday Chinese is in GB2312, the oldest part of GB18030; other encodings rarely land there.
    as_gb = sample.decode("gb18030", errors="replace")[:-4]  # the sample may end in a character
    foreign = "".join(char for char in as_gb if char > "\x7f")
    common = len(foreign.encode("gb2312", errors="ignore")) // 2
    return "gb18030" if foreign and common > 0.8 * len(foreign) else None


def _write_documents(rows: Iterable[tuple[object, object]], target: Path, path: str | Path) -> str:
    """Write the documents that have a text to an Arrow file, and return a hash of them."""
    import pyarrow as pa
    import xxhash

    skipped: Counter[str] = Counter()
    content_hash = xxhash.xxh64()
    kept = 0
    schema = pa.schema({"text": pa.string(), "source": pa.string()})
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(_usable(rows, skipped)):
            kept += len(batch)
            for value in (value for row in batch for value in row.values()):
                content_hash.update(b"%d:" % len(value))
                content_hash.update(value)
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))

    counts = ", ".join(f"{count:,} {problem}" for problem, count in skipped.most_common())
    if not kept:
        raise ValueError(
            f"{path} holds no documents"
            + (f" with text ({counts})" if counts else "")
            + "; choose another file, or another field with text_field=..."
        )
    if skipped:
        all_ = kept + skipped.total()
        logger.warning(f"{path}: left out {skipped.total():,} of {all_:,} documents: {counts}")
    logger.info(f"{Path(path).name}: {kept:,} documents")
    return content_hash.hexdigest()


def _usable(
    rows: Iterable[tuple[object, object]], skipped: Counter[str]
) -> Iterator[dict[str, bytes]]:
    """Yield text and source as UTF-8, and count what is left out."""
    for text, source in rows:
        if text is None:
            skipped["null"] += 1
        elif not isinstance(text, str):
            skipped["not a string"] += 1
        elif not text or text.isspace():
            skipped["empty"] += 1
        else:
            # Names may hold halves of characters too, which no file can store.
            row = {"source": str(source).encode("utf-8", errors="replace")}
            try:
                yield {"text": text.encode("utf-8"), **row}
            except UnicodeEncodeError:  # "\ud83d" in a JSON file: one half of an emoji
                skipped["with half a character"] += 1


def _batches(rows: Iterable[dict[str, bytes]]) -> Iterator[list[dict[str, bytes]]]:
    """Collect rows until there are a thousand of them, or enough for a large piece."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row["text"])
        if len(batch) == 1000 or size > _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_documents(documents: Dataset, test_size: float = 0.1, seed: int = 2222) -> DatasetDict:
    """Split the documents at random into a training set and a held-out set.

    Parameters
    ----------
    documents : datasets.Dataset
        The documents.
    test_size : float
        Share that is held out, between 0 and 1.
    seed : int
        The same seed gives the same split.

    Returns
    -------
    datasets.DatasetDict
        With ``"train"`` and ``"test"``.
    """
    if len(documents) < 2:
        raise ValueError(
            f"cannot split {len(documents)} document(s): one is needed to train on and one to "
            "hold out. If this is one long text, put blank lines between its parts"
        )
    return documents.train_test_split(test_size=test_size, seed=seed)


def document_lengths(documents: Dataset) -> np.ndarray:
    """Return the number of characters of each document, as int64."""
    import numpy as np

    batches = documents.select_columns("text").iter(batch_size=1000)
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

    Returns
    -------
    matplotlib.figure.Figure
    """
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    lengths = {
        "training": document_lengths(split["train"]),
        "held out": document_lengths(split["test"]),
    }
    everything = np.concatenate(list(lengths.values()))
    bins = np.geomspace(max(everything.min(), 1), everything.max() + 1, 50)

    figure, axes = new_axes()
    for (name, values), color in zip(lengths.items(), ("#4477aa", "#ee6677"), strict=True):
        # Percentages, not counts: the sets differ in size, and should not differ in shape.
        weights = np.full(len(values), 100 / len(values))
        label = f"{name} ({len(values):,})"
        style = {"facecolor": color + "33", "edgecolor": color, "linewidth": 1.5}
        axes.hist(values, bins, weights=weights, histtype="stepfilled", label=label, **style)
    if mark is not None:
        axes.axvline(mark, color="0.3", linestyle="--", linewidth=1)
        at_top = {"va": "top", "transform": axes.get_xaxis_transform()}
        axes.text(mark, 0.98, f" {mark_label}", color="0.3", parse_math=False, **at_top)
    axes.margins(y=0.15)
    axes.set(xscale="log", xlabel="characters in a document", ylabel="documents (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    return figure
