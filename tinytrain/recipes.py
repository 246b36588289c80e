"""Every hyperparameter of a run, in one place, with its reason.

A `Recipe` is frozen: a run is described by one value that is written beside its results, and
nothing changes it half-way. The price is that trying a value means ``dataclasses.replace``:

>>> from dataclasses import replace
>>> hotter = replace(RECIPES["pocket"], learning_rate=5e-3)

Five recipes: ``smoke`` (seconds, for CI), ``pocket`` (minutes on a laptop CPU; the default without
a GPU), ``seed`` (the guide this project follows, number for number), ``wiki`` (the guide's model,
better trained; the default with a GPU) and ``qwen-0.5b`` (the real 494M model).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from typing import ClassVar

# What you watch, and what makes a run fast or small, does not change what is learned.
DISPLAY_AND_SPEED_FIELDS = frozenset(
    ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "eval_blocks")
    + ("sample_steps", "halve_batch", "loss_rows", "attention", "compile")
)

# Of tuning on conversations, which comes after the training and does not change it.
CHAT_FIELDS = frozenset(
    ("chats", "chat_learning_rate", "chat_batch_size", "chat_epochs", "chat_text", "chat_average")
)

_CHOICES = {
    "tokenizer": ("qwen2.5", "own"),
    "optimizer": ("adamw", "muon"),
    # Those of the Trainer that need no arguments of their own.
    "lr_scheduler": ("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
    + ("constant", "constant_with_warmup", "reduce_lr_on_plateau"),
    "precision": ("bf16", "fp16", "float32"),
    "attention": ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
}
_SEED = (lambda value: 0 <= value < 2**32, f"from 0 to {2**32 - 1}")
_RANGES = {  # of all other whole numbers: at least 1
    "corpus": (bool, "encyclopedia, wikipedia or a path"),
    "test_size": (lambda value: 0 < value < 1, "above 0 and below 1: a share of the documents"),
    "split_seed": _SEED,
    "context_length": (lambda value: value >= 2, "at least 2: a token, and one to predict"),
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0"),
    "warmup_steps": (lambda value: value >= 0, "at least 0"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "at least 0"),
    "adam_beta2": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "epochs": (lambda value: 0 < value < math.inf, "above 0"),
    "hours": (lambda value: 0 < value < math.inf, "above 0"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1: the epochs decide"),
    "seed": _SEED,
    "chats": (bool, "a path, or modelscope:owner/name"),
    "chat_learning_rate": (lambda value: 0 < value < math.inf, "above 0"),
    "chat_epochs": (lambda value: 0 < value < math.inf, "above 0"),
    "chat_text": (lambda value: 0 <= value < 1, "at least 0 and below 1: a share of the blocks"),
    "chat_average": (lambda value: 0 < value <= 1, "above 0 and at most 1: a share of the weights"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of one run; defaults are those of the guide where it gives one."""

    name: str

    # --- text ---------------------------------------------------------------------------------
    corpus: str = "wikipedia"  # "encyclopedia" (built in), "wikipedia" (download) or a path
    text_field: str | None = None  # holds the text in JSON and parquet; None: a usual name is found
    max_documents: int | None = None  # take only the first ones; None takes all
    test_size: float = 0.1  # share of the documents that the model never trains on
    max_characters: int | None = None  # of the rest, in random order, to train on; None takes all
    split_seed: int = 2222  # the guide's
    drop_duplicates: bool = True  # held-out copies of training articles flatter the result

    # --- tokens -------------------------------------------------------------------------------
    tokenizer: str = "qwen2.5"  # "qwen2.5" (151,665 tokens) or "own" (trained on the text)
    vocab_size: int | None = None  # rows of the embedding; None: all tokens of the tokenizer
    context_length: int = 512  # tokens the model sees at once; memory grows with it
    packing: bool = True  # False: each article by itself, only full chunks

    # --- model --------------------------------------------------------------------------------
    hidden_size: int = 512
    intermediate_size: int = 2048  # 4 times the width, the usual proportion
    num_hidden_layers: int = 12
    num_attention_heads: int = 8  # heads of 64, the size attention kernels are written for
    num_key_value_heads: int = 2  # as in Qwen2.5-0.5B: shared keys and values save memory
    tie_word_embeddings: ClassVar[bool] = True  # one matrix reads tokens in and predicts them out

    # --- optimisation -------------------------------------------------------------------------
    optimizer: str = "adamw"  # the guide's; or "muon" for the matrices, with AdamW for the rest
    learning_rate: float = 2e-5  # the guide's; a rate for fine-tuning, see recipe "wiki"
    lr_scheduler: str = "cosine"  # falls to 0 at the end
    warmup_steps: int = 200  # Adam's averages are noise at first, so start gently
    weight_decay: float = 0.1
    adam_beta2: float = 0.999  # memory of Adam's squared gradients: 1 / (1 - beta2) steps
    batch_size: int = 16  # per-device batch: blocks that pass through a device at once
    gradient_accumulation: int = 8  # batches whose gradients add up to one optimiser step
    epochs: float = 1.0
    max_steps: int = -1  # stop after so many optimiser steps; -1: the epochs decide
    hours: float | None = None  # train for so long, whatever the steps; the rate goes by the clock
    seed: int = 42  # initial weights and the order of the blocks
    precision: str | None = None  # None: the best that the hardware computes itself
    loss_rows: int | None = None  # positions whose logits exist at once; None: all, as the guide
    attention: str = "sdpa"  # PyTorch's fused one; "eager": plain products
    compile: bool = False  # fuse the layers' small operations; takes a while at the start
    halve_batch: bool = True  # if the GPU's memory is too small: half the batch, twice as often

    # --- tuning on conversations, after the training -------------------------------------------
    chats: str | None = None  # your own: a file, or modelscope:owner/name; None: written
    chat_learning_rate: float = 1e-3  # of AdamW; goes down with the width, as below
    chat_batch_size: int = 4  # few blocks and many steps: the form takes steps to learn
    chat_epochs: float = 1.7  # with less, questions about other subjects fail more often
    chat_text: float = 0.5  # share of the blocks that are text: without it, the model forgets it
    chat_average: float = 0.9  # of the tuned weights, the rest of those before: it forgets less

    # --- rhythm -------------------------------------------------------------------------------
    logging_steps: int = 50
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 2  # checkpoints kept; one is three times the size of the model
    eval_blocks: int | None = None  # held-out blocks per evaluation while training; None: all
    sample_steps: int = 500  # how often the model writes a sample

    def __post_init__(self):
        """Refuse what would fail later, with a message about something else."""
        object.__setattr__(self, "corpus", os.path.expanduser(self.corpus))
        object.__setattr__(self, "chats", self.chats and os.path.expanduser(self.chats))
        for field in fields(self):
            value = getattr(self, field.name)
            kind, *optional = field.type.split(" | ")
            if value is None and optional:
                continue
            if allowed := _allowed(field.name, value, kind):
                allowed += ", or None" if optional else ""
                raise ValueError(f"{field.name} is {value!r}; it must be {allowed}")
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):  # the heads share it, and each rotates pairs of values
            allowed = f"a multiple of {2 * heads}, twice num_attention_heads"
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be {allowed}")
        if heads % key_heads:
            allowed = f"divide num_attention_heads, which is {heads}"
            raise ValueError(f"num_key_value_heads is {key_heads}; it must {allowed}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step of the optimiser learns from, on one device."""
        return self.batch_size * self.gradient_accumulation * self.context_length


def _allowed(name: str, value: object, kind: str) -> str | None:
    """Return what a field may be, in plain English, if the value is something else."""
    kinds = {"int": int, "float": int | float, "str": str | os.PathLike, "bool": bool}
    if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
        names = {"int": "a whole number", "float": "a number", "bool": "True or False"}
        return names.get(kind, "a text")
    if name in _CHOICES:
        return None if value in _CHOICES[name] else "one of " + ", ".join(_CHOICES[name])
    fits, range_ = _RANGES.get(name, (lambda value: kind != "int" or value >= 1, "at least 1"))
    return None if fits(value) else range_


SEED = Recipe(name="seed", drop_duplicates=False, packing=False)

# The hyperparameters of "wiki" and "qwen-0.5b" are those that learned most on real text in a
# "pocket" of four layers, each changed by itself (`python -m benchmarks.learning --choices`; see
# benchmarks/NOTES.md). One rule carries them over: the learning rate goes down as the width goes up
# (Yang et al., "Tensor Programs V", 2022, arXiv:2203.03466), 8e-3 x 256 / width. At width 512 half
# and twice that learned less in 280 steps; a long run has not been measured.
WIKI = replace(
    SEED,
    name="wiki",
    drop_duplicates=True,
    packing=True,  # chunks lose every article that is shorter
    vocab_size=32_768,  # most of Qwen2.5's tokens are of other languages and never occur
    optimizer="muon",  # learned more in equal time than AdamW at its best rate
    learning_rate=4e-3,  # 8e-3 x 256 / 512; 200 times the guide's
    lr_scheduler="linear",  # to 0, 1% better than a cosine (see Bergsma et al., arXiv:2502.15938)
    adam_beta2=0.95,  # usual for language models; the guide's 0.999 learned as much
    gradient_accumulation=4,  # 32,768 tokens a step, half the guide's: more and smaller steps
    loss_rows=1024,  # 3 GB less memory, the same loss
    compile=True,  # a quarter of a minute at the start, faster in every step
)

QWEN = replace(
    WIKI,
    name="qwen-0.5b",
    vocab_size=151_936,  # 151,665 rounded up, as in the published model
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    learning_rate=2.3e-3,  # 8e-3 x 256 / 896
    loss_rows=512,  # nearly five times the vocabulary, so fewer positions
    batch_size=4,  # activations of 24 layers: 0.7 GB a block
    gradient_accumulation=16,  # the same 32,768 tokens a step
)

POCKET = Recipe(
    name="pocket",
    corpus="encyclopedia",
    tokenizer="own",
    vocab_size=4096,  # with 151,665 tokens nearly all of a small model would be embeddings
    context_length=256,  # an article of the built-in text fits in
    hidden_size=256,
    intermediate_size=384,  # with twice that it knows no more of the built-in text
    num_hidden_layers=2,  # nor with four layers: facts need width rather than depth
    num_attention_heads=4,  # heads of 64
    num_key_value_heads=2,
    optimizer="muon",  # learned more in equal time than AdamW at its best rate
    learning_rate=8e-3,  # half or twice as much learned less, or no more
    lr_scheduler="linear",  # to 0, as `wiki`
    warmup_steps=60,
    adam_beta2=0.95,
    batch_size=8,  # a short run learns more from many small steps than from half as many large ones
    gradient_accumulation=1,
    max_steps=600,  # one to four minutes on two processor cores, whatever the length of the text
    logging_steps=5,
    eval_steps=100,
    save_steps=100,
    eval_blocks=32,
    sample_steps=60,
    loss_rows=1024,  # the loss in slices that suit a processor's cache
    chat_learning_rate=2e-3,  # half as much learned less, and 1e-3 at width 512 by the rule above
)

SMOKE = replace(
    POCKET,
    name="smoke",
    max_documents=300,
    precision="float32",  # nothing to gain at this size
    vocab_size=1024,
    context_length=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    warmup_steps=2,
    max_steps=20,
    logging_steps=2,
    eval_steps=10,
    save_steps=10,
    eval_blocks=16,
    sample_steps=10,
)

RECIPES = {recipe.name: recipe for recipe in (SMOKE, POCKET, SEED, WIKI, QWEN)}


def get_recipe(name: str | Recipe | None = None, has_gpu: bool = False) -> Recipe:
    """Return the recipe of this run.

    Variables of the environment let one notebook serve all runs: ``TINYTRAIN_RECIPE`` selects the
    recipe if no name is given, ``TINYTRAIN_CORPUS`` replaces its text by a file of your own, in
    which ``TINYTRAIN_TEXT_FIELD`` holds the text, ``TINYTRAIN_CHATS`` names conversations of your
    own, and ``TINYTRAIN_MAX_STEPS`` ends each training after so many optimiser steps.

    Parameters
    ----------
    name : str or Recipe, optional
        One of `RECIPES`; a recipe is returned as it is, so that a notebook's cell can run again.
    has_gpu : bool
        Whether to default to ``wiki`` rather than ``pocket``.

    Examples
    --------
    >>> get_recipe("seed").learning_rate
    2e-05
    """
    if isinstance(name, Recipe):
        return name
    name = name or os.environ.get("TINYTRAIN_RECIPE") or ("wiki" if has_gpu else "pocket")
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    changes = {}
    for field in ("corpus", "text_field", "max_steps", "chats"):
        if value := os.environ.get(f"TINYTRAIN_{field.upper()}"):
            changes[field] = value
    if steps := changes.get("max_steps"):
        if not steps.isdecimal() or int(steps) < 1:
            raise ValueError(f"TINYTRAIN_MAX_STEPS is {steps!r}; it must be a number, at least 1")
        changes["max_steps"] = int(steps)
    return replace(RECIPES[name], **changes)


def with_width(recipe: Recipe, hidden_size: int) -> Recipe:
    """Return a recipe of another width: heads of the same size, an MLP of the same proportion.

    It has fewer key/value heads where they would not divide the heads evenly. The learning rate
    stays, though a wider model wants a lower one.

    Raises
    ------
    ValueError
        If the width is no multiple of the size of a head.
    """
    head = recipe.hidden_size // recipe.num_attention_heads
    if hidden_size < head or hidden_size % head:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {head}, the size of a head")
    heads = hidden_size // head
    return replace(
        recipe,
        hidden_size=hidden_size,
        intermediate_size=recipe.intermediate_size * hidden_size // recipe.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, recipe.num_key_value_heads),
    )
