"""What a trained model knows: its loss on unseen text, what it writes, and questions with answers.

A loss is honest but says little to a reader; a completion says much but proves little. A few
hundred questions with one right answer sit in between: they count what the model has learned.

Losses are measured document by document here, not on packed blocks as in training: every document
stands alone, begins after an end-of-text token, and counts all its characters. So the numbers can
be compared with those of any other model, whatever its tokenizer, and documents can be resampled
to tell how sure a number is.
"""

from __future__ import annotations

import html
import itertools
import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    batch_size: int = 64,
) -> list[str]:
    """Let the model continue each prompt, always with the word it finds most likely (greedy).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer; the model stops at the end-of-text token.
    prompts : sequence of str
        Beginnings, none of them empty.
    max_new_tokens : int
        Where to stop if the model does not.
    batch_size : int
        Prompts that are continued at once.

    Returns
    -------
    list of str
        The continuations, without the prompts.

    Raises
    ------
    ValueError
        If a prompt is empty.
    """
    import torch

    if not all(prompts):
        raise ValueError("a prompt is empty: the model needs at least one character to go on from")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    # Shortest first: a batch then holds prompts of similar length, and little padding.
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    continuations = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[index]) for index in chosen)
        # Padding stands on the left, so that every prompt ends where its continuation begins.
        padded = [[tokenizer.eos_token_id] * (width - len(ids[i])) + ids[i] for i in chosen]
        mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen]
        with _evaluating(model):
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            continuations[index] = text
    return continuations


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout and gradients off, and leave the model's mode as it was, whatever happens."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Answer(NamedTuple):
    """One question, what was expected, and what the model wrote."""

    prompt: str
    expected: str
    written: str

    @property
    def right(self) -> bool:
        """Whether the model's text begins with the expected answer."""
        return self.written.startswith(self.expected)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
) -> list[Answer]:
    """Let the model complete cloze questions such as ``("法国的首都是", "巴黎")``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    questions : sequence of tuple
        Each begins with the prompt and the expected answer.

    Returns
    -------
    list of Answer
        In the order of the questions; ``answer.right`` tells whether the completion begins with
        what was expected.
    """
    prompts = [question[0] for question in questions]
    expected = [question[1] for question in questions]
    longest = max((len(tokenizer(answer)["input_ids"]) for answer in expected), default=0)
    # Two tokens more than the longest answer: the model may cut the same characters differently.
    written = complete(model, tokenizer, prompts, max_new_tokens=longest + 2)
    return [Answer(*row) for row in zip(prompts, expected, written, strict=True)]


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of right answers, between 0 and 1 (nan if there are none)."""
    return sum(answer.right for answer in answers) / len(answers) if answers else math.nan


def bits_per_character(loss: float, tokens_per_character: float) -> float:
    """Turn a loss into bits per character, which can be compared across tokenizers.

    A tokenizer with longer words makes fewer but harder predictions, so its loss per token is
    higher for the same knowledge. Per character both count the same.

    Parameters
    ----------
    loss : float
        Cross entropy in nats per token.
    tokens_per_character : float
        Tokens spent on a character of the same text.

    Returns
    -------
    float
        Bits per character.

    Examples
    --------
    >>> round(bits_per_character(4.0, 0.5), 2)
    2.89
    """
    return loss * tokens_per_character / math.log(2)


class Interval(NamedTuple):
    """A measured number, and where it would lie in 95 of 100 samples like this one."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show three digits, as ``0.7 (0.662 to 0.744)``, and no exponents."""
        value, low, high = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in self)
        return f"{value} ({low} to {high})"


