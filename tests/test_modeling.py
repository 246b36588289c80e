import functools
import io
import json
import logging
import math
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import kept_bytes
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

from tinytrain.costs import estimate
from tinytrain.hardware import Hardware
from tinytrain.modeling import (
    QWEN2_5_0_5B,
    build_model,
    compile_layers,
    initial_loss,
    load_model,
    qwen2_config,
    recipe_config,
)
from tinytrain.recipes import RECIPES

GUIDE = {
    "vocab_size": 151_665,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "eos_token_id": 151_643,
}
# The guide's shape with fewer dimensions.
SMALL = GUIDE | {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 256, "eos_token_id": 3}


def small_config(**changes):
    return qwen2_config(**SMALL | changes)


def test_config_takes_the_overrides_and_keeps_the_rest():
    config = qwen2_config(**GUIDE, context_length=128)
    for name, value in GUIDE.items():
        assert getattr(config, name) == value
    assert config.max_position_embeddings == 128
    assert config.bos_token_id == config.eos_token_id
    assert config.layer_types == ["full_attention"] * config.max_window_layers
    parent = Qwen2Config(**QWEN2_5_0_5B)
    for each in (config, parent):
        assert each.rope_parameters["rope_theta"] == 1e6 and each.rms_norm_eps == 1e-6
        assert each.num_key_value_heads == 2 and each.tie_word_embeddings
        assert each.hidden_act == "silu" and each.attention_dropout == 0.0
        assert each.initializer_range == 0.02 and each.sliding_window is None and each.use_cache
    assert parent.layer_types == ["full_attention"] * 24
    assert recipe_config(RECIPES["qwen-0.5b"]).vocab_size == parent.vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65 must be a multiple of 16: 8 attention heads"),
        ({"hidden_size": 72}, "hidden_size 72 .* rotates pairs"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"eos_token_id": 500}, "eos_token_id 500 is outside the vocabulary of 500"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone():
    config = small_config(num_hidden_layers=1)
    config.dtype = "bfloat16"  # as Qwen publishes it; ours remain float32
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (build_model(config, seed=seed) for seed in (1, 1, 2))
    assert {weight.dtype for weight in one.parameters()} == {torch.float32}
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_end_of_text_token_learns_like_any_other_and_fills_up_a_batch():
    # pad_token_id = eos_token_id in the configuration would zero its row and its gradient.
    model = build_model(small_config(num_hidden_layers=1))
    embedding = model.model.embed_tokens.weight
    model.model(torch.tensor([[3, 5, 6]])).last_hidden_state[..., 0].sum().backward()
    assert embedding[3].any()
    assert embedding.grad[3].any()
    generated = model.eval().generate(torch.tensor([[1, 2], [4, 5]]), max_new_tokens=3)
    assert generated.shape[0] == 2 and model.generation_config.pad_token_id == 3


def test_compiled_layers_learn_the_same_and_keep_what_is_estimated(monkeypatch, caplog):
    """Equal up to the rounding of sums that are taken in another order."""
    torch._logging._internal.warning_once.cache_clear()
    config = small_config(num_hidden_layers=4)
    ids = torch.randint(0, 500, (4, 128), generator=torch.Generator().manual_seed(1))
    plain = build_model(config)
    plain(input_ids=ids, labels=ids).loss.backward()
    real, found = torch.compile, {}
    for recompute, backend in ((False, "aot_eager_decomp_partition"), (True, "inductor")):
        # Writing C++ takes half a minute, so one of the two is content with the graphs.
        monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = build_model(config)
        names = list(model.state_dict())
        compile_layers(model, recompute)
        assert list(model.state_dict()) == names
        found[recompute] = kept_bytes(model, lambda: model.model(ids))  # noqa: B023
        with torch.profiler.profile() as profile:
            model(input_ids=ids, labels=ids).loss.backward()
        # Attention is the only thing that is not computed again.
        events = [event.name for event in profile.events()]
        assert events.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 4
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
        with torch.no_grad():
            assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)
        # One compilation for all layers, and it did happen.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

        hardware = Hardware("", 10**9, "float32", 1, is_gpu=not recompute)
        recipe = replace(RECIPES["seed"], batch_size=4, context_length=128, compile=True)
        # While a layer computes again, it holds what one of those that keep all would have kept.
        again = found[False] / 4 if recompute else 0
        expected = estimate(recipe, hardware, config).memory["activations"]
        assert found[recompute] + again == pytest.approx(expected, rel=0.25)
    assert found[True] < 0.3 * found[False]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_without_a_compiler_a_line_says_so(caplog):
    compile_layers(build_model(small_config()))
    for _ in range(2):  # as PyTorch tells of each part of a model
        try:
            raise RuntimeError("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")
        except RuntimeError:
            logging.getLogger("torch._dynamo.convert_frame").warning("WON'T", exc_info=True)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    told = "torch.compile fails here (RuntimeError: No working C++ compiler found): the run goes on"
    assert record.getMessage().startswith(told) and "\n" not in record.getMessage()


