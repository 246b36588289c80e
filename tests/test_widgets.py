"""The explorers: real widgets without a browser, their states set as a front end sets them."""

import io
from dataclasses import replace
from html.parser import HTMLParser

import ipywidgets as ipw
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tinytrain import widgets
from tinytrain.generation import complete, generate
from tinytrain.hardware import KNOWN_GPUS, Hardware
from tinytrain.modeling import build_model, estimate, plot_memory, qwen2_config, with_width
from tinytrain.recipes import RECIPES
from tinytrain.tokenization import show_tokens, train_tokenizer
from tinytrain.training import plot_learning_rate

HERE = Hardware("a <b>laptop</b>", 12 * 10**9, "float32", 0.1)
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=\"alert('2')\"> &lt;b&gt; & 'quoted'\n</div>"
)
HARMLESS = {"div", "span", "small", "br", "p", "b", "table", "tr", "th", "td"}


def parts(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def control(explorer, description):
    (found,) = [w for w in parts(explorer) if getattr(w, "description", None) == description]
    return found


def move(explorer, description, value):
    """Do what the message of a browser does."""
    widget = control(explorer, description)
    if isinstance(widget, ipw.Dropdown | ipw.SelectionSlider):
        values = [option[1] if isinstance(option, tuple) else option for option in widget.options]
        widget.set_state({"index": values.index(value)})
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
        assert each.attributes <= {"style", "title"}
    return "\n".join(each.text for each in pages)


# Memory


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_explorer_begins_with_the_recipe(name):
    explorer = widgets.memory_explorer(RECIPES[name], HERE)
    assert picture(explorer) == png(plot_memory(RECIPES[name], HERE))


def test_sliders_change_memory_and_time_as_the_plain_calls_do():
    explorer = widgets.memory_explorer(RECIPES["wiki"], HERE)
    move(explorer, "layers", 6)
    move(explorer, "width", 256)
    move(explorer, "vocabulary", 8192)
    move(explorer, "context", 1024)
    move(explorer, "batch", 4)
    move(explorer, "the loss in slices", False)
    recipe = replace(
        with_width(RECIPES["wiki"], 256),
        num_hidden_layers=6,
        vocab_size=8192,
        context_length=1024,
        batch_size=4,
        loss_rows=None,
    )
    assert picture(explorer) == png(plot_memory(recipe, HERE))
    shown = page(explorer)
    for card in (HERE, *KNOWN_GPUS):
        row = estimate(recipe, card).row()
        assert "".join(row[name] for name in ("on", "memory", "fits", "time")) in shown
    move(explorer, "the loss in slices", True)
    assert picture(explorer) == png(
        plot_memory(replace(recipe, loss_rows=RECIPES["wiki"].loss_rows), HERE)
    )


def test_every_width_of_the_slider_is_a_model():
    explorer = widgets.memory_explorer(RECIPES["qwen-0.5b"], HERE)
    width = control(explorer, "width")
    seen = set()
    for value in range(width.min, width.max + 1, width.step):
        move(explorer, "width", value)
        seen.add(picture(explorer))
    assert len(seen) == 32 and HERE.name in page(explorer)


def test_the_length_of_the_text_decides_the_time():
    pages = [
        page(widgets.memory_explorer(RECIPES["wiki"], HERE, n)) for n in (None, 10**6, 120 * 10**6)
    ]
    assert pages[0] == pages[2] != pages[1]


# Tokens


@pytest.fixture(scope="module")
def tokenizer():
    texts = [HOSTILE, "法国的首都是巴黎。日本的首都是东京。"] * 3
    return train_tokenizer(texts, vocab_size=340, max_token_chars=1)


def test_the_tokens_of_a_typed_text_appear_for_each_tokenizer(tokenizer):
    tokenizers = {
        "own": tokenizer,
        "bytes": train_tokenizer(["aa"] * 3, vocab_size=258),
    }
    explorer = widgets.token_explorer(tokenizers, "法国")
    assert "own: 2 tokens, 1.00 a character" in page(explorer)
    assert "bytes: 6 tokens, 3.00 a character" in page(explorer)
    move(explorer, "text", "日本的首都")
    shown = page(explorer)
    for tokenizer in tokenizers.values():
        assert "".join(f"{p}{i}" for p, i in show_tokens(tokenizer, "日本的首都")) in shown
    move(explorer, "text", "")
    assert "own: 0 tokens" in page(explorer)


def test_nothing_typed_and_no_name_becomes_html(tokenizer):
    explorer = widgets.token_explorer({HOSTILE: tokenizer}, "")
    move(explorer, "text", HOSTILE)
    shown = page(explorer)
    assert HOSTILE in shown  # the name
    for piece, _ in show_tokens(tokenizer, HOSTILE):
        assert piece.replace(" ", "·").replace("\n", "⏎") in shown


def test_a_tokenizer_that_cannot_be_shown_is_a_line():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel({"<法>": 0}, unk_token="<法>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "not byte-level" in page(widgets.token_explorer({"words": tokenizer}, "法国"))


# Learning rate


@pytest.mark.parametrize("name", RECIPES)
def test_the_learning_rate_explorer_begins_with_the_recipe(name):
    explorer = widgets.learning_rate_explorer(RECIPES[name], 777)
    assert picture(explorer) == png(plot_learning_rate(RECIPES[name], 777))


def test_controls_change_the_schedule_as_the_plain_call_does():
    explorer = widgets.learning_rate_explorer(RECIPES["pocket"], 600)
    move(explorer, "schedule", "linear")
    move(explorer, "peak", 1e-3)
    move(explorer, "warm-up", 30)
    move(explorer, "steps", 2000)
    changes = {"lr_scheduler": "linear", "learning_rate": 1e-3, "warmup_steps": 30}
    recipe = replace(RECIPES["pocket"], **changes)
    assert picture(explorer) == png(plot_learning_rate(recipe, 2000))


def test_a_schedule_that_cannot_be_foretold_is_a_line_until_another_is_chosen():
    recipe = replace(RECIPES["pocket"], lr_scheduler="<i>none</i>")
    explorer = widgets.learning_rate_explorer(recipe, 600)
    assert "<i>none</i>" in page(explorer) and picture(explorer) == b""
    move(explorer, "schedule", "cosine")
    assert page(explorer).strip() == ""
    assert picture(explorer) == png(plot_learning_rate(RECIPES["pocket"], 600))


# Playground


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that has learned two texts by heart, one of them no friend of ours."""
    config = qwen2_config(
        len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        context_length=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = build_model(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = []
    for text in ("法国的首都是巴黎。", "日本" + HOSTILE):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor([ids]))
    for _ in range(80):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture
def playground(taught, tokenizer):
    return widgets.playground(taught, tokenizer, "法国")


def button(explorer):
    return control(explorer, "Write")


def test_a_click_writes_what_the_plain_call_writes(playground, taught, tokenizer):
    move(playground, "temperature", 0.0)
    button(playground).click()
    (greedy,) = complete(taught, tokenizer, ["法国"])
    assert greedy == "的首都是巴黎。" and page(playground).strip() == "法国的首都是巴黎。"

    knobs = {"temperature": 2.0, "top-k (0: all)": 50, "top-p": 0.9, "repetition penalty": 1.5}
    for description, value in (knobs | {"length (tokens)": 20, "seed": 7}).items():
        move(playground, description, value)
    button(playground).click()
    arguments = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.5}
    plain = generate(taught, tokenizer, "法国", max_new_tokens=20, seed=7, **arguments)
    assert page(playground).strip() == f"法国{plain}".strip()
    move(playground, "seed", 8)
    button(playground).click()
    assert page(playground).strip() != f"法国{plain}".strip()


def test_text_appears_while_it_is_written_and_the_button_waits(playground):
    move(playground, "temperature", 0.0)
    seen = []
    for widget in parts(playground):
        if isinstance(widget, ipw.HTML):
            widget.observe(
                lambda change: seen.append((page(playground), button(playground).disabled)),
                names="value",
            )
    button(playground).click()
    texts = [text.strip() for text, _ in seen if text.strip()]
    assert len(set(texts)) > 2
    for earlier, later in zip(texts, texts[1:], strict=False):
        assert later.startswith(earlier)
    assert all(disabled for _, disabled in seen)
    assert not button(playground).disabled


def test_neither_the_prompt_nor_what_is_written_becomes_html(playground):
    move(playground, "prompt", "日本")
    move(playground, "temperature", 0.0)
    move(playground, "length (tokens)", 120)
    button(playground).click()
    assert page(playground).strip() == "日本" + HOSTILE
    move(playground, "prompt", HOSTILE)
    button(playground).click()
    assert HOSTILE in page(playground)


def test_an_empty_prompt_is_a_line_and_the_next_click_works(playground):
    move(playground, "prompt", "")
    button(playground).click()
    assert "prompt is empty" in page(playground) and not button(playground).disabled
    move(playground, "prompt", "法国")
    button(playground).click()
    assert "prompt is empty" not in page(playground) and "法国" in page(playground)


def test_any_other_failure_is_a_line_too(taught):
    stranger = train_tokenizer(["北京是中国的首都。" * 2, HOSTILE * 2], vocab_size=400)
    assert max(stranger("中国的首都")["input_ids"]) >= taught.config.vocab_size
    playground = widgets.playground(taught, stranger, "中国的首都")
    button(playground).click()
    assert "Error: " in page(playground) and not button(playground).disabled