def share(right: int, total: int) -> Interval:
    """Return the share of right answers with its confidence interval, by Wilson's formula.

    Parameters
    ----------
    right, total : int
        Answers that were right, and all answers.

    Returns
    -------
    Interval
        Between 0 and 1; nan if there are no answers.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Examples
    --------
    >>> print(share(9, 10))
    0.9 (0.596 to 0.982)
    """
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    z = 1.96  # standard deviations on either side that hold 95% of a normal distribution
    p, weight = right / total, z * z / total
    middle = (p + weight / 2) / (1 + weight)
    half = z * math.sqrt(p * (1 - p) / total + weight / (4 * total)) / (1 + weight)
    # Rounding must not move an end past the share itself, where all or none are right.
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def by_domain(
    questions: Sequence[tuple[str, str, str]], answers: Sequence[Answer]
) -> dict[str, Interval]:
    """Return the share of right answers in each domain, the best known first.

    Parameters
    ----------
    questions : sequence of tuple
        Prompt, expected answer and domain.
    answers : sequence of Answer
        What `answer_questions` returned for them.

    Returns
    -------
    dict of str to Interval
    """
    counts: dict[str, list[bool]] = defaultdict(list)
    for (_, _, domain), answer in zip(questions, answers, strict=True):
        counts[domain].append(answer.right)
    shares = {domain: share(sum(rights), len(rights)) for domain, rights in counts.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1].value))


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

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any causal language model; it computes in the format that its weights have.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer, a fast one.
    texts : iterable of str
        Documents.
    context_length : int
        Tokens that the model may look at. A longer document is read in windows that overlap by
        half, so that every token but the first ones has at least half a window before it.

    Returns
    -------
    list of DocumentLoss
        One a document, in the same order. The end-of-text token is not counted: another model
        may have none.
    """
    texts = list(texts)
    rows = [
        [_start(tokenizer), *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ] if texts else []  # fmt: skip
    scores = _token_scores(model, rows, context_length)
    return [
        DocumentLoss(len(text), len(nats), float(nats.sum()), int(right.sum()))
        for text, (nats, right) in zip(texts, scores, strict=True)
    ]


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a document begins after."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _windows(length: int, context_length: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each window, and the first of its tokens not predicted before."""
    stride = max(1, context_length // 2)
    known = 1
    for begin in itertools.count(step=stride):
        end = min(begin + context_length, length)
        if known < end:
            yield begin, end, known
        known = end
        if end >= length:
            return


def _token_scores(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], context_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each row, nats and hit or miss of all tokens but the first."""
    import torch

    scores = [(np.zeros(len(row) - 1), np.zeros(len(row) - 1, dtype=bool)) for row in rows]
    windows = [
        (number, *window)
        for number, row in enumerate(rows)
        for window in _windows(len(row), context_length)
    ]
    windows.sort(key=lambda window: window[2] - window[1])  # similar lengths: little padding
    # The scores of all words at all positions are by far the largest thing: at most 1 GB of them.
    positions = max(1, 2**28 // model.config.get_text_config().vocab_size)
    while windows:
        width = windows[-1][2] - windows[-1][1]
        size = min(len(windows), max(1, positions // width), 64)
        batch, windows = windows[-size:], windows[:-size]
        ids = torch.zeros(size, width, dtype=torch.long)
        # Padding stands on the right, where no token of a causal model can see it.
        for line, (number, begin, end, _) in enumerate(batch):
            ids[line, : end - begin] = torch.tensor(rows[number][begin:end])
        ids = ids.to(model.device)
        with _evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            hits = logits.argmax(-1) == ids[:, 1:]
        nats, hits = nats.cpu().numpy(), hits.cpu().numpy()
        for line, (number, begin, end, first) in enumerate(batch):
            new = slice(first - 1, end - 1)
            seen = slice(first - 1 - begin, end - 1 - begin)
            scores[number][0][new], scores[number][1][new] = nats[line, seen], hits[line, seen]
    return scores


class Measures(NamedTuple):
    """What a set of documents cost, in numbers that can be compared."""

    bits_per_character: Interval
    perplexity: Interval
    accuracy: Interval
    documents: int
    characters: int
    tokens: int


def summarize(documents: Sequence[DocumentLoss], resamples: int = 1000, seed: int = 0) -> Measures:
    """Turn what single documents cost into bits per character, perplexity and accuracy.

    The intervals come from the bootstrap: documents are drawn anew with replacement, a thousand
    times, and the middle 95% of the results are kept. Tokens of one document resemble each other,
    so that drawing tokens instead would promise too much.

    Parameters
    ----------
    documents : sequence of DocumentLoss
        From `document_losses` or `count_losses`.
    resamples : int
        How often to draw.
    seed : int
        Decides the draws.

    Returns
    -------
    Measures
        Perplexity is e to the mean nats of a token and depends on the tokenizer; accuracy is the
        share of tokens that were the first guess.

    Raises
    ------
    ValueError
        If there is no document with a token.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    table = np.array(documents, dtype=float).reshape(-1, 4)
    if not table[:, 1].sum():
        raise ValueError("there is nothing to measure: no document has a token")
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(table), size=len(table)) for _ in range(resamples))
    sums = np.array([table.sum(axis=0), *(table[draw].sum(axis=0) for draw in draws)])
    characters, tokens, nats, right = sums.T

    def interval(values: np.ndarray) -> Interval:
        return Interval(float(values[0]), *map(float, np.nanpercentile(values[1:], [2.5, 97.5])))

    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of empty documents alone
        return Measures(
            interval(nats / characters / math.log(2)),
            interval(np.exp(nats / tokens)),
            interval(right / tokens),
            len(table),
            int(characters[0]),
            int(tokens[0]),
        )


