"""Sliders and boxes over functions of the other modules: move one, and see what changes.

Each explorer shows what one plain call returns; its docstring names that call, for readers without
a browser. Only what ipywidgets 7 (Colab) and 8 share is used. All text from outside, a model's too,
is escaped before it becomes HTML.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from tinytrain.recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from tinytrain.hardware import Hardware


def memory_explorer(recipe: Recipe, hardware: Hardware) -> ipw.VBox:
    """Show what a model's sizes cost: parameters, memory by component, and time on several cards.

    Without a browser: ``plot_memory(recipe, hardware)`` and ``estimate(recipe, hardware).row()``,
    for a recipe changed with ``dataclasses.replace``. The sliders begin at `recipe`.
    """
    import pandas as pd

    from tinytrain.costs import estimate, plot_memory
    from tinytrain.hardware import KNOWN_GPUS
    from tinytrain.recipes import with_width

    head = recipe.hidden_size // recipe.num_attention_heads
    vocab_size = recipe.vocab_size or 151_665
    controls = {
        "num_hidden_layers": _slider("layers", recipe.num_hidden_layers, min=1, max=48),
        "hidden_size": _slider("width", recipe.hidden_size, min=head, max=32 * head, step=head),
        "vocab_size": _choice("vocabulary", vocab_size, [*(2**n for n in range(10, 18)), 151_665]),
        "context_length": _choice("context", recipe.context_length, (2**n for n in range(5, 14))),
        "batch_size": _choice("batch", recipe.batch_size, (2**n for n in range(8))),
        "loss_rows": ipw.Checkbox(
            bool(recipe.loss_rows), description="the loss in slices", indent=False
        ),
    }
    picture, table = ipw.Image(format="png"), ipw.HTML()

    def show(hidden_size: int, loss_rows: bool, **sizes: Any) -> None:
        sizes["loss_rows"] = (recipe.loss_rows or 512) if loss_rows else None
        changed = replace(with_width(recipe, hidden_size), **sizes)
        buffer = io.BytesIO()
        plot_memory(changed, hardware).savefig(buffer, format="png")
        picture.value = buffer.getvalue()
        costs = [estimate(changed, card).row() for card in (hardware, *KNOWN_GPUS)]
        rows = pd.DataFrame(costs)[["on", "memory", "fits", "time"]]
        table.value = rows.to_html(index=False, border=0, justify="left", col_space=110)

    return _explorer(controls, show, picture, table)


def token_explorer(
    tokenizers: Mapping[str, PreTrainedTokenizerFast], text: str = "法国的首都是巴黎。"
) -> ipw.VBox:
    """Show what becomes of a text in several byte-level tokenizers, while you type it.

    Without a browser: ``HTML(colour_tokens(tokenizer, text))`` of `tinytrain.tokenization`.
    """
    from tinytrain.tokenization import colour_tokens, show_tokens

    shown = ipw.HTML()

    def show(text: str) -> None:
        shown.value = "".join(
            f"<div><b>{html.escape(name)}</b>: {len(show_tokens(tokenizer, text)):,} tokens</div>"
            + colour_tokens(tokenizer, text)
            for name, tokenizer in tokenizers.items()
        )

    return _explorer({"text": ipw.Textarea(text, description="text", **_WIDE)}, show, shown)


def playground(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str = ""
) -> ipw.VBox:
    """Let the model continue a prompt, with the parameters of sampling on sliders.

    Without a browser: ``generate(model, tokenizer, prompt, ...)`` of `tinytrain.generation`.
    """
    from tinytrain.generation import generate

    box = ipw.Textarea(prompt, description="prompt", **_WIDE)
    controls = {
        "temperature": _slider("temperature", 0.8, min=0, max=2, step=0.05),
        "top_k": _slider("top-k (0: all)", 0, min=0, max=200),
        "top_p": _slider("top-p", 0.95, min=0.05, max=1, step=0.05),
        "repetition_penalty": _slider("repetition penalty", 1.0, min=1, max=2, step=0.05),
        "max_new_tokens": _slider("length (tokens)", 60, min=1, max=500),
        "seed": ipw.IntText(description="seed", value=0, **_LOOK),
    }
    button = ipw.Button(description="Write", icon="pencil", button_style="primary")
    problem, shown = ipw.HTML(), ipw.HTML()

    def write(_: Any) -> None:
        begin, pieces = box.value, []

        def show(piece: str) -> None:
            pieces.append(piece)
            text = f"<b>{html.escape(begin)}</b>{html.escape(''.join(pieces))}"
            shown.value = f'<div style="white-space:pre-wrap;line-height:1.5">{text}</div>'

        button.disabled, problem.value, shown.value = True, "", ""
        try:
            values = {name: control.value for name, control in controls.items()}
            generate(model, tokenizer, begin, on_text=show, **values)
            show("")  # the prompt at least, if the model stopped at once
        except Exception as error:  # a traceback would end in a log that nobody sees
            problem.value = _error_line(error)
        finally:
            button.disabled = False

    button.on_click(write)
    return ipw.VBox([box, _in_rows(controls.values()), button, problem, shown])


def chat_box(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
    questions: Iterable[str] = (),
) -> ipw.VBox:
    """Talk to a model that was tuned on conversations; turns that it has dropped are faded.

    Without a browser: ``Chat(model, tokenizer, system).reply(text)`` of `tinytrain.chat`. The
    questions are examples, to click instead of typing.
    """
    from tinytrain.chat import Chat

    chat, faded = Chat(model, tokenizer, system), []
    box = ipw.Text(placeholder="Write, and press Enter", continuous_update=False)
    box.layout.width = "60%"
    send = ipw.Button(description="Send", button_style="primary")
    again = ipw.Button(description="Start over", icon="refresh")
    examples = [ipw.Button(description=text, layout={"width": "auto"}) for text in questions]
    shown, note = ipw.HTML(), ipw.HTML()

    def show(*more: tuple[str, str]) -> None:
        seen = [(turn["role"], turn["content"]) for turn in chat.messages[bool(system) :]]
        bubbles = [_bubble(*turn, "opacity:0.45") for turn in faded]
        shown.value = "".join(bubbles + [_bubble(*turn) for turn in (*seen, *more)])

    def disable(disabled: bool) -> None:
        for button in (send, again, *examples):
            button.disabled = disabled

    def ask(text: str) -> None:
        before, pieces = chat.messages, []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            show(("user", text), ("assistant", "".join(pieces)))

        disable(True)
        box.value = note.value = ""
        show(("user", text))
        try:
            chat.reply(text, on_text)
            oldest = before[bool(system) :][: chat.dropped]
            faded.extend((turn["role"], turn["content"]) for turn in oldest)
            if faded:
                note.value = "The conversation is too long for the model: faded turns are dropped"
            show()
        except Exception as error:  # a traceback would end in a log that nobody sees
            note.value = _error_line(error)  # the question is shown until the next one
        finally:
            disable(False)

    def start_over(_: Any) -> None:
        chat.reset()
        faded.clear()
        note.value = shown.value = ""

    _on_enter(box, ask)
    send.on_click(lambda _: box.value and ask(box.value))
    again.on_click(start_over)
    for button in examples:
        button.on_click(lambda clicked: ask(clicked.description))
    return ipw.VBox([shown, note, ipw.HBox([box, send, again]), _in_rows(examples)])


def _bubble(role: str, text: str, style: str = "") -> str:
    """Return a turn as HTML, the user's on the right; its colours suit light and dark themes."""
    side = "margin-left:auto;background:rgba(66,133,244,0.25)" if role == "user" else ""
    style = f"{side or 'background:rgba(128,128,128,0.18)'};{style}"
    style += ";width:fit-content;max-width:80%;margin-top:6px;padding:4px 10px;border-radius:10px"
    return f'<div style="white-space:pre-wrap;line-height:1.5;{style}">{html.escape(text)}</div>'


