"""The model: a Qwen2 configuration that fits, and what it costs before anything is allocated.

The model itself is transformers' ``Qwen2ForCausalLM``: what is trained here loads everywhere. What
this module adds is arithmetic. Parameters, memory and FLOPs follow from the configuration in
closed form, so that one can ask "what if" in milliseconds instead of building a model to see it
run out of memory. Parameters and FLOPs are exact; the memory of a training step depends on the
kernels too and remains an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

QWEN2_5_0_5B: dict[str, Any] = {
    "vocab_size": 151_936,  # rows of the embedding: 151,665 words, rounded up to 128 x 1,187
    "hidden_size": 896,  # numbers that stand for one token inside the model
    "intermediate_size": 4864,  # width of the MLP in each layer
    "num_hidden_layers": 24,
    "num_attention_heads": 14,  # heads of 896 / 14 = 64 numbers
    "num_key_value_heads": 2,  # 7 query heads share each key and value (grouped-query attention)
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,  # the longest text the model was trained on, in tokens
    "rope_theta": 1_000_000.0,  # base of the rotary position encoding; large for long texts
    "rms_norm_eps": 1e-6,  # keeps the normalisation from dividing by zero
    "initializer_range": 0.02,  # standard deviation of the initial weights
    "attention_dropout": 0.0,  # with more text than one can repeat, nothing is memorised
    "tie_word_embeddings": True,  # one matrix reads tokens in and predicts them out
    "use_sliding_window": False,  # every token sees all tokens before it
    "sliding_window": 32_768,
    "max_window_layers": 24,
    "bos_token_id": 151_643,  # <|endoftext|>
    "eos_token_id": 151_643,  # <|endoftext|>
    "use_cache": True,  # keep keys and values while generating
}
"""The configuration of Qwen2.5-0.5B, under the names of its ``config.json``."""


def qwen2_config(
    vocab_size: int,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int = 2,
    context_length: int = 512,
    eos_token_id: int,
    tie_word_embeddings: bool = True,
) -> Qwen2Config:
    """Return the Qwen2.5-0.5B configuration in another size.

    ``AutoConfig.from_pretrained(parent, num_hidden_layers=12)`` looks the same, but expands the
    parent to 24 ``layer_types`` before it sets the 12 layers, so that the model trains and then
    fails when it is first saved. Here the configuration is built for its layers from the start.

    Parameters
    ----------
    vocab_size : int
        Rows of the embedding: at least ``len(tokenizer)``.
    hidden_size : int
        Width of the model; a multiple of ``2 * num_attention_heads``.
    intermediate_size : int
        Width of the MLP in each layer.
    num_hidden_layers : int
        Layers.
    num_attention_heads : int
        Query heads; a multiple of ``num_key_value_heads``.
    num_key_value_heads : int
        Heads of keys and values, each shared by several query heads.
    context_length : int
        Tokens of a training block. Becomes ``max_position_embeddings``. It has no weights (the
        positions are rotations), but tools that serve the model read it as what the model can
        do, and further than this it was never trained. (``n_ctx`` is GPT-2's name; Qwen2 has no
        such field and ignores it.)
    eos_token_id : int
        The end-of-text token. It stands between documents, so it also begins a text (bos). There
        is no padding token: Qwen2 starts that row of the embedding at zero and gives it no
        gradient as an input, so that ``pad = eos`` would leave a token unlearned.
    tie_word_embeddings : bool
        Whether input and output share one matrix.

    Returns
    -------
    transformers.Qwen2Config

    Raises
    ------
    ValueError
        If a number is not positive or two of them do not fit together.

    Examples
    --------
    >>> config = qwen2_config(151_665, hidden_size=512, intermediate_size=2048,
    ...                       num_hidden_layers=12, num_attention_heads=8, eos_token_id=151_643)
    >>> count_parameters(config)["total"]
    123287552
    """
    from transformers import Qwen2Config

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
    }
    for name, value in {**sizes, "context_length": context_length}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size {hidden_size} cannot be shared out among {num_attention_heads} "
            "attention heads; make it a multiple of num_attention_heads"
        )
    if (hidden_size // num_attention_heads) % 2:
        raise ValueError(
            f"heads of {hidden_size // num_attention_heads} numbers cannot be rotated in pairs; "
            "choose hidden_size / num_attention_heads even (64 is usual)"
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"{num_attention_heads} attention heads cannot share {num_key_value_heads} key/value "
            "heads evenly; make num_attention_heads a multiple of num_key_value_heads"
        )
    if not 0 <= eos_token_id < vocab_size:
        raise ValueError(
            f"eos_token_id {eos_token_id} is outside the vocabulary of {vocab_size}; "
            "vocab_size must be at least len(tokenizer)"
        )
    return Qwen2Config(
        **QWEN2_5_0_5B
        | sizes
        | {
            # layer_types is left out: the constructor makes one for each of our layers.
            "max_window_layers": num_hidden_layers,
            "max_position_embeddings": context_length,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
        }
    )


def build_model(config: Qwen2Config, seed: int = 0) -> Qwen2ForCausalLM:
    """Build a model with random weights in float32.

    The same seed gives the same weights, and the global random state stays as it was.

    Parameters
    ----------
    config : transformers.Qwen2Config
        For example from `qwen2_config`.
    seed : int
        Decides the weights.

    Returns
    -------
    transformers.Qwen2ForCausalLM
        On the CPU, in training mode. Mixed precision casts on the fly: the weights that are
        trained stay float32, in which a small update is not rounded away.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU alone; GPUs keep their state
        # Not AutoModelForCausalLM.from_config: where a configuration says bfloat16, as the one
        # published with Qwen2.5-0.5B does, it makes the weights themselves bfloat16.
        model = Qwen2ForCausalLM(config)
    # Only for generating: texts that end earlier than others are filled up with end-of-text.
    model.generation_config.pad_token_id = config.eos_token_id
    return model


