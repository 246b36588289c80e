"""Load text, find what is wrong with it, and split it honestly.

``datasets.load_dataset`` reads most of these files too, but its messages about a broken one come
from three libraries down. Here the whole file is read into memory and checked before anything is
made of it: simple, with errors that name the line. The price is memory, about 2 GB at the peak
for the 524 MB file of the guide; text that does not fit needs ``datasets`` and its files on disk.
"""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("completion", "text", "content")
FORMATS = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")
COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}


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


def load_documents(path: str | Path, text_field: str | None = None) -> Dataset:
    """Load the documents of one file, in the file's order.

    Read are JSON arrays, JSON lines, plain text and parquet, each also compressed with gzip or
    xz (``.json .jsonl .ndjson .txt .parquet``, then perhaps ``.gz`` or ``.xz``). In plain text,
    blank lines separate the documents; without any, each line is a document.

    Empty texts, and texts that are no text, are left out and counted in one warning.

    Parameters
    ----------
    path : str or Path
        The file.
    text_field : str, optional
        The field that holds the text; by default the first of ``completion``, ``text`` and
        ``content`` that the first document has.

    Returns
    -------
    datasets.Dataset
        String columns ``text`` and ``source``. A document that has no source of its own gets the
        file's name. The fingerprint depends on the content alone, so results that were cached
        for a text are found again, and never for another text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    IsADirectoryError
        If the path is a folder; the message lists the files in it that could be meant.
    ValueError
        If the file cannot be read; the message names the place and what to do.

    Examples
    --------
    >>> load_documents("poems.jsonl.gz", text_field="body")  # doctest: +SKIP
    Dataset({features: ['text', 'source'], num_rows: 320})
    """
    path = Path(path)
    file_format = _check_path(path)
    data = _read_bytes(path)
    if file_format == ".parquet":
        texts, sources = _parse_parquet(data, path, text_field)
    else:
        content = _decode(data, path)
        del data  # the file's bytes and its characters need not both stay in memory
        if file_format == ".txt":
            texts, sources = _parse_text(content), None
        else:
            texts, sources = _parse_json(content, path, text_field)
        del content
    return _build_dataset(texts, sources, path)


def _check_path(path: Path) -> str:
    """Return the suffix that tells the format, or say what could be meant instead."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file; {_candidates(path)}")
    if not path.exists():
        nearest = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise FileNotFoundError(f"there is no file {path}; {_candidates(nearest)}")
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
    endings = tuple(form + end for form in FORMATS for end in ("", *COMPRESSIONS))
    names = sorted(f.name for f in folder.iterdir() if f.name.lower().endswith(endings))
    if not names:
        return f"and {folder} holds no {', '.join(FORMATS)} file; give the path of one"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"give the path of one file; in {folder} there are: {', '.join(names[:5])}{more}"


def _read_bytes(path: Path) -> bytes:
    opener = COMPRESSIONS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            return file.read()
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(
            f"{path}: cannot decompress it ({error}); the file is damaged or cut off, or is no "
            f"{path.suffix} file. Fetch or copy it again"
        ) from None


def _decode(data: bytes, path: Path) -> str:
    try:
        # Editors on Windows put a byte order mark first, which is no part of the text.
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        start = error.start
    line = data.count(b"\n", 0, start) + 1
    place = f"{path}: byte {start} (line {line}) is not UTF-8"
    encoding = _guess_encoding(data, data.rfind(b"\n", 0, start) + 1)
    if encoding is None:
        raise ValueError(
            f"{place}: 0x{data[start]:02x}; repair that place or save the file as UTF-8"
        )
    opener = {".gz": "gzip.open", ".xz": "lzma.open"}.get(path.suffix.lower(), "open")
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    target = plain.with_name(f"{plain.stem}-utf8{plain.suffix}")
    raise ValueError(
        f"{place}; it looks like {encoding.upper()}. Convert it with these lines of Python, then "
        f"load {target}:\n"
        f"import gzip, lzma; text = {opener}({str(path)!r}, 'rt', encoding='{encoding}').read()\n"
        f"open({str(target)!r}, 'w', encoding='utf-8').write(text)"
    )


def _guess_encoding(data: bytes, line_start: int) -> str | None:
    """Tell, from a bad line on, another encoding from UTF-8 with a few bad bytes."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    sample = data[line_start : line_start + 100_000]
    as_utf8 = sample.decode("utf-8", errors="replace")
    if 2 * as_utf8.count("\ufffd") < sum(char > "\x7f" for char in as_utf8):
        return None
    # The sample may end inside a character, so the last few characters do not count. Everyday
    # Chinese lies in GB2312, the oldest part of GB18030; other encodings rarely land there.
    as_gb = sample.decode("gb18030", errors="replace")[:-4]
    foreign = "".join(char for char in as_gb if char > "\x7f")
    common = len(foreign.encode("gb2312", errors="ignore")) // 2
    return "gb18030" if foreign and common > 0.8 * len(foreign) else None


