"""Tune a trained model on conversations, so that it answers; a run like that of `runs`.

It learns from the assistant's turns, and from some text of its training set, so as not to forget.
This module joins the others, as `runs` does; copy from those, not from here.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinytrain import chat, conversations, encyclopedia, evaluation, results, runs, steps
from tinytrain.callbacks import LossGuard
from tinytrain.checkpoints import train
from tinytrain.common import context_of, rank, setup_logging, world_size, write_json
from tinytrain.evaluation import Interval
from tinytrain.recipes import Recipe
from tinytrain.training import total_steps

_HELD_OUT = 64  # conversations at most, to measure the loss on while training
_QUESTIONS = 150  # of each group, to measure a model with


def chat_blocks(
    recipe: Recipe, found: Dataset, tokenizer: PreTrainedTokenizerBase, mask: bool = True
) -> DatasetDict:
    """Return conversations packed into blocks: ``train``, with text added, and held-out ``test``.

    The recipe's ``chat_text`` is the share of blocks of text, from the run's training set; the
    tokenizer comes from `tinytrain.chat.add_chat_template`. Without the mask, the model learns from
    the user's turns too, which shows what that spoils. Too few conversations, or none that fits
    into a block, are a ValueError.
    """
    length = recipe.context_length
    if len(found) < 2:
        raise ValueError("there is one conversation; two are needed, to learn from and to hold out")
    held_out = min(_HELD_OUT, max(1, len(found) // 20))
    blocks = DatasetDict()
    for name, part in found.train_test_split(held_out, seed=recipe.split_seed).items():
        rows = chat.chat_rows(part["messages"], tokenizer, length)
        if not len(rows):
            raise ValueError(
                f"none of {len(part)} conversations fits into {length} tokens: take a model with a "
                "longer context, or shorter conversations"
            )
        if not mask:
            rows = rows.map(lambda row: {"labels": row["input_ids"]})
        blocks[name] = chat.pack_conversations(rows, length, tokenizer.pad_token_id)
    if recipe.chat_text:
        number = round(len(blocks["train"]) * recipe.chat_text / (1 - recipe.chat_text))
        known = steps.get_blocks(recipe)["train"].shuffle(recipe.split_seed)
        ids = np.array(known.select(range(min(number, len(known))))["input_ids"], dtype=np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        added = Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": positions})
        blocks["train"] = concatenate_datasets([blocks["train"], added])
    return blocks


def tuning_recipe(recipe: Recipe, blocks: int) -> Recipe:
    """Return the recipe of a tuning on so many blocks: its ``chat_`` fields take effect.

    A run's ``max_steps`` limits its tuning too; to tune for less, lower ``chat_epochs``.

    >>> from tinytrain.recipes import RECIPES
    >>> tuning_recipe(RECIPES["pocket"], 800).max_steps  # 4 blocks a step, 1.7 times
    340
    """
    tuned = replace(
        recipe,
        optimizer="adamw",  # Muon learned as much and forgot more
        learning_rate=recipe.chat_learning_rate,
        lr_scheduler="linear",
        weight_decay=0.0,
        adam_beta2=0.95,
        batch_size=recipe.chat_batch_size,
        gradient_accumulation=1,
        epochs=recipe.chat_epochs,
        max_steps=-1,
        hours=None,
    )
    number = total_steps(tuned, blocks)
    number = min(number, recipe.max_steps) if recipe.max_steps > 0 else number
    every = max(1, number // 4)
    names = ("eval_steps", "save_steps", "sample_steps")
    rhythm = {name: min(every, getattr(recipe, name)) for name in names}
    warmup = min(recipe.warmup_steps, number // 10)
    return replace(tuned, max_steps=number, warmup_steps=warmup, **rhythm)


def tune_recipe(recipe: Recipe, base: Path | None = None, fresh: bool = False) -> dict[str, Any]:
    """Tune a model on conversations, in one process or in several, and measure what it has learned.

    A tuning that was stopped goes on; one of another model, template or conversations is moved
    aside, and so is any if it is ``fresh``. Everything is kept in `tinytrain.steps.chat_folder`.

    ``base`` is a folder with another model than the run's own, in Hugging Face's format, whose
    tokenizer has ChatML's tokens; then no text is mixed in. Returns ``finished``; if it is true,
    the first process adds ``chat_before`` and ``chat_after`` (of `measure_chat`), ``bits_before``
    and ``bits_after`` (per character of held-out text).
    """
    run = steps.chat_folder(recipe)
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        setup_logging(run / "training.log")
    if base is not None:
        recipe = replace(recipe, chat_text=0.0)
    base = _base(recipe, base)
    model, tokenizer = _load(recipe, base)
    recipe = replace(recipe, context_length=min(recipe.context_length, context_of(model)))
    before = _measure(model, tokenizer, recipe) if rank() == 0 else None

    found = steps.get_conversations(recipe)
    blocks = chat_blocks(recipe, found, tokenizer)
    precision = runs.agree_on_precision(recipe, fresh)
    tuned = tuning_recipe(recipe, len(blocks["train"]))
    mine = runs.share_recipe(tuned, world_size())
    watched = tuned, run, tokenizer, model.config.vocab_size, mine.tokens_per_step * world_size()
    watching = runs.watch(*watched, partial(_write_answers, tokenizer), _questions(recipe, found))
    trainer = runs.assemble(
        mine, run / "checkpoints", precision, watching, steps.prepare(model, recipe), blocks
    )
    inputs = _inputs(recipe, found, base) | {"precision": precision}
    files = [run / "model", run / "summary.json"]
    train(
        trainer, inputs, fresh, recipe.halve_batch, results=files,
        make_model=lambda: steps.prepare(_load(recipe, base)[0], recipe),
    )  # fmt: skip
    average(trainer.model, _load(recipe, base)[0], recipe.chat_average)
    results.save_trained(recipe, trainer, tokenizer, inputs, run)
    if trainer.state.global_step < trainer.state.max_steps:
        return {"finished": False}
    if rank() > 0:
        return {"finished": True}
    after = _measure(*results.load_trained(recipe, run / "model"), recipe)
    values = {f"{name}_before": value for name, value in before.items()}
    values |= {f"{name}_after": value for name, value in after.items()}
    facts = {"chats": recipe.chats, "conversations": len(found)}
    write_json(run / "summary.json", {"step": trainer.state.global_step, **facts, **values})
    return {"finished": True, **values}


def tune_steps(recipe: Recipe, number: int, mask: bool = True) -> PreTrainedModel:
    """Return the run's model after so many steps of tuning, to compare recipes; keep nothing."""
    base = _base(recipe, None)
    model, tokenizer = _load(recipe, base)
    blocks = chat_blocks(recipe, steps.get_conversations(recipe), tokenizer, mask=mask)
    tuned = tuning_recipe(replace(recipe, max_steps=number), len(blocks["train"]) * 10**6)
    quiet = {"save_strategy": "no", "eval_strategy": "no"}
    precision = runs.choose_precision(recipe).name
    with tempfile.TemporaryDirectory() as folder:
        trainer = runs.assemble(
            tuned, folder, precision, [LossGuard()], steps.prepare(model, recipe), blocks, **quiet
        )
        trainer.train()
    average(trainer.model, _load(recipe, base)[0], recipe.chat_average)
    return trainer.model


