import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from tinytrain.hardware import KNOWN_GPUS
from tinytrain.modeling import (
    QWEN2_5_0_5B,
    best_plan,
    build_model,
    compile_layers,
    count_parameters,
    estimate,
    expand_vocabulary,
    expected_initial_loss,
    flops_per_token,
    initial_loss,
    optimizer_flops,
    plan_sizes,
    plot_memory,
    plot_parameters,
    plot_plans,
    predicted_loss,
    qwen2_config,
    recipe_config,
    training_memory,
    with_width,
)
from tinytrain.optimizer import muon_adamw
from tinytrain.recipes import RECIPES

GUIDE = {
    "vocab_size": 151_665,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "eos_token_id": 151_643,
}
REAL = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "eos_token_id": 151_643,
}
# The guide's shape with fewer dimensions.
SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "eos_token_id": 3,
}


def small_config(**changes):
    return qwen2_config(**{**SMALL, **changes})


def test_config_takes_the_overrides_and_keeps_the_parents_numbers():
    config = qwen2_config(**GUIDE, context_length=512)
    for name, value in GUIDE.items():
        assert getattr(config, name) == value
    assert config.num_key_value_heads == 2
    assert config.tie_word_embeddings is True
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 512
    assert config.bos_token_id == config.eos_token_id
    assert config.layer_types == ["full_attention"] * 12
    assert config.max_window_layers == 12


