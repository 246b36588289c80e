import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinytrain import runs
from tinytrain.checkpoints import train
from tinytrain.modeling import build_model, qwen2_config
from tinytrain.optimizer import MuonAdamW, _orthogonalize, muon_adamw


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


def test_fp16_orthogonalizes_gradients_that_it_could_not_hold():
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 60) * 1e-9  # in fp16 all of it would be 0
    result = _orthogonalize(matrices, dtype=torch.float16)
    assert result.dtype == torch.float16
    assert (result.float() - _orthogonalize(matrices)).abs().max() < 0.02


def test_zero_gradients():
    assert _orthogonalize(torch.zeros(4, 6)).abs().max() == 0


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_is_that_of_torchs_muon(rows, columns, weight_decay):
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
    # torch works in bf16, of 8 bits; ours in float32 on a CPU: 3% of the way is its rounding.
    assert (ours - theirs).norm() < 0.03 * (theirs - before).norm()


def test_no_operation_mixes_types():
    # CUDA and processors convert by themselves; older macOS on Apple's GPU does not.
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim]
            assert len({x.dtype for x in tensors}) <= 1, operation
            return operation(*args, **kwargs or {})

    matrix = torch.randn(16, 32, requires_grad=True)
    matrix.grad = torch.randn(16, 32)
    group = {"params": [matrix], "muon": True}
    with Watch():
        MuonAdamW([group], lr=0.01, dtype=torch.bfloat16).step()


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


def test_steps_are_about_as_large_as_the_learning_rate_says(monkeypatch):
    monkeypatch.setattr("tinytrain.optimizer._ELEMENTS_AT_ONCE", 40_000)  # many go in parts
    matrices = [torch.zeros(64, 256, requires_grad=True) for _ in range(5)]
    optimizer = MuonAdamW([{"params": matrices, "muon": True}], lr=1.0, weight_decay=0.0)
    for p in matrices:
        p.grad = torch.randn(64, 256) * 1e-5
    optimizer.step()
    for p in matrices:
        assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_a_run_with_muon_goes_on_where_it_stopped(small_trainer, tmp_path, caplog):
    caplog.set_level("INFO", logger="tinytrain")

    def trainer():
        muon = runs.get_optimizer(SimpleNamespace(optimizer="muon"))
        return small_trainer(tmp_path, make_optimizer=muon, max_steps=4, save_steps=2)

    whole = trainer()
    train(whole)
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trainer()
    train(again)
    assert "going on from checkpoint-2" in caplog.text
    assert isinstance(getattr(again.optimizer, "optimizer", again.optimizer), MuonAdamW)
    for value, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_adamw_is_the_trainers_own():
    assert runs.get_optimizer(SimpleNamespace(optimizer="adamw")) is None
