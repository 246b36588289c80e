"""How well a model predicts text, how sure that number is, and what to compare it with.

Losses are measured document by document, not on packed blocks as in training: so they can be
compared with those of any other model, whatever its tokenizer, and documents can be resampled to
tell how sure a number is.
"""

from __future__ import annotations

import html
import itertools
import lzma
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tinytrain.common import encode_each, evaluating, new_axes, plot_label, text_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST_COUNTED_TOKENS = 20_000_000  # bounds the memory (16 bytes a token) and time of counting
_MOST_COMPRESSED_CHARACTERS = 2_000_000  # bounds the time of xz: a minute on a slow core


def bits_per_character(loss: float, tokens_per_character: float) -> float:
    """Turn a loss in nats per token into bits per character, comparable across tokenizers.

    A tokenizer with longer tokens makes fewer but harder predictions; per character both count the
    same.

    >>> round(bits_per_character(4.0, 0.5), 2)
    2.89
    """
    return loss * tokens_per_character / math.log(2)


class Interval(NamedTuple):
    """A measured value, and the range that holds it in 95 of 100 samples like this one."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show three digits, as ``0.7 (0.662 to 0.744)``, and no exponents."""
        value, low, high = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in self)
        return f"{value} ({low} to {high})"


def share(right: int, total: int) -> Interval:
    """Return the share of right answers with its Wilson confidence interval (nan without answers).

    >>> print(share(9, 10))
    0.9 (0.596 to 0.982)
    """
    from scipy.stats import binomtest

    if not total:
        return Interval(math.nan, math.nan, math.nan)
    low, high = binomtest(right, total).proportion_ci(method="wilson")
    return Interval(right / total, float(low), float(high))


def by_kind(questions: Sequence[tuple[str, ...]], right: Sequence[bool]) -> dict[str, Interval]:
    """Return the share of right answers to each kind of question, the fourth field, as they come.

    See `tinytrain.encyclopedia.Question` for what "told", "reworded" and "reversed" mean.
    """
    marks: dict[str, list[bool]] = defaultdict(list)
    for question, mark in zip(questions, right, strict=True):
        marks[question[3]].append(mark)
    return {kind: share(sum(some), len(some)) for kind, some in marks.items()}


class DocumentLoss(NamedTuple):
    """What predicting one document cost."""

    characters: int
    tokens: int
    nats: float  # cross entropy, summed over the tokens
    right: int  # tokens that were the first guess


def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    context_length: int = 512,
) -> list[DocumentLoss]:
    """Measure what each document costs a model, each token given those before it.

    The model may be any causal language model of transformers, with its fast tokenizer. It looks at
    ``context_length`` tokens: a longer document is read in windows that overlap by half, so that
    every token but the first ones has at least half a window before it. The end-of-text token is
    not counted: another model may have none.
    """
    texts = list(texts)
    losses = _losses_of_rows(model, list(_rows(tokenizer, texts)), context_length)
    return [
        DocumentLoss(len(text), len(nats), float(nats.sum()), int(right.sum()))
        for text, (nats, right) in zip(texts, losses, strict=True)
    ]


def split_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    context_length: int = 512,
) -> tuple[list[DocumentLoss], list[DocumentLoss]]:
    """Measure what some spans of each document cost a model that reads the whole, and the rest.

    ``spans`` holds, for each text, first and behind the last character of its spans. A token counts
    where its last character is. For the rest see `document_losses`.
    """
    encoder, start = text_encoder(tokenizer), _start(tokenizer)
    encoded = [encoder.encode(text, add_special_tokens=False) for text in texts]
    rows = [np.array([start, *encoding.ids]) for encoding in encoded]
    losses = _losses_of_rows(model, rows, context_length)
    inside, outside = [], []
    for text, marked, encoding, (nats, right) in zip(texts, spans, encoded, losses, strict=True):
        last = np.array([end for _, end in encoding.offsets], dtype=int) - 1
        within = np.zeros(len(text), dtype=bool)
        for begin, end in marked:
            within[begin:end] = True
        for part, mask in ((inside, within), (outside, ~within)):
            some = mask[last]
            sums = int(some.sum()), float(nats[some].sum()), int(right[some].sum())
            part.append(DocumentLoss(int(mask.sum()), *sums))
    return inside, outside


def token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int = 512,
    before: str | None = None,
) -> list[tuple[str, float]]:
    """Cut a text into its tokens, and return each with the nats it cost the model.

    The pieces make up the text; tokens that are parts of one character are one piece. ``before``
    is a document that the model reads first, as in a packed block; see also `document_losses`.
    """
    encoding = text_encoder(tokenizer).encode(text, add_special_tokens=False)
    first = _rows(tokenizer, [] if before is None else [before])
    row = np.concatenate([*first, [_start(tokenizer)], encoding.ids]).astype(np.int64)
    [(nats, _)] = _losses_of_rows(model, [row], context_length)
    nats = nats[len(nats) - len(encoding.ids) :]
    pieces, done = [], 0
    for (_, end), loss in zip(encoding.offsets, nats.tolist(), strict=True):
        if end > done or not pieces:
            pieces.append((text[done:end], loss))
            done = end
        else:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + loss)
    return pieces


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that a document begins after."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _rows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of each text, after the token that a document begins after."""
    for ids in encode_each(tokenizer, texts):
        yield np.append(np.int64(_start(tokenizer)), ids)


