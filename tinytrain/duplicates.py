"""Find the held-out documents, and the single sentences, that are in the training set too.

A model is marked too kindly on texts that it has seen. Comparing all pairs would take days, so
locality-sensitive hashing proposes pairs that are probably alike, and each is then compared for
real: what is reported is true, while a near duplicate just above the threshold may, rarely, be
missed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from datasketch import MinHash

logger = logging.getLogger(__name__)

_NGRAM = 5  # characters in one of the overlapping pieces that are compared
_HASHES = 128  # of a MinHash: more miss fewer duplicates and take longer
# Texts from one template are all alike, and comparing them all would take days again: a held-out
# document is compared with so many, and with fewer once it has a near duplicate.
_COMPARISONS, _MORE_COMPARISONS = 1000, 100

# A sentence ends with one of these marks, and the closing quotes after it, or with its line.
_SENTENCE = re.compile(r"[^。！？；\n]+(?:[。！？；]+[”’」』）]*)?")


class Duplicate(NamedTuple):
    """A held-out document that is in the training set too."""

    test: int  # its row in the held-out set
    train: int  # row of its most similar document in the training set
    similarity: float  # share of the character 5-grams that they have in common, 0 to 1
    kind: str  # "exact" (the same characters) or "near"


def find_duplicates(split: DatasetDict, threshold: float = 0.8) -> list[Duplicate]:
    """Find the held-out documents that are in the training set too, exactly or nearly.

    Spaces, punctuation and case do not count. Each held-out document that has duplicates is named
    once, with its most similar one. The index takes some 500 bytes for each held-out document.

    Parameters
    ----------
    split : datasets.DatasetDict
        With ``"train"`` and ``"test"``, each with a column ``text``.
    threshold : float
        Least Jaccard similarity of a near duplicate, above 0 and at most 1.

    References
    ----------
    .. [1] A. Z. Broder, "On the resemblance and containment of documents", 1997.

    Examples
    --------
    >>> from datasets import Dataset, DatasetDict
    >>> texts = {"train": ["床前明月光", "疑是地上霜"], "test": ["疑是地上霜", "举头望明月"]}
    >>> split = DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in texts.items()})
    >>> find_duplicates(split)
    [Duplicate(test=0, train=1, similarity=1.0, kind='exact')]
    """
    import numpy as np
    from datasketch import MinHash, MinHashLSH
    from tqdm.auto import tqdm
    from xxhash import xxh128_intdigest

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it has to be above 0 and at most 1")
    empty = MinHash(_HASHES, hashfunc=int)  # the n-grams are hashed already
    # Proposing from a lower threshold than asked for costs comparisons, and misses fewer.
    bands = MinHashLSH(threshold=0.75 * threshold, num_perm=_HASHES).hashranges
    held_out, train = split["test"].select_columns("text"), split["train"]

    # The smaller set is indexed, the larger one passes by. datasketch's own index would take 6 kB
    # a document, half a gigabyte for a text of two; these sorted arrays take a twelfth of it.
    keys = np.empty((len(held_out), len(bands)), np.uint64)
    copies: dict[int, list[int]] = {}  # rows of equal texts
    for row, text in enumerate(_texts(held_out)):
        keys[row] = _band_keys(_ngram_hashes(text), empty, bands)
        copies.setdefault(xxh128_intdigest(text.encode()), []).append(row)
    order = np.argsort(keys, axis=None)
    rows, keys = order // len(bands), keys.ravel()[order]

    @lru_cache(maxsize=1000)
    def look_up(row: int) -> np.ndarray:
        return _ngram_hashes(held_out[row]["text"])

    best: dict[int, Duplicate] = {}
    left, passed_over = np.full(len(held_out), _COMPARISONS), 0
    texts = tqdm(_texts(train), "duplicates", len(train), delay=5, mininterval=1, leave=False)
    for train_row, text in enumerate(texts):
        for row in copies.pop(xxh128_intdigest(text.encode()), ()):
            best[row], left[row] = Duplicate(row, train_row, 1.0, "exact"), 0
        hashes = _ngram_hashes(text)
        wanted = _band_keys(hashes, empty, bands)
        first, end = (np.searchsorted(keys, wanted, side) for side in ("left", "right"))
        alike = np.unique(np.concatenate([rows[a:b] for a, b in zip(first, end, strict=True)]))
        for row in map(int, alike[left[alike] > 0]):
            left[row] -= 1
            similarity, old = _jaccard(look_up(row), hashes), best.get(row)
            if similarity >= threshold and (old is None or similarity > old.similarity):
                best[row] = Duplicate(row, train_row, similarity, "near")
                left[row] = min(left[row], _MORE_COMPARISONS)
        passed_over += np.count_nonzero(left[alike] == 0)
        if passed_over > len(rows):  # the index is cheaper to make smaller than to search
            kept = left[rows] > 0
            rows, keys, passed_over = rows[kept], keys[kept], 0

    exact = sum(duplicate.kind == "exact" for duplicate in best.values())
    logger.info(
        f"{len(best):,} of {len(held_out):,} held-out documents are in the training set too: "
        f"{exact:,} exactly, {len(best) - exact:,} nearly"
    )
    return [best[row] for row in sorted(best)]


def _texts(documents: Dataset) -> Iterator[str]:
    # By a hundred: row by row takes seven times as long, and books need memory.
    for batch in documents.select_columns("text").iter(batch_size=100):
        yield from batch["text"]


def _ngram_hashes(text: str) -> np.ndarray:
    """Return the hashes of a text's different n-grams, as sorted uint64."""
    import numpy as np

    letters = re.sub(r"[\W_]+", "", text).lower()
    codes = np.frombuffer(letters.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    length = min(_NGRAM, len(codes))  # a shorter text is one n-gram
    hashes = np.zeros(len(codes) - length + 1 if length else 0, dtype=np.uint64)
    for i in range(length):  # a polynomial in a large odd number, modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(hashes)]
    return np.unique(hashes)


def _band_keys(hashes: np.ndarray, empty: MinHash, bands: list[tuple[int, int]]) -> list[int]:
    """Return a hash of each band of the MinHash; similar documents probably share one of them."""
    import numpy as np
    from xxhash import xxh64_intdigest

    minhash = empty.copy()
    upper = hashes >> np.uint64(32)  # the well-mixed bits; MinHash wants 32
    for start in range(0, len(upper), 4096):  # pieces that fit the processor's cache
        minhash.update_batch(upper[start : start + 4096].tolist())
    values = minhash.hashvalues
    return [xxh64_intdigest(values[start:end].tobytes(), start) for start, end in bands]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np

    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)  # nothing but punctuation has no n-grams


