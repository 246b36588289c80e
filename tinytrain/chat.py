"""Conversations: the template, the mask, rows to train on, and talking.

A model that continues text learns to answer from conversations, written in Qwen's format (ChatML),
and only from what the assistant says in them. That includes the ``<|im_end|>`` that ends its turn:
a model that has not learned it writes for ever.
"""

from __future__ import annotations

import copy
import html
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinytrain.common import context_of, continue_rows, encode_each, encode_text, safe_text, sample

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]  # turns, each with its "role" and its "content"

_START, _END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_IGNORED_LABEL = -100  # as everywhere in PyTorch

# Qwen's template, without its default system turn: a model learns from the turns that are there.
# What the assistant writes is between `generation` and `endgeneration`: not the line end before,
# which is part of the prompt, nor the one after, when it has stopped.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def add_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with `CHAT_TEMPLATE`, whatever template it had.

    Its padding is ``<|endoftext|>``, not the ``<|im_end|>`` that ends an answer: what hides the
    padding from the loss would hide the end of the answer too. A tokenizer without such tokens is
    a ValueError: a new one would need a row in a trained embedding.
    """
    tokenizer = copy.deepcopy(tokenizer)
    added = tokenizer.get_added_vocab()
    if missing := [token for token in (_START, _END, _END_OF_TEXT) if token not in added]:
        raise ValueError(
            f"the tokenizer has no token {' and no '.join(missing)}: take one from train_tokenizer "
            "or of the Qwen family, and a model that was trained with it"
        )
    tokenizer.chat_template, tokenizer.pad_token = CHAT_TEMPLATE, _END_OF_TEXT
    return tokenizer


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, context_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a conversation, and labels that count where the assistant speaks.

    They are those of ``apply_chat_template(messages, return_assistant_tokens_mask=True)``, but each
    content is tokenized by itself, so that an ``<|im_end|>`` that a user typed stays text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        From `add_chat_template`.
    messages : sequence of mapping
        Turns with ``role`` (system, user, assistant) and ``content``.
    context_length : int, optional
        A longer conversation loses its oldest turns, but not a system turn at its beginning; the
        rest begins with a user's turn. If not even the last of them fits, nothing is left.

    Returns
    -------
    ids, labels : list of int
        The labels are the ids themselves, or -100 where nothing is learned; models shift them.

    Examples
    --------
    >>> messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    >>> ids, labels = encode_conversation(tokenizer, messages)  # doctest: +SKIP
    >>> tokenizer.decode([label for label in labels if label != -100])  # doctest: +SKIP
    '你好！<|im_end|>'
    """
    [(ids, labels, _)] = _encode(tokenizer, [messages], context_length or math.inf)
    return ids, labels


def _encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], room: float
) -> Iterator[tuple[list[int], list[int], list[Mapping[str, str]]]]:
    """Yield the ids and labels of each conversation, and the turns that fit into so many tokens."""
    start, end = tokenizer.convert_tokens_to_ids([_START, _END])
    turns = itertools.chain.from_iterable(conversations)
    texts = itertools.chain.from_iterable((f"{m['role']}\n", m["content"], "\n") for m in turns)
    # Not by `sanitize_control_tokens` of newer transformers, which gives no mask.
    found = encode_each(tokenizer, texts)  # all in one go: that is much faster
    for messages in conversations:
        ids, labels = [], []  # of each turn
        for message in messages:
            header, said, line_end = (next(found).tolist() for _ in range(3))
            ids.append([start, *header, *said, end, *line_end])
            labels.append([_IGNORED_LABEL] * len(ids[-1]))
            if message["role"] == "assistant":
                labels[-1][1 + len(header) : -len(line_end)] = [*said, end]
        kept = _kept(messages, list(map(len, ids)), room)
        joined = (list(itertools.chain(*(each[n] for n in kept))) for each in (ids, labels))
        yield *joined, [messages[n] for n in kept]


def _kept(messages: Messages, lengths: Sequence[int], room: float) -> list[int]:
    """Return the numbers of the turns that fit, as `encode_conversation` says."""
    roles = [message["role"] for message in messages]
    first = int(roles[:1] == ["system"])
    starts = [n for n, role in enumerate(roles) if n == first or (n > first and role == "user")]
    for start in starts:
        kept = [*range(first), *range(start, len(roles))]
        if sum(lengths[n] for n in kept) <= room:
            return kept
    return []


