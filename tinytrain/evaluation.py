"""What a trained model knows: its loss on unseen text, what it writes, and questions with answers.

A loss is honest but says little to a reader; a completion says much but proves little. A few
hundred questions with one right answer sit in between: they count what the model has learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[index]) for index in chosen)
        # Padding stands on the left, so that every prompt ends where its continuation begins.
        padded = [[tokenizer.eos_token_id] * (width - len(ids[i])) + ids[i] for i in chosen]
        mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen]
        with torch.no_grad():
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
    model.train(was_training)
    return continuations


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