def count_parameters(config: Qwen2Config) -> dict[str, int]:
    """Count the parameters of a Qwen2 model by component, exactly, without building it.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Of any size.

    Returns
    -------
    dict of str to int
        ``embeddings``, ``attention`` (queries, keys and values with biases, output without),
        ``mlp`` (gate, up and down, no biases), ``norms`` (two a layer and a last one),
        ``lm_head`` (0 if it is the embedding matrix once more) and ``total``.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query, key_value = _attention_widths(config)
    counts = {
        "embeddings": config.vocab_size * hidden,
        "attention": layers * ((hidden + 1) * (query + 2 * key_value) + query * hidden),
        "mlp": layers * 3 * hidden * config.intermediate_size,
        "norms": (2 * layers + 1) * hidden,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
    }
    return counts | {"total": sum(counts.values())}


def training_memory(
    config: Qwen2Config,
    batch_size: int,
    context_length: int,
    precision: str = "float32",
    loss_rows: int | None = None,
) -> dict[str, int]:
    """Estimate the memory of a training step by component, without building the model.

    For AdamW, without gradient checkpointing. In
    mixed precision the weights, their gradients and the optimizer remain float32; autocast makes
    half-precision copies for the matrix products. The sum is what is held when the backward pass
    begins, in any but the first step. Not counted: the CUDA context or Python's libraries (some
    hundred MB), the kernels' scratch space, fragmentation.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Of any size.
    batch_size : int
        Blocks that pass through the device at once (accumulation costs no memory).
    context_length : int
        Tokens of a block.
    precision : {"float32", "bf16", "fp16"}
        What the matrix products are computed in.
    loss_rows : int, optional
        Positions that `tinytrain.loss` scores at once; None for the loss as ``Qwen2ForCausalLM``
        computes it, from all scores.

    Returns
    -------
    dict of str to int
        Bytes: ``weights``, ``gradients``, ``optimizer`` (AdamW's two averages), ``activations``
        (what the forward pass keeps for the backward pass), ``logits`` (a score for every word of
        the vocabulary at every position, with what the loss makes of it) and ``total``.

    Raises
    ------
    ValueError
        If the precision is none of the three.

    Notes
    -----
    Activations per token and layer, for width ``h``, key/value width ``k``, MLP width ``f`` and
    ``s`` bytes a number (4, or 2 in mixed precision):

    - two norms, each with input and normalised input in float32: ``2 * 2 * 4 h``;
    - their outputs as inputs of the matrices: ``2 s h`` in float32. In mixed precision each matrix
      casts its own copy, three in attention and two in the MLP: ``5 s h``;
    - queries, keys, values, and the attention's output: ``s (2 h + 2 k)``;
    - the MLP's gate, its activation, up, and their product: ``4 s f``.

    Attention scores are not kept (scaled dot-product attention computes them anew). Logits take 12
    bytes each in all precisions: when the backward pass begins, the float32 log-probabilities and
    two float32 gradients exist together. With ``loss_rows`` a slice takes 8 (a score and its
    gradient), and the gradient of the output matrix waits for the rest of the backward pass.

    Measured on a CPU, two steps of several small models came within 3% of this where freed memory
    went back to the system at once, and to 1.5 times this with the allocator Linux has by default.
    """
    if precision not in ("float32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r} is none of float32, bf16, fp16")
    mixed = precision != "float32"
    size = 2 if mixed else 4
    parameters = count_parameters(config)["total"]
    hidden, tokens = config.hidden_size, batch_size * context_length
    query, key_value = _attention_widths(config)
    per_layer = (
        2 * 2 * 4 * hidden
        + (5 if mixed else 2) * size * hidden
        + size * (2 * query + 2 * key_value)
        + 4 * size * config.intermediate_size
    )
    last_norm = 2 * 4 * hidden + size * hidden
    activations = tokens * (config.num_hidden_layers * per_layer + last_norm)
    if mixed:  # autocast's copies of the matrices (norms and biases are too small to matter)
        activations += size * parameters
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 2 * 4 * parameters,
        "activations": activations,
        "logits": 12 * tokens * config.vocab_size,
    }
    if loss_rows:
        slice_ = 8 * min(loss_rows, tokens) * config.vocab_size
        memory["logits"] = slice_ + 4 * config.vocab_size * hidden
    return memory | {"total": sum(memory.values())}


def flops_per_token(config: Qwen2Config, context_length: int) -> dict[str, int]:
    """Count the floating-point operations of training on one token, by component.

    Those of the matrix products, where a multiplication and an addition are two. The backward pass
    takes twice the forward pass (a gradient for the weights, one for the input), so all is three
    times the forward pass. Norms, activations and the embedding look-up are left out: they cost
    memory traffic, not arithmetic.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Of any size.
    context_length : int
        Tokens of a block. Scores are counted for the whole block, as is the convention, although
        a causal kernel can skip the half above the diagonal.

    Returns
    -------
    dict of str to int
        ``attention_projections``, ``attention_scores``, ``mlp``, ``lm_head`` and ``total``.

    References
    ----------
    J. Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1,
    arXiv:2001.08361. J. Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022,
    appendix F, arXiv:2203.15556.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query, key_value = _attention_widths(config)
    multiplications = {
        "attention_projections": layers * hidden * (2 * query + 2 * key_value),
        "attention_scores": layers * 2 * context_length * query,
        "mlp": layers * 3 * hidden * config.intermediate_size,
        "lm_head": hidden * config.vocab_size,
    }
    flops = {name: 3 * 2 * number for name, number in multiplications.items()}
    return flops | {"total": sum(flops.values())}


def _attention_widths(config: Qwen2Config) -> tuple[int, int]:
    """Return the width of all queries and that of all keys (or values)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head


def expected_initial_loss(vocab_size: int) -> float:
    """Return the loss of a model that holds all words for equally likely: ln(vocab_size), in nats.

    Parameters
    ----------
    vocab_size : int
        Words to choose from.

    Returns
    -------
    float

    Examples
    --------
    >>> round(expected_initial_loss(151_665), 2)
    11.93
    """
    return math.log(vocab_size)


def initial_loss(
    model: PreTrainedModel, input_ids: torch.Tensor | Sequence[Sequence[int]]
) -> float:
    """Return the mean cross-entropy of a model on some blocks, without training on them.

    For an untrained model it should lie near `expected_initial_loss`, a little above it: random
    scores that vary by ``sigma`` add about ``sigma ** 2 / 2``. Much more than that points at a
    mistake in the initial weights, much less at one in the labels.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model; its mode (training or evaluation) is kept.
    input_ids : torch.Tensor or sequence of sequence of int
        Token ids of shape (blocks, context_length). A few blocks will do.

    Returns
    -------
    float
        In nats per token.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            losses = [
                # One block at a time, because the scores over a large vocabulary fill the memory.
                model(input_ids=block[None], labels=block[None]).loss.item()
                for block in torch.as_tensor(input_ids, device=model.device).long()
            ]
    finally:
        model.train(was_training)
    return sum(losses) / len(losses)


def plot_parameters(configs: Qwen2Config | Mapping[str, Qwen2Config]) -> Figure:
    """Draw where the parameters of one or several models are.

    Parameters
    ----------
    configs : transformers.Qwen2Config or mapping of str to transformers.Qwen2Config
        One model, or several by name; the first is drawn on top.

    Returns
    -------
    matplotlib.figure.Figure
        A bar for each model, its colours the components, in millions of parameters.
    """
    from matplotlib.figure import Figure

    if not isinstance(configs, Mapping):
        configs = {"model": configs}
    counts = {name: count_parameters(config) for name, config in configs.items()}
    largest = max(count["total"] for count in counts.values())

    figure = Figure(figsize=(7, 1.6 + 0.45 * len(counts)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    left = dict.fromkeys(counts, 0.0)
    for component, color in _COLORS.items():
        widths = [count[component] / 1e6 for count in counts.values()]
        if not any(widths):
            continue
        label = component.replace("_", " ")
        axes.barh(list(counts), widths, left=list(left.values()), color=color, label=label)
        for row, (name, width) in enumerate(zip(counts, widths, strict=True)):
            share = width * 1e6 / counts[name]["total"]
            if width * 1e6 > 0.06 * largest:  # narrower bars have no room for a number
                middle = left[name] + width / 2
                axes.text(middle, row, f"{share:.0%}", ha="center", va="center", color="white")
            left[name] += width
    for row, count in enumerate(counts.values()):
        total = count["total"] / 1e6
        axes.text(total, row, f"  {total:,.1f}M", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, largest / 1e6 * 1.15)  # room for the totals
    axes.set_xlabel("parameters (millions)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


_COLORS = {
    "embeddings": "#4c72b0",
    "attention": "#dd8452",
    "mlp": "#55a868",
    "norms": "#8c8c8c",
    "lm_head": "#8172b3",
}