def drop_duplicates(split: DatasetDict, duplicates: list[Duplicate]) -> DatasetDict:
    """Remove what `find_duplicates` found from the held-out set, and not from the training set."""
    from datasets import DatasetDict

    copies = {duplicate.test for duplicate in duplicates}
    kept = [row for row in range(len(split["test"])) if row not in copies]
    if not kept:
        raise ValueError(
            f"all {len(split['test']):,} held-out documents are in the training set too, so "
            "nothing would be left to measure with; hold out more (test_size), remove the "
            "repetitions from the text, or keep them: --set drop_duplicates=false"
        )
    logger.info(f"removed {len(copies):,} held-out documents, {len(kept):,} are left")
    return DatasetDict({"train": split["train"], "test": split["test"].select(kept)})


class SeenSentences(NamedTuple):
    """Every sentence of the held-out documents, and whether the training set has it too."""

    test: np.ndarray  # the row of its document in the held-out set
    start: np.ndarray  # its first character there
    end: np.ndarray  # the one after its last
    train: np.ndarray  # the row of the first training document that has it; -1 if none has

    def shares(self) -> tuple[float, float]:
        """Return the share of sentences that are in the training set, and of their characters."""
        seen, lengths = self.train >= 0, self.end - self.start
        if not len(seen):
            return float("nan"), float("nan")
        return float(seen.mean()), float(lengths[seen].sum() / lengths.sum())

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Return start and end of the seen sentences of one held-out document, in its order."""
        seen = (self.test == row) & (self.train >= 0)
        return list(zip(self.start[seen].tolist(), self.end[seen].tolist(), strict=True))


def find_seen_sentences(split: DatasetDict) -> SeenSentences:
    """Find the sentences of held-out documents that are in the training set too.

    Sentences are the same if they differ in white space only.
    """
    import numpy as np
    from tqdm.auto import tqdm

    train, found = split["train"], []
    for row, text in enumerate(_texts(split["test"])):
        found += [(row, *sentence) for sentence in _sentences(text)]
    first = dict.fromkeys((hash_ for *_, hash_ in found), -1)
    texts = tqdm(_texts(train), "sentences", len(train), delay=5, mininterval=1, leave=False)
    for row, text in enumerate(texts):
        for *_, hash_ in _sentences(text):
            if first.get(hash_) == -1:
                first[hash_] = row
    rows = [(row, start, end, first[hash_]) for row, start, end, hash_ in found]
    seen = SeenSentences(*np.array(rows, np.int64).reshape(-1, 4).T)
    logger.info(f"{seen.shares()[0]:.0%} of the held-out sentences are in the training set too")
    return seen


def _sentences(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and hash of each sentence of a text, without white space around it."""
    from xxhash import xxh64_intdigest

    for match in _SENTENCE.finditer(text):
        if sentence := match[0].strip():
            start = match.start() + match[0].index(sentence[0])
            hash_ = xxh64_intdigest(" ".join(sentence.split()).encode())
            yield start, start + len(sentence), hash_
