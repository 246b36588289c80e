"""The model: a Qwen2 configuration that fits, and what it costs before anything is allocated.

The model itself is transformers' ``Qwen2ForCausalLM``: what is trained here loads everywhere. What
this module adds is arithmetic. Parameters, memory and FLOPs follow from the configuration in
closed form, so that one can ask "what if" in milliseconds instead of building a model to see it
run out of memory. Parameters and FLOPs are exact; the memory of a training step depends on the
kernels too and remains an estimate.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tinytrain.recipes import Recipe

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


def recipe_config(
    recipe: Recipe, vocab_size: int | None = None, eos_token_id: int = 0
) -> Qwen2Config:
    """Return the configuration of a recipe's model.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "model" decide.
    vocab_size : int, optional
        Rows of the embedding; by default those the recipe asks for, or the words of Qwen2.5.
    eos_token_id : int
        The end-of-text token; it matters to generation, not to sizes.

    Returns
    -------
    transformers.Qwen2Config
    """
    return qwen2_config(
        vocab_size=vocab_size or recipe.vocab_size or 151_665,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        context_length=recipe.context_length,
        eos_token_id=eos_token_id,
    )


def with_width(recipe: Recipe, hidden_size: int) -> Recipe:
    """Return a recipe of another width: heads of the same size, an MLP of the same proportion.

    Parameters
    ----------
    recipe : Recipe
        Whose proportions to keep.
    hidden_size : int
        The new width, a multiple of the size of a head.

    Returns
    -------
    Recipe
        With fewer key/value heads where they would not divide the heads evenly. Its learning rate
        is the old one, though a wider model wants a lower one.

    Raises
    ------
    ValueError
        If the width is no multiple of the size of a head.

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> wide = with_width(RECIPES["seed"], 1024)
    >>> wide.num_attention_heads, wide.intermediate_size
    (16, 4096)
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


