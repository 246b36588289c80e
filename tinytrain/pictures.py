"""Pictures of a model's inside: its parts as a diagram, and what its heads attend to.

They are drawn from the model itself, a `tinytrain.inside.Qwen2`, so that they fit any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinytrain.common import chinese_font, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor, nn

_BLUE, _ORANGE, _GREEN, _GREY = "#dbe5f3", "#fbe3d2", "#dcefdd", "#ececec"


def draw_model(model: nn.Module) -> Figure:
    """Draw the parts of a model from input (below) to output (above), with their parameters.

    It is a `tinytrain.inside.Qwen2`; only the shapes of its weights are looked at.
    """
    from matplotlib.patches import Rectangle

    config, layer, layers = model.config, model.layers[0], len(model.layers)
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    tied = config.tie_word_embeddings
    figure, axes = new_axes(7, 6)
    axes.set(xlim=(-0.5, 7.6), ylim=(0.3, 12.2))
    axes.set_axis_off()
    total = sum(weight.numel() for weight in model.parameters())  # a tied matrix counts once
    figure.suptitle(f"{total:,} parameters")

    attention = f"attention: {heads} heads of {width // heads},\n{shared} pairs of keys and values"
    attention = attention if shared > 1 else attention.replace("pairs", "pair")
    output = "output: the embedding again" if tied else f"output: {width:,} → {vocab:,}"
    _box(axes, 1.4, f"embedding: {vocab:,} × {width:,}", _BLUE, _count(model.embed_tokens))
    _box(axes, 3.1, "RMSNorm", _GREY, _count(layer.input_layernorm, layers))
    _box(axes, 4.3, attention, _ORANGE, _count(layer.self_attn, layers), height=1)
    _box(axes, 6.5, "RMSNorm", _GREY, _count(layer.post_attention_layernorm, layers))
    swiglu = f"SwiGLU: {width:,} → {inner:,} → {width:,}"
    _box(axes, 7.6, swiglu, _GREEN, _count(layer.mlp, layers))
    _box(axes, 9.8, "RMSNorm", _GREY, _count(model.norm))
    _box(axes, 10.9, output, _BLUE, "" if tied else _count(model.lm_head))

    axes.text(3, 0.5, "token ids", ha="center", va="center")
    axes.text(3, 11.9, "logits", ha="center", va="center")
    stops = (0.7, 1.1), (1.7, 2.8), (3.4, 3.8), (4.8, 5.2), (5.6, 6.2)
    stops += (6.8, 7.3), (7.9, 8.3), (8.7, 9.5), (10.1, 10.6), (11.2, 11.65)
    for start, end in stops:
        axes.annotate("", (3, end), (3, start), arrowprops={"arrowstyle": "-|>", "color": "black"})
    for start, end in ((2.5, 5.4), (5.85, 8.5)):  # around a norm and what follows it
        axes.plot([3, 0.6, 0.6, 2.75], [start, start, end, end], color="black", linewidth=1)
        axes.text(3, end, "+", ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
    frame = {"fill": False, "linestyle": "--", "edgecolor": "#777777"}
    axes.add_patch(Rectangle((0.2, 2.2), 5.3, 6.75, **frame))
    axes.text(-0.1, 5.5, f"{layers} layers", rotation=90, ha="center", va="center")
    return figure


def _count(part: nn.Module, times: int = 1) -> str:
    number = f"{sum(weight.numel() for weight in part.parameters()):,}"
    return number if times == 1 else f"{times} × {number}"


def _box(
    axes: Axes, middle: float, text: str, color: str, parameters: str, height: float = 0.6
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((1, middle - height / 2), 4, height, facecolor=color, edgecolor="k"))
    axes.text(3, middle, text, ha="center", va="center")
    axes.text(7.5, middle, parameters, ha="right", va="center", family="monospace")


def plot_attention(attention: Sequence[Tensor], pieces: Sequence[tuple[str, int]]) -> Figure:
    """Draw what every head attends to: a square for each, rows look at columns.

    The weights of each layer have the shape (1, heads, tokens, tokens), as in
    `tinytrain.inside.Trace`; the pieces are tokens with their ids, which take the tokens' place
    where no font has Chinese characters.
    """
    font = chinese_font()
    readable = [text if font or text.isascii() else str(number) for text, number in pieces]
    style = {"fontsize": 8, "parse_math": False}
    heads = attention[0].shape[1]
    size = min(max(1.6, 0.26 * len(pieces)), 16 / heads)  # inches: no wider than a page
    width, height = 1 + size * heads, 1 + size * len(attention)
    figure = new_figure(width, height, dpi=100, layout="constrained")
    grid = figure.subplots(len(attention), heads, sharex=True, sharey=True, squeeze=False)
    for layer, row in enumerate(grid, 1):
        for head, axes in enumerate(row, 1):
            weights = attention[layer - 1][0, head - 1].cpu()
            image = axes.imshow(weights, vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
            axes.set_xticks(range(len(pieces)), readable, rotation=90, **style)
            axes.set_yticks(range(len(pieces)), readable, **style)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention (a row sums to 1)")
    return figure
