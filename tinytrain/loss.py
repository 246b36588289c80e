"""The loss of a language model, without ever holding all of its logits.

With Qwen2.5's 151,665 tokens the float32 logits of a batch of 16 x 512 positions take 5 GB, and the
loss and its gradient as much again each. So they are computed for a few positions at a time, and
turned into their gradient at once, which then exists during the rest of the backward pass. The idea
is Liger Kernel's (Hsu et al., 2024, arXiv:2410.10989), here in plain PyTorch, for any device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_IGNORED_LABEL = -100  # as everywhere in PyTorch
_LOGITS_AT_ONCE = 2**22  # in float32, uncompiled: 16 MB, which may stay in a processor's cache


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients on the way forward; backward only hands them over."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, total, rows, dtype, deferred, needs_grad, compiled):
        narrow = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # In the type of the products, as autocast would make it; but fp16 may overflow in a sum.
        sum_dtype = torch.float32 if dtype == torch.float16 else dtype
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_grad else None
        rows = min(rows, max(len(hidden), 1))
        few = rows if compiled else min(rows, max(_LOGITS_AT_ONCE // len(weight), 1))
        # Allocated once: fresh memory for each slice would take longer than filling it.
        buffer = hidden.new_empty((rows, len(weight)), dtype=dtype)
        work = None if compiled else buffer.new_empty((few, len(weight)), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].to(dtype)
            label = labels[start : start + rows, None]
            logits = torch.mm(part, narrow.T, out=buffer[: len(part)])
            for first in range(0, len(part), few):
                piece = logits[first : first + few], label[first : first + few]
                loss += _fused(*piece) if compiled else _to_gradient(*piece, work, needs_grad)
            if needs_grad:
                grad_hidden[start : start + rows] = logits @ narrow
                if dtype == sum_dtype:
                    grad_weight.addmm_(logits.T, part)
                else:
                    grad_weight += logits.T @ part
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.total, ctx.weight_dtype, ctx.deferred = total, weight.dtype, deferred
        return loss / total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        grad_hidden, grad_weight = ctx.saved_tensors
        # Only here divided by the number of positions: before, fp16 could not hold the result.
        factor = factor / ctx.total
        grad_hidden = grad_hidden.mul_(factor)
        if ctx.deferred is not None:
            ctx.deferred.append((grad_weight, factor))
            return grad_hidden, *[None] * 8
        return grad_hidden, grad_weight.to(ctx.weight_dtype).mul_(factor), *[None] * 7


class _TiedEmbedding(torch.autograd.Function):
    """Looks up rows of a table that the loss uses too, and hands over one gradient for both.

    PyTorch would make a second table for the rows that were read, and a third one for the sum. Here
    the loss defers its gradient until the backward pass ends, and the rows are added in place.
    """

    @staticmethod
    def forward(ctx, ids, table, deferred):
        ctx.save_for_backward(ids, table)
        ctx.deferred = deferred
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        ids, table = ctx.saved_tensors
        if ctx.deferred:
            narrow, factor = ctx.deferred.pop()
            grad_table = narrow.to(table.dtype).mul_(factor)
            del narrow
        else:  # nothing was learned from the loss
            grad_table = torch.zeros_like(table)
        ids, grad_rows = ids.flatten(), grad_rows.flatten(0, -2).to(table.dtype)
        # Both sum the rows of one token in a fixed order; each is slow on the other device.
        if table.is_cuda:
            grad_table.index_put_((ids,), grad_rows, accumulate=True)
        else:
            grad_table += torch.sparse_coo_tensor(
                ids[None], grad_rows, table.shape, check_invariants=False
            )
        return None, grad_table, None


def _to_gradient(
    logits: torch.Tensor, label: torch.Tensor, work: torch.Tensor, needs_grad: bool
) -> torch.Tensor:
    """Return the summed loss of some positions, and make their logits into its gradient."""
    counts = (label != _IGNORED_LABEL).float()
    label = label.clamp(min=0)
    powers = work[: len(logits)].copy_(logits)
    right = powers.gather(-1, label)
    highest = powers.amax(-1, keepdim=True)
    sums = powers.sub_(highest).exp_().sum(-1, keepdim=True)
    if needs_grad:
        # The gradient of a position's loss: its probabilities, less 1 for the right token.
        logits.copy_(powers.mul_(counts / sums).scatter_add_(-1, label, -counts))
    return ((highest + sums.log() - right) * counts).sum()


def _to_gradient_at_once(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Do the same in a form that torch.compile turns into loops without memory of their own."""
    counts = (label != _IGNORED_LABEL).float()
    label = label.clamp(min=0)
    right = logits.gather(-1, label).float()
    highest = logits.amax(-1, keepdim=True).float()
    level = highest + (logits.float() - highest).exp().sum(-1, keepdim=True).log()
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    logits.copy_(((logits.float() - level).exp() - (tokens == label).float()) * counts)
    return ((level - right) * counts).sum()


