from dataclasses import replace

import pytest
import torch
from conftest import kept_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from tinytrain.costs import (
    count_parameters,
    estimate,
    flops_per_token,
    larger_batches,
    plot_memory,
    plot_parameters,
)
from tinytrain.hardware import KNOWN_GPUS
from tinytrain.modeling import QWEN2_5_0_5B, build_model, recipe_config
from tinytrain.optimizer import muon_adamw
from tinytrain.recipes import RECIPES

T4, A100 = KNOWN_GPUS[0], KNOWN_GPUS[3]
GUIDE, REAL = recipe_config(RECIPES["seed"]), Qwen2Config(**QWEN2_5_0_5B)


def small_config(**changes):
    """Return the guide's shape with fewer dimensions."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 12}
    return Qwen2Config(**{"tie_word_embeddings": True} | sizes | heads | changes)


def memory_of(config=None, hardware=A100, **changes):
    return estimate(replace(RECIPES["seed"], **changes), hardware, config).memory


def parameters_of(config):
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    counts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "lm_head"), 0)
    parts = {"embed_tokens": "embeddings", "self_attn": "attention", "norm": "norms"}
    for name, weight in model.named_parameters():
        found = [part for key, part in parts.items() if key in name]
        component = found[0] if found else "mlp" if ".mlp." in name else "lm_head"
        counts[component] += weight.numel()
    return counts


@pytest.mark.parametrize(
    "config",
    [
        GUIDE,
        REAL,
        small_config(tie_word_embeddings=False),
        small_config(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3),
        small_config(num_attention_heads=4, num_key_value_heads=4, intermediate_size=100),
    ],
)
def test_counts_by_component_are_those_of_the_model(config):
    counts = count_parameters(config)
    assert counts.pop("total") == sum(counts.values())
    assert counts == parameters_of(config)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_activations_are_what_the_forward_pass_keeps(precision, kv_heads):
    config = small_config(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=3
    )
    batch, context = 4, 128
    model = build_model(config)
    ids = torch.randint(0, 500, (batch, context))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = kept_bytes(model, lambda: model(input_ids=ids, labels=ids))
    log_probabilities = 4 * batch * context * 500
    memory = memory_of(config, batch_size=batch, context_length=context, precision=precision)
    assert kept - log_probabilities == pytest.approx(memory["activations"], rel=0.01)


def test_memory_of_the_guides_model():
    memory = memory_of()
    assert memory["weights"] == memory["gradients"] == 4 * 123_287_552
    assert memory["optimizer"] == 8 * 123_287_552
    assert memory["logits"] == 4 * 4 * 16 * 512 * 151_665
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert memory_of(precision="fp16") == memory
    sliced = memory_of(loss_rows=512)
    # A slice of logits in bf16, a part of it in float32, and the output matrix's gradient in bf16.
    assert sliced["logits"] == 151_665 * (2 * 512 + 2 * 512) + 4 * 2**22
    assert memory["total"] - sliced["total"] == memory["logits"] - sliced["logits"]
    compiled = memory_of(loss_rows=512, compile=True)
    assert compiled["logits"] == 151_665 * (2 * 512 + 2 * 512)
    assert 0.4 < compiled["activations"] / memory["activations"] < 0.7
    with torch.device("meta"):
        model = Qwen2ForCausalLM(GUIDE)
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert memory["optimizer"] - memory_of(optimizer="muon")["optimizer"] == 4 * in_layers
    assert memory_of(precision="float32")["activations"] > memory["activations"]


def test_what_does_not_fit_together_has_no_estimate():
    with pytest.raises(ValueError, match="float16"):
        memory_of(precision="float16")
    with pytest.raises(ValueError, match="hidden_size is 512; it must be a multiple of 14"):
        memory_of(num_attention_heads=7)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tied):
    config = small_config(tie_word_embeddings=tied, num_hidden_layers=3)
    config._attn_implementation = "eager"  # plain products, which the counter sees
    model = build_model(config)
    ids = torch.randint(0, 500, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = flops_per_token(config, context_length=32)
    assert flops["total"] == sum(flops.values()) - flops["total"]
    # The counter adds the few products that make the table of rotations.
    assert flops["total"] * ids.numel() == pytest.approx(counter.get_total_flops(), rel=1e-3)
    if tied:
        optimizer = muon_adamw(model, lr=1e-3)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        one_step = replace(RECIPES["seed"], max_steps=1)
        adamw, muon = (
            estimate(replace(one_step, optimizer=name), A100, config) for name in ("adamw", "muon")
        )
        assert muon.flops - adamw.flops == counter.get_total_flops()


def test_an_estimate_adds_up():
    seed, wiki = (estimate(RECIPES[name], A100, tokens=10**8) for name in ("seed", "wiki"))
    assert seed.parameters["total"] == 123_287_552
    assert seed.tokens % 65_536 == 0 and 0 <= seed.tokens - 10**8 < 65_536
    # 6 operations for each parameter and token, and attention; then the evaluations.
    assert 1.05 < seed.flops / (seed.tokens * 777.3e6) < 1.15
    assert seed.seconds == pytest.approx(seed.flops / (0.4 * 312e12))
    assert not estimate(RECIPES["seed"], T4).fits and estimate(RECIPES["wiki"], T4).fits
    assert wiki.memory["total"] < seed.memory["total"] / 2
    # Three checkpoints of weights and two averages, the model, and four bytes a token.
    assert seed.disk == (3 * 3 + 1) * 4 * 123_287_552 + 4 * 10**8
    assert not seed.probed and set(seed.row()) == set(wiki.row())
    for free in (0, 10**6):
        assert not estimate(RECIPES["wiki"], T4._replace(disk=free)).fits
    # A probe corrects time and memory.
    recipe = RECIPES["pocket"]
    probed = estimate(recipe, A100, step_seconds=0.5, peak_memory=2 * 10**9)
    assert probed.probed and probed.memory["total"] == 2 * 10**9
    training = 0.5 * recipe.max_steps
    assert training < probed.seconds < 1.1 * training  # with the evaluations in between
    assert probed.row()["time"].startswith("5 min") and probed.row()["memory"] == "2.0 GB"


# --- plots ----------------------------------------------------------------------------------------


def test_the_plot_shows_every_component_of_every_model():
    figure = plot_parameters({"guide": GUIDE, "real": REAL})
    axes = figure.axes[0]
    first, *_, last = axes.containers  # the bars follow each other, so the last one ends at 100%
    assert first[0].get_width() == pytest.approx(100 * 151_665 * 512 / 123_287_552)
    assert [bar.get_x() + bar.get_width() for bar in last] == pytest.approx([100, 100])
    assert {"123.3M", "494.0M", "63%"} <= {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["guide", "real"]
    untied = plot_parameters({"untied": small_config(tie_word_embeddings=False)})
    assert "lm head" in [text.get_text() for text in untied.legends[0].get_texts()]


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_bar_is_the_estimate_and_tells_the_cards_that_are_too_small(name):
    figure = plot_memory(RECIPES[name], A100)
    [axes] = figure.axes
    bars = [container[0] for container in axes.containers]
    cost = estimate(RECIPES[name], A100)
    memory = cost.memory
    total = memory.pop("total") / 1e9
    assert [bar.get_width() for bar in bars] == pytest.approx([n / 1e9 for n in memory.values()])
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(total)
    assert total < axes.get_xlim()[1]
    green = {text.get_text() for text in axes.texts if text.get_color() == "#2e7d32"}
    assert green == {f"{card} GB" for card in (8, 16, 24, 40, 80) if card >= total}
    assert "this machine 40 GB" in [text.get_text() for text in figure.legends[0].get_texts()]
    precision = f"in {RECIPES[name].precision or 'bf16'}"
    millions = f"{cost.parameters['total'] / 1e6:.1f}M parameters"
    assert millions in figure.get_suptitle() and precision in figure.get_suptitle()


@pytest.mark.parametrize("gpu", KNOWN_GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", ["seed", "wiki", "qwen-0.5b"])
def test_a_gpu_with_memory_to_spare_gets_larger_batches(name, gpu):
    recipe = RECIPES[name]
    larger = larger_batches(recipe, gpu)
    assert larger.tokens_per_step == recipe.tokens_per_step
    if larger == recipe:  # the next size would take more than half
        doubled = replace(recipe, batch_size=2 * recipe.batch_size)
        assert estimate(doubled, gpu).memory["total"] > gpu.memory / 2
    else:
        assert larger.batch_size > recipe.batch_size
        assert estimate(larger, gpu).memory["total"] < gpu.memory / 2 + 600_000_000  # libraries
