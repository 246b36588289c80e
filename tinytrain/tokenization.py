"""From text to token ids: a tokenizer of your own, and blocks of tokens to train on.

Cutting each document into full chunks (`chunk_documents`) throws away every document shorter than
a chunk; joining all of them before cutting (`pack_documents`) loses only the last, unfinished
block, at the price of blocks that hold the end of one document and the beginning of the next.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tinytrain.common import cut_text, encode_each, encode_text

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_END_OF_TEXT = "<|endoftext|>"
# The borders of a turn in a conversation. Plain text never has them: they wait for notebook 08, and
# a token that is added later would need a new row in a trained embedding.
_TURN_TOKENS = ["<|im_start|>", "<|im_end|>"]

# Chinese has no spaces, so the pre-tokenizer splits only at punctuation and digits: in a text that
# repeats itself, whole phrases would become tokens, with nothing left to predict inside them. The
# longest common words have four characters, of three bytes each.
_MAX_TOKEN_BYTES = 4 * 3

# More hardly change a small vocabulary, and each takes some 250 bytes of memory.
_MAX_TRAINING_CHARACTERS = 2_000_000

_IDS_AT_ONCE = 2**16  # that wait to be written


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair tokenizer that treats text as Qwen2.5's does.

    Parameters
    ----------
    texts : iterable of str
        The training set, in random order: two million characters are read.
    vocab_size : int
        Tokens wanted, including the 256 bytes and three that structure text: ``<|endoftext|>``
        (id 0, also for padding), ``<|im_start|>`` and ``<|im_end|>``. If the text has fewer pairs
        that occur twice, the vocabulary is smaller, which is logged.

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

    special = [_END_OF_TEXT, *_TURN_TOKENS]
    if vocab_size <= 256 + len(special):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {256 + len(special)} tokens are taken by the "
            f"bytes, {', '.join(special)}. Ask for 2,000 or more."
        )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        # A pair that occurs once would only teach the vocabulary one place of the text by heart.
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        max_token_length=_MAX_TOKEN_BYTES + 1,  # the trainer stays below it
        show_progress=False,
    )
    # An empty Qwen tokenizer brings the normalizer (NFC), the pre-tokenizer and the decoder.
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(_up_to(texts, _MAX_TRAINING_CHARACTERS), trainer)
    model = json.loads(backend.to_str())["model"]
    if not model["merges"]:
        raise ValueError(
            "The texts are empty or too few to train a tokenizer: no pair of bytes occurs twice."
        )
    if (size := len(model["vocab"])) < vocab_size:
        logger.warning(f"A vocabulary of {size} tokens, not {vocab_size}: no more pairs repeat")
    merges = [tuple(pair) for pair in model["merges"]]
    added = {"extra_special_tokens": _TURN_TOKENS, "padding_side": "left"}
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **added)


def _up_to(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """Yield texts, long ones in parts to save memory, until they have enough characters."""
    for text in texts:
        yield from (part for part, _ in cut_text(text[:max_characters]))
        max_characters -= len(text)
        if max_characters <= 0:
            return


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder: one from a hub, or one that you saved.

    Its end-of-text and padding token is ``<|endoftext|>``. (A tokenizer for conversations names
    ``<|im_end|>``, which a model trained on plain text never sees.) Code in the folder is not run.

    Raises
    ------
    FileNotFoundError
        If there is no ``tokenizer.json``, nor ``vocab.json`` and ``merges.txt``.
    ValueError
        If the files cannot be read, or the vocabulary has no ``<|endoftext|>``.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    # Checked here because transformers takes a path that does not exist for a name on the hub.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        raise FileNotFoundError(
            f"No tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt. "
            "Save one there with save_pretrained, or download it again."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the readers of transformers and tokenizers raise bare Exception
        raise ValueError(
            f"The tokenizer in {folder} is damaged ({error}): save or download it again."
        ) from error
    if _END_OF_TEXT not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer in {folder} has no {_END_OF_TEXT}, which separates the documents: "
            "take one of the Qwen family, or train one with train_tokenizer."
        )
    tokenizer.eos_token = tokenizer.pad_token = _END_OF_TEXT
    tokenizer.padding_side = "left"  # what a batch of prompts needs; training pads nothing
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of everything that decides which ids a text becomes.

    Truncation and padding, which each call sets again, do not count.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    deciding = {part: state[part] for part in parts} | {"eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def tokenize(
    element: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerFast, context_length: int
) -> dict[str, list[list[int]]]:
    """Cut each text of a batch into chunks and keep the full ones.

    Parameters
    ----------
    element : mapping of str to list of str
        A batch with the column ``text``, as from ``Dataset.map(..., batched=True)``.
    tokenizer : transformers.PreTrainedTokenizerFast
    context_length : int
        Tokens a chunk.

    Returns
    -------
    dict
        ``input_ids``: chunks of exactly ``context_length`` ids. A document's remainder is dropped,
        and so is every document that is shorter than one chunk.
    """
    # Not `tokenizer(texts, return_overflowing_tokens=True)`: a text that spells out a special token
    # would place it.
    chunks = []
    for ids in encode_text(tokenizer, element["text"]):
        chunks += [ids[i : i + context_length] for i in range(0, len(ids), context_length)]
    return {"input_ids": [ids for ids in chunks if len(ids) == context_length]}


def chunk_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    folder: str | os.PathLike | None = None,
) -> Dataset:
    """Cut every document into full chunks; takes and returns the same as `pack_documents`."""
    rows = encode_each(tokenizer, _texts(documents))
    full = (ids[: len(ids) // context_length * context_length] for ids in rows)
    return _write_blocks(full, context_length, folder)


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    folder: str | os.PathLike | None = None,
) -> Dataset:
    """Join all documents, an end-of-text token after each, and cut the whole into blocks.

    Parameters
    ----------
    documents : datasets.Dataset
        One document a row, in the column ``text``. An ``<|endoftext|>`` in it is plain characters.
    tokenizer : transformers.PreTrainedTokenizerFast
    context_length : int
        Tokens a block.
    folder : path, optional
        Where the ids are written, 4 bytes each, to be mapped into memory; by default they are held
        in memory.

    Returns
    -------
    datasets.Dataset
        Column ``input_ids``: int32 (uint16 ends at 65,535), ``context_length`` ids a row.
    """
    import numpy as np

    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    rows = encode_each(tokenizer, _texts(documents))
    return _write_blocks(chain.from_iterable((ids, end) for ids in rows), context_length, folder)


def _texts(documents: Dataset) -> Iterator[str]:
    """Yield the documents' texts one by one, with a progress bar."""
    from datasets.utils import tqdm

    texts = documents.select_columns("text")  # raises ValueError if there is no such column
    with tqdm(total=len(texts), unit=" documents", desc="Tokenizing") as progress:
        # As Arrow tables, which stay on the disk: a hundred documents may be a hundred books.
        for batch in texts.with_format("arrow").iter(batch_size=100):
            for text in batch["text"]:
                yield text.as_py()
            progress.update(len(batch))


