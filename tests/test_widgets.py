"""The explorers: real widgets without a browser, their states set as a front end sets them."""

import copy
import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import ipywidgets as ipw
import pytest
from test_chat_command import FRANCE, HELLO, taught_to_chat

from tinytrain import widgets
from tinytrain.chat import Chat
from tinytrain.costs import estimate, plot_memory
from tinytrain.generation import complete, generate
from tinytrain.hardware import KNOWN_GPUS, Hardware
from tinytrain.recipes import RECIPES, with_width
from tinytrain.tokenization import show_tokens, train_tokenizer

HERE = Hardware("a <b>laptop</b>", 12 * 10**9, "float32", 0.1)
HARMLESS = {"div", "span", "small", "br", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}


def parts(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def control(explorer, description):
    (found,) = [w for w in parts(explorer) if getattr(w, "description", None) == description]
    return found


def move(explorer, values):
    """Do what the messages of a browser do, for controls by their descriptions."""
    for description, value in values.items():
        widget = control(explorer, description)
        if isinstance(widget, ipw.Dropdown | ipw.SelectionSlider):
            options = [each[1] if isinstance(each, tuple) else each for each in widget.options]
            widget.set_state({"index": options.index(value)})
        else:
            widget.set_state({"value": value})


def picture(explorer):
    (image,) = [w for w in parts(explorer) if isinstance(w, ipw.Image)]
    return image.value


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class Page(HTMLParser):
    """What a browser would make of a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def page(explorer):
    """Return what all HTML of an explorer shows, having seen that it can do no harm."""
    shown = [w.value for w in parts(explorer) if isinstance(w, ipw.HTML)]
    pages = [Page(text) for text in shown]
    for each in pages:
        assert each.tags <= HARMLESS
        assert each.attributes <= {"style", "title", "class", "border"}
    return "\n".join(each.text for each in pages)


# Memory


@pytest.mark.parametrize("name", RECIPES)
def test_memory_begins_with_the_recipe(name):
    explorer = widgets.memory_explorer(RECIPES[name], HERE)
    assert picture(explorer) == png(plot_memory(RECIPES[name], HERE))


def test_sliders_change_memory_and_time_as_the_plain_calls_do():
    explorer = widgets.memory_explorer(RECIPES["wiki"], HERE)
    sizes = {"layers": 6, "vocabulary": 8192, "context": 1024, "batch": 4}
    move(explorer, sizes | {"width": 256, "the loss in slices": False})
    changes = {"num_hidden_layers": 6, "vocab_size": 8192, "context_length": 1024, "batch_size": 4}
    recipe = replace(with_width(RECIPES["wiki"], 256), **changes, loss_rows=None)
    assert picture(explorer) == png(plot_memory(recipe, HERE))
    shown = "".join(page(explorer).split())
    for card in (HERE, *KNOWN_GPUS):
        row = estimate(recipe, card).row()
        cells = "".join(row[name] for name in ("on", "memory", "fits", "time"))
        assert "".join(cells.split()) in shown
    move(explorer, {"the loss in slices": True})
    recipe = replace(recipe, loss_rows=RECIPES["wiki"].loss_rows)
    assert picture(explorer) == png(plot_memory(recipe, HERE))


@pytest.mark.parametrize("share_of_slider", [0, 0.3, 1])
def test_widths_of_the_slider_are_models(share_of_slider):
    explorer = widgets.memory_explorer(RECIPES["qwen-0.5b"], HERE)
    before, slider = picture(explorer), control(explorer, "width")
    steps = round(share_of_slider * (slider.max - slider.min) / slider.step)
    move(explorer, {"width": slider.min + steps * slider.step})
    assert picture(explorer) != before and HERE.name in page(explorer)


# Tokens


def test_the_tokens_of_a_typed_text_appear_for_each_tokenizer_and_never_as_html(smoke, hostile):
    byte_level = train_tokenizer(["aa"] * 3, vocab_size=260)
    explorer = widgets.token_explorer({hostile: smoke.tokenizer, "bytes": byte_level}, "法国")
    assert "bytes: 6 tokens" in page(explorer)
    move(explorer, {"text": "日本的首都"})
    shown = page(explorer)
    for tokenizer in (smoke.tokenizer, byte_level):
        assert "".join(f"{p}{i}" for p, i in show_tokens(tokenizer, "日本的首都")) in shown
    move(explorer, {"text": hostile})
    for piece, _ in show_tokens(smoke.tokenizer, hostile):
        assert repr(piece)[1:-1].replace(" ", "·") in page(explorer)
    move(explorer, {"text": ""})
    assert f"{hostile}: 0 tokens" in page(explorer)


# Playground


@pytest.fixture
def playground(taught, smoke):
    return widgets.playground(taught, smoke.tokenizer, "法国")


def write(explorer, values):
    """Move the controls, click the button, and return the text that is shown."""
    move(explorer, values)
    control(explorer, "Write").click()
    assert not control(explorer, "Write").disabled
    return page(explorer).strip()


def test_a_click_writes_what_the_plain_call_writes(playground, taught, smoke):
    (greedy,) = complete(taught, smoke.tokenizer, ["法国"])
    assert f"法国{greedy}" == write(playground, {"temperature": 0.0}) == "法国的首都是巴黎。"

    moved = {"temperature": 2.0, "top-k (0: all)": 50, "top-p": 0.9, "repetition penalty": 1.5}
    written = write(playground, moved | {"length (tokens)": 20, "seed": 7})
    arguments = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.5}
    plain = generate(taught, smoke.tokenizer, "法国", max_new_tokens=20, seed=7, **arguments)
    assert written == f"法国{plain}".strip() != write(playground, {"seed": 8})


def test_text_appears_while_it_is_written_and_the_button_waits(playground):
    button, seen = control(playground, "Write"), []

    def look(change):
        seen.append((page(playground).strip(), button.disabled))

    for widget in parts(playground):
        if isinstance(widget, ipw.HTML):
            widget.observe(look, names="value")
    write(playground, {"temperature": 0.0})
    texts = [text for text, _ in seen if text]
    assert len(set(texts)) > 2
    for earlier, later in zip(texts, texts[1:], strict=False):
        assert later.startswith(earlier)
    assert all(disabled for _, disabled in seen)


def test_neither_the_prompt_nor_what_is_written_becomes_html(playground, hostile):
    assert write(playground, {"prompt": "网页", "temperature": 0.0}) == f"网页{hostile}"
    assert write(playground, {"prompt": hostile}).startswith(hostile)


def test_a_failure_is_a_line_and_the_next_click_works(taught, smoke):
    stranger = copy.deepcopy(smoke.tokenizer)
    stranger.add_tokens("中国的首都")  # a token that the model does not have
    playground = widgets.playground(taught, stranger, "中国的首都")
    assert "Error: " in write(playground, {})
    assert "prompt is empty" in write(playground, {"prompt": ""})
    assert write(playground, {"prompt": "法国"}).startswith("法国")


# Chat


@pytest.fixture(scope="module")
def tuned():
    return taught_to_chat(more=[HOSTILE])


HOSTILE = ("网页", "<img src=x onerror=alert(1)>\n&lt;")


def turns(box):
    """Return what is shown of the conversation: the side, the text, whether it is faded."""
    page(box)  # harmless
    shown = "".join(w.value for w in parts(box) if isinstance(w, ipw.HTML) and "<div" in w.value)
    found = re.findall(r'<div style="([^"]*)">(.*?)</div>', shown, flags=re.DOTALL)
    sides = ["right" if "margin-left:auto" in style else "left" for style, _ in found]
    return [
        (side, html.unescape(text), "opacity" in style)
        for side, (style, text) in zip(sides, found, strict=True)
    ]


def answered(*pairs, faded=0):
    said = [turn for pair in pairs for turn in zip(("right", "left"), pair, strict=True)]
    return [(*turn, number < faded) for number, turn in enumerate(said)]


def text_box(box):
    (found,) = [w for w in parts(box) if isinstance(w, ipw.Text)]
    return found


def press_enter(box, text):
    """Do what a browser does, in its order: what was typed comes after the key."""
    field = text_box(box)
    field._handle_custom_msg({"event": "submit"}, [])
    field.set_state({"value": text})


def test_enter_sends_and_so_do_the_button_and_the_examples(tuned):
    box = widgets.chat_box(*tuned, questions=[HELLO[0], HOSTILE[0]])
    plain = Chat(*tuned)
    press_enter(box, FRANCE[0])
    assert turns(box) == answered((FRANCE[0], plain.reply(FRANCE[0]))) == answered(FRANCE)
    assert text_box(box).value == ""
    text_box(box).set_state({"value": HELLO[0]})
    assert len(turns(box)) == 2  # one has only clicked elsewhere
    control(box, "Send").click()
    assert turns(box) == answered(FRANCE, HELLO)
    control(box, HELLO[0]).click()
    assert turns(box) == answered(FRANCE, HELLO, HELLO)
    text_box(box).set_state({"value": FRANCE[0]})
    text_box(box)._handle_custom_msg({"event": "submit"}, [])  # nothing has changed since
    assert turns(box) == answered(FRANCE, HELLO, HELLO, FRANCE)
    control(box, "Send").click()  # nothing is there
    assert turns(box) == answered(FRANCE, HELLO, HELLO, FRANCE) and page(box).count("\n") == 1
    control(box, "Start over").click()
    assert turns(box) == []
    press_enter(box, HELLO[0])
    assert turns(box) == answered(HELLO)


def test_an_answer_appears_while_it_is_written_and_the_buttons_wait(tuned):
    box, seen = widgets.chat_box(*tuned, questions=[HELLO[0]]), []
    buttons = [w for w in parts(box) if isinstance(w, ipw.Button)]

    def look(change):
        seen.append((turns(box)[-1], {button.disabled for button in buttons}))

    for widget in parts(box):
        if isinstance(widget, ipw.HTML):
            widget.observe(look, names="value")
    press_enter(box, HELLO[0])
    (side, asked, _), *answers = [turn for turn, _ in seen]
    texts = [text for _, text, _ in answers]
    assert (side, asked) == ("right", HELLO[0]) and texts[-1] == HELLO[1] != texts[0]
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    assert all(disabled == {True} for _, disabled in seen)
    assert not any(button.disabled for button in buttons)


def test_neither_question_nor_answer_becomes_html(tuned):
    box = widgets.chat_box(*tuned)
    press_enter(box, HOSTILE[0])
    press_enter(box, "<img onerror=x>")
    assert turns(box)[:3] == [*answered(HOSTILE), ("right", "<img onerror=x>", False)]


def test_dropped_turns_are_faded_until_it_starts_over(tuned):
    box = widgets.chat_box(*tuned, system="你好" * 20, questions=[FRANCE[0]])
    plain, dropped, number = Chat(*tuned, system="你好" * 20), 0, 0
    while dropped < 3:
        assert turns(box) == answered(*[FRANCE] * number, faded=dropped)
        assert ("faded turns" in page(box)) == (dropped > 0)
        control(box, FRANCE[0]).click()
        plain.reply(FRANCE[0])
        dropped, number = dropped + plain.dropped, number + 1
    control(box, "Start over").click()
    assert page(box).strip() == ""
    press_enter(box, FRANCE[0])
    assert turns(box) == answered(FRANCE)


def test_what_cannot_be_answered_is_a_line(tuned):
    box = widgets.chat_box(*tuned)
    press_enter(box, FRANCE[0])
    for text, told in (("长" * 99, "too long"), (" ", "is empty")):
        press_enter(box, text)
        assert told in page(box)
        assert turns(box) == [*answered(FRANCE), ("right", text, False)]
        assert not control(box, "Send").disabled
    press_enter(box, HELLO[0])
    assert turns(box) == answered(FRANCE, HELLO) and "is empty" not in page(box)


def test_an_interrupted_answer_stays_and_an_interrupted_question_goes(tuned, monkeypatch):
    box = widgets.chat_box(*tuned)
    press_enter(box, FRANCE[0])

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuned[0].model, "forward", stop)
        press_enter(box, HELLO[0])
    assert turns(box) == answered(FRANCE)
    press_enter(box, HELLO[0])
    assert turns(box) == answered(FRANCE, HELLO)