def compile_layers(model: PreTrainedModel, recompute: bool = False) -> None:
    """Let torch.compile fuse what happens inside each layer between the matrix products.

    The layers are alike, so that one compilation serves all of them: a quarter of a minute on a
    laptop, once. Afterwards a training step is faster and keeps less for the backward pass. Only
    training is compiled; evaluation and generation, with their changing lengths, run as before.
    The weights and their names stay as they are. Where compiling fails, for example for want of a
    C++ compiler, PyTorch says so and the layers run uncompiled.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One whose layers are ``model.model.layers``, such as Qwen2 or Llama. Changed in place.
    recompute : bool
        Whether the backward pass computes a layer's results again, the products of matrices among
        them, rather than keep them from the forward pass; only what attention made is kept.
    """
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    torch._dynamo.config.suppress_errors = True
    kind = type(model.model.layers[0])
    layer = kind.forward
    if recompute:
        # Compiling warns of operations in place, of which these layers have none.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_in_place)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        layer = functools.partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    compiled = torch.compile(layer)

    @functools.wraps(kind.forward)
    def forward(self, *args: Any, **kwargs: Any):
        if not self.training:
            return kind.forward(self, *args, **kwargs)
        # A cache of keys and values, which nothing reads in training, knows each layer's number and
        # would make each one compile anew.
        return compiled(self, *args, **kwargs | {"past_key_values": None})

    # A class of its own, as in tinytrain.loss: copies of the model keep their own parts.
    faster = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for layer in model.model.layers:
        layer.__class__ = faster


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Say what a layer that computes again keeps: what is small for the time that it takes."""
    from torch.utils.checkpoint import CheckpointPolicy

    keep = "attention" in str(operation)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _not_in_place(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def expand_vocabulary(
    model: Qwen2ForCausalLM, ids: Sequence[int], vocab_size: int, blocks: Sequence[Sequence[int]]
) -> Qwen2ForCausalLM:
    """Give a model that was trained with a reduced vocabulary the rows of the full one again.

    The result works with the original tokenizer, and scores the words it was trained on as the
    model did. All the rows it adds are one vector: the one that takes the least probability away
    from those words on some text. Training with all rows drives them there too, slowly.

    Parameters
    ----------
    model : transformers.Qwen2ForCausalLM
        The trained model, with tied embeddings. It stays as it is.
    ids : sequence of int
        Where each of its rows belongs, from `tinytrain.qwen.original_ids`.
    vocab_size : int
        Rows of the result.
    blocks : sequence
        Token blocks of the text, of shape (blocks, context_length): some thousand tokens, at least
        several times the model's width.

    Returns
    -------
    transformers.Qwen2ForCausalLM
        On the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If ids and rows do not fit, or the embeddings are not tied.
    """
    import torch

    rows = model.get_input_embeddings().weight.detach().float().cpu()
    if len(ids) != len(rows) or max(ids) >= vocab_size:
        raise ValueError(
            f"{len(ids)} ids up to {max(ids)} do not fit {len(rows)} rows of the model and "
            f"{vocab_size} of the result"
        )
    if not model.config.tie_word_embeddings:
        raise ValueError("expand_vocabulary is for tied embeddings, and this model's are not")
    training = model.training
    model.eval()
    with torch.no_grad():
        inputs = torch.as_tensor(blocks, device=model.device)
        hidden = model.model(input_ids=inputs).last_hidden_state.flatten(0, 1).float().cpu()
        known = torch.cat([(part @ rows.T).logsumexp(-1) for part in hidden.split(512)])
    model.train(training)

    config = copy.deepcopy(model.config)
    config.vocab_size = vocab_size
    config.bos_token_id = config.eos_token_id = ids[model.config.eos_token_id]
    full = torch.empty(vocab_size, rows.shape[1])
    full[:] = _never_written(hidden, known, max(1, vocab_size - len(ids)))
    full[torch.as_tensor(ids)] = rows
    expanded = build_model(config)
    tables = {"model.embed_tokens.weight": full, "lm_head.weight": full}
    expanded.load_state_dict(model.state_dict() | tables)
    return expanded.eval()


def _never_written(hidden: torch.Tensor, known: torch.Tensor, words: int) -> torch.Tensor:
    """Return the row that, given to so many words, adds least to the loss of all positions.

    ``hidden`` has shape (positions, width); ``known`` is the logarithm of the summed powers of the
    scores of all other words. The loss is convex in the row, so that the best one is found.
    """
    import torch

    row = torch.zeros(hidden.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([row], max_iter=200, line_search_fn="strong_wolfe")

    def added_loss() -> torch.Tensor:
        search.zero_grad()
        added = hidden @ row + math.log(words) - known
        loss = torch.nn.functional.softplus(added).mean()
        loss.backward()
        return loss

    search.step(added_loss)
    return row.detach()


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
    compiled: bool = False,
    optimizer: str = "adamw",
    recompute: bool = False,
) -> dict[str, int]:
    """Estimate the memory of a training step by component, without building the model.

    In mixed precision the weights, their gradients and the optimizer remain float32; autocast makes
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
    compiled : bool
        Whether `compile_layers` is used.
    optimizer : {"adamw", "muon"}
        Muon keeps one running average of each of the layers' matrices, AdamW two of everything.
    recompute : bool
        Whether the compiled layers keep little, as `compile_layers` says.

    Returns
    -------
    dict of str to int
        Bytes: ``weights``, ``gradients``, ``optimizer`` (running averages), ``activations``
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
    two float32 gradients exist together. With ``loss_rows`` only a slice of them exists, which
    becomes its own gradient, and the gradient of the output matrix waits for the rest of the
    backward pass. Compiled layers keep their input and the results of matrix products and
    attention, and make the rest again; with ``recompute`` only their input, in float32, and what
    attention made of it, ``s h`` and a float32 number a head, and no copies of the matrices; but
    one layer after the other then holds for a moment what it did not keep, which is counted once.

    Measured on a CPU, two steps of several small models came within 3% of this where freed memory
    went back to the system at once, and to 1.5 times this with the allocator Linux has by default.
    """
    if precision not in ("float32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r} is none of float32, bf16, fp16")
    mixed = precision != "float32"
    size = 2 if mixed else 4
    recompute = recompute and compiled
    parameters = count_parameters(config)["total"]
    hidden, tokens = config.hidden_size, batch_size * context_length
    query, key_value = _attention_widths(config)
    per_layer = (
        2 * 2 * 4 * hidden
        + (5 if mixed else 2) * size * hidden
        + size * (2 * query + 2 * key_value)
        + 4 * size * config.intermediate_size
    )
    if compiled:
        # The input; queries and the attention's inputs and output, and likewise keys and values;
        # the output, gate, up and down products.
        products = size * (3 * query + 4 * key_value + 2 * hidden + 2 * config.intermediate_size)
        per_layer = 4 * hidden + products
    kept = config.num_hidden_layers * per_layer
    if recompute:  # the input, what attention made, and all of the layer that computes again
        attention = size * query + 4 * config.num_attention_heads
        kept = config.num_hidden_layers * (4 * hidden + attention) + per_layer
    last_norm = 2 * 4 * hidden + size * hidden
    activations = tokens * (kept + last_norm)
    if mixed and not recompute:
        # Autocast's copies of the matrices (norms and biases are too small to matter).
        activations += size * parameters
    averages = 2 * parameters
    if optimizer == "muon":
        averages -= sum(rows * columns for rows, columns in _matrices(config))
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 4 * averages,
        "activations": activations,
        "logits": 12 * tokens * config.vocab_size,
    }
    if loss_rows:
        scores = min(loss_rows, tokens) * config.vocab_size
        apart = 0 if compiled else 4 * min(scores, 2**22)  # some of them in float32
        memory["logits"] = size * scores + apart + size * config.vocab_size * hidden
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


def _matrices(config: Qwen2Config) -> list[tuple[int, int]]:
    """Return the shapes of all matrices in the layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = _attention_widths(config)
    layer = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    return (layer + [(inner, hidden), (inner, hidden), (hidden, inner)]) * config.num_hidden_layers


