"""Sliders and boxes over functions of the other modules: move one, and see what changes.

Nothing is computed here. Each explorer shows what one plain call returns, and that call stands in
its docstring, for those who read without a browser and for programs. Pictures are replaced in
place, since a drawing that comes and goes flickers; where drawing takes longer than a slider
moves, it waits until the slider is let go. Only what ipywidgets 7 (Colab) and 8 share is used.
Whatever text comes from outside, a model's too, is escaped before it becomes HTML.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    from ipywidgets import HTML, VBox, Widget
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def memory_explorer(recipe: Recipe, hardware: Any = None, tokens: int | None = None) -> VBox:
    """Show what a model's sizes cost: parameters, memory by component, and time on several cards.

    Without a browser: ``plot_memory(recipe, hardware)`` and ``estimate(recipe, hardware).row()`` of
    `tinytrain.costs`, for a recipe changed with ``dataclasses.replace``.

    Parameters
    ----------
    recipe : Recipe
        Where the sliders stand at first, and all that they do not change.
    hardware : tinytrain.hardware.Hardware, optional
        This machine; by default it is measured, which takes a second.
    tokens : int, optional
        As for `tinytrain.costs.estimate`.

    Returns
    -------
    ipywidgets.VBox
    """
    import ipywidgets as ipw

    from tinytrain.costs import estimate, plot_memory
    from tinytrain.hardware import KNOWN_GPUS, this_hardware
    from tinytrain.recipes import with_width

    here = hardware or this_hardware()
    head = recipe.hidden_size // recipe.num_attention_heads
    words = recipe.vocab_size or 151_665
    controls = {
        "num_hidden_layers": _slider(
            ipw.IntSlider, "layers", recipe.num_hidden_layers, min=1, max=48
        ),
        "hidden_size": _slider(
            ipw.IntSlider, "width", recipe.hidden_size, min=head, max=32 * head, step=head
        ),
        "vocab_size": _choice("vocabulary", words, [*(2**n for n in range(10, 18)), 151_665]),
        "context_length": _choice("context", recipe.context_length, (2**n for n in range(5, 14))),
        "batch_size": _choice("batch", recipe.batch_size, (2**n for n in range(8))),
        "loss_rows": ipw.Checkbox(
            description="the loss in slices", value=bool(recipe.loss_rows), indent=False
        ),
    }
    picture, table = ipw.Image(format="png"), ipw.HTML()

    def show(hidden_size: int, loss_rows: bool, **sizes: int) -> None:
        rows = (recipe.loss_rows or 512) if loss_rows else None
        changed = replace(with_width(recipe, hidden_size), loss_rows=rows, **sizes)
        picture.value = _png(plot_memory(changed, here))
        costs = [estimate(changed, card, tokens=tokens).row() for card in (here, *KNOWN_GPUS)]
        table.value = _table(costs, ("on", "memory", "fits", "time"))

    problem = _whenever_moved(controls, show)
    return ipw.VBox([_in_rows(controls.values()), problem, picture, table])


def token_explorer(
    tokenizers: Mapping[str, PreTrainedTokenizerFast], text: str = "法国的首都是巴黎。"
) -> VBox:
    """Show what becomes of a text in several tokenizers, while it is typed.

    Without a browser: ``show_tokens(tokenizer, text)`` of `tinytrain.tokenization`, or
    ``HTML(colour_tokens(tokenizer, text))``.

    Parameters
    ----------
    tokenizers : mapping of str to transformers.PreTrainedTokenizerFast
        By the name that stands above the tokens; of a byte-level kind.
    text : str
        What stands in the box at first.

    Returns
    -------
    ipywidgets.VBox
    """
    import ipywidgets as ipw

    from tinytrain.tokenization import colour_tokens, count_tokens

    box = ipw.Textarea(description="text", value=text, rows=3, layout=ipw.Layout(width="98%"))
    shown = ipw.HTML()

    def show(text: str) -> None:
        shown.value = "".join(
            f"<div><b>{html.escape(name)}</b>: {count_tokens(tokenizer, text)}</div>"
            + colour_tokens(tokenizer, text)
            for name, tokenizer in tokenizers.items()
        )

    problem = _whenever_moved({"text": box}, show)
    return ipw.VBox([box, problem, shown])


def learning_rate_explorer(recipe: Recipe, steps: int) -> VBox:
    """Show how the learning rate goes over a run.

    Without a browser: ``plot_learning_rate(recipe, steps)`` of `tinytrain.training`.

    Parameters
    ----------
    recipe : Recipe
        Where the controls stand at first.
    steps : int
        Steps of the run, from `tinytrain.training.total_steps`.

    Returns
    -------
    ipywidgets.VBox
    """
    import ipywidgets as ipw

    from tinytrain.training import plot_learning_rate

    kinds = ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"]
    kinds += [recipe.lr_scheduler] if recipe.lr_scheduler not in kinds else []
    lengths = [n * 10**power for power in range(1, 5) for n in (1, 2, 5)]
    controls = {
        "lr_scheduler": ipw.Dropdown(
            description="schedule", options=kinds, value=recipe.lr_scheduler, **_LOOK
        ),
        "learning_rate": ipw.FloatLogSlider(
            description="peak",
            value=recipe.learning_rate,
            min=-6,  # powers of ten
            max=-1,
            step=0.05,
            readout_format=".2g",
            continuous_update=False,
            **_LOOK,
        ),
        "warmup_steps": _slider(ipw.IntSlider, "warm-up", recipe.warmup_steps, min=0, max=1000),
        "steps": _choice("steps", steps, lengths),
    }
    picture = ipw.Image(format="png")

    def show(steps: int, **changes: Any) -> None:
        picture.value = _png(plot_learning_rate(replace(recipe, **changes), steps))

    problem = _whenever_moved(controls, show)
    return ipw.VBox([_in_rows(controls.values()), problem, picture])


def playground(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str = "", seed: int = 0
) -> VBox:
    """Let the model go on from a prompt, with the knobs of sampling at hand.

    Without a browser: ``generate(model, tokenizer, prompt, ...)`` of `tinytrain.evaluation`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    prompt : str
        What stands in the box at first.
    seed : int
        The seed at first; the same one writes the same text again.

    Returns
    -------
    ipywidgets.VBox
    """
    import ipywidgets as ipw

    from tinytrain.evaluation import generate

    box = ipw.Textarea(description="prompt", value=prompt, rows=2, layout=ipw.Layout(width="98%"))
    knobs = {
        "temperature": _slider(ipw.FloatSlider, "temperature", 0.8, min=0, max=2, step=0.05),
        "top_k": _slider(ipw.IntSlider, "top-k (0: all)", 0, min=0, max=200),
        "top_p": _slider(ipw.FloatSlider, "top-p", 0.95, min=0.05, max=1, step=0.05),
        "repetition_penalty": _slider(
            ipw.FloatSlider, "repetition penalty", 1.0, min=1, max=2, step=0.05
        ),
        "max_new_tokens": _slider(ipw.IntSlider, "length (tokens)", 60, min=1, max=500),
        "seed": ipw.IntText(description="seed", value=seed, **_LOOK),
    }
    button = ipw.Button(description="Write", icon="pencil", button_style="primary")
    problem, shown = ipw.HTML(), ipw.HTML()

    def write(_: Any) -> None:
        begin, pieces = box.value, []

        def show(piece: str) -> None:
            pieces.append(piece)
            shown.value = _continued(begin, "".join(pieces))

        button.disabled, problem.value, shown.value = True, "", ""
        try:
            values = {name: knob.value for name, knob in knobs.items()}
            shown.value = _continued(
                begin, generate(model, tokenizer, begin, on_text=show, **values)
            )
        except Exception as error:  # a traceback would end in a log that nobody sees
            problem.value = _line(error)
        finally:
            button.disabled = False

    button.on_click(write)
    return ipw.VBox([box, _in_rows(knobs.values()), button, problem, shown])


# Two controls fit in a row even beside the open side bar of a small screen.
_LOOK = {"style": {"description_width": "120px"}, "layout": {"width": "325px"}}


def _slider(kind: type[Widget], description: str, value: float, **range_: Any) -> Widget:
    """Return a slider that tells its value when it is let go, long enough to hold the first one."""
    range_["max"] = max(range_["max"], value)
    return kind(description=description, value=value, continuous_update=False, **_LOOK, **range_)


def _choice(description: str, value: int, options: Iterable[int]) -> Widget:
    """Return a slider over some numbers, the given one among them."""
    import ipywidgets as ipw

    numbers = [(f"{number:,}", number) for number in sorted({*options, value})]
    return ipw.SelectionSlider(
        description=description, options=numbers, value=value, continuous_update=False, **_LOOK
    )


def _in_rows(controls: Iterable[Widget]) -> Widget:
    """Return the controls side by side, as many in a row as there is room for."""
    import ipywidgets as ipw

    return ipw.Box(list(controls), layout=ipw.Layout(flex_flow="row wrap"))


def _whenever_moved(controls: Mapping[str, Widget], show: Callable[..., None]) -> HTML:
    """Call show with the controls' values, now and after each change; return a line for errors."""
    import ipywidgets as ipw

    problem = ipw.HTML()

    def update(_: Any = None) -> None:
        try:
            show(**{name: control.value for name, control in controls.items()})
            problem.value = ""
        except ValueError as error:
            problem.value = _line(error)

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return problem


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(error: Exception) -> str:
    """Return what went wrong as a line of HTML."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    words = html.escape(f"{kind}{error}")
    return f'<span style="color:var(--jp-error-color1, #d32f2f)">{words}</span>'


def _continued(prompt: str, text: str) -> str:
    """Return a prompt and what a model made of it as HTML that keeps the line ends."""
    return (
        '<div style="white-space:pre-wrap;line-height:1.5">'
        f"<b>{html.escape(prompt)}</b>{html.escape(text)}</div>"
    )


def _table(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Return some columns of a table as HTML."""

    def line(tag: str, cells: Iterable[str]) -> str:
        style = 'style="padding:1px 14px 1px 0;text-align:left"'
        return "".join(f"<{tag} {style}>{html.escape(text)}</{tag}>" for text in cells)

    lines = [line("th", columns), *(line("td", (row[name] for name in columns)) for row in rows)]
    table = "".join(f"<tr>{cells}</tr>" for cells in lines)
    return f'<table style="line-height:1.4">{table}</table>'
