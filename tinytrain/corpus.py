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
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from datasketch import MinHash, MinHashLSH
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("completion", "text", "content")
FORMATS = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")
COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}

_DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
_PIECE = 1 << 18  # characters or bytes read at once


class Duplicate(NamedTuple):
    """A held-out document that stands in the training half as well.

    Attributes
    ----------
    test, train : int
        Row in the held-out half, and row of its most similar document in the training half.
    similarity : float
        Share of the two documents' character 5-grams that they have in common, 0 to 1.
    kind : str
        ``"exact"`` (the same characters) or ``"near"``.
    """

    test: int
    train: int
    similarity: float
    kind: str


def load_documents(
    path: str | Path, text_field: str | None = None, folder: str | Path | None = None
) -> Dataset:
    """Load the documents of a file, or of all files of a folder, in their order.

    Read are JSON arrays, JSON lines, plain text and parquet, each also compressed with gzip or
    xz (``.json .jsonl .ndjson .txt .parquet``, then perhaps ``.gz`` or ``.xz``). In plain text,
    blank lines separate the documents; without any, each line is a document.

    Empty texts, and texts that are no text, are left out and counted in one warning.

    The text may be larger than the memory, which holds some megabytes of it and the longest
    document at a time.

    Parameters
    ----------
    path : str or Path
        A file, a folder, or a pattern such as ``texts/part-*.jsonl.gz``; see `text_files`.
    text_field : str, optional
        The field that holds the text; by default the first of ``completion``, ``text`` and
        ``content`` that a file's first document has.
    folder : str or Path, optional
        Gets the file ``documents.arrow`` that the dataset is read from, and has to stay as long as
        the dataset is used. By default a temporary folder that goes when the program ends; name
        one for a large text, as temporary folders may be small or lie in memory.

    Returns
    -------
    datasets.Dataset
        String columns ``text`` and ``source``. A document that has no source of its own gets the
        file's name. The fingerprint depends on the content alone, so results that were cached
        for a text are found again, and never for another text.

    Raises
    ------
    FileNotFoundError
        If there is no such file; the message lists those that could be meant.
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
        A file; a folder, of which those files are meant whose names end like a format that
        can be read; or a pattern with ``*``, ``?`` or ``**``, of which likewise.

    Returns
    -------
    list of Path
        In the order of their names, letter by letter: ``part-10`` comes before ``part-2``.

    Raises
    ------
    FileNotFoundError
        If there are none.
    ValueError
        If the path is a file of which the name does not tell the format.
    """
    path = Path(path)
    if path.is_file():
        _format(path)
        return [path]
    if path.is_dir():
        found, problem = path.iterdir(), f"{path} is a folder without a text"
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        problem = f"there is no file {path}"
    files = sorted(file for file in found if _can_be_read(file))
    if not files:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        raise FileNotFoundError(f"{problem}; {_candidates(nearest)}")
    return files


def _can_be_read(file: Path) -> bool:
    endings = tuple(form + end for form in FORMATS for end in ("", *COMPRESSIONS))
    hidden = file.name.startswith(".")  # what some systems lay beside a file is no text
    return file.name.lower().endswith(endings) and not hidden and file.is_file()