def optimizer_flops(config: Qwen2Config, optimizer: str = "adamw") -> int:
    """Count the operations of the matrix products in one step of the optimiser.

    Parameters
    ----------
    config : transformers.Qwen2Config
        Of any size.
    optimizer : {"adamw", "muon"}
        AdamW multiplies no matrices. Muon's five rounds take ``4 m m n + 2 m m m`` each for a
        matrix of sides ``m <= n``.

    Returns
    -------
    int
    """
    if optimizer != "muon":
        return 0
    sides = [sorted(shape) for shape in _matrices(config)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)


# The Chinese Wikipedia of the guide: 524 MB of UTF-8 and JSON, in which a character takes about
# three bytes, and 0.7 tokens of Qwen2.5 a character. Known exactly once it is tokenized.
WIKIPEDIA_TOKENS = 120_000_000
USUAL_SHARE = 0.4  # of a chip's peak that training reaches, before a probe says better
LIBRARIES = 600_000_000  # bytes of Python, torch and transformers; on a GPU, of the CUDA context


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and operations; `row` writes them for reading."""

    recipe: str
    hardware: str
    parameters: dict[str, int]
    memory: dict[str, int]  # while training, by component; "total" is their sum, or the probe's
    fits: bool  # into the memory of the hardware, and onto its disk
    steps: int
    tokens: int  # that are learned from
    flops: float
    seconds: float
    disk: dict[str, int]
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
            "time": _duration(self.seconds),
            "disk": f"{self.disk['total'] / 1e9:.1f} GB",
            "by": "probe" if self.probed else "arithmetic",
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
    factor of two either way; parameters are exact. With the time and the memory of a few real steps
    (`tinytrain.steps.probe`) only the number of steps is left to multiply.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run.
    hardware : tinytrain.hardware.Hardware
        This machine, or one of ``KNOWN_GPUS``.
    config : transformers.Qwen2Config, optional
        The model; by default what the recipe says, with as many words as it asks for.
    tokens : int, optional
        Tokens of the training half; by default about those of the Chinese Wikipedia. Only used
        where epochs, not ``max_steps``, decide the length.
    step_seconds : float, optional
        Measured time of a step.
    peak_memory : int, optional
        Measured bytes of the process, or of the GPU.

    Returns
    -------
    Estimate

    Examples
    --------
    >>> from tinytrain.hardware import KNOWN_GPUS
    >>> from tinytrain.recipes import RECIPES
    >>> estimate(RECIPES["seed"], KNOWN_GPUS[0]).fits  # the guide's model on a T4
    False
    """
    config = config or recipe_config(recipe)
    parameters = count_parameters(config)
    memory = training_memory(
        config,
        recipe.batch_size,
        recipe.context_length,
        recipe.precision or hardware.precision,
        recipe.loss_rows,
        recipe.compile,
        recipe.optimizer,
        recompute=not hardware.is_gpu,
    )
    total = memory.pop("total") + LIBRARIES
    memory |= {"libraries": LIBRARIES, "total": peak_memory or total}

    if recipe.max_steps > 0:
        steps = recipe.max_steps
    else:
        steps = math.ceil(recipe.epochs * (tokens or WIKIPEDIA_TOKENS) / recipe.tokens_per_step)
    per_token = flops_per_token(config, recipe.context_length)["total"]
    step_flops = recipe.tokens_per_step * per_token + optimizer_flops(config, recipe.optimizer)
    held_out = recipe.eval_blocks or (
        recipe.test_size * (tokens or WIKIPEDIA_TOKENS) // recipe.context_length
    )
    evaluations = steps // recipe.eval_steps
    # An evaluation is a forward pass, a third of the work.
    eval_flops = evaluations * held_out * recipe.context_length * per_token / 3
    flops = steps * step_flops + eval_flops
    if step_seconds is None:
        seconds = flops / (USUAL_SHARE * hardware.tflops * 1e12)
    else:
        seconds = flops / step_flops * step_seconds
    # A checkpoint holds the weights and the optimiser; the model is kept once more at the end.
    checkpoint = memory["weights"] + memory["optimizer"]
    disk = {
        "checkpoints": (recipe.save_total_limit + 1) * checkpoint,  # the new one before the oldest
        "model": memory["weights"],
        "blocks": 4 * (tokens or steps * recipe.tokens_per_step),
    }
    disk["total"] = sum(disk.values())
    enough_disk = hardware.disk is None or disk["total"] <= hardware.disk
    return Estimate(
        recipe=recipe.name,
        hardware=hardware.name,
        parameters=parameters,
        memory=memory,
        fits=memory["total"] <= hardware.memory and enough_disk,
        steps=steps,
        tokens=steps * recipe.tokens_per_step,
        flops=flops,
        seconds=seconds,
        disk=disk,
        probed=step_seconds is not None,
    )


