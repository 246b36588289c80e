"""Let a model write: greedily, by sampling, token by token, and as answers to questions.

A completion says much to a reader and proves little. A few hundred questions with one right answer
count what the model has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tinytrain.common import (
    check_sampling,
    context_of,
    continue_rows,
    encode_each,
    encode_text,
    evaluating,
    new_axes,
    sample,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
) -> list[str]:
    """Continue each prompt greedily, and return the continuations without the prompts.

    The model, a causal language model of transformers, stops at its tokenizer's end-of-text token,
    or after `max_new_tokens`. No prompt may be empty.
    """
    rows = _prompt_ids(model, tokenizer, prompts)
    return continue_rows(model, tokenizer, rows, [tokenizer.eos_token_id], max_new_tokens)


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
    """Continue one prompt, sampling each token, and return the continuation.

    Of a prompt longer than the model's context, the last part is used. The parameters are those of
    `tinytrain.common.sample`; one out of its range, or an empty prompt, is a ValueError.
    """
    [ids] = _prompt_ids(model, tokenizer, [prompt])
    options = temperature, top_k, top_p, repetition_penalty, seed, on_text
    return sample(model, tokenizer, ids, [tokenizer.eos_token_id], max_new_tokens, *options)


def next_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    number: int = 8,
) -> list[tuple[str, float]]:
    """Return the likeliest next tokens, with the probabilities that `generate` samples from.

    Tokens that cannot be sampled are left out; `number` is the most that are returned.
    """
    import torch
    from transformers import generation

    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature 0 always takes the first token; use one above 0 here")
    ids = torch.tensor(_prompt_ids(model, tokenizer, [prompt]), device=model.device)
    with evaluating(model):
        logits = model(input_ids=ids).logits[:, -1].float()
    logits = generation.TemperatureLogitsWarper(float(temperature))(ids, logits)
    if top_k:
        logits = generation.TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1:
        logits = generation.TopPLogitsWarper(top_p)(ids, logits)
    probabilities, tokens = logits.softmax(-1)[0].topk(min(number, logits.shape[-1]))
    pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
    return [(tokenizer.decode([token]), probability) for token, probability in pairs if probability]


def plot_next_tokens(chances: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """Draw what `next_tokens` returned for each named setting, the likeliest token first."""
    figure, axes = new_axes(7, 3.5)
    for name, pairs in chances.items():
        ranks = range(1, len(pairs) + 1)
        axes.plot(ranks, [probability for _, probability in pairs], "o-", label=name)
    axes.set(xlabel="rank of the token", ylabel="probability", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


class Answer(NamedTuple):
    """One question, the expected answer, and what the model wrote."""

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
    questions: Sequence[tuple[str, ...]],
) -> list[Answer]:
    """Let the model complete cloze questions, whose first two fields are prompt and answer."""
    prompts, expected = ([question[n] for question in questions] for n in (0, 1))
    longest = max(map(len, encode_text(tokenizer, expected)), default=0)
    # Two tokens more than the longest answer: the model may cut the same characters differently.
    written = complete(model, tokenizer, prompts, max_new_tokens=longest + 2)
    return [Answer(*row) for row in zip(prompts, expected, written, strict=True)]


def _prompt_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[list[int]]:
    """Return the ids of prompts, of a long one its last part, after what the tokenizer begins with.

    A special token that is spelled out in a prompt is text.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: the model needs at least one character to go on from")
    begin = tokenizer("")["input_ids"]  # for many families a beginning-of-text token, here nothing
    room = max(1, context_of(model) - 1 - len(begin))
    return [begin + ids[-room:].tolist() for ids in encode_each(tokenizer, prompts)]