@functools.cache
def _compiled() -> Any:
    torch._dynamo.config.suppress_errors = True  # where compiling fails, it runs as it is
    return torch.compile(_to_gradient_at_once)


def _fused(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Compile once for any number of positions; for any vocabulary too, it would be slow."""
    for tensor in (logits, label):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(logits, label)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    total: torch.Tensor | float | None = None,
    rows: int = 512,
    compiled: bool = False,
    deferred: list | None = None,
) -> torch.Tensor:
    """Return the cross entropy of ``hidden @ weight.T``, computed a few rows at a time.

    Under autocast the matrix products are computed in its type and the rest in float32. The result
    is a float32 scalar in nats; 0 if no label counts, where PyTorch's own is NaN.

    Parameters
    ----------
    hidden, weight : torch.Tensor
        The last hidden state, of shape (positions, width), and the output matrix, of shape
        (vocabulary size, width).
    labels : torch.Tensor
        The right token at each position, int64 of shape (positions,); -100 where none counts.
    total : torch.Tensor or float, optional
        What the sum of all losses is divided by, at least 1; by default the labels that count.
    rows : int
        Positions at a time: fewer save memory, many more gain no speed.
    compiled : bool
        Whether torch.compile, once, fuses what happens between the matrix products.
    deferred : list, optional
        Gets the gradient of the weight, and a factor, in place of autograd.

    Examples
    --------
    >>> hidden, weight = torch.zeros(3, 4), torch.zeros(10, 4)
    >>> linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100]))  # ln(10)
    tensor(2.3026)
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    if total is None:
        total = (labels != _IGNORED_LABEL).sum()
    total = torch.as_tensor(total).clamp(min=1)  # where no label counts, the loss is 0, not 0 / 0
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = rows, dtype, deferred, needs_grad, compiled and needs_grad
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, total, *options)


def _is_plain(table: torch.nn.Module) -> bool:
    """Tell whether the table's gradient may be handed over in one piece: it is not sharded."""
    plain = type(table) is torch.nn.Embedding and type(table.weight) is torch.nn.Parameter
    return plain and table.padding_idx is None and table.weight.device.type in ("cpu", "cuda")


def save_loss_memory(model: PreTrainedModel, rows: int = 512, compiled: bool = False) -> None:
    """Let a causal language model compute its training loss by `linear_cross_entropy`.

    The model, with the parts ``model`` and ``lm_head`` (without bias) as Qwen2 and Llama have them,
    is changed in place; another one is a ValueError. With labels its output then holds the loss and
    no logits; without, it works as before. What is saved stays the same.
    """
    head = getattr(model, "lm_head", None)
    if not hasattr(model, "model") or head is None or getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(model).__name__} has no parts `model` and `lm_head` without bias")
    # A class of its own, not a function in the model: a copy on a second GPU keeps its own parts.
    kind, plain_head = type(model), type(head)

    @functools.wraps(kind.forward)  # the Trainer looks at the arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ):
        if labels is None:
            return kind.forward(self, input_ids, *args, **kwargs)
        kwargs["use_cache"] = False  # nothing is generated: keys and values need not be kept
        table, deferred = self.model.embed_tokens, None
        tied = self.lm_head.weight is table.weight and table.weight.requires_grad
        if tied and torch.is_grad_enabled() and input_ids is not None and _is_plain(table):
            deferred = []
            kwargs["inputs_embeds"] = _TiedEmbedding.apply(input_ids, table.weight, deferred)
            input_ids = None
        hidden = self.model(input_ids, *args, **kwargs).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)  # each position predicts the next token
        labels, total = labels[:, 1:].flatten(), num_items_in_batch
        return CausalLMOutputWithPast(loss=self.lm_head(hidden, labels, total, deferred))

    def head_forward(self, hidden, labels=None, total=None, deferred=None):
        """Compute the loss here, where FSDP has the whole of the weight."""
        if labels is None:
            return plain_head.forward(self, hidden)
        return linear_cross_entropy(hidden, self.weight, labels, total, rows, compiled, deferred)

    # The same name: it is written into the saved configuration.
    for part, function in ((model, forward), (head, head_forward)):
        own = type(part)
        methods = {"forward": function, "__module__": own.__module__, "__doc__": own.__doc__}
        part.__class__ = type(own.__name__, (own,), methods)