def predicted_loss(parameters: float, tokens: float, corpus_tokens: float = math.inf) -> float:
    """Predict the loss of a trained model from its size and its tokens, by Chinchilla's law.

    ``1.82 + 482 / parameters ** 0.348 + 2085 / tokens ** 0.366``: what cannot be learned, what the
    model is too small for, and what it has seen too little for. A text read again teaches less each
    time; sixteen times over it is worth half as much as new text.

    Parameters
    ----------
    parameters : float
        Size of the model, embeddings included.
    tokens : float
        Tokens trained on.
    corpus_tokens : float
        Different tokens there are; beyond them the text is read again.

    Returns
    -------
    float
        Nats per token. The constants were fitted to English web text, a vocabulary of 32,000 words
        and models from 44M to 16B parameters: for Chinese text, another tokenizer or a smaller
        model the number itself is off, and only which size comes out best may be leaned on.

    References
    ----------
    Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, arXiv:2203.15556; the
    constants by Besiroglu et al., "Chinchilla Scaling: A replication attempt", 2024,
    arXiv:2404.10102; the worth of repeated text by Muennighoff et al., "Scaling Data-Constrained
    Language Models", 2023, arXiv:2305.16264.
    """
    again = max(tokens / corpus_tokens - 1, 0.0)
    if again:
        tokens = corpus_tokens * (1 + 15.39 * (1 - math.exp(-again / 15.39)))
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


class Plan(NamedTuple):
    """A size of model, and what a budget of operations does with it."""

    num_hidden_layers: int
    hidden_size: int
    parameters: int
    tokens: float  # that the budget pays for
    tokens_per_parameter: float
    epochs: float  # how often the text is read
    loss: float  # see `predicted_loss`

    def row(self) -> dict[str, str]:
        """Return the plan as a row of a table."""
        return {
            "layers": str(self.num_hidden_layers),
            "width": f"{self.hidden_size:,}",
            "parameters": f"{self.parameters / 1e6:,.0f}M",
            "tokens": f"{self.tokens / 1e6:,.0f}M",
            "tokens a parameter": f"{self.tokens_per_parameter:.1f}",
            "epochs": f"{self.epochs:.1f}",
        }


def plan_sizes(
    flops: float,
    vocab_size: int = 32_768,
    context_length: int = 512,
    corpus_tokens: float = math.inf,
) -> list[Plan]:
    """Spend one budget on models of all sizes: the larger the model, the fewer tokens are left.

    Parameters
    ----------
    flops : float
        Operations to spend: seconds times those that the hardware makes in a second of training,
        which a probe tells (see `flops_per_token`).
    vocab_size, context_length : int
        Of the models.
    corpus_tokens : float
        Tokens of the text at hand.

    Returns
    -------
    list of Plan
        From 1 to 40 layers, each with one head of 64 a layer, so that the width is 64 times the
        depth; the MLP is four times as wide.

    Raises
    ------
    ValueError
        If there is nothing to spend.

    Examples
    --------
    >>> best_plan(plan_sizes(1e18)).num_hidden_layers
    10
    """
    if not flops > 0:
        raise ValueError(f"a budget of {flops} operations buys nothing; it must be above 0")
    plans = []
    for layers in range(1, 41):
        config = qwen2_config(
            vocab_size=vocab_size,
            hidden_size=64 * layers,
            intermediate_size=256 * layers,
            num_hidden_layers=layers,
            num_attention_heads=layers,
            num_key_value_heads=math.gcd(layers, 2),
            eos_token_id=0,
        )
        parameters = count_parameters(config)["total"]
        tokens = flops / flops_per_token(config, context_length)["total"]
        loss = predicted_loss(parameters, tokens, corpus_tokens)
        ratio, epochs = tokens / parameters, tokens / corpus_tokens
        plans.append(Plan(layers, 64 * layers, parameters, tokens, ratio, epochs, loss))
    return plans


