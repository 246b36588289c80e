"""Lets the model write while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tinytrain.common import (
    DISPLAYS,
    PROGRESS,
    NotebookOutput,
    append_json_line,
    in_notebook,
    one_line,
    read_json_lines,
    write_json_lines,
)

logger = logging.getLogger(__name__)

_ROWS = 10  # the most samples shown per prompt; the file keeps all


class SampleCallback(TrainerCallback):
    """Lets the model complete the same few prompts every so many steps, and at the end.

    ``write(model, prompts)`` returns a continuation for each prompt, for example
    ``functools.partial(complete, tokenizer=tokenizer, max_new_tokens=16)``. ``path``, usually
    ``samples.jsonl``, gets a line per sample with ``step`` and ``texts``; a resumed run drops the
    lines after its checkpoint and goes on.
    """

    rank_zero_only = True
    needs_unsharded_model = True  # with FSDP the model writes only if all processes take part

    def __init__(
        self, write: Callable[..., list[str]], prompts: Sequence[str], every: int, path: str | Path
    ):
        self.write, self.prompts = write, list(prompts)
        self.every, self.path = every, Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the samples of the steps already done."""
        self.samples: list[dict[str, Any]] = []
        if state.global_step and self.path.exists():
            known = read_json_lines(self.path)
            self.samples = [sample for sample in known if sample["step"] <= state.global_step]
        write_json_lines(self.path, self.samples)
        self._output = NotebookOutput() if in_notebook() else None
        if self._output:
            DISPLAYS.add(self)
            self._output.show(self.table() or "(here you will see what the model writes)")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Let the model write, every so many steps."""
        if state.global_step % self.every == 0:
            self._sample(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Let the model write once more."""
        if not self.samples or self.samples[-1]["step"] != state.global_step:
            self._sample(state, model)
        self.close()

    def close(self) -> None:
        """Let messages appear on the screen again."""
        DISPLAYS.discard(self)

    def _sample(self, state, model) -> None:
        texts = self.write(model, prompts=self.prompts)
        self.samples.append({"step": state.global_step, "texts": texts})
        append_json_line(self.path, self.samples[-1])
        for prompt, text in zip(self.prompts, texts, strict=True):
            message = f"step {state.global_step}: {one_line(prompt)} → {one_line(text)}"
            logger.info(message, extra=PROGRESS)
        if self._output:
            self._output.show(self.table())

    def table(self) -> str:
        """Return the samples for reading, under each prompt a row per step."""
        shown, last = self.samples, len(self.samples) - 1
        if last >= _ROWS:  # evenly, the first and the last among them
            shown = [shown[round(i * last / (_ROWS - 1))] for i in range(_ROWS)]
        blocks = []
        for number, prompt in enumerate(self.prompts):
            rows = [f"{s['step']:>8,}  {one_line(s['texts'][number])}" for s in shown]
            blocks.append("\n".join([one_line(prompt), *rows]))
        return "\n\n".join(blocks) if shown else ""