# Two controls fit in a row even beside the open side bar of a small screen.
_WIDE = {"rows": 3, "layout": {"width": "98%"}}
_LOOK = {"style": {"description_width": "120px"}, "layout": {"width": "325px"}}


def _slider(description: str, value: float, **limits: Any) -> ipw.Widget:
    """Return a slider over integers or floats, as its value is, long enough to hold that value."""
    kind = ipw.FloatSlider if isinstance(value, float) else ipw.IntSlider
    limits["max"] = max(limits["max"], value)
    return kind(description=description, value=value, continuous_update=False, **_LOOK, **limits)


def _choice(description: str, value: int, options: Iterable[int]) -> ipw.Widget:
    """Return a slider over some numbers, the given one among them."""
    numbers = [(f"{number:,}", number) for number in sorted({*options, value})]
    return ipw.SelectionSlider(
        description=description, options=numbers, value=value, continuous_update=False, **_LOOK
    )


def _in_rows(controls: Iterable[ipw.Widget]) -> ipw.Widget:
    """Return the controls side by side, as many in a row as there is room for."""
    return ipw.Box(list(controls), layout={"flex_flow": "row wrap"})


def _explorer(
    controls: Mapping[str, ipw.Widget], show: Callable[..., None], *outputs: ipw.Widget
) -> ipw.VBox:
    """Call ``show`` with the controls' values, now and after each change; errors become a line."""
    problem = ipw.HTML()

    def update(_: Any = None) -> None:
        try:
            show(**{name: control.value for name, control in controls.items()})
            problem.value = ""
        except ValueError as error:
            problem.value = _error_line(error)

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipw.VBox([_in_rows(controls.values()), problem, *outputs])


def _error_line(error: Exception) -> str:
    """Return what went wrong as a line of HTML."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    message = html.escape(f"{kind}{error}")
    return f'<span style="color:var(--jp-error-color1, #d32f2f)">{message}</span>'


def _on_enter(box: ipw.Text, call: Callable[[str], None]) -> None:
    """Call with the text of a box when Enter is pressed there.

    The browser reports the key first and then the text, unless it has done so before, when the
    reader clicked elsewhere. (A box that reports each letter may be late with the last one.)
    """
    pressed = []

    def on_key(_: Any, content: Mapping[str, Any], __: Any) -> None:
        if content.get("event") == "submit":
            pressed.append(True)
            on_text()

    def on_text(_: Any = None) -> None:
        if pressed and box.value:
            pressed.clear()
            call(box.value)

    box.on_msg(on_key)
    box.observe(on_text, names="value")
