"""What a model costs before anything is allocated: parameters, memory, FLOPs and time.

All of it follows from the configuration in closed form, so that "what if" is answered in
milliseconds, instead of building a model to see it run out of memory. Parameters and FLOPs are
exact; the memory of a training step depends on the kernels too and remains an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinytrain.common import format_seconds, new_axes, plot_label
from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import Qwen2Config

# The Chinese Wikipedia of the guide: 524 MB of UTF-8 and JSON, in which a character takes about
# three bytes, and 0.7 tokens of Qwen2.5 a character. Known exactly once it is tokenized.
WIKIPEDIA_TOKENS = 120_000_000
USUAL_SHARE = 0.4  # of a chip's peak that training reaches, before a probe says better
_LIBRARIES = 600_000_000  # bytes of Python, torch and transformers; on a GPU, of the CUDA context

_CARDS = (8, 16, 24, 40, 80)  # gigabytes of memory that graphics cards usually have
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8c8c8c", "#8172b3", "#64b5cd")


def count_parameters(config: Qwen2Config) -> dict[str, int]:
    """Count the parameters of a Qwen2 model by component, exactly, without building it.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Or a recipe with a ``vocab_size``, which names sizes alike.

    Returns
    -------
    dict of str to int
        ``embeddings``, ``attention`` (queries, keys and values with biases, output without),
        ``mlp`` (gate, up and down, no biases), ``norms`` (two a layer and a last one),
        ``lm_head`` (0 if it is the embedding matrix once more) and ``total``.
    """
    hidden, layers, key_value = config.hidden_size, config.num_hidden_layers, _key_width(config)
    counts = {
        "embeddings": config.vocab_size * hidden,
        "attention": layers * ((hidden + 1) * (hidden + 2 * key_value) + hidden * hidden),
        "mlp": layers * 3 * hidden * config.intermediate_size,
        "norms": (2 * layers + 1) * hidden,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: Qwen2Config, context_length: int) -> dict[str, int]:
    """Count the floating-point operations of training on one token, by component.

    Counted are the matrix products, where a multiplication and an addition are two. The backward
    pass takes twice the forward pass (a gradient for the weights, one for the input). Norms,
    activations and the embedding look-up cost memory traffic rather than arithmetic.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Or a recipe with a ``vocab_size``, which names sizes alike.
    context_length : int
        Tokens of a block. By convention attention scores are counted for the whole block, although
        a causal kernel can skip those above the diagonal.

    Returns
    -------
    dict of str to int
        ``attention_projections``, ``attention_scores``, ``mlp``, ``lm_head`` and ``total``.

    References
    ----------
    Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1, arXiv:2001.08361;
    Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, appendix F,
    arXiv:2203.15556.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    multiplications = {
        "attention_projections": layers * hidden * 2 * (hidden + _key_width(config)),
        "attention_scores": layers * 2 * context_length * hidden,
        "mlp": layers * 3 * hidden * config.intermediate_size,
        "lm_head": hidden * config.vocab_size,
    }
    flops = {name: 3 * 2 * number for name, number in multiplications.items()}
    return flops | {"total": sum(flops.values())}


def _key_width(config: Qwen2Config) -> int:
    """Return the width of all keys, or of all values; that of all queries is the model's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads * config.num_key_value_heads


def _layer_matrices(config: Qwen2Config) -> list[tuple[int, int]]:
    """Return the shapes of all matrices in the layers."""
    hidden, inner, key_value = config.hidden_size, config.intermediate_size, _key_width(config)
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    return (attention + mlp) * config.num_hidden_layers


def _muon_flops(config: Qwen2Config) -> int:
    """Count Muon's matrix products in a step: five rounds of ``4 m m n + 2 m m m`` a matrix."""
    sides = [sorted(shape) for shape in _layer_matrices(config)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)