def test_the_embedded_numbers_are_a_configuration_of_the_parent():
    config = Qwen2Config(**QWEN2_5_0_5B)
    assert count_parameters(config)["total"] == 494_032_768
    assert len(config.layer_types) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65 .* 8 attention heads"),
        ({"hidden_size": 72}, "heads of 9 numbers"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"context_length": -1}, "context_length is -1"),
        ({"eos_token_id": 500}, "eos_token_id 500 is outside the vocabulary of 500"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (build_model(small_config(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_weights_are_float32_whatever_the_configuration_says():
    config = small_config()
    config.dtype = "bfloat16"
    assert {weight.dtype for weight in build_model(config).parameters()} == {torch.float32}


def test_the_end_of_text_token_learns_like_any_other():
    # pad_token_id = eos_token_id in the configuration would zero its row and its gradient.
    model = build_model(small_config(num_hidden_layers=1))
    embedding = model.model.embed_tokens.weight
    model.model(torch.tensor([[3, 5, 6]])).last_hidden_state[..., 0].sum().backward()
    assert embedding[3].any()
    assert embedding.grad[3].any()


def test_a_batch_of_texts_can_be_generated():
    model = build_model(small_config(num_hidden_layers=1)).eval()
    generated = model.generate(torch.tensor([[1, 2], [4, 5]]), max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2
    assert model.generation_config.pad_token_id == 3


@pytest.mark.parametrize(
    ("shape", "total"), [(GUIDE, 123_287_552), (REAL, 494_032_768)], ids=["guide", "real"]
)
def test_the_big_shapes_have_exactly_so_many_parameters(shape, total):
    config = qwen2_config(**shape)
    assert count_parameters(config)["total"] == total
    assert sum(parameters_of(config).values()) == total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 100},
    ],
)
def test_counts_by_component_are_those_of_the_model(changes):
    config = small_config(**changes)
    counts = count_parameters(config)
    assert counts.pop("total") == sum(counts.values())
    assert counts == parameters_of(config)


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


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_activations_are_what_the_forward_pass_keeps(precision, kv_heads):
    config = small_config(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=3
    )
    batch, context = 4, 128
    model = build_model(config)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(0, 500, (batch, context))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(input_ids=ids, labels=ids)
    log_probabilities = 4 * batch * context * 500
    memory = training_memory(config, batch, context, precision)
    assert sum(kept.values()) - log_probabilities == pytest.approx(memory["activations"], rel=0.01)


def test_memory_of_the_guides_model():
    config = qwen2_config(**GUIDE)
    memory = training_memory(config, 16, 512, "bf16")
    assert memory["weights"] == memory["gradients"] == 4 * 123_287_552
    assert memory["optimizer"] == 8 * 123_287_552
    assert memory["logits"] == 3 * 4 * 16 * 512 * 151_665
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert training_memory(config, 16, 512, "fp16") == memory
    sliced = training_memory(config, 16, 512, "bf16", loss_rows=512)
    # A slice of scores in bf16, a part of it in float32, and the output matrix's gradient in bf16.
    assert sliced["logits"] == 151_665 * (2 * 512 + 2 * 512) + 4 * 2**22
    compiled = training_memory(config, 16, 512, "bf16", loss_rows=512, compiled=True)
    assert compiled["logits"] == 151_665 * (2 * 512 + 2 * 512)
    assert 0.4 < compiled["activations"] / memory["activations"] < 0.7
    muon = training_memory(config, 16, 512, "bf16", optimizer="muon")
    matrices = [p for n, p in build_model(config).named_parameters() if p.ndim == 2]
    in_layers = sum(p.numel() for p in matrices) - 151_665 * 512
    assert memory["optimizer"] - muon["optimizer"] == 4 * in_layers
    assert memory["total"] - sliced["total"] == memory["logits"] - sliced["logits"]
    assert training_memory(config, 16, 512)["activations"] > memory["activations"]
    with pytest.raises(ValueError, match="float16"):
        training_memory(config, 16, 512, "float16")


def test_the_steps_of_muon_cost_the_products_that_pytorch_counts():
    model = build_model(small_config(num_hidden_layers=3))
    optimizer = muon_adamw(model, lr=1e-3)
    ids = torch.randint(0, 500, (2, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer_flops(model.config, "muon") == counter.get_total_flops()
    assert optimizer_flops(model.config, "adamw") == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_learn_what_the_others_learn(recompute):
    """Equal up to the rounding of sums that are taken in another order."""
    config = small_config(num_hidden_layers=2)
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))
    plain, compiled = build_model(config), build_model(config)
    before = compiled.state_dict()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled, recompute)
    assert list(compiled.state_dict()) == list(before)
    for model in (plain, compiled):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, compiled.eval()(ids).logits)
    # One compilation for both layers, and it did happen.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def kept_bytes(model, ids):
    """Return the bytes that the layers keep for the backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(ids)
    return sum(kept.values())


def test_what_is_computed_again_is_not_kept(caplog):
    """And `training_memory` knows how much that is."""
    torch._logging._internal.warning_once.cache_clear()
    config = small_config(num_hidden_layers=4)
    ids = torch.randint(0, 500, (4, 128))
    found = {}
    for recompute in (False, True):
        torch._dynamo.reset()
        model = build_model(config)
        compile_layers(model, recompute)
        found[recompute] = kept_bytes(model, ids)
        said = training_memory(config, 4, 128, compiled=True, recompute=recompute)["activations"]
        # While a layer computes again, it holds what one of those that keep all would have kept.
        again = found[False] / 4 if recompute else 0
        assert found[recompute] + again == pytest.approx(said, rel=0.25)
    assert found[True] < 0.3 * found[False]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_attention_is_not_computed_again():
    config = small_config(num_hidden_layers=3)
    ids = torch.randint(0, 500, (2, 32))
    torch._dynamo.reset()
    model = build_model(config)
    compile_layers(model, recompute=True)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.profiler.profile() as profile:
        model(input_ids=ids, labels=ids).loss.backward()
    names = [event.name for event in profile.events()]
    assert names.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 3


T4, A100 = KNOWN_GPUS[0], KNOWN_GPUS[3]


def test_an_estimate_adds_up():
    seed, wiki = (estimate(RECIPES[name], A100, tokens=10**8) for name in ("seed", "wiki"))
    assert seed.parameters["total"] == 123_287_552
    assert seed.tokens == seed.steps * 65_536 and seed.tokens - 10**8 < 65_536
    # 6 operations for each parameter and token, and attention; then the evaluations.
    assert 1.05 < seed.flops / (seed.tokens * 777.3e6) < 1.15
    assert seed.seconds == pytest.approx(seed.flops / (0.4 * 312e12))
    assert sum(seed.memory.values()) == 2 * seed.memory["total"]
    assert not estimate(RECIPES["seed"], T4).fits and estimate(RECIPES["wiki"], T4).fits
    assert wiki.memory["total"] < seed.memory["total"] / 2
    assert not seed.probed and set(seed.row()) == set(wiki.row())
    full = T4._replace(disk=10**6)
    assert not estimate(RECIPES["wiki"], full).fits


def test_a_probe_corrects_time_and_memory():
    recipe = RECIPES["pocket"]
    probed = estimate(recipe, A100, step_seconds=0.5, peak_memory=2 * 10**9)
    assert probed.probed and probed.memory["total"] == 2 * 10**9
    training = 0.5 * recipe.max_steps
    assert training < probed.seconds < 1.1 * training  # with the evaluations in between
    assert probed.row()["time"] == "5 min" and probed.row()["memory"] == "2.0 GB"


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


def test_the_initial_loss_is_near_that_of_guessing():
    model = build_model(small_config(vocab_size=5000))
    ids = torch.randint(0, 5000, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = initial_loss(model, ids)
    assert expected_initial_loss(5000) == math.log(5000)
    assert loss == pytest.approx(math.log(5000), abs=0.15)
    assert initial_loss(model, ids.tolist()) == pytest.approx(loss)
    assert model.training
    assert model.lm_head.weight.grad is None


def test_the_plot_shows_every_component_of_every_model():
    figure = plot_parameters({"guide": qwen2_config(**GUIDE), "real": qwen2_config(**REAL)})
    axes = figure.axes[0]
    *_, last = axes.containers  # the bars stand end to end, so the last one ends at the total
    ends = [bar.get_x() + bar.get_width() for bar in last]
    assert ends == pytest.approx([123.287552, 494.032768])
    texts = {text.get_text().strip() for text in axes.texts}
    assert {"123.3M", "494.0M", "63%"} <= texts
    assert [label.get_text() for label in axes.get_yticklabels()] == ["guide", "real"]
    untied = plot_parameters(small_config(tie_word_embeddings=False))
    assert "lm head" in [text.get_text() for text in untied.legends[0].get_texts()]


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_bar_is_the_estimate_component_by_component(name):
    axes = plot_memory(RECIPES[name], A100).axes[0]
    bars = [container[0] for container in axes.containers]
    memory = estimate(RECIPES[name], A100).memory
    total = memory.pop("total") / 1e9
    assert [bar.get_width() for bar in bars] == pytest.approx([n / 1e9 for n in memory.values()])
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(total)
    assert total < axes.get_xlim()[1]


def test_the_memory_bar_tells_the_cards_that_are_too_small():
    figure = plot_memory(RECIPES["seed"], A100)  # 20.9 GB in bf16
    sizes = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    fits = {size: color == "#2e7d32" for size, color in sizes.items() if size.endswith("GB")}
    assert fits == {"8 GB": 0, "16 GB": 0, "24 GB": 1, "40 GB": 1, "80 GB": 1}
    assert any("this machine: 40 GB" in text for text in sizes)
    assert "123.3M parameters" in figure.get_suptitle() and "in bf16" in figure.get_suptitle()


def test_a_wider_recipe_keeps_the_size_of_its_heads():
    wide = with_width(RECIPES["qwen-0.5b"], 960)
    assert (wide.num_attention_heads, wide.num_key_value_heads) == (15, 1)
    assert wide.intermediate_size == pytest.approx(960 * 4864 / 896, abs=1)
    for recipe in RECIPES.values():
        assert with_width(recipe, recipe.hidden_size) == recipe
        head = recipe.hidden_size // recipe.num_attention_heads
        for heads in range(1, 33):
            assert recipe_config(with_width(recipe, heads * head)).hidden_size == heads * head
    with pytest.raises(ValueError, match="no multiple of 64"):
        with_width(RECIPES["pocket"], 100)


def trainer_for(model, folder):
    blocks = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=blocks)


def test_the_guides_own_lines_train_and_fail_at_the_first_checkpoint(tmp_path):
    parent = {**QWEN2_5_0_5B, "model_type": "qwen2", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(parent), encoding="utf-8")
    config = AutoConfig.from_pretrained(
        tmp_path,
        vocab_size=500,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=8,
        num_hidden_layers=12,
        n_ctx=512,
    )
    assert (config.num_hidden_layers, len(config.layer_types)) == (12, 24)
    trainer = trainer_for(AutoModelForCausalLM.from_config(config), tmp_path / "run")
    with pytest.raises(Exception, match=r"`num_hidden_layers` \(12\) .* `layer_types` \(24\)"):
        trainer.train()
    assert trainer.state.global_step == 1  # the step was done; saving it failed
    assert not list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))


def test_ours_passes_the_first_checkpoint_and_loads_again(tmp_path):
    model = build_model(small_config())
    trainer_for(model, tmp_path).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.config.to_dict()["layer_types"] == ["full_attention"] * 12
    assert_same_logits(model, loaded)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(tmp_path, tied):
    model = build_model(small_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert loaded.num_parameters() == count_parameters(model.config)["total"]
    assert loaded.generation_config.pad_token_id == 3
    assert_same_logits(model, loaded)


def assert_same_logits(one, other):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(one.eval()(ids).logits, other.eval()(ids).logits)


def trained_with_few_words(tie=True):
    """Return a model with 60 words that has learned a little, and blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "context_length": 32}
    config = qwen2_config(60, **shape, **heads, eos_token_id=3, tie_word_embeddings=tie)
    model = build_model(config)
    # Some words are frequent and most are rare, as in any language.
    rare = torch.distributions.Categorical(logits=-(torch.arange(60) + 1.0).log())
    blocks = rare.sample((16, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, blocks


def test_an_expanded_vocabulary_predicts_what_the_reduced_one_did(tmp_path):
    model, blocks = trained_with_few_words()
    ids = [7 * number for number in range(60)]
    full = expand_vocabulary(model, ids, 500, blocks)
    assert model.training and full.config.vocab_size == 500
    assert full.config.eos_token_id == full.config.bos_token_id == 21
    moved = torch.tensor(ids)
    with torch.no_grad():
        few = model.eval()(input_ids=blocks).logits
        many = full(input_ids=moved[blocks]).logits
    assert torch.allclose(many[..., moved], few, atol=1e-5)
    # What the 440 words that were added take away from the others, in nats per token.
    taken = -many.log_softmax(-1)[..., moved].logsumexp(-1)
    assert taken.mean() < 0.01
    full.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=moved[blocks]).logits, many)