def _parse_text(content: str) -> list[str]:
    """Cut plain text at blank lines, or at every line if no line is blank."""
    content = content.replace("\r\n", "\n").strip()
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", content)]
    if len(paragraphs) == 1:
        paragraphs = content.split("\n")
    return [paragraph for paragraph in paragraphs if paragraph]


def _parse_json(content: str, path: Path, text_field: str | None) -> tuple[list, list]:
    """Tell an array from lines by the first character, and read it."""
    first = re.search(r"\S", content)
    if first is None:
        return [], []
    if first[0] == "[":
        rows = _json_array(content, path)
    elif first[0] == "{":
        rows = _json_lines(content, path)
    else:
        raise ValueError(
            f"{path}: starts with {first[0]!r}; a JSON file of documents is either one array "
            '[{"text": "..."}, ...] or one object {"text": "..."} on each line'
        )

    texts, sources = [], []
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: is a {type(row).__name__}; every document has to be an object "
                'such as {"text": "..."}'
            )
        text_field = _find_field(row, f"{path}, {place}", text_field)
        texts.append(row[text_field])
        sources.append(row.get("source"))
    return texts, sources


def _json_array(content: str, path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.rstrip().endswith("]"):
            advice = "Correct that place"
        else:
            advice = "The file seems to be cut off: it does not end in ]. Fetch or copy it again"
        raise ValueError(f"{path}: not valid JSON: {error}. {advice}") from None
    for number, row in enumerate(rows, start=1):
        yield f"document {number}", row


def _json_lines(content: str, path: Path) -> Iterator[tuple[str, object]]:
    # Not splitlines(), which also cuts at characters that may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
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


def _parse_parquet(data: bytes, path: Path, text_field: str | None) -> tuple[list, list]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        text_field = _find_field(names, str(path), text_field)
        table = file.read([name for name in names if name in (text_field, "source")])
        texts = table[text_field].to_pylist()
        sources = table["source"].to_pylist() if "source" in names else [None] * len(texts)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot read it as parquet ({error}); the file is damaged or cut off, or is "
            "something else. Fetch or write it again"
        ) from None
    return texts, sources


def _build_dataset(texts: list, sources: list | None, path: Path) -> Dataset:
    import pyarrow as pa
    import xxhash
    from datasets import Dataset

    kept_texts, kept_sources, skipped = [], [], Counter()
    content_hash = xxhash.xxh64()
    for text, source in zip(texts, sources or [None] * len(texts), strict=True):
        problem = _text_problem(text)
        if problem:
            skipped[problem] += 1
            continue
        source = path.name if source is None else str(source)
        # Names may hold halves of characters too, which no file can store.
        source = source.encode("utf-8", errors="replace").decode("utf-8")
        kept_texts.append(text)
        kept_sources.append(source)
        for value in (text.encode("utf-8"), source.encode("utf-8")):
            content_hash.update(b"%d:" % len(value))
            content_hash.update(value)

    counts = ", ".join(f"{count:,} {problem}" for problem, count in skipped.most_common())
    if not kept_texts:
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
            f"{len(texts):,}",
            counts,
        )
    logger.info("%s: %s documents", path, f"{len(kept_texts):,}")

    table = pa.table(
        {"text": pa.array(kept_texts, pa.string()), "source": pa.array(kept_sources, pa.string())}
    )
    # Without a fingerprint of our own, datasets would pickle the whole text to make one.
    return Dataset(table, fingerprint=content_hash.hexdigest())


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
    may, rarely, be missed. Spaces, punctuation and case do not count.

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
    # Proposing from a lower threshold than asked for costs comparisons, and misses fewer.
    index = MinHashLSH(threshold=0.75 * threshold, num_perm=num_perm)

    # The index holds the smaller half; the larger one passes by.
    held_out = list(_texts(split["test"]))
    shingles, rows_of_text = [], defaultdict(list)
    for row, text in enumerate(held_out):
        rows_of_text[text].append(row)
        hashes = _shingle_hashes(text, ngram)
        shingles.append(np.unique(hashes))
        if len(hashes):
            index.insert(row, _minhash(hashes, blank))

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
        for row in rows_of_text.get(text, ()):
            if row not in best or best[row].kind == "near":
                best[row] = Duplicate(row, train_row, 1.0, "exact")
        hashes = _shingle_hashes(text, ngram)
        candidates = index.query(_minhash(hashes, blank)) if len(hashes) else []
        unique = np.unique(hashes) if candidates else None
        for row in candidates:
            similarity = _jaccard(shingles[row], unique)
            if similarity >= threshold and (row not in best or similarity > best[row].similarity):
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


def _minhash(hashes: np.ndarray, blank):
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

    return np.array([len(text) for text in _texts(documents)])


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
