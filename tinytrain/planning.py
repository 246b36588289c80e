"""From the time you have to a recipe: how large a model to train on a text, and how good it gets.

Scaling laws tell the loss of a model from its size and its text. The well-known ones were fitted to
models from 44M parameters up and billions of tokens; for a model that a laptop trains in an hour
they are wrong by far. The law here was fitted to small models (``python -m benchmarks.scaling``;
the runs are in ``benchmarks/results/scaling.json``), in bits per character, so that vocabularies
can be compared. This module joins the others: it reads the text and measures this machine.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tinytrain import corpus, costs, evaluation, hardware, recipes, runs, steps, tokenization
from tinytrain.common import format_seconds, new_axes, world_size, write_json
from tinytrain.recipes import POCKET, Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The constants of the law, fitted to the runs of the study; see `expected_bits`.
LAW = {
    "rest": 0.4675,
    "size": 0.0225,
    "size_power": 0.3659,
    "read": 0.029,
    "read_power": 0.225,
    "again": 7.77,
}
EXPECTED_ERROR = 0.06  # the largest of a run predicted from the others
LARGEST_MEASURED = 1.22e7  # parameters of the largest model that the law was fitted to
MOST_PASSES = 4  # over the text; read more often, it is learned by heart, and held-out loss rises
_WIDTHS = (*range(64, 577, 64), *range(640, 1537, 128))
_COUNTED_TOKENS = 500_000  # of the training set, to see how hard a text is to predict
_TOKENIZER_TEXT = 2_000_000  # characters that a tokenizer is trained on, if there are so many
_BYTES_FOR_A_TOKEN = 150  # of a short text: with more tokens, most would occur too rarely
_PER_TOKEN = 4  # characters at most: 1.7 in Chinese, 3.5 in English
_HELD_OUT = 450_000  # bytes, 150,000 Chinese characters: known to half a per cent, in seconds
_OWN_FIELDS = ("corpus", "text_field", "chats", "seed")


def expected_bits(
    pair_bits: float,
    parameters: float,
    tokens: float,
    text_tokens: float = math.inf,
    law: Mapping[str, float] = LAW,
) -> float:
    """Return the bits per character that a model will need for held-out text, by the measured law.

    ``pair_bits * (rest + ((size / N) ** (size_power / read_power) + read / D) ** read_power)``, for
    N million parameters and D million tokens: a small model gains little from more text, and a
    little text little from a larger model (the form of Kaplan et al., 2020, arXiv:2001.08361). Text
    that is read again counts for less each time (Muennighoff et al., 2023, arXiv:2305.16264).

    Parameters
    ----------
    pair_bits : float
        What the text costs a model that only counts pairs of tokens; see `measure_text`.
    parameters : float
        Size of the model, embeddings included.
    tokens : float
        Tokens trained on.
    text_tokens : float
        Different tokens there are; beyond them the text is read again.
    law : mapping
        The constants.
    """
    again = max(tokens / text_tokens - 1, 0.0)
    if again:
        tokens = text_tokens * (1 + law["again"] * (1 - math.exp(-again / law["again"])))
    size = (law["size"] / (parameters / 1e6)) ** (law["size_power"] / law["read_power"])
    return pair_bits * (law["rest"] + (size + law["read"] / (tokens / 1e6)) ** law["read_power"])


class Text(NamedTuple):
    """What a plan has to know about a text."""

    characters: int  # of the training set
    tokens_per_character: float
    pair_bits: float  # per held-out character, of a model that counts pairs of tokens

    @property
    def tokens(self) -> float:
        """Return how many different tokens there are to learn from."""
        return self.characters * self.tokens_per_character


class Plan(NamedTuple):
    """A size of model, and what a time is enough for."""

    recipe: Recipe
    parameters: int
    tokens: float
    bits: float  # expected, per character


def measure_text(recipe: Recipe) -> Text:
    """Read the text of a recipe and tell how much there is of it and how hard it is to predict."""
    split, tokenizer = steps.get_split(recipe), steps.get_tokenizer(recipe)
    held_out = list(split["test"]["text"])
    rate = tokenization.tokens_per_character(tokenizer, held_out)
    some = steps.first_characters(split["train"], round(_COUNTED_TOKENS / rate))["text"]
    losses = evaluation.count_losses(tokenizer, some, held_out)
    bits = sum(loss.nats for loss in losses) / math.log(2) / sum(map(len, held_out))
    return Text(sum(map(len, split["train"]["text"])), rate, bits)


def sized_recipe(base: Recipe, width: int, on_gpu: bool = False) -> Recipe:
    """Return the recipe of a width, made from one like ``pocket``.

    It has the shape of the models that were measured: a layer for every 64 of width, and MLPs that
    are three times as wide. The learning rate is that of ``pocket`` up to its width, and goes down
    as the width goes up from there. A GPU gets longer blocks and more of them at once, or it would
    be idle.
    """
    slower = min(1, POCKET.hidden_size / width)
    on_gpu_only = {"context_length": 512, "batch_size": 16, "compile": True}
    return replace(
        recipes.with_width(base, width),
        intermediate_size=3 * width,
        num_hidden_layers=max(2, width // 64),
        learning_rate=float(f"{POCKET.learning_rate * slower:.2g}"),
        chat_learning_rate=float(f"{POCKET.chat_learning_rate * slower:.2g}"),
        lr_scheduler="linear",
        attention="sdpa" if on_gpu else "eager",  # a tenth faster with 256 tokens in bf16
        **(on_gpu_only if on_gpu else {}),
    )


def batch_size(tokens: float) -> int:
    """Return the best number of blocks a step, of those measured, to train on so many tokens.

    Early in a training small steps in great number learn the most; a long one learns more from
    larger batches, and is faster with them.
    """
    return 8 if tokens < 4e6 else 16 if tokens < 16e6 else 32


def make_plans(
    seconds: float, text: Text, sizes: Sequence[Recipe], speed: Callable[[Recipe], float]
) -> list[Plan]:
    """Return what a time is enough for at each size: the larger the model, the fewer the tokens.

    A text is read at most `MOST_PASSES` times, however much time there is.

    Parameters
    ----------
    seconds : float
        Time to train.
    text : Text
        From `measure_text`.
    sizes : sequence of Recipe
        From `sized_recipe`.
    speed : callable
        Returns how many tokens of a recipe's training this machine makes in a second.
    """
    plans = []
    for recipe in sizes:
        parameters = costs.count_parameters(recipe)["total"]
        tokens = min(seconds * speed(recipe), MOST_PASSES * text.tokens)
        bits = expected_bits(text.pair_bits, parameters, tokens, text.tokens)
        plans.append(Plan(recipe, parameters, tokens, bits))
    return plans


def best_plan(plans: Sequence[Plan]) -> Plan:
    """Return the smallest model whose bits are within half a per cent of the fewest.

    More parameters for less than that are not worth it: the law does not know it so exactly.
    """
    enough = 1.005 * min(plan.bits for plan in plans)
    return next(plan for plan in plans if plan.bits <= enough)


def plot_plans(plans: Mapping[str, Sequence[Plan]]) -> Figure:
    """Draw the expected bits over the size of the model, a curve and its best size for each time.

    The dotted line leads through the sizes nearest to twenty tokens a parameter, which Hoffmann et
    al. (2022, arXiv:2203.15556) found best for large models. Models on the grey background are
    larger than any that the law was fitted to.
    """
    figure, axes = new_axes(8, 4.2)
    twenty = []
    for name, some in plans.items():
        best = best_plan(some)
        label = f"{name}: {best.parameters / 1e6:,.1f}M, {best.tokens / 1e6:,.1f}M tokens"
        [line] = axes.plot([p.parameters for p in some], [p.bits for p in some], label=label)
        axes.plot(best.parameters, best.bits, "o", color=line.get_color())
        near = min(some, key=lambda plan: abs(math.log(plan.tokens / plan.parameters / 20)))
        twenty.append((near.parameters, near.bits))
    axes.plot(*zip(*twenty, strict=True), ":", color="0.3", label="20 tokens a parameter")
    largest = max(plan.parameters for some in plans.values() for plan in some)
    if largest > LARGEST_MEASURED:
        label = "larger than measured"
        axes.axvspan(LARGEST_MEASURED, largest, color="0.93", zorder=0, label=label)
    axes.set(xscale="log", xlabel="parameters", ylabel="expected bits per character")
    axes.legend(edgecolor="none", framealpha=1)
    return figure


class Speed:
    """How many tokens a second this machine trains with, at sizes measured and between them.

    Parameters
    ----------
    tflops : float
        What is assumed of the machine before anything is measured, in 10^12 operations a second.
    """

    def __init__(self, tflops: float):
        self.tflops = tflops
        self.measured: dict[int, float] = {}  # 10^12 operations a second by width
        self.memory: dict[int, int] = {}  # peak in bytes by width

    def __call__(self, recipe: Recipe) -> float:
        """Return the tokens a second, from the nearest width that was measured."""
        width = recipe.hidden_size
        nearest = min(self.measured, key=lambda other: abs(math.log(other / width)), default=None)
        return self.measured.get(nearest, self.tflops) * 1e12 / self._operations(recipe)

    def measure(self, recipe: Recipe) -> None:
        """Train a few steps of a model, on random tokens."""
        precision = hardware.choose_precision(recipe.precision).name
        width, step = recipe.hidden_size, recipe.tokens_per_step * self._operations(recipe)
        seconds, self.memory[width] = runs.probe(recipe, precision, real=False)
        self.measured[width] = step / seconds / 1e12

    @staticmethod
    def _operations(recipe: Recipe) -> int:
        return costs.flops_per_token(recipe, recipe.context_length)["total"]


def get_recipe(
    name: str | float | Recipe | None = None, has_gpu: bool = False, **changes: Any
) -> Recipe:
    """Return the recipe of this run: by its name, or from the hours you have.

    As `tinytrain.recipes.get_recipe`; in place of a name you may give a number of hours, or set
    ``TINYTRAIN_HOURS``, from which `plan` makes a recipe (``TINYTRAIN_MAX_STEPS`` does not end it).
    Further arguments replace its fields.
    """
    hours = name if isinstance(name, int | float) else None
    if name is None and (value := os.environ.get("TINYTRAIN_HOURS")):
        try:
            hours = float(value)
        except ValueError:
            raise ValueError(
                f"TINYTRAIN_HOURS is {value!r}; it must be a number, such as 0.5"
            ) from None
    if hours is None:
        return replace(recipes.get_recipe(name, has_gpu), **changes)
    return replace(plan(hours, replace(recipes.get_recipe("pocket"), **changes)), **changes)


def plan(hours: float, base: Recipe = POCKET) -> Recipe:
    """Return the recipe that makes the best of so many hours on this machine.

    It is printed, and kept as ``plan.json`` in the run's folder; from then on it stays as it is. Of
    a text too short for the time, less time is planned.

    Parameters
    ----------
    hours : float
        How long to train.
    base : Recipe
        Its text counts, its ``text_field``, ``chats`` and ``seed``.

    Raises
    ------
    ValueError
        If the time is too short, or the text does not fill a block.
    """
    if not 60 <= 3600 * hours < math.inf:
        raise ValueError(f"hours is {hours:g}; it must be a number from 0.02 on, about a minute")
    own = {name: getattr(base, name) for name in _OWN_FIELDS}
    base = replace(POCKET, name=f"hours-{hours:.3g}", hours=float(hours), **own)
    file = steps.run_folder(base) / "plan.json"
    with steps.one_at_a_time(file):  # of several processes, one plans and the others read
        if not file.is_file():
            made = _make_plan(base)
            write_json(file, made)
            place = f"{file.parent.name}/{file.name}"
            print(f"The plan for {format_seconds(3600 * hours)}, kept as {place}:")
            for name, value in made["expected"].items():
                print(f"  {name:12}{value}")
            print(f"as a recipe:\n{_as_code(Recipe(**made['recipe']))}", flush=True)
        found = json.loads(file.read_text(encoding="utf-8"))["recipe"]
    return Recipe(**found | {"corpus": base.corpus})


def _as_code(recipe: Recipe) -> str:
    """Return a recipe as it would be written in ``recipes.py``."""
    values = asdict(recipe).items()
    changed = [f"    {name}={value!r}," for name, value in values if value != getattr(POCKET, name)]
    return "\n".join(["replace(", "    POCKET,", *changed, ")"])


def _make_plan(base: Recipe) -> dict[str, Any]:
    """Read the text, choose the size by the law and this machine's speed; return it for JSON."""
    begun, end = time.monotonic(), datetime.now() + timedelta(hours=base.hours)
    here = hardware.this_hardware(steps.runs_folder())
    speed = Speed(costs.USUAL_SHARE * here.tflops * world_size())

    def choose(base: Recipe, text: Text) -> Plan:
        """Return the best size that fits into the memory; what looks best is measured first."""
        sizes = [sized_recipe(base, width, here.is_gpu) for width in _WIDTHS]
        memory = [costs.estimate(size, here).memory["total"] for size in sizes]
        sizes = [size for size, needed in zip(sizes, memory, strict=True) if needed <= here.memory]
        if not sizes:
            raise ValueError(
                f"the smallest model takes {memory[0] / 1e9:.1f} GB of memory to train; here are "
                f"{here.memory / 1e9:.1f}"
            )
        while True:
            seconds = 3600 * base.hours - (time.monotonic() - begun)
            best = best_plan(make_plans(seconds, text, sizes, speed))
            if best.recipe.hidden_size in speed.measured:
                return best
            speed.measure(best.recipe)

    # Of a long text only as much is prepared as the time is enough for.
    most = _PER_TOKEN * choose(base, Text(math.inf, 1, 1)).tokens
    size = sum(file.stat().st_size for file in corpus.text_files(steps.get_text(base)))
    base = replace(
        base,
        max_characters=max(_TOKENIZER_TEXT, int(float(f"{most:.2g}"))),
        test_size=float(f"{min(0.1, _HELD_OUT / size):.2g}"),
        vocab_size=min(POCKET.vocab_size, max(1024, size // _BYTES_FOR_A_TOKEN)),
    )
    base = replace(base, vocab_size=len(steps.get_tokenizer(base)))  # perhaps fewer
    text = measure_text(base)
    best = choose(base, text)
    if batch_size(best.tokens) > base.batch_size and not here.is_gpu:
        base = replace(base, batch_size=batch_size(best.tokens))
        speed.measured.clear()  # larger batches are faster
        best = choose(base, text)
    recipe = _with_rhythm(best, best.recipe.tokens_per_step / speed(best.recipe))
    if best.tokens == MOST_PASSES * text.tokens:  # a short text: no more time than it is good for
        taken = (time.monotonic() - begun + best.tokens / speed(best.recipe)) / 3600
        # With much time to spare it goes by its steps: seconds are never known so exactly.
        hours = None if taken < base.hours / 2 else min(base.hours, float(f"{taken:.3g}"))
        recipe = replace(recipe, hours=hours)
        end -= timedelta(hours=max(0, base.hours - taken))
    # Counting pairs of tokens may have taken more than a small model does.
    memory = max(speed.memory[best.recipe.hidden_size], hardware.peak_memory())
    told = _in_words(best, text, memory, end)
    if recipe.hours != base.hours:
        told["text"] += f": too few for {format_seconds(3600 * base.hours)}, the run is shorter"
    return {"recipe": asdict(recipe), "bits": best.bits, "memory": memory, "expected": told}


def _with_rhythm(best: Plan, step_seconds: float) -> Recipe:
    """Return the recipe of a plan with its length, and how often to log, evaluate and save."""
    number = max(1, round(best.tokens / best.recipe.tokens_per_step))
    eighth, half_a_minute = max(1, number // 8), max(1, round(30 / step_seconds))
    return replace(
        best.recipe,
        max_steps=number,
        warmup_steps=min(best.recipe.warmup_steps, number // 10),
        logging_steps=max(1, number // 200),
        eval_steps=eighth,
        save_steps=max(half_a_minute, number // 50),
        sample_steps=eighth,
    )


def _in_words(best: Plan, text: Text, memory: int, end: datetime) -> dict[str, str]:
    """Return what a plan comes to, line by line."""
    recipe, passes = best.recipe, best.tokens / text.tokens
    low, high = (best.bits * (1 + sign * EXPECTED_ERROR) for sign in (-1, 1))
    bits = f"{best.bits:.2f} per character expected, {low:.2f} to {high:.2f}"
    if recipe.corpus == "encyclopedia":
        bits = "unknown: the law does not hold for the built-in text, whose sentences are alike"
    shape = f"{recipe.num_hidden_layers} layers of width {recipe.hidden_size}"
    return {
        "text": f"{text.characters:,} characters to learn from",
        "vocabulary": f"{recipe.vocab_size:,} tokens, {text.tokens_per_character:.2f} a character",
        "parameters": f"{best.parameters:,}: {shape}",
        "context": f"{recipe.context_length} tokens",
        "tokens": f"about {best.tokens / 1e6:,.1f}M, {passes:.2g} passes over the text",
        "memory": f"{memory / 1e9:.1f} GB",
        "bits": bits,
        "done at": f"{end:%Y-%m-%d %H:%M}",
    }