def by_length(documents: Sequence[DocumentLoss], parts: int = 4) -> dict[str, Measures]:
    """Measure short and long documents apart, in groups of about equally many documents.

    Parameters
    ----------
    documents : sequence of DocumentLoss
        From `document_losses`.
    parts : int
        Number of groups; fewer are returned if many documents have the same length.

    Returns
    -------
    dict of str to Measures
        From the shortest to the longest; a key such as ``"120 to 260 characters"``.
    """
    lengths = np.array([document.characters for document in documents])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, parts + 1)))
    groups = np.searchsorted(edges[1:-1], lengths, side="right")
    found = {}
    for group in np.unique(groups):
        chosen = [documents[index] for index in np.flatnonzero(groups == group)]
        sizes = [document.characters for document in chosen]
        found[f"{min(sizes):,} to {max(sizes):,} characters"] = summarize(chosen)
    return found


def count_losses(
    tokenizer: PreTrainedTokenizerBase,
    train_texts: Iterable[str],
    texts: Iterable[str],
    order: int = 2,
    max_tokens: int = 20_000_000,
) -> list[DocumentLoss]:
    """Measure what documents cost someone who has only counted words, or pairs of words.

    A model worth its training must do better. With ``order=1`` a token's probability is its share
    of the training text (one is added to each count, so that none is 0); with ``order=2`` it is
    how often it followed the token before, mixed with the former by Witten and Bell's rule: the
    more different followers a token has had, the likelier is a new one.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A fast tokenizer.
    train_texts : iterable of str
        What to count in.
    texts : iterable of str
        What to predict.
    order : {1, 2}
        Single tokens, or pairs.
    max_tokens : int
        Count in no more than so many tokens, which bounds memory (16 bytes a token) and time.

    Returns
    -------
    list of DocumentLoss
        One a document, as from `document_losses`.

    References
    ----------
    Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37,
    1991, method C.
    """
    if order not in (1, 2):
        raise ValueError(f"order {order} is neither 1 (tokens) nor 2 (pairs of tokens)")
    words, start = len(tokenizer), tokenizer.eos_token_id
    pairs = np.concatenate(
        [np.zeros(0, dtype=np.int64), *_pairs(tokenizer, train_texts, max_tokens)]
    )
    single = np.bincount(pairs % words, minlength=words) + 1.0
    single /= single.sum()
    seen, counts = np.unique(pairs, return_counts=True)
    before = np.bincount(seen // words, weights=counts, minlength=words)
    followers = np.bincount(seen // words, minlength=words)

    # The first guess: the likeliest token of all, unless one is likelier after the token before.
    guess = np.full(words, single.argmax())
    if order == 2:
        likely = counts + followers[seen // words] * single[seen % words]
        best = np.lexsort((likely, seen // words))
        rises = likely[best] > followers[seen[best] // words] * single.max()
        guess[seen[best][rises] // words] = seen[best][rises] % words  # the last one stays

    losses = []
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        previous = np.concatenate([[start], ids[:-1]]) if len(ids) else ids
        chance = single[ids]
        if order == 2:
            keys = previous * words + ids
            place = np.searchsorted(seen, keys).clip(max=max(len(seen) - 1, 0))
            together = np.where(seen[place] == keys, counts[place], 0) if len(seen) else 0
            total = before[previous] + followers[previous]
            mixed = (together + followers[previous] * chance) / np.maximum(total, 1)
            chance = np.where(total > 0, mixed, chance)
        right = int((guess[previous] == ids).sum())
        losses.append(DocumentLoss(len(text), len(ids), float(-np.log(chance).sum()), right))
    return losses


def _pairs(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int
) -> Iterator[np.ndarray]:
    """Yield each document's pairs of neighbours, the end of text first, as ``a * words + b``."""
    words, left = len(tokenizer), max_tokens
    texts = iter(texts)
    while left > 0 and (batch := list(itertools.islice(texts, 1000))):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            row = np.array([tokenizer.eos_token_id, *ids], dtype=np.int64)
            yield row[:-1] * words + row[1:]
            left -= len(ids)


def xz_bits_per_character(
    texts: Iterable[str], train_texts: Iterable[str] = (), max_characters: int = 2_000_000
) -> float:
    """Return the bits that ``xz -9e`` spends on a character after it has seen the training text.

    A compressor is a language model too: it spends few bits on what it expects. This one knows
    repetitions, and nothing else.

    Parameters
    ----------
    texts : iterable of str
        What to compress.
    train_texts : iterable of str
        What it may look back at; its own bytes are not counted.
    max_characters : int
        Take no more of either, which bounds the time (a minute on a slow core).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there is nothing to compress.
    """
    texts, train = _joined(texts, max_characters), _joined(train_texts, max_characters)
    if not texts:
        raise ValueError("there is nothing to compress: the texts are empty")

    def size(text: str) -> int:
        return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(train + texts) - (size(train) if train else 0)) / len(texts)


def _joined(texts: Iterable[str], max_characters: int) -> str:
    taken, left = [], max_characters
    for text in texts:
        if left <= 0:
            break
        taken.append(text[:left])
        left -= len(text)
    return "".join(taken)


def plot_comparison(
    bits: Mapping[str, Interval | float], label: str = "bits per character of unseen text"
) -> Figure:
    """Draw one bar a model, with its confidence interval if it has one.

    Parameters
    ----------
    bits : mapping of str to Interval or float
        What is called how; drawn from top to bottom.
    label : str
        Says what is drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.42 * len(bits)), layout="constrained")
    axes = figure.add_subplot()
    for name, number in bits.items():
        value, low, high = number if isinstance(number, Interval) else (number, number, number)
        axes.barh(name, value, color="tab:blue", height=0.6)
        if low < high:
            axes.errorbar(value, name, xerr=[[value - low], [high - value]], color="k", capsize=3)
        axes.annotate(f"{value:.2f}", (high, name), (6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int = 512,
) -> list[tuple[str, float]]:
    """Cut a text into its tokens and tell how much each surprised the model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer, a fast one.
    text : str
        What to read.
    context_length : int
        See `document_losses`.

    Returns
    -------
    list of tuple
        Piece of text and nats. The pieces make up the text; tokens that are parts of one
        character stand together.
    """
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    [(nats, _)] = _token_scores(model, [[_start(tokenizer), *encoded["input_ids"]]], context_length)
    pieces: list[tuple[str, float]] = []
    done = 0
    for (_, end), loss in zip(encoded["offset_mapping"], nats.tolist(), strict=True):
        if end > done or not pieces:
            pieces.append((text[done:end], loss))
            done = end
        else:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + loss)
    if done < len(text):  # what the tokenizer passed over
        pieces.append((text[done:], 0.0))
    return pieces


def colour_losses(pieces: Iterable[tuple[str, float]], most: float = 8.0) -> str:
    """Write a text as HTML, the redder the more a token surprised the model.

    Parameters
    ----------
    pieces : iterable of tuple
        Piece of text and nats, from `token_losses`.
    most : float
        Nats that are shown in full red.

    Returns
    -------
    str
        HTML in which the text is escaped; the loss and the probability of a token show where the
        mouse rests on it.
    """
    spans = []
    for piece, nats in pieces:
        strength = min(max(nats / most, 0.0), 1.0)
        others = round(255 - 190 * strength)
        title = f"{nats:.2f} nats, probability {math.exp(-nats):.1%}"
        # Its own text colour: a dark theme would write white on pink.
        style = f"background:rgb(255,{others},{others});color:#000"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(piece)}</span>')
    return f'<div style="line-height:1.9;white-space:pre-wrap">{"".join(spans)}</div>'


def next_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    number: int = 8,
) -> list[tuple[str, float]]:
    """Return the likeliest next tokens, as the knobs of `generate` leave them to be drawn from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    prompt : str
        What comes before.
    temperature, top_k, top_p
        See `generate`; the temperature must be above 0 here.
    number : int
        Tokens to return at most.

    Returns
    -------
    list of tuple
        Text and probability, the likeliest first; what the knobs exclude is left out.

    Raises
    ------
    ValueError
        If the prompt is empty or a knob is out of its range.
    """
    import torch
    from transformers import generation

    _check_knobs(prompt, temperature, top_k, top_p, 1.0)
    if temperature == 0:
        raise ValueError("temperature 0 always takes the first token; use one above 0 here")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    with _evaluating(model):
        scores = model(input_ids=ids).logits[:, -1].float()
    scores = generation.TemperatureLogitsWarper(float(temperature))(ids, scores)
    if top_k:
        scores = generation.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = generation.TopPLogitsWarper(top_p)(ids, scores)
    chances, tokens = scores.softmax(-1)[0].topk(min(number, scores.shape[-1]))
    return [
        (tokenizer.decode([token]), chance)
        for token, chance in zip(tokens.tolist(), chances.tolist(), strict=True)
        if chance > 0
    ]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Let the model continue one prompt, drawing each token by its probability.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer; the model stops at the end-of-text token.
    prompt : str
        The beginning. Of a prompt longer than the model's context the last part is used.
    max_new_tokens : int
        Where to stop if the model does not; also where its context is full.
    temperature : float
        Below 1 likely tokens become likelier, above 1 rarer ones; 0 always takes the likeliest
        (greedy).
    top_k : int
        Draw only from so many of the likeliest tokens; 0 from all.
    top_p : float
        Draw only from the likeliest tokens that together have this probability; 1 from all.
    repetition_penalty : float
        Above 1, makes every token less likely that already stands in the text.
    seed : int, optional
        The same seed writes the same text. The random numbers of others are left alone.
    on_text : callable, optional
        Called with each piece of text as soon as it is written:
        ``partial(print, end="", flush=True)``.

    Returns
    -------
    str
        The continuation, without the prompt.

    Raises
    ------
    ValueError
        If the prompt is empty or a knob is out of its range.

    References
    ----------
    Holtzman et al., "The curious case of neural text degeneration", 2020, arXiv:1904.09751
    (top-p); Keskar et al., "CTRL", 2019, arXiv:1909.05858 (repetition penalty).
    """
    import torch

    _check_knobs(prompt, temperature, top_k, top_p, repetition_penalty)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    ids = tokenizer(prompt)["input_ids"][-(context - 1) :]
    knobs = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    devices = [model.device] if model.device.type == "cuda" else []
    with _evaluating(model), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=min(max_new_tokens, context - len(ids)),
            do_sample=temperature > 0,
            **(knobs if temperature > 0 else {}),
            repetition_penalty=float(repetition_penalty),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=_streamer(tokenizer, on_text) if on_text else None,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def _check_knobs(
    prompt: str, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    if not prompt:
        raise ValueError(
            "the prompt is empty: the model needs at least one character to go on from"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is below 0; 0 is greedy, 1 changes nothing")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} is below 0; 0 draws from all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not between 0 and 1; 1 draws from all tokens")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty {repetition_penalty} is not above 0; 1 means none")


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
    """Return a streamer of transformers that hands each finished piece of text to a function."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
