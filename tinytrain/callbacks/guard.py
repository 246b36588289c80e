"""Stops a run whose loss spikes or is NaN, before the step changes the weights."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes, reduce
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class LossError(RuntimeError):
    """The loss of a step, in nats per token, is NaN or spikes; the step was not made.

    ``documents`` are the numbers of the batch's documents in the training set, as far as known;
    ``checkpoint`` is the newest complete one, or None.
    """

    def __init__(
        self, message: str, step: int, loss: float, documents: list[int], checkpoint: Path | None
    ):
        super().__init__(message)
        self.step, self.loss, self.documents = step, loss, documents
        self.checkpoint = checkpoint


class LossGuard(TrainerCallback):
    """Stops a run whose loss is NaN or spikes, before the step changes the weights.

    A loss spikes if it exceeds the mean of the last ``window`` steps by more than ``spike`` of
    their standard deviations, and by more than one nat; the first half of a window is not judged,
    and with None no spike is. Where the model returns no ``loss``, because the Trainer computes
    another one (``compute_loss_func``, label smoothing), only the gradients are judged.

    The tokenizer serves to name the documents of the batch; ``find_checkpoint`` takes the output
    folder and returns the newest complete checkpoint, or None.
    """

    def __init__(
        self,
        spike: float | None = 10.0,
        window: int = 50,
        tokenizer: PreTrainedTokenizerBase | None = None,
        find_checkpoint: Callable[[str], str | Path | None] = get_last_checkpoint,
    ):
        self.spike, self.window = spike, window
        self.tokenizer, self.find_checkpoint = tokenizer, find_checkpoint
        self.gradient_norm: torch.Tensor | None = None  # given before a step, it is not measured
        self._recent: deque[float] = deque(maxlen=window)
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Begin with nothing to compare with, and watch the model."""
        self.close()  # an earlier run may have ended by an error
        self._dataset = train_dataloader.dataset if train_dataloader is not None else None
        self._recent.clear()
        # Bounded, since a run that ends by an error leaves the hook in the model.
        micro_batches = args.gradient_accumulation_steps * max(args.n_gpu, 1)
        self._losses: deque[torch.Tensor] = deque(maxlen=micro_batches)
        self._batch: deque[torch.Tensor] = deque(maxlen=micro_batches)
        self._hook = model.register_forward_hook(self._record, with_kwargs=True)

    @torch.compiler.disable
    def _record(self, model: torch.nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
        """Keep the loss of a micro-batch, and its tokens."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is None or not model.training:
            return
        # With this the loss is a sum, divided by the tokens of the whole step on all processes.
        self._is_share_of_step = kwargs.get("num_items_in_batch") is not None
        self._losses.append(loss.detach().mean())  # a copy: the Trainer scales the loss in place
        if "input_ids" in kwargs:
            self._batch.append(kwargs["input_ids"])

    def _step_loss(self, args: TrainingArguments) -> float | None:
        """Return the mean loss of the step's tokens, over all micro-batches and processes."""
        if not self._losses:
            return None
        losses = torch.stack([loss.to(args.device) for loss in self._losses])
        if not self._is_share_of_step:
            return float(reduce(losses.mean(), "mean"))
        over_processes = "sum" if args.average_tokens_across_devices else "mean"
        return float(reduce(losses.sum(), over_processes))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Judge the loss and the gradients of a step, the last moment that nothing is changed."""
        loss = self._step_loss(args)
        trouble = self._trouble(loss) if loss is not None else ""
        norm, self.gradient_norm = self.gradient_norm, None
        # In fp16 gradients overflow now and then; the Trainer then leaves the step out by itself.
        if not trouble and not args.fp16:
            if norm is None:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
            if not math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):
                trouble = "the gradient is not finite"
        if trouble:
            self.close()
            raise self._error(trouble, loss, state.global_step + 1, args)
        if loss is not None:
            self._recent.append(loss)
        self._losses.clear()
        self._batch.clear()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop watching the model."""
        self.close()

    def close(self) -> None:
        """Stop watching the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

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

    def _error(self, trouble: str, loss: float | None, step: int, args: Any) -> LossError:
        message = f"step {step}: {trouble}; the step was not made."
        documents: list[int] = []
        if rows := [row.to(args.device) for ids in self._batch for row in ids]:
            blocks = pad_sequence(rows, batch_first=True)
            blocks = gather(pad_across_processes(blocks, dim=1)).cpu()
            numbers, documents = self._find(blocks)
            if numbers:
                source = f", from documents {_listed(documents)}" if documents else ""
                message += f" Its batch is blocks {_listed(numbers)} of the training set{source}."
            if self.tokenizer is not None:
                begins = [repr(self.tokenizer.decode(block[:12])) for block in blocks[:4]]
                message += f" They begin {', '.join(begins)}."
        found = self.find_checkpoint(args.output_dir)
        checkpoint = Path(found) if found else None
        good = f"is {checkpoint.name}" if checkpoint else "does not exist yet"
        message += f" The last good checkpoint {good}."
        message += " Look at these documents, or start over with half the learning rate."
        return LossError(message, step, math.nan if loss is None else loss, documents, checkpoint)

    def _find(self, wanted: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the indices of blocks in the training set, and of the documents they come from.

        The number of end-of-text tokens before a block is the number of its first document.
        """
        if not (hasattr(self._dataset, "with_format") and hasattr(self._dataset, "__len__")):
            return [], []  # not a datasets.Dataset, or one that is streamed
        ids = self._dataset.with_format("numpy")
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