def _windows(length: int, context_length: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each window, and the first of its tokens not predicted before."""
    stride = max(1, context_length // 2)
    known = 1
    for begin in range(0, max(0, length - context_length) + stride, stride):
        end = min(begin + context_length, length)
        if known < end:
            yield begin, end, known
        known = end


def _losses_of_rows(
    model: PreTrainedModel, rows: list[np.ndarray], context_length: int
) -> list[np.ndarray]:
    """Return of each row nats and hits (1 or 0) of its tokens but the first: (2, len(row) - 1)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    losses = [np.zeros((2, len(row) - 1)) for row in rows]
    windows = sorted(  # similar lengths side by side: little padding
        (end - begin, number, begin, end, first)
        for number, row in enumerate(rows)
        for begin, end, first in _windows(len(row), context_length)
    )
    # The logits are by far the largest thing: at most 1 GB of them at a time, and on a processor
    # 32 MB, which stay in its cache.
    most = 2**23 if model.device.type == "cpu" else 2**28
    positions = max(1, most // model.config.get_text_config().vocab_size)
    while windows:
        size = min(len(windows), max(1, positions // windows[-1][0]), 64)
        batch = windows[-size:]
        del windows[-size:]
        # Padding goes on the right, where no token of a causal model can see it.
        ids = [torch.from_numpy(rows[number][begin:end]) for _, number, begin, end, _ in batch]
        ids = pad_sequence(ids, batch_first=True).to(model.device)
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            targets = ids[:, 1:]
            nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
            hits = logits.argmax(-1) == targets.flatten()
        found = torch.stack([nats, hits.float()]).unflatten(1, targets.shape).cpu().numpy()
        for line, (_, number, begin, end, first) in enumerate(batch):
            new = slice(first - 1 - begin, end - 1 - begin)
            losses[number][:, first - 1 : end - 1] = found[:, line, new]
    return losses


class Measures(NamedTuple):
    """What a set of documents cost, in numbers that can be compared."""

    bits_per_character: Interval
    perplexity: Interval
    accuracy: Interval
    documents: int
    characters: int
    tokens: int


def summarize(documents: Sequence[DocumentLoss]) -> Measures:
    """Turn what single documents cost into bits per character, perplexity and accuracy.

    Perplexity is e to the mean nats of a token; accuracy is the share of tokens that were the first
    guess. The intervals come from the bootstrap: documents (tokens of one document resemble each
    other) are drawn with replacement, a thousand times, and the middle 95% of results are kept
    (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
    """
    from scipy.stats import bootstrap

    columns = np.array([row for row in documents if row.tokens], dtype=float).reshape(-1, 4).T
    if not columns.size:
        raise ValueError("there is nothing to measure: no document has a token")
    values = low = high = _ratios(*columns)
    if columns.shape[1] > 1:  # scipy does not resample a single document
        low, high = bootstrap(
            tuple(columns),
            _ratios,
            n_resamples=1000,
            batch=20,  # all resamples at once would be gigabytes
            paired=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    intervals = [Interval(*row) for row in np.stack([values, low, high], axis=-1).tolist()]
    characters, tokens, _, _ = columns.sum(axis=1)
    return Measures(*intervals, len(documents), int(characters), int(tokens))


def _ratios(
    characters: np.ndarray, tokens: np.ndarray, nats: np.ndarray, right: np.ndarray, axis: int = -1
) -> np.ndarray:
    """Return bits per character, perplexity and accuracy: ratios of sums over the documents."""
    characters, tokens, nats, right = (x.sum(axis) for x in (characters, tokens, nats, right))
    return np.stack([nats / characters / math.log(2), np.exp(nats / tokens), right / tokens])


def compare(losses_a: Sequence[DocumentLoss], losses_b: Sequence[DocumentLoss]) -> Interval:
    """Return how many more bits per character model a needs than model b for the same documents.

    Where the interval does not contain 0, the two can be told apart, even if the intervals of
    `summarize` overlap: each resample holds the same documents for both (the paired bootstrap:
    Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004). The
    tokenizers may differ; other documents are a ValueError.

    >>> a, b = DocumentLoss(10, 5, 9.0, 2), DocumentLoss(10, 5, 7.0, 3)
    >>> round(compare([a], [b]).value, 3)
    0.289
    """
    lengths_a, lengths_b = ([row.characters for row in rows] for rows in (losses_a, losses_b))
    if lengths_a != lengths_b:
        raise ValueError("the losses are not of the same documents: their characters differ")
    pairs = zip(losses_a, losses_b, strict=True)
    rows = [DocumentLoss(a.characters, a.characters, a.nats - b.nats, 0) for a, b in pairs]
    return summarize(rows).bits_per_character


def count_losses(
    tokenizer: PreTrainedTokenizerBase,
    train_texts: Iterable[str],
    texts: Iterable[str],
    order: int = 2,
) -> list[DocumentLoss]:
    """Measure what documents cost a model that only counts tokens, or pairs of tokens.

    It counts in ``train_texts``, up to 20 million tokens, and predicts ``texts``. With ``order=1``
    a token's probability is its share of the training text (one is added to each count). With
    ``order=2`` it is how often it followed the token before, mixed with the former by Witten and
    Bell's rule ("The zero-frequency problem", IEEE Trans. on Information Theory 37, 1991): the more
    different followers a token has had, the likelier is a new one.
    """
    vocab_size = len(tokenizer)
    # A pair of neighbours is one number: ``first * vocab_size + second``.
    found, room = [np.zeros(0, dtype=np.int64)], _MOST_COUNTED_TOKENS
    for row in _rows(tokenizer, train_texts):
        found.append((row[:-1] * vocab_size + row[1:])[:room])
        room -= len(found[-1])
        if not room:
            break
    pairs = np.concatenate(found)
    unigram = np.bincount(pairs % vocab_size, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    if order == 1:
        pairs = pairs[:0]  # without pairs, single tokens are all there is
    seen, counts = np.unique(pairs, return_counts=True)
    first, second = np.divmod(seen, vocab_size)
    occurrences = np.bincount(first, weights=counts, minlength=vocab_size)
    followers = np.bincount(first, minlength=vocab_size)

    # The first guess: the likeliest token of all, unless one is likelier after the token before.
    guess = np.full(vocab_size, unigram.argmax())
    mixed = counts + followers[first] * unigram[second]
    best = np.lexsort((mixed, first))
    best = best[mixed[best] > followers[first[best]] * unigram.max()]
    guess[first[best]] = second[best]  # of several followers, the last and likeliest

    seen, counts = np.append(seen, vocab_size**2), np.append(counts, 0)  # every search ends here
    losses = []
    for text in texts:
        [row] = _rows(tokenizer, [text])
        previous, ids = row[:-1], row[1:]
        pair = previous * vocab_size + ids
        place = np.searchsorted(seen, pair)
        together = np.where(seen[place] == pair, counts[place], 0)
        total = occurrences[previous] + followers[previous]
        probability = (together + followers[previous] * unigram[ids]) / np.maximum(total, 1)
        probability = np.where(total > 0, probability, unigram[ids])
        right = int((guess[previous] == ids).sum())
        losses.append(DocumentLoss(len(text), len(ids), float(-np.log(probability).sum()), right))
    return losses


def xz_bits_per_character(texts: Iterable[str], train_texts: Iterable[str] = ()) -> float:
    """Return the bits that ``xz -9e`` spends on a character after it has seen the training text.

    A compressor is a language model that knows repetitions, and nothing else. Of either text, the
    first two million characters are used.
    """
    text, seen = (
        "".join(itertools.islice(itertools.chain.from_iterable(some), _MOST_COMPRESSED_CHARACTERS))
        for some in (texts, train_texts)
    )
    if not text:
        raise ValueError("there is nothing to compress: the texts are empty")

    def size(text: str) -> int:
        return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(seen + text) - (size(seen) if seen else 0)) / len(text)


def plot_comparison(bars: Mapping[str, Interval | float], highlight: str | None = None) -> Figure:
    """Draw one bar a name, from top to bottom, with its confidence interval if it has one.

    Where one name is to ``highlight``, the bars of the others are grey.
    """
    figure, axes = new_axes(8, 0.6 + 0.42 * len(bars))
    axes.grid(visible=False)
    for name, bar in bars.items():
        value, low, high = bar if isinstance(bar, Interval) else (bar, bar, bar)
        error = [[value - low], [high - value]] if low < high else None
        color = "tab:blue" if highlight in (None, name) else "silver"
        drawn = axes.barh(plot_label(name), value, xerr=error, color=color, height=0.6, capsize=3)
        axes.bar_label(drawn, fmt="%.2f", padding=6)
    axes.invert_yaxis()
    axes.set_xlabel("bits per character of unseen text (less is better)")
    axes.margins(x=0.12)
    return figure


def colour_losses(pieces: Iterable[tuple[str, float]]) -> str:
    """Write the pieces of `token_losses` as HTML, the redder the more they surprised the model."""
    spans = []
    for piece, nats in pieces:
        others = round(255 - 190 * min(max(nats / 8, 0), 1))  # 8 nats are all red
        title = f"{nats:.2f} nats, probability {math.exp(-nats):.1%}"
        # Its own text colour: a dark theme would write white on pink.
        style = f"background:rgb(255,{others},{others});color:#000"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(piece)}</span>')
    return f'<div style="line-height:1.9;white-space:pre-wrap">{"".join(spans)}</div>'
