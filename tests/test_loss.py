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
    ("sizes", "ignored", "rows", "total", "scale"),
    [
        ((64, 16, 100), 0, 16, None, 1),
        ((37, 7, 53), 5, 10, 11.0, 1),
        ((10, 4, 3), 9, 3, None, 1),
        ((5, 4, 1001), 0, 512, 11.0, 1),
        ((8, 4, 10), 0, 3, None, 1e6),  # logits whose exponentials would overflow
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradients_are_those_of_the_plain_loss(
    sizes, ignored, rows, total, scale, compiled
):
    hidden, weight, labels = inputs(*sizes, ignored)
    hidden = scale * hidden
    expected = with_gradients(plain, hidden, weight, labels, total)
    options = {"rows": rows, "compiled": compiled}
    found = with_gradients(linear_cross_entropy, hidden, weight, labels, total, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("compiled", [False, True])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_plain_loss(compiled):
    hidden, weight, labels = inputs(200, 16, 5000, 10)
    truth = with_gradients(plain, hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"rows": 200 if compiled else 32, "compiled": compiled}
        found = with_gradients(linear_cross_entropy, hidden, weight, labels, **options)
        usual = with_gradients(plain, hidden, weight, labels)
        with torch.profiler.profile(profile_memory=True) as profile:
            linear_cross_entropy(hidden, weight, labels, **options)
    if compiled:
        # The logits, made once in bf16; what is not really compiled makes several copies of them.
        assert max(event.cpu_memory_usage for event in profile.events()) == 2 * 200 * 5000
    for ours, theirs, exact in zip(found, usual, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()
        assert (ours - exact).norm() <= 0.02 * exact.norm()


def test_without_learning_only_the_logits_are_computed():
    hidden, weight, labels = inputs(20, 16, 300)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, rows=8)
    assert counter.get_total_flops() == 2 * 20 * 16 * 300
    torch.testing.assert_close(loss, plain(hidden, weight, labels))


def test_in_fp16_small_gradients_do_not_vanish():
    """A token that is never right has a share of 1 / vocabulary / positions: too small for fp16."""
    hidden, weight, labels = inputs(1000, 16, 20_000)
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


def test_neither_all_logits_nor_a_second_gradient_of_tied_embeddings_is_held():
    model = small_model(tied=True)
    save_loss_memory(model, rows=10)
    ids = torch.randint(211, (4, 64))
    with Watch() as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with Watch() as backward:
        loss.backward()
    largest = max(s.numel() // 211 for s, _ in forward.seen + backward.seen if 211 in s)
    assert 10 <= largest <= 32  # ten rows of logits; the matrix itself has 32 columns
    # A dense gradient of the embedding would be as large as the model and nearly all zeros.
    tables = {storage for shape, storage in backward.seen if shape == (211, 32)}
    assert tables == {model.lm_head.weight.grad.untyped_storage().data_ptr()}


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


def test_what_does_not_fit_is_said():
    hidden, weight, labels = inputs(8, 4, 10)
    for wrong in ((hidden, weight, labels[1:]), (hidden[None], weight, labels)):
        with pytest.raises(RuntimeError, match="size|matrix"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="SimpleNamespace has no parts"):
        save_loss_memory(SimpleNamespace(model=None))


def small_model(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, tie_word_embeddings=tied)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("items", "padding"), [(None, 7), (40, None)])
def test_a_model_learns_the_same(tied, items, padding):
    model = small_model(tied)
    # Its row learns from the loss only, as `torch.nn.Embedding` has it.
    model.model.embed_tokens.padding_idx = padding
    ids = torch.randint(211, (3, 19), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([5, 7, 7])
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


def test_what_is_saved_generated_and_copied_stays_the_same(tmp_path):
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
    # A copy uses its own weights: several GPUs under one process have one each.
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(3)
    assert model(input_ids=ids, labels=ids).loss != other(input_ids=ids, labels=ids).loss
    assert isinstance(other, Qwen2ForCausalLM)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_trainer_reaches_the_same_loss_with_it(smoke, tmp_path, precision):
    losses, some = [], smoke.blocks["test"].select(range(8))
    for change in (lambda model: None, lambda model: save_loss_memory(model, rows=100)):
        model = build_model(smoke.config, seed=1)
        change(model)
        folder = tmp_path / str(len(losses))
        arguments = training_arguments(smoke.recipe, folder, precision, use_cpu=True, max_steps=4)
        trainer = build_trainer(model, arguments, smoke.blocks["train"], some)
        train(trainer)
        history = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        losses.append(history + [trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "float32" else 5e-3)