def test_a_vocabulary_is_not_expanded_by_ids_of_another():
    model, blocks = trained_with_few_words(tie=False)
    with pytest.raises(ValueError, match="59 ids up to 58 do not fit 60 rows"):
        expand_vocabulary(model, range(59), 500, blocks)
    with pytest.raises(ValueError, match="60 ids up to 59 do not fit 60 rows of the model and 59"):
        expand_vocabulary(model, range(60), 59, blocks)
    with pytest.raises(ValueError, match="tied"):
        expand_vocabulary(model, range(60), 500, blocks)


# --- planning -------------------------------------------------------------------------------------


def test_the_law_says_what_chinchilla_found():
    # 70B parameters and 1.4T tokens, for the operations of 280B and 300B (Gopher), which is worse.
    assert predicted_loss(70e9, 1.4e12) < predicted_loss(280e9, 300e9)
    assert predicted_loss(70e9, 1.4e12) == pytest.approx(1.94, abs=0.05)
    # The best split of 10^22 operations lies near twenty tokens a parameter.
    ratios = [10 ** (x / 50) for x in range(-50, 200)]
    best = min(ratios, key=lambda r: predicted_loss((1e22 / 6 / r) ** 0.5, (1e22 / 6 * r) ** 0.5))
    assert 10 < best < 40


