import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from tinytrain.callbacks import LivePlotCallback
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.training import (
    build_trainer,
    collate,
    last_checkpoint,
    open_run,
    train,
    training_arguments,
)


class StopAt(TrainerCallback):
    """Ends a run early, as a reader does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def small_trainer(smoke, folder, callbacks=(), **overrides):
    arguments = training_arguments(smoke.recipe, folder, use_cpu=True, **overrides)
    model = build_model(smoke.config, seed=smoke.recipe.seed)
    return build_trainer(model, arguments, smoke.blocks["train"], smoke.blocks["test"], callbacks)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_arguments_are_the_recipes_numbers(tmp_path):
    arguments = training_arguments(RECIPES["seed"], tmp_path, "bf16", use_cpu=True)
    assert arguments.learning_rate == 2e-5
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.warmup_steps == 200
    assert arguments.weight_decay == 0.1
    assert arguments.per_device_train_batch_size == 16
    assert arguments.gradient_accumulation_steps == 8
    assert (arguments.logging_steps, arguments.eval_steps, arguments.save_steps) == (50, 500, 500)
    assert arguments.save_total_limit == 2
    assert arguments.bf16 and not arguments.fp16
    assert arguments.report_to == []


def test_precision_is_passed_on_or_refused(tmp_path):
    assert not training_arguments(RECIPES["pocket"], tmp_path, use_cpu=True).bf16
    with pytest.raises(ValueError, match="'half' is none of float32, bf16, fp16"):
        training_arguments(RECIPES["pocket"], tmp_path, "half")


def test_other_arguments_go_through(tmp_path):
    arguments = training_arguments(RECIPES["pocket"], tmp_path, use_cpu=True, max_grad_norm=0.5)
    assert arguments.max_grad_norm == 0.5


def test_every_token_is_learned_the_end_of_text_too():
    batch = collate([{"input_ids": [5, 0, 7]}, {"input_ids": torch.tensor([0, 0, 1])}])
    assert batch["input_ids"].tolist() == [[5, 0, 7], [0, 0, 1]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].dtype == torch.int64
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 5  # not the same memory


def test_training_lowers_the_held_out_loss(smoke, tmp_path):
    trainer = small_trainer(smoke, tmp_path, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def test_too_little_text_is_said_before_training(smoke, tmp_path):
    nothing = smoke.blocks["test"].select([])
    arguments = training_arguments(smoke.recipe, tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="held-out text gives no full block.*context_length"):
        build_trainer(build_model(smoke.config), arguments, smoke.blocks["train"], nothing)


def test_checkpoints_are_limited_and_the_newest_is_found(smoke, tmp_path):
    small_trainer(smoke, tmp_path, save_steps=5, eval_steps=5, max_steps=20).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-15",
        "checkpoint-20",
    ]
    assert last_checkpoint(tmp_path).name == "checkpoint-20"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_half_written_checkpoint_is_passed_over(tmp_path, caplog):
    for step, files in ((9, ["trainer_state.json"]), (10, ["model.safetensors"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 is incomplete" in caplog.text


def test_a_run_taken_up_again_ends_like_one_never_stopped(smoke, tmp_path):
    whole = small_trainer(smoke, tmp_path / "whole")
    whole.train()

    inputs = {"recipe": "smoke"}
    folder = tmp_path / "stopped"
    assert open_run(folder, inputs) is None
    train(small_trainer(smoke, folder, [StopAt(10)]))
    checkpoint = open_run(folder, inputs)
    assert checkpoint.name == "checkpoint-10"
    resumed = small_trainer(smoke, folder)
    train(resumed, checkpoint)

    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_finished_run_is_not_trained_further(smoke, tmp_path):
    first = small_trainer(smoke, tmp_path)
    train(first, open_run(tmp_path, {}))
    before = sorted(tmp_path.iterdir())
    plot = LivePlotCallback(tmp_path / "loss.png")
    again = small_trainer(smoke, tmp_path, [plot])
    train(again, open_run(tmp_path, {}))
    assert again.state.global_step == smoke.recipe.max_steps
    assert sorted(tmp_path.iterdir()) == [*before, plot.path]  # no checkpoint, but the last plot
    for name, value in weights(first).items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def checkpoint_of(folder, inputs):
    open_run(folder, inputs)
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "trainer_state.json").write_text("{}")


def test_checkpoints_of_another_run_are_moved_aside_and_the_difference_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    folder = tmp_path / "checkpoints"
    checkpoint_of(folder, {"learning_rate": 0.1, "text": "a"})
    assert open_run(folder, {"learning_rate": 0.2, "text": "a"}) is None
    assert "learning_rate was 0.1, is 0.2" in caplog.text
    assert "text was" not in caplog.text
    assert (tmp_path / "checkpoints-1" / "checkpoint-7").is_dir()


def test_fresh_starts_over_and_keeps_the_old_run(tmp_path):
    folder = tmp_path / "checkpoints"
    for number in (1, 2):
        checkpoint_of(folder, {"a": 1})
        assert open_run(folder, {"a": 1}).name == "checkpoint-7"
        assert open_run(folder, {"a": 1}, fresh=True) is None
        assert (tmp_path / f"checkpoints-{number}" / "checkpoint-7").is_dir()
        shutil.rmtree(folder)
    assert json.loads((tmp_path / "checkpoints-1" / "inputs.json").read_text()) == {"a": 1}
