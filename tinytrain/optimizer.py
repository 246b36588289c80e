"""Muon for the matrices, AdamW for the rest: one optimiser, which the Trainer saves like any other.

The gradient of a matrix has a few large directions that drown the many small ones. Muon makes all
of them equally long. From the same tokens that learns more, for some matrix products each step,
whatever the batch. ``torch.optim.Muon`` is the same rule, matrix by matrix and always in bf16; here
matrices of one shape go together, in the type you choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

# Of a polynomial that, applied again and again, drives all singular values to about 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ELEMENTS_AT_ONCE = 16 * 2**20  # four times as many on a GPU; more only costs memory


def _orthogonalize(
    matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return about ``U V^T`` for each matrix ``U S V^T``, with singular values of 0.7 to 1.2.

    ``dtype`` is what the products are computed in; by default that of the matrices.

    By a Newton-Schulz iteration: K. Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks", 2024, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = _COEFFICIENTS
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if upright else matrices  # the products of the short side are the small ones
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    # Before the type changes: fp16 knows no gradients as small as they are late in a run.
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype or x.dtype)
    for _ in range(steps):
        # x becomes a x + (b p + c p p) x, with the products p = x x^T.
        products = x @ x.mT
        factor = torch.baddbmm(products, products, products, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    x = x.reshape(shape)
    return x.mT if upright else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with ``muon=True``, whose matrices Muon steps.

    Both use one learning rate: Muon's step is scaled so that its elements are on average as large
    as AdamW's usually are, 0.2 times the rate (J. Liu et al., "Muon is Scalable for LLM Training",
    2025, arXiv:2502.16982). Its running average remembers 1 / (1 - momentum) steps; its directions
    are computed in ``dtype``, and rough ones are enough: bfloat16 or float16, where that is fast.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ):
        self.dtype = dtype
        super().__init__(params, lr=lr, fused=True, **kwargs)
        # Or fp16's loss scaler would leave it to each step to notice gradients that overflowed.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of AdamW and of Muon."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        for matrices in _batches_of_one_shape(p for p in group["params"] if p.grad is not None):
            for p in matrices:
                if not self.state[p]:
                    # AdamW expects a count of steps wherever it loads a state.
                    self.state[p]["step"] = torch.tensor(0.0)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.state[p]["step"] += 1
            gradients = [p.grad for p in matrices]
            averages = [self.state[p]["momentum_buffer"] for p in matrices]
            # All at once: a GPU would wait for the start of each small operation.
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            # A look ahead (Nesterov): the average as it will be if the next gradient is this.
            ahead = torch._foreach_mul(averages, group["momentum"])
            torch._foreach_add_(ahead, gradients, alpha=1 - group["momentum"])
            if isinstance(ahead[0], DTensor):  # with FSDP this rank holds a shard only
                ahead = [shard.full_tensor() for shard in ahead]
            directions = _orthogonalize(torch.stack(ahead), dtype=self.dtype)
            # Back to the type of the weights: older macOS cannot add bf16 to float32 on its GPU.
            directions = directions.to(matrices[0].dtype).unbind()
            steps = [_shard_like(*pair) for pair in zip(matrices, directions, strict=True)]
            length = 0.2 * math.sqrt(max(matrices[0].shape))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, steps, alpha=-group["lr"] * length)


def _shard_like(p: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a matrix, if the weights are sharded."""
    if not isinstance(p, DTensor):
        return matrix
    everywhere = [Replicate()] * p.device_mesh.ndim
    matrix = DTensor.from_local(matrix, p.device_mesh, everywhere, run_check=False)
    return matrix.redistribute(placements=p.placements)


def _batches_of_one_shape(params: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return lists of matrices of one shape, of `_ELEMENTS_AT_ONCE` or one matrix at most."""
    shapes: dict[torch.Size, list[torch.Tensor]] = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    lists = []
    for shape, same in shapes.items():
        elements = _ELEMENTS_AT_ONCE * (4 if same[0].is_cuda else 1)
        number = max(1, elements // shape.numel())
        lists += [same[start : start + number] for start in range(0, len(same), number)]
    return lists


def muon_adamw(
    model: PreTrainedModel,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    dtype: torch.dtype = torch.float32,
) -> MuonAdamW:
    """Return the optimiser for a language model: Muon for the matrices of its layers.

    Norms and biases have no weight decay; ``dtype`` is what Muon computes its directions in.

    Examples
    --------
    >>> from tinytrain.modeling import build_model, qwen2_config
    >>> model = build_model(qwen2_config(100, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=2, eos_token_id=0))
    >>> optimizer = muon_adamw(model, lr=6e-3)
    >>> [len(group["params"]) for group in optimizer.param_groups]  # matrices, embedding, vectors
    [14, 1, 11]
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(table.weight) for table in tables}
    matrices, embeddings, vectors = [], [], []
    for p in model.parameters():
        if p.requires_grad:
            group = embeddings if id(p) in tables else matrices if p.ndim == 2 else vectors
            group.append(p)
    groups = [
        {"params": matrices, "muon": True},
        {"params": embeddings},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return MuonAdamW(groups, lr, weight_decay=weight_decay, betas=betas, eps=eps, dtype=dtype)