def best_plan(plans: Sequence[Plan]) -> Plan:
    """Return the plan with the lowest predicted loss."""
    return min(plans, key=lambda plan: plan.loss)


def plot_plans(budgets: Mapping[str, Sequence[Plan]]) -> Figure:
    """Draw the predicted loss over the size of the model, one curve a budget, its best size marked.

    Parameters
    ----------
    budgets : mapping of str to sequence of Plan
        From `plan_sizes`; the name says what is spent.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name, plans in budgets.items():
        best = best_plan(plans)
        # A model that gets less than a token for ten parameters is off any law.
        shown = [plan for plan in plans if plan.tokens_per_parameter > 0.1]
        [line] = axes.plot(
            [plan.parameters for plan in shown], [plan.loss for plan in shown], label=name
        )
        axes.plot(best.parameters, best.loss, "o", color=line.get_color())
        size, tokens = best.parameters / 1e6, best.tokens / 1e6
        axes.annotate(
            f"{size:,.0f}M, {tokens:,.0f}M tokens",
            (best.parameters, best.loss),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("predicted loss (nats per token)")
    axes.margins(x=0.1, y=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


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


CARDS = (8, 16, 24, 40, 80)  # gigabytes of memory that graphics cards usually have


def plot_memory(recipe: Recipe, hardware: Any, config: Qwen2Config | None = None) -> Figure:
    """Draw what a step of training holds in memory, beside the sizes of graphics cards.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run.
    hardware : tinytrain.hardware.Hardware
        This machine, whose memory is marked and whose precision is assumed.
    config : transformers.Qwen2Config, optional
        The model; by default what the recipe says.

    Returns
    -------
    matplotlib.figure.Figure
        One bar, its colours the components of `estimate`, and a line for each size: green where
        the run fits. The axis ends at the next larger card.
    """
    from matplotlib.figure import Figure

    cost = estimate(recipe, hardware, config)
    memory = {part: size / 1e9 for part, size in cost.memory.items()}
    total = memory.pop("total")
    here = hardware.memory / 1e9

    figure = Figure(figsize=(7, 2.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    end = 0.0
    for part, size in memory.items():
        label = f"{part} {_size(size * 1e9)}"
        axes.barh([0], [size], left=[end], color=_MEMORY_COLORS[part], label=label)
        end += size
    last = next((card for card in CARDS if card >= total), total)
    axes.set(xlim=(0, 1.08 * last), ylim=(-0.75, 0.8), yticks=[])
    for card in CARDS:
        color = "#2e7d32" if total <= card else "#c62828"
        axes.axvline(card, ymax=0.85, color=color, linestyle="--", linewidth=1)
        axes.text(card, 0.6, f"{card} GB", color=color, ha="center", clip_on=True)
    axes.axvline(here, ymax=0.85, color="black", linewidth=1.5)
    beyond = here > 1.08 * last
    axes.text(
        min(here, 1.08 * last),
        -0.6,
        f" this machine: {here:.0f} GB {'→' if beyond else ''}",
        ha="right" if here > last / 2 else "left",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    axes.set_xlabel("memory while training (GB)")
    axes.spines[["top", "left", "right"]].set_visible(False)
    precision = recipe.precision or hardware.precision
    millions = cost.parameters["total"] / 1e6
    figure.suptitle(f"{millions:,.1f}M parameters: {_size(total * 1e9)} in {precision}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


_MEMORY_COLORS = {
    "weights": "#4c72b0",
    "gradients": "#64b5cd",
    "optimizer": "#8172b3",
    "activations": "#55a868",
    "logits": "#dd8452",
    "libraries": "#8c8c8c",
}