def _format(path: Path) -> str:
    """Return the suffix that tells the format."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        raise ValueError(
            f"{path}: cannot tell the format by the name; it has to end in one of "
            f"{' '.join(FORMATS)}, perhaps followed by {' or '.join(COMPRESSIONS)}"
        )
    return suffixes[-1]


def _candidates(folder: Path) -> str:
    """Name the files of a folder that `load_documents` could read."""
    names = sorted(file.name for file in folder.iterdir() if _can_be_read(file))
    if not names:
        return f"{folder} holds no {', '.join(FORMATS)} file; give the path of one"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"give the path of one; in {folder} there are: {', '.join(names[:5])}{more}"


def _read_file(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    """Yield text and source of each document, and say what is wrong with the file."""
    try:
        if _format(path) == ".parquet":
            rows = _read_parquet(path, text_field)
        elif _format(path) == ".txt":
            rows = ((text, None) for text in _read_text(path))
        else:
            rows = _read_json(path, text_field)
        for text, source in rows:
            yield text, path.name if source is None else source
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        _check_compression(path)  # what is decompressed wrongly has other errors, too
        if isinstance(error, UnicodeDecodeError):
            raise _wrong_encoding(path) from None
        raise


def _open(path: Path) -> IO[bytes]:
    return COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _open_text(path: Path) -> IO[str]:
    # Editors on Windows put a byte order mark first, which is no part of the text ("-sig"). Lines
    # end only at "\n": the other ends that Python knows may stand inside a JSON string.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


def _check_compression(path: Path) -> None:
    if path.suffix.lower() in COMPRESSIONS:
        try:
            with _open(path) as file:
                while file.read(_PIECE):
                    pass
        except _DAMAGED as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: cannot decompress it ({error}); the file is damaged or cut off, or is no "
        f"{path.suffix} file. Fetch or copy it again"
    )


def _wrong_encoding(path: Path) -> ValueError:
    """Say where a file stops to be UTF-8, and what it looks like."""
    with _open(path) as file:
        start = _first_bad_byte(file)
        line, line_start = _line_of(file, start)
        file.seek(0)
        head = file.read(2)
        file.seek(line_start)
        sample = file.read(100_000)
        file.seek(start)
        byte = file.read(1)
    place = f"{path}: byte {start} (line {line}) is not UTF-8"
    encoding = "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else _guess_encoding(sample)
    if encoding is None:
        return ValueError(f"{place}: 0x{byte.hex()}; repair that place or save the file as UTF-8")
    opener = {".gz": "gzip.open", ".xz": "lzma.open"}.get(path.suffix.lower(), "open")
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    target = plain.with_name(f"{plain.stem}-utf8{plain.suffix}")
    return ValueError(
        f"{place}; it looks like {encoding.upper()}. Convert it with these lines of Python, then "
        f"load {target}:\n"
        f"import gzip, lzma; text = {opener}({str(path)!r}, 'rt', encoding='{encoding}')\n"
        f"open({str(target)!r}, 'w', encoding='utf-8').writelines(text)"
    )


def _first_bad_byte(file: IO[bytes]) -> int:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        piece = file.read(_PIECE)
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece cut
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            return position - waiting + error.start
        position += len(piece)


def _line_of(file: IO[bytes], position: int) -> tuple[int, int]:
    """Return the number of the line that a byte stands in, and where that line begins."""
    file.seek(0)
    line, line_start = 1, 0
    for start in range(0, position, _PIECE):
        piece = file.read(min(_PIECE, position - start))
        line += piece.count(b"\n")
        if b"\n" in piece:
            line_start = start + piece.rindex(b"\n") + 1
    return line, line_start


def _guess_encoding(sample: bytes) -> str | None:
    """Tell, from a bad line on, another encoding from UTF-8 with a few bad bytes."""
    as_utf8 = sample.decode("utf-8", errors="replace")
    if 2 * as_utf8.count("\ufffd") < sum(char > "\x7f" for char in as_utf8):
        return None
    # The sample may end inside a character, so the last few characters do not count. Everyday
    # Chinese lies in GB2312, the oldest part of GB18030; other encodings rarely land there.
    as_gb = sample.decode("gb18030", errors="replace")[:-4]
    foreign = "".join(char for char in as_gb if char > "\x7f")
    common = len(foreign.encode("gb2312", errors="ignore")) // 2
    return "gb18030" if foreign and common > 0.8 * len(foreign) else None


def _read_text(path: Path) -> Iterator[str]:
    """Cut plain text at blank lines, or at every line if no line is blank."""
    with _open_text(path) as lines:
        has_paragraphs = _has_paragraphs(lines)
    with _open_text(path) as lines:
        if has_paragraphs:
            parts = ("".join(group) for blank, group in groupby(lines, str.isspace) if not blank)
        else:
            parts = (line for line in lines if not line.isspace())
        for part in parts:
            yield part.replace("\r\n", "\n").strip("\n")


def _has_paragraphs(lines: Iterable[str]) -> bool:
    """Tell whether a blank line stands between two others."""
    text_before = blank_before = False
    for line in lines:
        if line.isspace():
            blank_before = text_before
        elif blank_before:
            return True
        else:
            text_before = True
    return False


def _read_json(path: Path, text_field: str | None) -> Iterator[tuple[object, object]]:
    """Tell an array from lines by the first character, and read it."""
    with _open_text(path) as file:
        first = _Window(file).peek()
    if first == "[":
        rows = _json_array(path)
    elif first == "{":
        rows = _json_lines(path)
    elif not first:
        return
    else:
        raise ValueError(
            f"{path}: starts with {first!r}; a JSON file of documents is either one array "
            '[{"text": "..."}, ...] or one object {"text": "..."} on each line'
        )
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: is a {type(row).__name__}; every document has to be an object "
                'such as {"text": "..."}'
            )
        text_field = _find_field(row, f"{path}, {place}", text_field)
        yield row[text_field], row.get("source")


def _json_array(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as file:
        window = _Window(file)
        try:
            for number, row in enumerate(_elements(window), start=1):
                yield f"document {number}", row
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            if window.last_character() == "]":
                advice = "Correct that place"
            else:
                advice = (
                    "The file seems to be cut off: it does not end in ]. Fetch or copy it again"
                )
            raise ValueError(f"{path}: not valid JSON: {error}. {advice}") from None


def _elements(window: _Window) -> Iterator[object]:
    """Yield the elements of a JSON array, one at a time."""
    window.peek()  # the opening bracket
    window.at += 1
    if window.peek() != "]":
        yield window.read_value()
        while window.peek() == ",":
            window.at += 1
            window.peek()
            yield window.read_value()
    if window.peek() != "]":
        raise window.error("Expecting ',' delimiter")
    window.at += 1
    if window.peek():
        raise window.error("Extra data")


class _Window:
    """The part of a long JSON text that is being read, and where it stands in the whole."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.at = 0  # what lies before this place has been used
        self.characters = self.lines = self.column = 0  # before the first one of `text`
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space and return the character that follows, or ``""`` at the end."""
        while True:
            self.at = json.decoder.WHITESPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at : self.at + 1]

    def read_value(self) -> object:
        """Return the value that begins here."""
        while True:
            nearly_all = len(self.text) - 16  # longer than any word or escape
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # A value that the window's end cuts gives an error near the end, or in a string
                # that has none. All others are real, and no reason to read on.
                is_cut = error.pos > nearly_all or error.msg.startswith("Unterminated")
                if is_cut and self.read_on():
                    continue
                raise self.error(error.msg, error.pos) from None
            if end > nearly_all and self.read_on():
                continue  # "1e" is 1, and perhaps the beginning of 1e5
            self.at = end
            return value

    def read_on(self) -> bool:
        """Drop what has been used and read as much again as is left; tell whether there was any."""
        more = self.file.read(max(_PIECE, len(self.text) - self.at))
        if more:
            self.characters, self.lines, self.column = self.position(self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def position(self, at: int) -> tuple[int, int, int]:
        """Return how many characters and lines lie before a place, and how many in its line."""
        line_start = self.text.rfind("\n", 0, at) + 1
        column = at - line_start + (0 if line_start else self.column)
        return self.characters + at, self.lines + self.text.count("\n", 0, at), column

    def error(self, message: str, at: int | None = None) -> ValueError:
        """Say it as the module json does, with the place in the whole file."""
        character, line, column = self.position(self.at if at is None else at)
        return ValueError(f"{message}: line {line + 1} column {column + 1} (char {character})")

    def last_character(self) -> str:
        """Read to the end and return the last character that is not white space."""
        tail = self.text.rstrip()[-1:]
        while piece := self.file.read(_PIECE):
            tail = piece.rstrip()[-1:] or tail
        return tail


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


def _find_field(fields: Iterable[str], place: str, wanted: str | None) -> str:
    """Return the field that holds the text."""
    names = (wanted,) if wanted else TEXT_FIELDS
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

    is_packed = path.suffix.lower() in COMPRESSIONS
    with tempfile.TemporaryFile() if is_packed else nullcontext(path) as whole:
        if is_packed:  # parquet cannot be read from the front
            with _open(path) as packed:
                shutil.copyfileobj(packed, whole, _PIECE)
        try:
            file = pq.ParquetFile(whole, buffer_size=_PIECE, pre_buffer=False)
            names = file.schema_arrow.names
            text_field = _find_field(names, str(path), text_field)
            wanted = [name for name in names if name in (text_field, "source")]
            for batch in file.iter_batches(batch_size=100, columns=wanted):
                texts = batch.column(text_field).to_pylist()
                sources = batch.column("source").to_pylist() if "source" in wanted else repeat(None)
                yield from zip(texts, sources, strict=False)
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot read it as parquet ({error}); the file is damaged or cut off, or "
                "is something else. Fetch or write it again"
            ) from None


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
            for value in (value for row in batch for value in row):
                content_hash.update(b"%d:" % len(value))
                content_hash.update(value)
            columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))

    counts = ", ".join(f"{count:,} {problem}" for problem, count in skipped.most_common())
    if not kept:
        raise ValueError(
            f"{path} holds no documents"
            + (f" with text ({counts})" if counts else "")
            + "; choose another file, or another field with text_field=..."
        )
    if skipped:
        logger.warning(
            "%s: left out %s of %s documents: %s",
            path,
            f"{skipped.total():,}",
            f"{kept + skipped.total():,}",
            counts,
        )
    logger.info("%s: %s documents", path, f"{kept:,}")
    return content_hash.hexdigest()


def _usable(
    rows: Iterable[tuple[object, object]], skipped: Counter[str]
) -> Iterator[tuple[bytes, bytes]]:
    """Yield text and source as UTF-8, and count what is left out."""
    for text, source in rows:
        problem = _text_problem(text)
        if problem:
            skipped[problem] += 1
        else:
            # Names may hold halves of characters too, which no file can store.
            yield text.encode("utf-8"), str(source).encode("utf-8", errors="replace")


def _batches(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Collect rows until there are a thousand of them, or enough for a large piece."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[0])
        if len(batch) == 1000 or size > _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text_problem(text: object) -> str | None:
    """Say why a text cannot be used; None if it can."""
    if text is None:
        return "null"
    if not isinstance(text, str):
        return "not a string"
    if not text or text.isspace():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud83d" in a JSON file: one half of an emoji
        return "with half a character"
    return None


def split_documents(documents: Dataset, test_size: float = 0.1, seed: int = 2222) -> DatasetDict:
    """Split the documents at random into a training and a held-out half.

    Parameters
    ----------
    documents : datasets.Dataset
        The documents.
    test_size : float
        Share that is held out, between 0 and 1.
    seed : int
        The same seed gives the same halves.

    Returns
    -------
    datasets.DatasetDict
        With the halves ``"train"`` and ``"test"``.

    Raises
    ------
    ValueError
        If there are fewer than two documents.

    Examples
    --------
    >>> from datasets import Dataset
    >>> documents = Dataset.from_dict({"text": list("abcdefghij")})
    >>> {name: len(half) for name, half in split_documents(documents).items()}
    {'train': 9, 'test': 1}
    """
    if len(documents) < 2:
        raise ValueError(
            f"cannot split {len(documents)} document(s): one is needed to train on and one to "
            "hold out. If this is one long text, put blank lines between its parts"
        )
    return documents.train_test_split(test_size=test_size, seed=seed)


def find_duplicates(
    split: DatasetDict, threshold: float = 0.8, ngram: int = 5, num_perm: int = 128
) -> list[Duplicate]:
    """Find the held-out documents that stand in the training half too.

    A model is marked too kindly on texts that it has seen. Comparing all pairs would take days,
    so locality-sensitive hashing proposes pairs that probably are alike, and each is then
    compared for real: what is reported is true, while a near duplicate just above the threshold
    may, rarely, be missed. Spaces, punctuation and case do not count. The documents may lie on
    disk: the index takes some 500 bytes for each held-out one.

    Parameters
    ----------
    split : datasets.DatasetDict
        With ``"train"`` and ``"test"``, each with a column ``text``.
    threshold : float
        Least Jaccard similarity of a near duplicate, above 0 and at most 1.
    ngram : int
        Characters in one of the overlapping pieces that are compared.
    num_perm : int
        Hash functions of a MinHash: more miss fewer duplicates and take longer.

    Returns
    -------
    list of Duplicate
        One for each held-out document that has a twin, with its most similar one, in the order
        of the held-out half.

    References
    ----------
    .. [1] A. Z. Broder, "On the resemblance and containment of documents", 1997.

    Examples
    --------
    >>> from datasets import Dataset, DatasetDict
    >>> halves = {"train": ["床前明月光", "疑是地上霜"], "test": ["疑是地上霜", "举头望明月"]}
    >>> split = DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in halves.items()})
    >>> find_duplicates(split)
    [Duplicate(test=0, train=1, similarity=1.0, kind='exact')]
    """
    import numpy as np
    from datasketch import MinHash, MinHashLSH
    from tqdm.auto import tqdm

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it has to be above 0 and at most 1")
    blank = MinHash(num_perm, hashfunc=int)  # the shingles are hashed already
    # Proposing from a lower threshold than asked for costs comparisons, and misses fewer. The
    # index itself keeps some kilobytes a document; an array of the same hashes does with bytes.
    bands = MinHashLSH(threshold=0.75 * threshold, num_perm=num_perm)
    held_out = split["test"].select_columns("text")

    # The smaller half is indexed; the larger one passes by.
    keys = np.empty((len(held_out), bands.b + 1), np.uint64)
    for row, text in enumerate(_texts(held_out)):
        keys[row] = _keys(text, _shingle_hashes(text, ngram), blank, bands)
    order = np.argsort(keys, axis=None)
    rows, keys = order // keys.shape[1], keys.ravel()[order]

    @lru_cache(maxsize=1000)
    def look_up(row: int) -> tuple[str, np.ndarray]:
        text = held_out[row]["text"]
        return text, np.unique(_shingle_hashes(text, ngram))

    best: dict[int, Duplicate] = {}
    texts = tqdm(
        _texts(split["train"]),
        "duplicates",
        len(split["train"]),
        delay=5,
        mininterval=1,
        leave=False,
    )
    for train_row, text in enumerate(texts):
        hashes = _shingle_hashes(text, ngram)
        wanted = _keys(text, hashes, blank, bands)
        first, end = (np.searchsorted(keys, wanted, side) for side in ("left", "right"))
        for row in {int(row) for a, b in zip(first, end, strict=True) for row in rows[a:b]}:
            if row in best and best[row].kind == "exact":
                continue
            other, other_hashes = look_up(row)
            if other == text:
                best[row] = Duplicate(row, train_row, 1.0, "exact")
            elif len(hashes):
                similarity = _jaccard(other_hashes, np.unique(hashes))
                better = row not in best or similarity > best[row].similarity
                if better and similarity >= threshold:
                    best[row] = Duplicate(row, train_row, similarity, "near")

    found = [best[row] for row in sorted(best)]
    exact = sum(duplicate.kind == "exact" for duplicate in found)
    logger.info(
        "%s of %s held-out documents stand in the training half too: %s exactly, %s nearly",
        f"{len(found):,}",
        f"{len(held_out):,}",
        f"{exact:,}",
        f"{len(found) - exact:,}",
    )
    return found


def _keys(text: str, hashes: np.ndarray, blank: MinHash, bands: MinHashLSH) -> np.ndarray:
    """Return a hash of the text and one of each band of its MinHash.

    Two documents that have any of them in common are likely to be alike.
    """
    import numpy as np
    from xxhash import xxh64_intdigest

    keys = np.full(bands.b + 1, xxh64_intdigest(text.encode("utf-8")), np.uint64)
    if len(hashes):  # else it is nothing but punctuation
        values = _minhash(hashes, blank).hashvalues
        for band, (start, end) in enumerate(bands.hashranges, start=1):
            keys[band] = xxh64_intdigest(values[start:end].tobytes(), band)
    return keys


def _texts(documents: Dataset) -> Iterator[str]:
    for batch in documents.select_columns("text").iter(batch_size=1000):
        yield from batch["text"]


def _shingle_hashes(text: str, ngram: int) -> np.ndarray:
    """Hash all pieces of `ngram` characters, as uint64 (a shorter text is one piece)."""
    import numpy as np

    letters = re.sub(r"[\W_]+", "", text).lower()
    codes = np.frombuffer(letters.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    length = min(ngram, len(codes))
    hashes = np.zeros(len(codes) - length + 1 if length else 0, dtype=np.uint64)
    for i in range(length):  # a polynomial in a large odd number, modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(hashes)]
    return hashes


def _minhash(hashes: np.ndarray, blank: MinHash) -> MinHash:
    import numpy as np

    minhash = blank.copy()
    upper = hashes >> np.uint64(32)  # the well-mixed bits; MinHash wants 32
    for start in range(0, len(upper), 4096):  # pieces keep its work inside the processor's cache
        minhash.update_batch(upper[start : start + 4096].tolist())
    return minhash


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np

    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def drop_duplicates(split: DatasetDict, duplicates: list[Duplicate]) -> DatasetDict:
    """Remove the held-out documents that stand in the training half too.

    Parameters
    ----------
    split : datasets.DatasetDict
        With ``"train"`` and ``"test"``.
    duplicates : list of Duplicate
        From `find_duplicates` on the same split.

    Returns
    -------
    datasets.DatasetDict
        The same training half, and what is left of the held-out half.

    Raises
    ------
    ValueError
        If nothing would be left.
    """
    from datasets import DatasetDict

    # Only the held-out copies go. Its number has to be honest; the training half stays as it is,
    # so that runs with and without this step learn from the same text.
    copies = {duplicate.test for duplicate in duplicates}
    kept = [row for row in range(len(split["test"])) if row not in copies]
    if not kept:
        raise ValueError(
            f"all {len(split['test']):,} held-out documents stand in the training half too, so "
            "nothing would be left to measure with; hold out more (test_size), call only closer "
            "matches duplicates (threshold), or remove the repetitions from the text first"
        )
    logger.info("removed %s held-out documents, %s are left", f"{len(copies):,}", f"{len(kept):,}")
    return DatasetDict({"train": split["train"], "test": split["test"].select(kept)})


def describe(documents: Dataset) -> dict[str, float]:
    """Count documents and characters.

    Parameters
    ----------
    documents : datasets.Dataset
        With a column ``text``.

    Returns
    -------
    dict
        ``documents``, ``characters``, and the ``shortest``, ``median``, ``mean`` and ``longest``
        document in characters.

    Examples
    --------
    >>> from datasets import Dataset
    >>> describe(Dataset.from_dict({"text": ["春眠", "不觉晓"]}))["characters"]
    5
    """
    import numpy as np

    lengths = _lengths(documents)
    return {
        "documents": len(lengths),
        "characters": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
    }


def _lengths(documents: Dataset) -> np.ndarray:
    import numpy as np

    return np.fromiter(map(len, _texts(documents)), np.int64, len(documents))


def count_sources(documents: Dataset, top: int = 10) -> dict[str, int]:
    """Count the documents of each source.

    What follows a slash is left away, so ``book/chapter`` counts for the book and a web address
    for its host.

    Parameters
    ----------
    documents : datasets.Dataset
        With a column ``source``.
    top : int
        How many sources to tell apart.

    Returns
    -------
    dict of str to int
        The largest sources first; the others, if any, together as ``"others"``, last.

    Examples
    --------
    >>> from datasets import Dataset
    >>> count_sources(Dataset.from_dict({"source": ["wiki/1", "wiki/2", "poems"]}))
    {'wiki': 2, 'poems': 1}
    """
    counts: Counter[str] = Counter()
    for batch in documents.select_columns("source").iter(batch_size=1000):
        counts.update(source.split("://")[-1].split("/")[0] for source in batch["source"])
    largest = dict(counts.most_common(top))
    rest = counts.total() - sum(largest.values())
    return {**largest, "others": rest} if rest else largest


def plot_lengths(split: DatasetDict, mark: float | None = None, mark_label: str = "") -> Figure:
    """Draw how long the documents of both halves are.

    Parameters
    ----------
    split : datasets.DatasetDict
        With ``"train"`` and ``"test"``, each with a column ``text``.
    mark : float, optional
        A length in characters to mark with a line, for example that of one context.
    mark_label : str
        What stands beside the line.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    lengths = {"training": _lengths(split["train"]), "held out": _lengths(split["test"])}
    everything = np.concatenate(list(lengths.values()))
    bins = np.geomspace(max(everything.min(), 1), everything.max() + 1, 50)

    figure, axes = _figure()
    for (name, values), color in zip(lengths.items(), ("#4477aa", "#ee6677"), strict=True):
        # Shares, not counts: the halves differ in size, and should not differ in shape.
        axes.hist(
            values,
            bins,
            weights=np.full(len(values), 100 / len(values)),
            histtype="stepfilled",
            facecolor=color + "33",
            edgecolor=color,
            linewidth=1.5,
            label=f"{name} ({len(values):,})",
        )
    if mark is not None:
        axes.axvline(mark, color="0.3", linestyle="--", linewidth=1)
        axes.text(
            mark,
            0.98,
            f" {mark_label}",
            va="top",
            transform=axes.get_xaxis_transform(),
            color="0.3",
        )
    axes.margins(y=0.15)
    axes.set(xscale="log", xlabel="characters in a document", ylabel="documents (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    return figure


def plot_sources(documents: Dataset, top: int = 10) -> Figure:
    """Draw how many documents each source has, as `count_sources` counts them.

    Parameters
    ----------
    documents : datasets.Dataset
        With a column ``source``.
    top : int
        How many sources to tell apart.

    Returns
    -------
    matplotlib.figure.Figure
    """
    counts = count_sources(documents, top)
    figure, axes = _figure(height=1 + 0.25 * len(counts))
    bars = axes.barh(range(len(counts)), list(counts.values()), color="#4477aa")
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=4)
    fonts = _fonts()
    # Without a Chinese font, a question mark says more than an empty box and a warning.
    labels = counts if len(fonts) > 1 else (s.encode("ascii", "replace").decode() for s in counts)
    axes.set_yticks(range(len(counts)), list(labels), fontfamily=fonts)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("documents")
    return figure


def _figure(height: float = 3.0):
    # Not pyplot: it keeps every figure alive, and chooses a backend for the whole program.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _fonts() -> list[str]:
    """Return matplotlib's own font and, if the machine has one, a Chinese font."""
    from matplotlib.font_manager import get_font_names

    known = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei")
    known += ("PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS")
    installed = set(get_font_names())
    return ["DejaVu Sans", *[name for name in known if name in installed][:1]]
