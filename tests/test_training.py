import sys
from dataclasses import replace

import pytest
import torch

from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.training import (
    _collate,
    _learning_rates,
    build_trainer,
    plot_learning_rate,
    total_steps,
    training_arguments,
)


def test_arguments_are_the_recipes_hyperparameters_and_others_are_passed_on(tmp_path):
    arguments = training_arguments(
        RECIPES["seed"], tmp_path, "bf16", use_cpu=True, max_grad_norm=0.5
    )
    assert arguments.learning_rate == 2e-5
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.warmup_steps == 200
    assert arguments.weight_decay == 0.1
    assert arguments.per_device_train_batch_size == 16
    assert arguments.gradient_accumulation_steps == 8
    assert (arguments.logging_steps, arguments.eval_steps, arguments.save_steps) == (50, 500, 500)
    assert arguments.save_total_limit == 2
    assert arguments.bf16 and not arguments.fp16
    assert arguments.report_to == [] and arguments.max_grad_norm == 0.5
    with pytest.raises(ValueError, match="'half' is none of float32, bf16, fp16"):
        training_arguments(RECIPES["pocket"], tmp_path, "half")


def test_the_learning_rates_shown_are_those_of_the_run(smoke, whole):
    logged = {line["step"]: line["learning_rate"] for line in whole.history if "loss" in line}
    rates = _learning_rates(smoke.recipe, 20)
    assert logged == pytest.approx({step: rates[step - 1] for step in logged})
    assert len(set(rates)) > 3 and max(rates) == smoke.recipe.learning_rate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_the_schedule_is_the_trainers(smoke, small_trainer, tmp_path, kind):
    recipe = replace(smoke.recipe, lr_scheduler=kind, warmup_steps=3)
    trainer = small_trainer(tmp_path, lr_scheduler_type=kind, warmup_steps=3)
    trainer.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        rates += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert _learning_rates(recipe, 8) == pytest.approx(rates)
    assert max(rates) == recipe.learning_rate


@pytest.mark.parametrize(
    ("blocks", "batch", "accumulation", "epochs"), [(7, 2, 3, 1.0), (6, 2, 1, 1.5), (3, 4, 8, 2.0)]
)
def test_the_steps_are_known_before_the_run(smoke, tmp_path, blocks, batch, accumulation, epochs):
    shared = {"batch_size": batch, "gradient_accumulation": accumulation}
    recipe = replace(smoke.recipe, max_steps=-1, epochs=epochs, **shared)
    arguments = training_arguments(recipe, tmp_path, use_cpu=True)
    few = smoke.blocks["train"].select(range(blocks))
    trainer = build_trainer(build_model(smoke.config), arguments, few, few)
    *_, steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert steps == total_steps(recipe, blocks)


def test_the_learning_rate_is_drawn_with_the_end_of_the_warm_up():
    recipe = RECIPES["pocket"]
    (axes,) = plot_learning_rate(recipe, 600).axes
    curve, mark = axes.lines
    assert list(curve.get_ydata()) == _learning_rates(recipe, 600)
    assert list(curve.get_xdata()) == list(range(1, 601))
    assert curve.get_ydata()[int(mark.get_xdata()[0]) - 1] == recipe.learning_rate
    assert len(plot_learning_rate(replace(recipe, warmup_steps=0), 600).axes[0].lines) == 1


def test_learning_rates_that_nobody_can_know_are_refused():
    with pytest.raises(ValueError, match="follows the loss"):
        _learning_rates(replace(RECIPES["pocket"], lr_scheduler="reduce_lr_on_plateau"), 10)
    with pytest.raises(ValueError, match="at least one"):
        _learning_rates(RECIPES["pocket"], 0)


def test_every_token_is_learned_the_end_of_text_too():
    batch = _collate([{"input_ids": [5, 0, 7]}, {"input_ids": torch.tensor([0, 0, 1])}])
    assert batch["input_ids"].tolist() == [[5, 0, 7], [0, 0, 1]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].dtype == torch.int64
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 5  # not the same memory


def test_training_lowers_the_held_out_loss(small_trainer, whole, tmp_path):
    before = small_trainer(tmp_path).evaluate()["eval_loss"]
    *_, after = (line["eval_loss"] for line in whole.history if "eval_loss" in line)
    assert after < before - 0.3


def test_too_little_text_is_said_before_training(smoke, tmp_path):
    nothing = smoke.blocks["test"].select([])
    arguments = training_arguments(smoke.recipe, tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="held-out text gives no full block.*context_length"):
        build_trainer(build_model(smoke.config), arguments, smoke.blocks["train"], nothing)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_bf16_trains_on_a_processor_as_it_does_on_a_gpu(smoke, small_trainer, tmp_path):
    trainer = small_trainer(tmp_path, precision="bf16", max_steps=1)
    seen = set()
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32}
    # Nobody has to say use_cpu.
    assert training_arguments(smoke.recipe, tmp_path, "bf16").use_cpu


def test_a_run_needs_no_notebook_and_can_be_watched_in_tensorboard(
    small_trainer, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "IPython", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    often = {"max_steps": 2, "logging_steps": 1, "eval_steps": 2}
    small_trainer(tmp_path / "run", report_to="tensorboard", **often).train()
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes() and b"eval/loss" in events.read_bytes()