def test_text_read_again_teaches_less():
    once = predicted_loss(1e8, 1e9)
    assert predicted_loss(1e8, 1e9, corpus_tokens=1e9) == once
    four, new = predicted_loss(1e8, 4e9, corpus_tokens=1e9), predicted_loss(1e8, 4e9)
    forty, many = (predicted_loss(1e8, n * 1e9, corpus_tokens=1e9) for n in (40, 4000))
    assert new < four < once
    assert (four - new) < 0.1 * (once - new)  # "up to four epochs are almost as good as new text"
    assert forty - many < 0.1 * (once - many)  # and beyond forty nothing comes any more


def test_a_plan_spends_its_budget():
    for plan in plan_sizes(1e18, vocab_size=4096, context_length=256):
        config = qwen2_config(
            vocab_size=4096,
            hidden_size=plan.hidden_size,
            intermediate_size=4 * plan.hidden_size,
            num_hidden_layers=plan.num_hidden_layers,
            num_attention_heads=plan.num_hidden_layers,
            num_key_value_heads=1 + (plan.num_hidden_layers % 2 == 0),
            eos_token_id=0,
        )
        assert plan.parameters == count_parameters(config)["total"]
        assert plan.tokens * flops_per_token(config, 256)["total"] == pytest.approx(1e18)
        assert plan.tokens_per_parameter == pytest.approx(plan.tokens / plan.parameters)


def test_more_to_spend_wants_a_larger_model_and_more_tokens():
    small, large = best_plan(plan_sizes(1e17)), best_plan(plan_sizes(1e19))
    assert small.parameters < large.parameters and small.tokens < large.tokens
    assert large.row()["parameters"] == f"{large.parameters / 1e6:.0f}M"
    assert 15 < large.tokens_per_parameter < 30
    # A text too short for the budget: rather a larger model than reading it once more.
    short = best_plan(plan_sizes(1e19, corpus_tokens=1e8))
    assert short.parameters > large.parameters and short.epochs < large.tokens / 1e8
    with pytest.raises(ValueError, match="budget of 0 operations"):
        plan_sizes(0)


def test_the_plot_of_plans_marks_the_best_size():
    budgets = {"1 hour": plan_sizes(1e16), "1 day": plan_sizes(24e16)}
    [axes] = plot_plans(budgets).axes
    marked = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert marked == [best_plan(plans).parameters for plans in budgets.values()]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(budgets)