def chat_rows(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> Dataset:
    """Return conversations as rows to train on, and log how many are cut or left out.

    The columns ``input_ids`` and ``labels`` are int32, as of `encode_conversation`. A conversation
    without an answer, or whose last turns alone do not fit, is left out: no row is without labels.
    """
    import numpy as np
    from datasets import Dataset

    rows, cut = {"input_ids": [], "labels": []}, 0
    encoded = _encode(tokenizer, conversations, context_length)
    for messages, (ids, labels, kept) in zip(conversations, encoded, strict=True):
        if any(label != _IGNORED_LABEL for label in labels):
            rows["input_ids"].append(np.array(ids, dtype=np.int32))
            rows["labels"].append(np.array(labels, dtype=np.int32))
            cut += len(kept) < len(messages)
    left_out = len(conversations) - len(rows["labels"])
    if cut or left_out:
        logger.warning(
            f"Of {len(conversations)} conversations, {cut} lose their oldest turns to fit into "
            f"{context_length} tokens; {left_out} are left out, whose last turns alone do not fit "
            "or that have no answer"
        )
    return Dataset.from_dict(rows)


def pack_conversations(rows: Dataset, context_length: int, pad_token_id: int) -> Dataset:
    """Put several conversations into each row, so that little of a batch is padding.

    Takes what `chat_rows` returns for the same context, and adds ``position_ids``, which start over
    with each conversation. From that, transformers (eager and SDPA attention) knows where one
    begins, and masks those before it: the loss is as if each had its own row.
    """
    import numpy as np
    from datasets import Dataset

    empty = [[pad_token_id] * context_length, [_IGNORED_LABEL] * context_length]
    empty = np.array([*empty, range(context_length)], dtype=np.int32)
    packed, used = [], context_length
    for row in rows:
        length = len(row["input_ids"])
        if used + length > context_length:
            packed.append(empty.copy())
            used = 0
        packed[-1][:, used : used + length] = row["input_ids"], row["labels"], range(length)
        used += length
        packed[-1][2, used:] = range(context_length - used)
    ids, labels, positions = np.stack(packed, axis=1)
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "position_ids": positions})


def colour_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Return a conversation as HTML: green where the model learns to write it, grey elsewhere.

    Show it with ``IPython.display.HTML``; the conversation's text is escaped.
    """
    ids, labels = encode_conversation(tokenizer, messages)
    pairs = zip(ids, labels, strict=True)
    spans = []
    for learned, part in itertools.groupby(pairs, lambda pair: pair[1] != _IGNORED_LABEL):
        style = "background:#c6e9c4;color:#111" if learned else "color:#888"
        text = html.escape(safe_text(tokenizer.decode([id_ for id_, _ in part])))
        spans.append(f'<span style="{style}">{text}</span>')
    return f'<div style="white-space:pre-wrap">{"".join(spans)}</div>'


def answer_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int = 40,
) -> list[str]:
    """Return the likeliest answer to each question, asked by itself in a new conversation."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    room = context_of(model) - 1
    prompt, stops = _prompt(tokenizer)
    rows = [ids + prompt for ids, _, _ in _encode(tokenizer, asked, room - len(prompt))]
    return continue_rows(model, tokenizer, rows, stops, max_new_tokens)


def _prompt(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens after which the assistant speaks, and those that end what it says."""
    start, *stops = tokenizer.convert_tokens_to_ids([_START, _END, _END_OF_TEXT])
    return [start, *encode_text(tokenizer, ["assistant\n"])[0]], stops


class Chat:
    """A conversation with a model.

    Parameters
    ----------
    model, tokenizer
        A causal language model that was tuned on conversations, and its tokenizer.
    system : str, optional
        A system turn to begin with.

    Attributes
    ----------
    messages : list of dict
        The turns so far, without those that were dropped.
    dropped : int
        How many of the oldest turns were dropped for the last answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, system: str | None = None):
        self.model, self.tokenizer = model, tokenizer
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.messages, self.dropped = [*self._beginning], 0

    def reply(
        self,
        text: str,
        on_text: Callable[[str], None] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> str:
        """Return the model's answer, and add both turns to the conversation.

        Ctrl-C ends the answer too: what was written until then counts, and if nothing was, the
        question is forgotten. Turns that no longer fit the context are dropped, which is logged.
        The other parameters are those of `tinytrain.common.sample`.

        Raises
        ------
        ValueError
            If the text is empty or alone too long, or a sampling parameter is out of its range; the
            conversation stays as it was.
        """
        if not text.strip():
            raise ValueError("the message is empty: write something to answer")
        asked = [*self.messages, {"role": "user", "content": text}]
        (header, stops), context = _prompt(self.tokenizer), context_of(self.model)
        room = context - min(max_new_tokens, context // 4) - len(header)
        [(ids, _, kept)] = _encode(self.tokenizer, [asked], room)
        if not kept:
            raise ValueError(f"the message is too long: {room} tokens fit, a system turn included")
        self.dropped = len(asked) - len(kept)
        if self.dropped:
            logger.warning(
                f"The conversation is longer than {context} tokens: its {self.dropped} oldest "
                "turns are dropped"
            )
        pieces: list[str] = []

        def on_piece(piece: str) -> None:
            pieces.append(piece)
            if on_text:
                on_text(piece)

        sampling |= {"temperature": temperature, "on_text": on_piece}
        try:
            sample(self.model, self.tokenizer, ids + header, stops, max_new_tokens, **sampling)
        except KeyboardInterrupt:
            if not pieces:
                return ""
        answer = "".join(pieces)
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        return answer
