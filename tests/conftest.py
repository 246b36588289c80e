"""What several tests share: one small, real run of recipe ``smoke``, made once a session."""

import logging
import os
import shutil
import time
from types import SimpleNamespace

import pytest

# Nothing here may reach out for a hub or write into a home folder's history of experiments.
os.environ["HF_HUB_OFFLINE"] = "1"
# What `make test` hands down is not for a make that a test starts.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    """The recipes of the tests are their own, whatever the shell has set."""
    for name in ("RECIPE", "CORPUS", "TEXT_FIELD", "MAX_STEPS", "CHATS"):
        monkeypatch.delenv(f"TINYTRAIN_{name}", raising=False)


@pytest.fixture(autouse=True)
def no_logging_left():
    """What a test sets up with `setup_logging` would keep messages from those after it."""
    yield
    logger = logging.getLogger("tinytrain")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Text, tokenizer, blocks and configuration of recipe ``smoke``, in a folder of its own."""
    from tinytrain import steps
    from tinytrain.recipes import RECIPES

    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("TINYTRAIN_RUNS", str(runs))
        recipe = RECIPES["smoke"]
        return SimpleNamespace(
            recipe=recipe,
            runs=runs,
            split=steps.get_split(recipe),
            tokenizer=steps.get_tokenizer(recipe),
            blocks=steps.get_blocks(recipe),
            config=steps.get_config(recipe),
        )


@pytest.fixture(scope="session")
def trained(smoke, tmp_path_factory):
    """The folder of runs after ``python -m tinytrain train --recipe smoke``."""
    from tinytrain.__main__ import main

    runs = tmp_path_factory.mktemp("trained") / "runs"
    shutil.copytree(smoke.runs, runs, ignore=shutil.ignore_patterns("*.lock"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYTRAIN_RUNS", str(runs))
        assert main(["train", "--recipe", "smoke"]) == 0
    return runs


@pytest.fixture
def plain_trainer(smoke, tmp_path):
    """Return a function that builds a Trainer of transformers, without ours around it."""
    from transformers import Trainer, TrainingArguments

    from tinytrain.modeling import build_model
    from tinytrain.training import _collate

    def build(callbacks, model=None, **overrides):
        arguments = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True}
        arguments |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 2}
        return Trainer(
            model=model or build_model(smoke.config, seed=1),
            args=TrainingArguments(str(tmp_path), **arguments | overrides),
            train_dataset=smoke.blocks["train"],
            eval_dataset=smoke.blocks["test"].select(range(4)),
            data_collator=_collate,
            callbacks=callbacks,
        )

    return build


@pytest.fixture(scope="session")
def small_trainer(smoke):
    """Return a function that builds the Trainer of recipe ``smoke``, for a folder."""
    from tinytrain.modeling import build_model
    from tinytrain.training import build_trainer, training_arguments

    def build(folder, callbacks=(), precision="float32", make_optimizer=None, **overrides):
        arguments = training_arguments(
            smoke.recipe, folder, precision, **{"use_cpu": True} | overrides
        )
        model = build_model(smoke.config, seed=smoke.recipe.seed)
        few = smoke.blocks["test"].select(range(smoke.recipe.eval_blocks))
        return build_trainer(
            model, arguments, smoke.blocks["train"], few, callbacks, make_optimizer
        )

    return build


@pytest.fixture(scope="session")
def hostile():
    """Text that must never become HTML."""
    return "<script>x</script>&lt;'\"&\n</div>"


@pytest.fixture(scope="session")
def taught(smoke, hostile):
    """A model that has learned three texts by heart, and to stop after them."""
    import torch

    from tinytrain.modeling import build_model

    model = build_model(smoke.config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = ("法国的首都是巴黎。", "日本的首都是东京。", f"网页{hostile}")
    ids = [[*smoke.tokenizer(text)["input_ids"], smoke.tokenizer.eos_token_id] for text in texts]
    for _ in range(60):
        for row in ids:
            batch = torch.tensor([row])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture(scope="session")
def whole(smoke, small_trainer, tmp_path_factory):
    """A run of ``smoke`` that nothing disturbs: its folder, history without times, weights."""
    from tinytrain.callbacks import HistoryCallback
    from tinytrain.checkpoints import train

    folder = tmp_path_factory.mktemp("whole")
    history = HistoryCallback(folder / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(folder / "checkpoints", [history])
    train(trainer)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return SimpleNamespace(folder=folder, history=without_times(history.path), weights=weights)


def without_times(path):
    """Return the lines of a history that another run of the same recipe must have too."""
    from tinytrain.callbacks import read_history

    lines = read_history(path)
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def kept_bytes(model, forward):
    """Return the bytes that a forward pass keeps for the backward pass, weights left out."""
    import torch

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def wait_for(condition, seconds=120, every=0.05):
    """Return once a condition is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(every)
