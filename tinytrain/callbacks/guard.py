"""Stops a run whose loss spikes or is NaN, before the step changes the weights."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather, reduce
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LossError(RuntimeError):
    """The loss of a step is NaN or spikes.

    Attributes
    ----------
    step : int
        The step, which has not changed the weights.
    loss : float
        Its loss in nats per token.
    documents : list of int
        Where the batch's documents stand in the training set; empty if that cannot be told.
    checkpoint : Path or None
        The newest complete checkpoint, from before this step.
    """

    def __init__(self, message: str, step: int, loss: float, documents: list[int], checkpoint):
        super().__init__(message)
        self.step, self.loss, self.documents = step, loss, documents
        self.checkpoint = checkpoint


class LossGuard(TrainerCallback):
    """Stops a run whose loss is NaN or spikes, before the step changes the weights.

    A loss spikes if it lies above the mean of the last `window` steps by more than `spike` of their
    standard deviations, and by more than one nat: the model has become, at one blow, e times less
    sure of every token. While the loss falls steeply at the start the deviation is large and the
    guard is patient; later it is small, and one nat decides.

    Parameters
    ----------
    spike : float, optional
        Standard deviations. None only looks for what is not a number.
    window : int
        Steps to compare with; the first half of a window is not judged.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        To name the documents of the batch.
    """

    def __init__(
        self,
        spike: float | None = 10.0,
        window: int = 50,
        tokenizer: PreTrainedTokenizerBase | None = None,
        find_checkpoint: Callable[[str], str | Path | None] = get_last_checkpoint,
    ):
        self.spike = spike
        self.window = window
        self.tokenizer = tokenizer
        self.find_checkpoint = find_checkpoint

    gradient_norm: torch.Tensor | None = None  # of this step, where it is known already

    def on_train_begin(self, args, state, control, train_dataloader=None, model=None, **kwargs):
        """Begin with nothing to compare with."""
        if model is not None:
            self._hook = model.register_forward_hook(self._see, with_kwargs=True)
        self._blocks = train_dataloader.dataset if train_dataloader is not None else None
        self._recent: deque[float] = deque(maxlen=self.window)
        self._losses: list[torch.Tensor] = []
        self._batch: list[torch.Tensor] = []

    def close(self) -> None:
        """Remove the hook."""
        if getattr(self, "_hook", None) is not None:
            self._hook.remove()

    def _see(self, module, args, kwargs, output):
        if module.training:
            self._batch.append(kwargs["input_ids"])
            self._losses.append(output.loss.detach())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Judge the loss and the gradients of a step, the last moment that nothing is changed."""
        # Each process sees the loss of its own blocks; that of the step is their mean.
        loss = float(reduce(torch.stack(self._losses).sum(), "sum"))
        batch, self._batch, self._losses = self._batch, [], []
        trouble = self._trouble(loss)
        # In fp16 gradients overflow now and then; the Trainer then leaves the step out by itself.
        norm, self.gradient_norm = self.gradient_norm, None
        if not trouble and not args.fp16:
            if norm is None:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
            if not math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):
                trouble = "the gradient is not finite"
        if trouble:
            self._stop(trouble, loss, state.global_step + 1, batch, args)
        self._recent.append(loss)

    def _trouble(self, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.spike is None or len(self._recent) < self.window // 2:
            return ""
        mean, spread = statistics.fmean(self._recent), statistics.pstdev(self._recent)
        if loss <= mean + max(1.0, self.spike * spread):
            return ""
        return (
            f"the loss spikes to {loss:.2f} (the last {len(self._recent)} steps: {mean:.2f}, "
            f"standard deviation {spread:.2f})"
        )

    def _stop(
        self, trouble: str, loss: float, step: int, batch: list[torch.Tensor], args: Any
    ) -> None:
        blocks = torch.cat([ids.reshape(-1, ids.shape[-1]) for ids in batch])
        blocks = gather(blocks.to(args.device).contiguous()).cpu()
        rows, documents = self._find(blocks)
        checkpoint = self.find_checkpoint(args.output_dir)
        checkpoint = Path(checkpoint) if checkpoint else None
        words = [f"step {step}: {trouble}; the step was not made."]
        if rows:
            words.append(f"Its batch is blocks {_listed(rows)} of the training set")
            words[-1] += f", from documents {_listed(documents)}." if documents else "."
        if self.tokenizer is not None:
            begins = [self.tokenizer.decode(block[:12]) for block in blocks[:4]]
            words.append(f"They begin {', '.join(repr(text) for text in begins)}.")
        good = f"is {checkpoint.name}" if checkpoint else "does not exist yet"
        words.append(
            f"The last good checkpoint {good}. Look at these documents, or halve the learning rate."
        )
        raise LossError(" ".join(words), step, loss, documents, checkpoint)

    def _find(self, wanted: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return where blocks stand in the training set, and the documents they come from.

        Packed blocks follow each other as the documents do, so that the number of end-of-text
        tokens before a block is the number of its first document.
        """
        if self._blocks is None:
            return [], []
        ids = self._blocks.with_format("numpy")
        wanted_rows = {tuple(row) for row in wanted.tolist()}
        end = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        rows, documents, ended = [], set(), 0
        for start in range(0, len(ids), 10_000):
            for number, row in enumerate(ids[start : start + 10_000]["input_ids"], start):
                here = int((row == end).sum())
                if tuple(row.tolist()) in wanted_rows:
                    rows.append(number)
                    # A block that ends with its last document's end does not touch the next one.
                    documents.update(range(ended, ended + here + (row[-1] != end)))
                ended += here
        return rows, sorted(documents) if ended else []


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
