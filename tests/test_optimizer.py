import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from tinytrain import runs
from tinytrain.checkpoints import train
from tinytrain.modeling import build_model, qwen2_config
from tinytrain.optimizer import MuonAdamW, _batches_of_one_shape, _orthogonalize, muon_adamw

MUON = SimpleNamespace(optimizer="muon")


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (3, 20, 60), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_have_directions_of_about_one_length(shape, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=dtype) * 1e3
    result = _orthogonalize(matrices)
    assert result.shape == matrices.shape and result.dtype == dtype
    lengths = torch.linalg.svdvals(result.float())
    assert lengths.min() > 0.5 and lengths.max() < 1.3


def test_orthogonalizing_keeps_the_directions():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(20, 30), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1, 5, 20)) @ v
    mixed = u.T @ _orthogonalize(matrix, steps=10) @ v.T
    assert (mixed - torch.diag(mixed.diagonal())).abs().max() < 1e-3


def test_zero_gradients_and_vectors():
    assert _orthogonalize(torch.zeros(4, 6)).abs().max() == 0
    with pytest.raises(ValueError, match="Muon steps matrices"):
        MuonAdamW([{"params": [torch.zeros(4, requires_grad=True)], "muon": True}], lr=1.0)


def same_as_torch(rows, columns, weight_decay):
    torch.manual_seed(0)
    ours = torch.randn(rows, columns, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    mine = MuonAdamW([{"params": [ours], "muon": True}], lr=0.01, weight_decay=weight_decay)
    torchs = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    before = ours.detach().clone()
    for _ in range(5):
        ours.grad = torch.randn(rows, columns)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    moved = (theirs - before).norm()
    return (ours - theirs).norm() / moved


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_is_that_of_torchs_muon(shape, weight_decay):
    # torch works in bf16, of 8 bits; ours in float32 on a CPU: 3% of the way is its rounding.
    assert same_as_torch(*shape, weight_decay) < 0.03


def test_what_is_not_a_matrix_of_a_layer_is_stepped_by_adamw():
    config = qwen2_config(
        50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, context_length=16, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model, other = build_model(config, seed=1), build_model(config, seed=1)
    ours = muon_adamw(model, lr=1e-3, weight_decay=0.1)
    torchs = torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.ndim == 2]},
            {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    ids = torch.randint(50, (2, 16))
    for one, optimizer in ((model, ours), (other, torchs)):
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        by_muon = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert torch.allclose(p, q, atol=1e-6) != by_muon, name


def test_many_matrices_are_worked_on_in_parts(monkeypatch):
    params = [torch.zeros(4, 8), torch.zeros(8, 4), *(torch.zeros(4, 8) for _ in range(4))]
    monkeypatch.setattr("tinytrain.optimizer._ELEMENTS_AT_ONCE", 64)
    lists = _batches_of_one_shape(params)
    assert [len(same) for same in lists] == [2, 2, 1, 1]
    assert sum(p is q for q in params for same in lists for p in same) == len(params)


def test_steps_are_about_as_large_as_the_learning_rate_says():
    p = torch.zeros(64, 256, requires_grad=True)
    optimizer = MuonAdamW([{"params": [p], "muon": True}], lr=1.0, weight_decay=0.0)
    p.grad = torch.randn(64, 256) * 1e-5
    optimizer.step()
    assert math.isclose(p.detach().square().mean().sqrt(), 0.2, rel_tol=0.2)


def test_a_run_with_muon_goes_on_where_it_stopped(small_trainer, tmp_path):
    def trainer():
        return small_trainer(tmp_path, make_optimizer=runs.get_optimizer(MUON))

    whole = trainer()
    train(whole)
    shutil.rmtree(tmp_path / "checkpoint-20")
    again = trainer()
    train(again)
    assert [line["step"] for line in again.state.log_history if "train_runtime" in line] == [20]
    assert isinstance(getattr(again.optimizer, "optimizer", again.optimizer), MuonAdamW)
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_another_optimizer_makes_another_run():
    with pytest.raises(ValueError, match="neither 'adamw' nor 'muon'"):
        runs.get_optimizer(SimpleNamespace(optimizer="sgd"))
    assert runs.get_optimizer(SimpleNamespace(optimizer="adamw")) is None
