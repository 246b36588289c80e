"""The model written out is transformers' own, and its pictures show what they say."""

import re

import pytest
import torch

from tinytrain import inside, pictures
from tinytrain.inside import Trace, write_out
from tinytrain.modeling import build_model, qwen2_config

# Two ways of rounding float32: of logits up to 10, a hundred-thousandth each is left.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}
SHAPES = [(4, 1, True), (4, 2, False), (6, 3, True), (4, 4, False), (1, 1, True)]


def random_model(heads=4, shared=2, tied=True, layers=3):
    """Return a model whose biases and norms are random too, which those of a new one are not."""
    config = qwen2_config(
        300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    model = build_model(config, seed=1).eval()
    draw = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=draw)
    return model


IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("heads, shared, tied", SHAPES)
def test_the_logits_are_those_of_transformers(heads, shared, tied):
    model = random_model(heads, shared, tied)
    plain = write_out(model)
    logits = model(IDS).logits
    assert logits.abs().max() > 3  # else any tolerance is met
    torch.testing.assert_close(plain(IDS), logits, **TOLERANCE)
    assert sum(weight.numel() for weight in plain.parameters()) == model.num_parameters()


def test_so_are_those_of_a_trained_model(smoke, taught):
    plain = write_out(taught)
    ids = torch.tensor([smoke.tokenizer("法国的首都是巴黎。日本的首都是东京。")["input_ids"]])
    taught.eval()
    torch.testing.assert_close(plain(ids), taught(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("heads, shared, tied", SHAPES)
def test_with_a_cache_they_are_the_same(heads, shared, tied):
    plain = write_out(random_model(heads, shared, tied))
    cache = plain.new_cache()
    parts = [plain(part, cache) for part in IDS.split([20, 1, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), plain(IDS), **TOLERANCE)
    assert cache[0]["keys"].shape == cache[0]["values"].shape == (2, shared, 40, 48 // heads)


def test_a_trace_holds_what_transformers_returns():
    model, trace = random_model(), Trace()
    model.set_attn_implementation("eager")
    logits = write_out(model)(IDS, trace=trace)
    theirs = model(IDS, output_attentions=True, output_hidden_states=True)
    for ours, other in zip(trace.attention, theirs.attentions, strict=True):
        torch.testing.assert_close(ours, other, **TOLERANCE)
    *before, last = trace.hidden
    for ours, other in zip(before, theirs.hidden_states, strict=False):
        torch.testing.assert_close(ours, other, **TOLERANCE)
    plain = write_out(model)
    torch.testing.assert_close(plain.lm_head(plain.norm(last)), logits)


def test_the_copy_is_its_own():
    model = random_model()
    plain, logits = write_out(model), model(IDS).logits
    for weight in plain.parameters():
        weight.zero_()
    assert torch.equal(model(IDS).logits, logits)


def test_distance_alone_counts_for_rotated_vectors():
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(at, other):
        turned = (inside.rotate(x, torch.tensor([p]), 1e4) for x, p in ((query, at), (key, other)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(9, 4), score(1009, 1004), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(9, 4), score(9, 5), rtol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "no plain Qwen2, but llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "window"),
    ],
)
def test_what_is_not_written_out_is_refused(change, message):
    model = random_model()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        write_out(model)


@pytest.mark.parametrize("heads, shared, tied", SHAPES)
def test_the_numbers_of_the_diagram_add_up(heads, shared, tied):
    model = random_model(heads, shared, tied)
    figure = pictures.draw_model(write_out(model))
    labels = [text.get_text() for text in figure.axes[0].texts]
    found = [re.fullmatch(r"(?:(\d+) × )?([\d,]+)", label) for label in labels]
    numbers = [(int(f[1] or 1), int(f[2].replace(",", ""))) for f in found if f]
    total = sum(times * number for times, number in numbers)
    assert total == model.num_parameters()
    assert figure.get_suptitle() == f"{total:,} parameters"
    figure.draw_without_rendering()


@pytest.mark.parametrize("has_font", [True, False])
def test_tokens_can_be_read_with_and_without_a_chinese_font(has_font, monkeypatch):
    if has_font and not pictures.chinese_font():
        pytest.skip("no font with Chinese characters is installed")
    if not has_font:
        monkeypatch.setattr(pictures, "chinese_font", lambda: None)
    trace = Trace()
    write_out(random_model())(torch.tensor([[7, 8, 9]]), trace=trace)
    figure = pictures.plot_attention(trace.attention, [("法国", 7), ("$x$", 8), ("是", 9)])
    maps = figure.axes[:-1]  # the last is the bar of colours
    assert len(maps) == 3 * 4
    shown = [label.get_text() for label in maps[0].get_yticklabels()]
    assert shown == (["法国", "$x$", "是"] if has_font else ["7", "$x$", "9"])
    assert maps[5].get_title() == "layer 2, head 2"
    torch.testing.assert_close(
        torch.as_tensor(maps[5].images[0].get_array()), trace.attention[1][0, 1], rtol=0, atol=0
    )
    figure.draw_without_rendering()  # a missing glyph would warn, which is an error here


pytestmark = pytest.mark.filterwarnings("error:Glyph")