def _write_blocks(
    rows: Iterable[np.ndarray], context_length: int, folder: str | os.PathLike | None
) -> Dataset:
    """Join arrays of ids and cut the whole into blocks, in memory or in a folder."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema({"input_ids": pa.list_(pa.int32(), context_length)})
    if folder is None:
        file = pa.BufferOutputStream()
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = pa.OSFile(str(Path(folder, "blocks.arrow")), "wb")
    with file, pa.ipc.new_stream(file, schema) as writer:
        waiting, number = [], 0
        for ids in chain(rows, [None]):  # None: there are no more
            if ids is not None:
                waiting.append(ids)
                number += len(ids)
            if waiting and (ids is None or number >= _IDS_AT_ONCE):
                ids = np.concatenate(waiting)
                whole = number // context_length * context_length
                blocks = pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), context_length)
                writer.write_batch(pa.record_batch([blocks], schema=schema))
                waiting, number = [ids[whole:]], number - whole
    if folder is None:
        return Dataset.from_buffer(file.getvalue())
    return Dataset.from_file(str(Path(folder, "blocks.arrow")))


def tokens_per_character(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Return how many tokens a character of the texts costs, without end-of-text tokens.

    Take texts that the tokenizer was not trained on.
    """
    if not (characters := sum(map(len, texts))):
        raise ValueError("The texts hold no characters: pass some text to measure on.")
    return sum(map(len, encode_each(tokenizer, texts))) / characters


def show_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, int]]:
    """Return the tokens of a short text for reading, each with its id, of a byte-level tokenizer.

    A byte that is only a part of a character is shown as ``<0xE4>``.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    added, shown = tokenizer.added_tokens_decoder, []
    [ids] = encode_text(tokenizer, [text])
    for id_, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if id_ in added:
            piece = added[id_].content
        else:  # a byte that fits nowhere becomes U+DC00 plus the byte
            piece = bytes(byte_of[char] for char in token).decode(errors="surrogateescape")
        piece = re.sub("[\udc80-\udcff]", lambda char: f"<0x{ord(char[0]) - 0xDC00:02X}>", piece)
        shown.append((piece, id_))
    return shown


def colour_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return the tokens of a text as HTML, on alternating colours, each with its id below.

    Show it with ``IPython.display.HTML``. What is invisible is shown as Python writes it.
    """
    shown = []
    for number, (piece, id_) in enumerate(show_tokens(tokenizer, text)):
        style = f"background:{_TOKEN_COLORS[number % len(_TOKEN_COLORS)]};{_TOKEN_STYLE}"
        visible = html.escape(repr(piece)[1:-1].replace(" ", "·"))
        below = f'<small style="display:block">{id_}</small>'
        shown.append(f'<span style="{style}">{visible}{below}</span>')
    return f"<div>{''.join(shown)}</div>"


_TOKEN_COLORS = ("#bcd9f5", "#f9dcb0", "#c6e9c4", "#f3c9d6")
_TOKEN_STYLE = (  # with a colour of its own for the text, to be readable on a dark page
    "color:#111;display:inline-block;margin:1px;padding:1px 4px;border-radius:3px;"
    "text-align:center;line-height:1.35;white-space:nowrap"
)