def test_the_initial_loss_is_near_that_of_guessing():
    model = build_model(small_config(vocab_size=5000))
    ids = torch.randint(0, 5000, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = initial_loss(model, ids)
    assert loss == pytest.approx(math.log(5000), abs=0.15)
    assert initial_loss(model, ids.tolist()) == pytest.approx(loss)
    assert model.training
    assert model.lm_head.weight.grad is None


def trainer_for(model, folder):
    blocks = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    arguments = TrainingArguments(
        str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    return Trainer(model=model, args=arguments, train_dataset=blocks)


def test_the_guides_own_lines_train_and_fail_at_the_first_checkpoint(tmp_path):
    parent = {**QWEN2_5_0_5B, "model_type": "qwen2", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(parent), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path, **SMALL, n_ctx=512)
    assert (config.num_hidden_layers, len(config.layer_types)) == (12, 24)
    trainer = trainer_for(AutoModelForCausalLM.from_config(config), tmp_path / "run")
    with pytest.raises(Exception, match=r"`num_hidden_layers` \(12\) .* `layer_types` \(24\)"):
        trainer.train()
    assert trainer.state.global_step == 1  # the step was done; saving it failed
    assert not list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
def test_ours_passes_the_first_checkpoint_and_loads_again(tmp_path, tied):
    model = build_model(small_config(tie_word_embeddings=tied))
    trainer_for(model, tmp_path).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.config.layer_types == ["full_attention"] * 12
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.generation_config.pad_token_id == 3
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model in a folder, and code beside it that would leave a file."""
    folder = tmp_path_factory.mktemp("saved")
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    build_model(small_config(**shape)).save_pretrained(folder)
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder / 'executed')!r}, 'w')", encoding="utf-8")
    return folder


AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"auto_map": AUTO_MAP}, None),  # Qwen2 needs none of it
        ({"auto_map": AUTO_MAP, "model_type": "mine"}, "needs code of its own, which is never run"),
        ({"model_type": "mine"}, "does not recognize this architecture"),
        ({"model_type": "llama"}, "do not fit its config.json .unexpected_keys: .*bias"),
        ({"num_hidden_layers": 3, "layer_types": None}, "missing_keys: model.layers.2"),
        ({"vocab_size": 501}, "mismatched_keys: .*embed_tokens.*500.*501"),
        ("no config", "no model in .*: it needs config.json, and the weights as safetensors"),
        ("cut off", "cannot be loaded .*: make or download it again"),
        ("bits flipped", "cannot be loaded"),
        ("gguf", "no model in .*model.gguf"),
        ("pickle", "no model in .*a .bin may be a pickle.* ask for safetensors, or convert"),
        ("index to a pickle", "cannot be loaded"),
    ],
    ids=str,
)
def test_a_strangers_folder_runs_no_code_and_must_fit(saved, tmp_path, capfd, change, words):
    folder = shutil.copytree(saved, tmp_path / "copy")
    config, weights = folder / "config.json", folder / "model.safetensors"

    class Trap:
        def __reduce__(self):
            return (open, (str(saved / "executed"), "w"))

    if isinstance(change, dict):
        values = json.loads(config.read_text(encoding="utf-8")) | change
        config.write_text(json.dumps(values), encoding="utf-8")
    elif change == "no config":
        config.unlink()
    elif change == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "bits flipped":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif change == "gguf":
        folder = weights.rename(folder / "model.gguf")
    else:
        file = io.BytesIO()
        pickle.dump(Trap(), file)
        (folder / "pytorch_model.bin").write_bytes(file.getvalue())
        outside = weights.rename(tmp_path / "outside.safetensors")
        if change != "pickle":
            shutil.copy(outside, folder / "other.safetensors")
            index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    if words:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            load_model(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert "LOAD REPORT" not in "".join(capfd.readouterr())
    else:
        assert load_model(folder).dtype == torch.float32
    assert not (saved / "executed").exists()
