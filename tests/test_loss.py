import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tinytrain.checkpoints import train
from tinytrain.loss import linear_cross_entropy, save_loss_memory
from tinytrain.modeling import build_model
from tinytrain.training import build_trainer, training_arguments


def plain(hidden, weight, labels, total=None):
    logits = (hidden @ weight.T).float()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss / ((labels != -100).sum() if total is None else total)


def inputs(positions, width, vocabulary, ignored=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(positions * vocabulary)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    labels[torch.randperm(positions, generator=generator)[:ignored]] = -100
    return hidden, weight, labels


def with_gradients(function, hidden, weight, *args, **kwargs):
    loss = function(hidden, weight, *args, **kwargs)
    return loss, *torch.autograd.grad(3 * loss, (hidden, weight))


@pytest.mark.parametrize(
    ("positions", "width", "vocabulary", "ignored", "rows"),
    [(64, 16, 100, 0, 16), (37, 7, 53, 5, 10), (10, 4, 3, 9, 3), (5, 4, 1001, 0, 512)],
)
@pytest.mark.parametrize("total", [None, 11.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradients_are_those_of_the_plain_loss(
    positions, width, vocabulary, ignored, rows, total, compiled
):
    hidden, weight, labels = inputs(positions, width, vocabulary, ignored)
    expected = with_gradients(plain, hidden, weight, labels, total)
    options = {"rows": rows, "compiled": compiled}
    found = with_gradients(linear_cross_entropy, hidden, weight, labels, total, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("compiled", [False, True])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_plain_loss(compiled):
    hidden, weight, labels = inputs(100, 64, 500, 10)
    truth = with_gradients(plain, hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"rows": 32, "compiled": compiled}
        found = with_gradients(linear_cross_entropy, hidden, weight, labels, **options)
        usual = with_gradients(plain, hidden, weight, labels)
    for ours, theirs, exact in zip(found, usual, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()
        assert (ours - exact).norm() <= 0.02 * exact.norm()


def test_compiling_needs_no_memory_of_the_size_of_the_logits():
    """And happens: what would run uncompiled in its place makes several copies of them."""
    hidden, weight, labels = inputs(64, 16, 5000, dtype=torch.bfloat16)
    linear_cross_entropy(hidden, weight, labels, compiled=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, compiled=True)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest == 2 * 64 * 5000  # the logits themselves, made once; in float32 they take twice


def test_without_learning_only_the_logits_are_computed():
    hidden, weight, labels = inputs(20, 16, 300)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, rows=8)
    assert counter.get_total_flops() == 2 * 20 * 16 * 300
    torch.testing.assert_close(loss, plain(hidden, weight, labels))


def test_in_fp16_small_gradients_do_not_vanish():
    """A token that is never right has a share of 1 / vocabulary / positions: too small for fp16."""
    hidden, weight, labels = inputs(2000, 16, 20_000)
    weight = (0.01 * weight).detach().requires_grad_()
    *_, truth = with_gradients(plain, hidden, weight, labels)
    with torch.autocast("cpu", torch.float16):
        *_, found = with_gradients(linear_cross_entropy, hidden, weight, labels, rows=500)
    never = torch.ones(20_000, dtype=torch.bool)
    never[labels] = False
    assert (found - truth)[never].norm() <= 0.02 * truth[never].norm()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the storage and the shape of every dense tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.layout == torch.strided:
            self.seen.append((result.shape, result.untyped_storage().data_ptr()))
        return result


def test_no_second_table_is_made_for_the_gradient_of_tied_embeddings():
    """A dense gradient of the embedding would be as large as the model and nearly all zeros."""
    model = small_model(tied=True)
    save_loss_memory(model, rows=10)
    ids = torch.randint(50, (2, 12))
    loss = model(input_ids=ids, labels=ids).loss
    with Watch() as watch:
        loss.backward()
    tables = {storage for shape, storage in watch.seen if shape == (211, 32)}
    assert tables == {model.lm_head.weight.grad.untyped_storage().data_ptr()}


def test_it_never_holds_all_logits():
    """The largest tensor of a training step has as many rows as asked for."""
    model = small_model(True)
    save_loss_memory(model, rows=10)
    ids = torch.randint(211, (4, 64))
    with Watch() as watch:
        model(input_ids=ids, labels=ids).loss.backward()
    largest = max(shape.numel() // 211 for shape, _ in watch.seen if 211 in shape)
    assert 10 <= largest <= 32  # ten rows of logits; the matrix itself has 32 columns


def test_the_row_of_a_padding_token_learns_from_the_loss_only():
    """As ``torch.nn.Embedding`` has it; the model reads it, and nothing comes back that way."""
    gradients = []
    for change in (lambda model: None, save_loss_memory):
        model = small_model(True)
        model.model.embed_tokens.padding_idx = 7
        change(model)
        ids = torch.tensor([[5, 7, 7, 3]])
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_and_frozen_embeddings_get_none():
    model = small_model(True)
    save_loss_memory(model, rows=10)
    ids = torch.randint(211, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    once = model.lm_head.weight.grad.clone()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 2 * once)
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_huge_logits_do_not_overflow_and_no_label_is_nan_as_in_pytorch(compiled):
    hidden, weight, labels = inputs(8, 4, 10)
    huge = 1e6 * hidden, weight, labels
    found = with_gradients(linear_cross_entropy, *huge, rows=3, compiled=compiled)
    for ours, theirs in zip(found, with_gradients(plain, *huge), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert linear_cross_entropy(hidden, weight, torch.full((8,), -100)).isnan()


def test_what_does_not_fit_is_said():
    hidden, weight, labels = inputs(8, 4, 10)
    with pytest.raises(ValueError, match=r"do not fit.*\(8, 4\).*\(10, 4\).*\(7,\)"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="rows=0"):
        linear_cross_entropy(hidden, weight, labels, rows=0)
    with pytest.raises(ValueError, match="SimpleNamespace has no parts"):
        save_loss_memory(SimpleNamespace(model=None))


def small_model(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, tie_word_embeddings=tied)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 40])
def test_a_model_learns_the_same(tied, items):
    model = small_model(tied)
    ids = torch.randint(211, (3, 19), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:9] = -100
    gradients, losses = [], []
    for change in (lambda model: None, lambda model: save_loss_memory(model, rows=10)):
        change(model)
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-6)


def test_what_is_saved_and_generated_stays_the_same(tmp_path):
    model = small_model(True)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "before")
    save_loss_memory(model)
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "after")(ids).logits, before)
    model.generation_config.eos_token_id = None
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_a_copy_uses_its_own_weights():
    """As several GPUs under one process do, each with a copy."""
    model = small_model(True)
    save_loss_memory(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(3)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, labels=ids).loss != other(input_ids=ids, labels=ids).loss
    assert isinstance(other, Qwen2ForCausalLM)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_trainer_reaches_the_same_loss_with_it(smoke, tmp_path, precision):
    losses = []
    for change in (lambda model: None, lambda model: save_loss_memory(model, rows=100)):
        model = build_model(smoke.config, seed=1)
        change(model)
        folder = tmp_path / str(len(losses))
        arguments = training_arguments(smoke.recipe, folder, precision, use_cpu=True, max_steps=6)
        trainer = build_trainer(model, arguments, smoke.blocks["train"], smoke.blocks["test"])
        train(trainer)
        history = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        losses.append(history + [trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "float32" else 5e-3)