def _training_memory(config: Qwen2Config, recipe: Recipe, hardware: Any) -> dict[str, int]:
    """Estimate the bytes of a training step by component.

    The sum is what is held when the backward pass begins, in any but the first step, without the
    kernels' scratch space and fragmentation. Weights, gradients and optimizer are float32 in mixed
    precision too; autocast makes 16-bit copies for the matrix products.

    Activations per token and layer, for width ``h``, key/value width ``k``, MLP width ``f`` and
    ``s`` bytes a value (4, or 2 in mixed precision):

    - two norms, each with input and normalised input in float32: ``2 * 2 * 4 h``;
    - their outputs as inputs of the matrices: ``2 s h`` in float32. In mixed precision each matrix
      casts its own copy, three in attention and two in the MLP: ``5 s h``;
    - queries, keys, values, and the attention's output: ``s (2 h + 2 k)``; its scores are not kept,
      since scaled dot-product attention computes them again;
    - the MLP's gate, its activation, up, and their product: ``4 s f``.

    Compiled layers keep their input and the results of matrix products and attention. On a CPU
    they recompute (see `tinytrain.modeling.compile_layers`): they keep their float32 input and the
    attention's output (``s h``, and a float32 value a head), but no copies of the matrices; what
    one layer holds while it recomputes is counted once.

    Logits take 12 bytes each: float32 log-probabilities and two float32 gradients exist together;
    and 4 more on a GPU in mixed precision, by what the guide's code was seen to take on an H200.
    With ``loss_rows`` only a slice exists, which becomes its own gradient, and the gradient of the
    output matrix waits for the rest of the backward pass.

    On a CPU, two steps of several small models measured within 3% of this where freed memory went
    back to the system at once, and up to 1.5 times this with Linux's default allocator.
    On an H200, `wiki` and `qwen-0.5b` took 1.01 to 1.12 times this.
    """
    mixed = (recipe.precision or hardware.precision) != "float32"
    size = 2 if mixed else 4
    parameters = count_parameters(config)["total"]
    hidden, inner, key_value = config.hidden_size, config.intermediate_size, _key_width(config)
    layers, tokens = config.num_hidden_layers, recipe.batch_size * recipe.context_length

    recompute = recipe.compile and not hardware.is_gpu
    if recipe.compile:
        # The input, and on a GPU two more of its size; queries and the attention's inputs and
        # output, and likewise keys and values; the output, gate, up and down products.
        floats = (4 if recompute else 12) * hidden
        per_layer = floats + size * (5 * hidden + 4 * key_value + 2 * inner)
    else:
        inputs = (5 if mixed else 2) * hidden
        per_layer = 16 * hidden + size * (inputs + 2 * hidden + 2 * key_value + 4 * inner)
    kept = layers * per_layer
    if recompute:  # the input, what attention made, and all of the layer that recomputes
        attention = size * hidden + 4 * config.num_attention_heads
        kept = layers * (4 * hidden + attention) + per_layer
    last_norm = 2 * 4 * hidden + size * hidden
    # Autocast's copies of the matrices (norms and biases are too small to matter).
    copies = size * parameters if mixed and not recompute else 0

    averages = 2 * parameters
    if recipe.optimizer == "muon":  # one average of each of the layers' matrices, not two
        averages -= sum(rows * columns for rows, columns in _layer_matrices(config))

    logits = (16 if mixed and hardware.is_gpu else 12) * tokens * config.vocab_size
    if recipe.loss_rows:
        numbers = min(recipe.loss_rows, tokens) * config.vocab_size
        in_float32 = 0 if recipe.compile else 4 * min(numbers, 2**22)
        logits = size * numbers + in_float32 + size * config.vocab_size * hidden
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 4 * averages,
        "activations": tokens * (kept + last_norm) + copies,
        "logits": logits,
    }


