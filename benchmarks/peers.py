"""The model of recipe ``pocket`` as litgpt and as llms-from-scratch train it.

Run by ``benchmarks.train_step`` with a Python that has these two and not tinytrain, so nothing of
this project is imported here: ``python benchmarks/peers.py litgpt`` prints one line of JSON. Both
get what their own training commands do: litgpt's ``pretrain`` compiles the model and computes in
bf16 mixed precision, on a CPU too; llms-from-scratch's ``train_model_simple`` does neither.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

BATCH, CONTEXT, STEPS, WARM_UP = 8, 256, 12, 3
VOCAB_SIZE, WIDTH, INNER, LAYERS, HEADS, GROUPS = 4096, 256, 768, 4, 4, 2


def litgpt():
    """Return a training step as in ``litgpt/pretrain.py``, with its default precision, on a CPU."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, get_default_supported_precision

    fabric = lightning.Fabric(
        accelerator="cpu", devices=1, precision=get_default_supported_precision(training=True)
    )
    config = Config(
        block_size=CONTEXT,
        padded_vocab_size=VOCAB_SIZE,
        n_layer=LAYERS,
        n_head=HEADS,
        n_query_groups=GROUPS,
        n_embd=WIDTH,
        intermediate_size=INNER,
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

    def step(ids):
        logits = model(ids[:, :-1].contiguous())
        loss = chunked_cross_entropy(logits, ids[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def llms_from_scratch():
    """Return a training step as in ``train_model_simple``, for the faster of its Llama models."""
    import torch
    from llms_from_scratch.llama3 import Llama3ModelFast

    model = Llama3ModelFast(
        {
            "vocab_size": VOCAB_SIZE,
            "context_length": CONTEXT,
            "emb_dim": WIDTH,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "hidden_dim": INNER,
            "n_kv_groups": GROUPS,
            "rope_base": 1_000_000.0,
            "rope_freq": None,
            "dtype": torch.float32,
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

    def step(ids):
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        targets = ids[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()

    return step


MODELS = {"litgpt": litgpt, "llms-from-scratch": llms_from_scratch}


def main() -> None:
    """Train some steps and print the tokens a second and the peak of memory in GB."""
    import torch

    step, times = MODELS[sys.argv[1]](), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(VOCAB_SIZE, (BATCH, CONTEXT + 1), generator=generator)
        start = time.perf_counter()
        step(ids)
        times.append(time.perf_counter() - start)
    speed = BATCH * CONTEXT / statistics.median(times[WARM_UP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"tokens_per_second": speed, "peak": peak}))


if __name__ == "__main__":
    main()
