"""The model of recipe ``pocket`` as litgpt and as llms-from-scratch train it.

Run by ``benchmarks.train_step`` and ``benchmarks.hours`` with a Python that has these two and not
tinytrain, so nothing of this project is imported here. ``python benchmarks/peers.py litgpt 2 512``
prints its speed and memory with 2 layers, whose MLPs are 512 wide, as a line of JSON; with a file
of token blocks and a number of seconds it trains for so long and prints the held-out loss. Both get
what their own training commands do: litgpt's ``pretrain`` compiles the model and computes in bf16
mixed precision, on a CPU too, with a rate that falls to a tenth by a cosine; llms-from-scratch's
``train_model_simple`` does neither.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

BATCH, CONTEXT, STEPS, WARM_UP = 8, 256, 12, 3
VOCAB_SIZE, WIDTH, HEADS, GROUPS = 4096, 256, 4, 2


def litgpt(layers, inner, precision=None):
    """Return loss and update as in ``litgpt/pretrain.py`` on a CPU, by default in its precision."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, get_default_supported_precision

    precision = precision or get_default_supported_precision(training=True)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    config = Config(
        block_size=CONTEXT,
        padded_vocab_size=VOCAB_SIZE,
        n_layer=layers,
        n_head=HEADS,
        n_query_groups=GROUPS,
        n_embd=WIDTH,
        intermediate_size=inner,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer = fabric.setup_optimizers(optimizer)

    def loss_of(ids):
        logits = model(ids[:, :-1].contiguous())
        return chunked_cross_entropy(logits, ids[:, 1:].contiguous())

    def update(loss, done):
        # Its 2,000 steps of warm-up and its batch of 512 blocks would need days.
        rate = min(1, 20 * done) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = 4e-4 * rate
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loss_of, update


def llms_from_scratch(layers, inner):
    """Return loss and update as in ``train_model_simple``, for the faster of its Llama models."""
    import torch
    from llms_from_scratch.llama3 import Llama3ModelFast

    model = Llama3ModelFast(
        {
            "vocab_size": VOCAB_SIZE,
            "context_length": CONTEXT,
            "emb_dim": WIDTH,
            "n_heads": HEADS,
            "n_layers": layers,
            "hidden_dim": inner,
            "n_kv_groups": GROUPS,
            "rope_base": 1_000_000.0,
            "rope_freq": None,
            "dtype": torch.float32,
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

    def loss_of(ids):
        logits, targets = model(ids[:, :-1]), ids[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def update(loss, done):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return loss_of, update


def shape(recipe) -> list[str]:
    """Return a recipe's layers and the width of their MLPs, as this command takes them."""
    return [str(recipe.num_hidden_layers), str(recipe.intermediate_size)]


MODELS = {
    "litgpt": litgpt,
    "litgpt in float32": partial(litgpt, precision="32-true"),
    "llms-from-scratch": llms_from_scratch,
}


def train(make: Callable, file: str, seconds: float) -> dict[str, float]:
    """Train on a file's blocks ``train`` by the clock; return the loss on its blocks ``test``."""
    import numpy as np
    import torch

    blocks = {key: torch.from_numpy(ids).long() for key, ids in np.load(file).items()}
    torch.manual_seed(0)
    start, batches = time.perf_counter(), []
    loss_of, update = make()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        if not batches:  # an epoch, in an order of its own
            batches = [*torch.randperm(len(blocks["train"])).split(BATCH)]
            batches = [rows for rows in batches if len(rows) == BATCH]  # one shape for the compiler
        update(loss_of(blocks["train"][batches.pop()]), done)
    with torch.no_grad():
        losses = [loss_of(ids).item() for ids in blocks["test"].split(BATCH) if len(ids) == BATCH]
    return {"loss": statistics.mean(losses)}


def measure(make: Callable) -> dict[str, float]:
    """Train some steps; return the tokens a second and the peak of memory in GB."""
    import torch

    (loss_of, update), times = make(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(VOCAB_SIZE, (BATCH, CONTEXT + 1), generator=generator)
        start = time.perf_counter()
        update(loss_of(ids), 0.5)
        times.append(time.perf_counter() - start)
    speed = BATCH * CONTEXT / statistics.median(times[WARM_UP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"tokens_per_second": speed, "peak": peak}


if __name__ == "__main__":
    name, layers, inner, *given = sys.argv[1:]
    make = partial(MODELS[name], int(layers), int(inner))
    print(json.dumps(train(make, given[0], float(given[1])) if given else measure(make)))