def larger_batches(recipe: Recipe, hardware: Any) -> Recipe:
    """Return the recipe with the blocks of a step in as few batches as half of the memory holds.

    A step learns from the same blocks, and a large GPU is idle less often. An ``Estimate`` may err,
    so the other half stays free.

    Examples
    --------
    >>> from tinytrain.hardware import KNOWN_GPUS
    >>> from tinytrain.recipes import RECIPES
    >>> for gpu in KNOWN_GPUS[0], KNOWN_GPUS[-1]:
    ...     wiki = larger_batches(RECIPES["wiki"], gpu)
    ...     print(gpu.name, wiki.batch_size, wiki.gradient_accumulation)
    T4 32 2
    H100-80G 64 1
    """
    blocks = recipe.batch_size * recipe.gradient_accumulation
    config = replace(recipe, vocab_size=recipe.vocab_size or 151_665)
    largest = recipe.batch_size
    for size in range(recipe.batch_size, blocks + 1):
        if blocks % size == 0:
            memory = _training_memory(config, replace(config, batch_size=size), hardware)
            if sum(memory.values()) <= hardware.memory / 2:
                largest = size
    return replace(recipe, batch_size=largest, gradient_accumulation=blocks // largest)


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and operations; `row` writes them for reading."""

    recipe: str
    hardware: str
    parameters: dict[str, int]
    memory: dict[str, int]  # while training, by component; "total" is their sum, or the probe's
    fits: bool  # into the memory of the hardware, and onto its disk
    tokens: int  # that are learned from
    flops: float
    seconds: float
    disk: int
    probed: bool  # whether a few real steps have corrected memory and time

    def row(self) -> dict[str, str]:
        """Return the estimate as a row of a table."""
        return {
            "recipe": self.recipe,
            "on": self.hardware,
            "parameters": f"{self.parameters['total'] / 1e6:,.1f}M",
            "memory": f"{self.memory['total'] / 1e9:.1f} GB",
            "fits": "yes" if self.fits else "no",
            "tokens": f"{self.tokens / 1e6:,.1f}M",
            "operations": f"{self.flops:.1e}",
            "time": format_seconds(self.seconds),
            "disk": f"{self.disk / 1e9:.1f} GB",
            "by": "probe" if self.probed else "estimate",
        }


def estimate(
    recipe: Recipe,
    hardware: Any,
    config: Qwen2Config | None = None,
    tokens: int | None = None,
    step_seconds: float | None = None,
    peak_memory: int | None = None,
) -> Estimate:
    """Estimate what a run takes before it starts.

    Without a probe, time is the operations over 0.4 of the hardware's peak, which may be wrong by a
    factor of two either way. With the time and the memory of a few real steps, which
    `tinytrain.runs.probe` measures, only the number of steps is left to multiply.

    Parameters
    ----------
    recipe : Recipe
        The hyperparameters of the run.
    hardware : tinytrain.hardware.Hardware
        This machine, or one of ``KNOWN_GPUS``.
    config : transformers.Qwen2Config, optional
        The model; by default that of the recipe, with as large a vocabulary as it asks for.
    tokens : int, optional
        Tokens of the training set; by default about those of the Chinese Wikipedia. They decide the
        length of a run unless ``max_steps`` does.
    step_seconds : float, optional
        Measured time of a step.
    peak_memory : int, optional
        Measured bytes of the process, or of the GPU.

    Examples
    --------
    >>> from tinytrain.hardware import KNOWN_GPUS
    >>> from tinytrain.recipes import RECIPES
    >>> estimate(RECIPES["seed"], KNOWN_GPUS[0]).fits  # the guide's model on a T4
    False
    """
    config = config or replace(recipe, vocab_size=recipe.vocab_size or 151_665)
    memory = _training_memory(config, recipe, hardware) | {"libraries": _LIBRARIES}
    memory["total"] = peak_memory or sum(memory.values())

    corpus_tokens = tokens or WIKIPEDIA_TOKENS
    steps = recipe.max_steps
    if steps <= 0:
        steps = math.ceil(recipe.epochs * corpus_tokens / recipe.tokens_per_step)
    per_token = flops_per_token(config, recipe.context_length)["total"]
    step_flops = recipe.tokens_per_step * per_token
    if recipe.optimizer == "muon":
        step_flops += _muon_flops(config)
    eval_blocks = recipe.eval_blocks or recipe.test_size * corpus_tokens // recipe.context_length
    eval_tokens = steps // recipe.eval_steps * eval_blocks * recipe.context_length
    # An evaluation is a forward pass, a third of the work.
    flops = steps * step_flops + eval_tokens * per_token / 3
    speed = step_flops / step_seconds if step_seconds else USUAL_SHARE * hardware.tflops * 1e12

    tokens_to_learn = steps * recipe.tokens_per_step
    # A checkpoint holds the weights and the optimiser; for a moment there is one more than kept.
    checkpoints = (recipe.save_total_limit + 1) * (memory["weights"] + memory["optimizer"])
    disk = checkpoints + memory["weights"] + 4 * (tokens or tokens_to_learn)  # model and blocks
    enough_disk = hardware.disk is None or disk <= hardware.disk
    return Estimate(
        recipe=recipe.name,
        hardware=hardware.name,
        parameters=count_parameters(config),
        memory=memory,
        fits=memory["total"] <= hardware.memory and enough_disk,
        tokens=tokens_to_learn,
        flops=flops,
        seconds=flops / speed,
        disk=disk,
        probed=step_seconds is not None,
    )


def plot_parameters(configs: Mapping[str, Qwen2Config]) -> Figure:
    """Draw where the parameters of models are: a bar for each name, the first on top.

    In shares, so that a small and a large model can be compared; the number follows the bar.
    """
    counts = {plot_label(name): count_parameters(config) for name, config in configs.items()}
    totals = [count.pop("total") for count in counts.values()]
    figure, axes = new_axes(7, 1.6 + 0.45 * len(counts))
    axes.grid(False)
    left = [0.0] * len(counts)
    for component, color in zip(next(iter(counts.values())), _COLORS, strict=False):
        numbers = [count[component] for count in counts.values()]
        if not any(numbers):
            continue
        widths = [100 * number / total for number, total in zip(numbers, totals, strict=True)]
        label = component.replace("_", " ")
        bars = axes.barh(list(counts), widths, left=left, color=color, label=label)
        shares = [f"{width:.0f}%" if width > 5 else "" for width in widths]
        axes.bar_label(bars, shares, label_type="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.bar_label(bars, [f"{total / 1e6:,.1f}M" for total in totals], padding=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 113), xticks=range(0, 101, 20), xlabel="share of the parameters (%)")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def plot_memory(recipe: Recipe, hardware: Any) -> Figure:
    """Draw what a training step holds in memory, beside the sizes of graphics cards.

    One bar, its colours the components of `estimate`; each card's line is green where the run fits.
    The memory of `hardware`, a `tinytrain.hardware.Hardware`, is marked.
    """
    cost = estimate(recipe, hardware)
    memory = {part: size / 1e9 for part, size in cost.memory.items()}
    total = memory.pop("total")
    here = hardware.memory / 1e9
    figure, axes = new_axes(7, 2.5)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    end = 0.0
    for color, (part, size) in zip(_COLORS, memory.items(), strict=True):
        axes.barh([0], [size], left=[end], color=color, label=f"{part} {_size(size)}")
        end += size
    last = next((card for card in _CARDS if card >= total), total)
    axes.set(xlim=(0, 1.08 * last), ylim=(-0.45, 0.8), yticks=[])
    for card in _CARDS:
        color = "#2e7d32" if total <= card else "#c62828"
        axes.axvline(card, ymax=0.85, color=color, linestyle="--", linewidth=1)
        axes.text(card, 0.6, f"{card} GB", color=color, ha="center", clip_on=True)
    axes.axvline(here, color="black", linewidth=1.5, label=f"this machine {here:.0f} GB")
    axes.set_xlabel("memory while training (GB)")
    precision, parameters = recipe.precision or hardware.precision, cost.row()["parameters"]
    figure.suptitle(f"{parameters} parameters: {_size(total)} in {precision}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.0f} MB"
