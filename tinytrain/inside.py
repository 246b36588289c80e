"""Qwen2 written out: the model of notebook 04 in plain PyTorch, to be read from top to bottom.

The parts that have weights are classes; the two that have none, `rotate` and `attend`, are
functions, which you can replace by your own. Weights have the names of transformers, so `write_out`
fills them from a trained model; the logits agree but for rounding.

References: Vaswani et al., arXiv:1706.03762 (attention); Zhang and Sennrich, arXiv:1910.07467
(RMSNorm); Su et al., arXiv:2104.09864 (rotary positions); Ainslie et al., arXiv:2305.13245 (shared
keys and values); Shazeer, arXiv:2002.05202 (SwiGLU); Yang et al., arXiv:2407.10671 (Qwen2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

Cache = dict[str, Tensor]  # keys and values of a layer so far; empty before the first token


@dataclass
class Trace:
    """What a forward pass writes down when it is given one of these."""

    # After the embedding and after each layer: (batch, tokens, width).
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)  # of each layer, as `attend` returns it


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then multiply each of its values by a weight."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon  # so that a vector of zeros is not divided by zero

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape, whose last dimension was normalised."""
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.epsilon))


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Encode positions in queries or keys, by rotation.

    Values ``i`` and ``i + size / 2`` of a head are a point in the plane, which is turned by
    ``position * theta ** (-2 * i / size)``. A query times a key then depends on how far apart the
    two are, and not on where they are: if both are turned further, the angle between them stays.

    ``x`` has the shape (batch, heads, tokens, size) and ``positions`` the shape (tokens,), from 0
    at the first token of a text. The larger ``theta``, the slower the slowest points turn.
    """
    size = x.shape[-1]
    speeds = theta ** (-torch.arange(0, size, 2, device=x.device) / size)
    angles = positions[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Let each token take a weighted mean of the values of all tokens up to itself.

    Parameters
    ----------
    queries : Tensor
        Of shape (batch, heads, tokens, size): of the last tokens of a text, or of all.
    keys, values : Tensor
        Of shape (batch, key/value heads, all tokens, size); several heads in a row share one.

    Returns
    -------
    tuple of Tensor
        The means, of the shape of the queries, and the weights, of shape (batch, heads, tokens,
        all tokens). Weights are positive and sum to 1 for each token.
    """
    tokens, all_tokens, size = queries.shape[2], keys.shape[2], queries.shape[3]
    sharing = queries.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(sharing, dim=1)
    values = values.repeat_interleave(sharing, dim=1)
    scores = queries @ keys.transpose(2, 3) / size**0.5
    visible = torch.ones(tokens, all_tokens, dtype=torch.bool, device=scores.device)
    visible = visible.tril(all_tokens - tokens)  # the causal mask: no token sees those after it
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return weights @ values, weights


class Attention(nn.Module):
    """Grouped-query attention: each head has its queries, groups of heads share keys and values."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        width = config.hidden_size
        self.size = width // config.num_attention_heads  # of a head
        self.theta = config.rope_parameters["rope_theta"]
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.size)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.size)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Cache, trace: Trace | None) -> Tensor:
        """Return what each token gathers, of the shape of x; keys and values go to the cache."""

        def by_head(vectors: Tensor) -> Tensor:  # to (batch, heads, tokens, size)
            return vectors.unflatten(2, (-1, self.size)).transpose(1, 2)

        queries, keys, values = (by_head(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        start = cache["keys"].shape[2] if cache else 0
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        queries = rotate(queries, positions, self.theta)
        keys = rotate(keys, positions, self.theta)
        if cache:
            keys = torch.cat([cache["keys"], keys], dim=2)
            values = torch.cat([cache["values"], values], dim=2)
        cache.update(keys=keys, values=values)
        means, weights = attend(queries, keys, values)
        if trace is not None:
            trace.attention.append(weights)
        return self.o_proj(means.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The MLP: a wider vector, multiplied by a gate, and back to the width of the model."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x; each token is worked on by itself."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each with a norm before it, each added to what came in."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cache: Cache, trace: Trace | None) -> Tensor:
        """Return a tensor of the shape of x: (batch, tokens, width)."""
        x = x + self.self_attn(self.input_layernorm(x), cache, trace)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The whole model, from token ids to logits.

    Sliding windows and scaled rotary positions are not written out here, and are a ValueError.
    """

    def __init__(self, config: Qwen2Config):
        super().__init__()
        rope, activation = config.rope_parameters["rope_type"], config.hidden_act
        if (config.model_type, rope, activation) != ("qwen2", "default", "silu"):
            raise ValueError(f"no plain Qwen2, but {config.model_type} with {rope}, {activation}")
        if "sliding_attention" in config.layer_types:
            raise ValueError("a layer of this model has a sliding window, which is left out here")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, ids: Tensor, cache: list[Cache] | None = None, trace: Trace | None = None
    ) -> Tensor:
        """Return the logits, of shape (batch, tokens, vocabulary), for ids of (batch, tokens).

        With a cache from `new_cache`, the ids go on where those before have ended.
        """
        x = self.embed_tokens(ids)
        for layer, layer_cache in zip(self.layers, cache or self.new_cache(), strict=True):
            if trace is not None:
                trace.hidden.append(x)
            x = layer(x, layer_cache, trace)
        if trace is not None:
            trace.hidden.append(x)
        return self.lm_head(self.norm(x))

    def new_cache(self) -> list[Cache]:
        """Return an empty cache for each layer."""
        return [{} for _ in self.layers]


def write_out(model: Qwen2ForCausalLM) -> Qwen2:
    """Return a model of transformers as a `Qwen2`, on its device, with a copy of its weights."""
    plain = Qwen2(model.config).to(model.device, model.dtype)
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    plain.load_state_dict(weights)  # raises if a weight is missing or left over
    return plain.eval()