def average(model: PreTrainedModel, before: PreTrainedModel, share: float) -> None:
    """Average a tuned model's weights, in place, with those before; theirs count ``1 - share``.

    The model remembers more again and loses little of what it has learned (Wortsman et al., "Robust
    fine-tuning of zero-shot models", 2022, arXiv:2109.01903).
    """
    with torch.no_grad():
        for weight, old in zip(model.parameters(), before.parameters(), strict=True):
            weight.lerp_(old.to(weight.device), 1 - share)


def get_tuned(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the run's model, tuned on its conversations, and the tokenizer; tune it if need be."""
    folder = steps.chat_folder(recipe) / "model"
    made, found = steps.read_inputs(folder), steps.get_conversations(recipe)
    inputs = _inputs(recipe, found, _base(recipe, None))
    if made is None or steps.find_damage(folder) or results.differences(made, inputs):
        tune_recipe(recipe)
    return results.load_trained(recipe, folder)


def _base(recipe: Recipe, base: Path | None) -> Path:
    """Return the folder of the model to tune; the run's own is trained if need be."""
    if base is None and not results.is_trained(recipe):
        runs.get_trained(recipe)
    return base or steps.run_folder(recipe) / "model"


def _load(recipe: Recipe, base: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = results.load_trained(recipe, base)
    return model, chat.add_chat_template(tokenizer)


def _inputs(recipe: Recipe, found: Dataset, base: Path) -> dict[str, Any]:
    """Return what decides the outcome of a tuning, for `tinytrain.checkpoints.train`."""
    said = "".join(json.dumps(messages, sort_keys=True) for messages in found["messages"])
    values = results.recipe_inputs(tuning_recipe(recipe, 1))
    values |= {"max_steps": recipe.max_steps, "warmup_steps": recipe.warmup_steps}
    return values | {
        "base": results.weights_hash(base),
        "conversations": hashlib.sha256(said.encode()).hexdigest()[:16],
        "template": hashlib.sha256(chat.CHAT_TEMPLATE.encode()).hexdigest()[:16],
        "chat_text": recipe.chat_text,
        "chat_average": recipe.chat_average,
        "blocks": steps.blocks_hash(recipe) if recipe.chat_text else None,
    }


def measure_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, limit: int = 150
) -> dict[str, Interval]:
    """Return the shares of right answers by group, and of real subjects it claims not to know.

    The groups are those of `tinytrain.conversations.ChatQuestion`, and ``"refused"``; each is asked
    at most ``limit`` questions. With conversations of your own (``chats``) there are none.
    """
    if recipe.chats is not None:
        return {}
    questions = conversations.chat_questions(encyclopedia.read_facts(), limit)
    answers = chat.answer_each(model, tokenizer, [question.question for question in questions])
    pairs = list(zip(questions, answers, strict=True))
    shares = evaluation.by_kind(questions, [q.is_right(answer) for q, answer in pairs])
    real = [conversations.UNKNOWN in answer for q, answer in pairs if q.group != "invented"]
    return shares | {"refused": evaluation.share(sum(real), len(real))}


def _measure(model: Any, tokenizer: Any, recipe: Recipe) -> dict[str, Any]:
    """Return `measure_chat`, and the bits per character of held-out text: forgetting adds some."""
    texts = steps.get_split(recipe)["test"]["text"][:200]
    losses = evaluation.document_losses(model, tokenizer, texts, recipe.context_length)
    bits = evaluation.summarize(losses).bits_per_character
    return {"chat": measure_chat(model, tokenizer, recipe, _QUESTIONS), "bits": bits}


def _write_answers(tokenizer: Any, model: Any, prompts: list[str]) -> list[str]:
    return chat.answer_each(model, tokenizer, prompts, max_new_tokens=24)


def _questions(recipe: Recipe, found: Dataset) -> list[str]:
    """Return two questions to ask while training."""
    if recipe.chats is None:
        return ["法国的首都是哪里？", "你好！"]
    turns = (turn for messages in found["messages"] for turn in messages if turn["role"] == "user")
    return [next(turns)["content"] for _ in range(2)]
