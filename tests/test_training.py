import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from tinytrain.callbacks import HistoryCallback, LivePlotCallback, read_history
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.training import (
    MARK,
    build_trainer,
    checkpoint_problem,
    collate,
    last_checkpoint,
    learning_rates,
    open_run,
    plot_learning_rate,
    total_steps,
    train,
    training_arguments,
)


class StopAt(TrainerCallback):
    """Ends a run early, once, without a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            self.step = None


def small_trainer(smoke, folder, callbacks=(), precision="float32", **overrides):
    arguments = training_arguments(smoke.recipe, folder, precision, **{"use_cpu": True} | overrides)
    model = build_model(smoke.config, seed=smoke.recipe.seed)
    blocks = smoke.blocks
    return build_trainer(model, arguments, blocks["train"], blocks["test"], callbacks)


def test_training_needs_no_notebook(smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    assert small_trainer(smoke, tmp_path, max_steps=1).train().global_step == 1


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same_weights(trainer, expected):
    return [
        n for n, v in trainer.model.state_dict().items() if not torch.equal(v, expected[n])
    ] == []


@pytest.fixture(scope="module")
def whole(smoke, tmp_path_factory):
    """The weights and the history of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    history = HistoryCallback(folder / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(smoke, folder / "checkpoints", [history])
    train(trainer, {"recipe": "smoke"})
    return weights(trainer), without_times(history.path)


def without_times(path):
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in read_history(path)
    ]


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


class Rates(TrainerCallback):
    """Notes the learning rate with which each step is made."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_the_learning_rates_shown_are_those_of_the_run(smoke, tmp_path, kind):
    recipe = replace(smoke.recipe, lr_scheduler=kind, warmup_steps=3, max_steps=8)
    noted = Rates()
    arguments = training_arguments(recipe, tmp_path, use_cpu=True, eval_strategy="no")
    model = build_model(smoke.config, seed=0)
    build_trainer(model, arguments, smoke.blocks["train"], smoke.blocks["test"], [noted]).train()
    assert len(noted.rates) == total_steps(recipe, len(smoke.blocks["train"])) == 8
    assert noted.rates == pytest.approx(learning_rates(recipe, 8))
    assert len(set(noted.rates)) > 3 and max(noted.rates) == recipe.learning_rate


@pytest.mark.parametrize(
    ("blocks", "batch", "accumulation", "epochs"), [(7, 2, 3, 1.0), (6, 2, 1, 1.5), (3, 4, 8, 2.0)]
)
def test_the_steps_are_known_before_the_run(smoke, tmp_path, blocks, batch, accumulation, epochs):
    recipe = replace(
        smoke.recipe,
        max_steps=-1,
        batch_size=batch,
        gradient_accumulation=accumulation,
        epochs=epochs,
    )
    arguments = training_arguments(recipe, tmp_path, use_cpu=True, eval_strategy="no")
    few = smoke.blocks["train"].select(range(blocks))
    trainer = build_trainer(build_model(smoke.config), arguments, few, few)
    trainer.train()
    assert trainer.state.global_step == total_steps(recipe, blocks)


def test_the_learning_rate_is_drawn_with_the_end_of_the_warm_up():
    recipe = RECIPES["pocket"]
    (axes,) = plot_learning_rate(recipe, 600).axes
    curve, mark = axes.lines
    assert list(curve.get_ydata()) == learning_rates(recipe, 600)
    assert list(curve.get_xdata()) == list(range(1, 601))
    assert curve.get_ydata()[int(mark.get_xdata()[0]) - 1] == recipe.learning_rate
    assert len(plot_learning_rate(replace(recipe, warmup_steps=0), 600).axes[0].lines) == 1


def test_learning_rates_that_nobody_can_know_are_refused():
    for kind, message in (("reduce_lr_on_plateau", "goes by the loss"), ("up", "up is not a")):
        with pytest.raises(ValueError, match=message):
            learning_rates(replace(RECIPES["pocket"], lr_scheduler=kind), 10)
    with pytest.raises(ValueError, match="at least one"):
        learning_rates(RECIPES["pocket"], 0)


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


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_bf16_trains_on_a_processor_as_it_does_on_a_gpu(smoke, tmp_path):
    arguments = training_arguments(smoke.recipe, tmp_path, "bf16", max_steps=2)  # no use_cpu here
    model = build_model(smoke.config)
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = build_trainer(model, arguments, smoke.blocks["train"], smoke.blocks["test"])
    train(trainer)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}


def test_a_run_can_be_watched_in_tensorboard_too(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(small_trainer(smoke, tmp_path / "run", report_to="tensorboard"))
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes() and b"eval/loss" in events.read_bytes()


def test_checkpoints_are_limited_and_the_newest_is_found(smoke, tmp_path):
    train(small_trainer(smoke, tmp_path, save_steps=5, eval_steps=5, max_steps=20))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-15",
        "checkpoint-20",
    ]
    assert last_checkpoint(tmp_path).name == "checkpoint-20"
    assert last_checkpoint(tmp_path / "nowhere") is None


def checkpoint_of(folder, step, inputs=None):
    """A folder that looks like a checkpoint; only whole if it has inputs."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    (path / "trainer_state.json").write_text("{}")
    if inputs is not None:
        files = {"model.safetensors": 7, "trainer_state.json": 2}
        (path / MARK).write_text(json.dumps({"inputs": inputs, "files": files}))
    return path


def test_a_half_written_checkpoint_is_passed_over(tmp_path, caplog):
    checkpoint_of(tmp_path, 9, {})
    checkpoint_of(tmp_path, 10)
    cut = checkpoint_of(tmp_path, 100, {})
    (cut / "model.safetensors").write_text("wei")
    (checkpoint_of(tmp_path, 101, {}) / "trainer_state.json").unlink()
    (checkpoint_of(tmp_path, 102, {}) / MARK).write_text('{"inputs": {}, "fi')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 is passed over: its writing was not finished" in caplog.text
    assert "checkpoint-100 is passed over: model.safetensors has 3 bytes and not 7" in caplog.text
    assert "checkpoint-101 is passed over: trainer_state.json is missing" in caplog.text
    assert "checkpoint-102 is passed over: its writing was not finished" in caplog.text


def test_every_file_of_a_real_checkpoint_is_missed(smoke, tmp_path):
    train(small_trainer(smoke, tmp_path, max_steps=10))
    checkpoint = last_checkpoint(tmp_path)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < names
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert checkpoint_problem(checkpoint), path.name
        path.write_bytes(content)
        assert not checkpoint_problem(checkpoint)


def test_a_clock_that_jumps_back_does_not_cost_the_newest_checkpoint(smoke, tmp_path):
    """The Trainer by itself would take the oldest file for the newest, and delete the new one."""

    class JumpBack(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (4e9, 4e9))  # written, it seems, in the year 2096

    train(small_trainer(smoke, tmp_path, [JumpBack()], save_steps=4, max_steps=20))
    assert last_checkpoint(tmp_path).name == "checkpoint-20"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-16", "checkpoint-20"}


@pytest.mark.parametrize("same_session", [True, False])
def test_a_stopped_run_taken_up_again_ends_like_one_never_stopped(
    smoke, whole, tmp_path, caplog, same_session
):
    caplog.set_level("INFO", logger="tinytrain")
    history = HistoryCallback(tmp_path / "history.jsonl", smoke.recipe.tokens_per_step)
    folder, inputs = tmp_path / "checkpoints", {"recipe": "smoke"}
    trainer = small_trainer(smoke, folder, [history, StopAt(13)])
    train(trainer, inputs)
    assert trainer.state.global_step == 13
    if not same_session:
        trainer = small_trainer(smoke, folder, [history])
    train(trainer, inputs)
    assert "going on from checkpoint-10; fresh=True would start over" in caplog.text
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []
    assert same_weights(trainer, whole[0])
    assert without_times(history.path) == whole[1]


def test_the_same_seed_gives_the_same_curve(smoke, whole, tmp_path):
    history = HistoryCallback(tmp_path / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(smoke, tmp_path / "run", [history])
    train(trainer)
    assert without_times(history.path) == whole[1]
    assert same_weights(trainer, whole[0])


def test_a_finished_run_is_not_trained_further(smoke, whole, tmp_path):
    train(small_trainer(smoke, tmp_path / "run"))
    before = sorted((tmp_path / "run").iterdir())
    plot = LivePlotCallback(tmp_path / "loss.png")
    again = small_trainer(smoke, tmp_path / "run", [plot])
    train(again)
    assert again.state.global_step == smoke.recipe.max_steps
    assert sorted((tmp_path / "run").iterdir()) == before
    assert plot.path.is_file()
    assert same_weights(again, whole[0])


def test_checkpoints_of_another_run_are_refused_and_the_difference_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    folder, history = tmp_path / "checkpoints", tmp_path / "history.jsonl"
    history.write_text("curve")
    checkpoint_of(folder, 7, {"learning_rate": 0.1, "text": "a"})
    assert open_run(folder, {"learning_rate": 0.2, "text": "a"}, files=[history]) is None
    assert "checkpoint-7: learning_rate was 0.1, is 0.2" in caplog.text
    assert "text was" not in caplog.text
    assert (tmp_path / "checkpoints-1" / "checkpoint-7").is_dir()
    assert (tmp_path / "checkpoints-1" / "history.jsonl").read_text() == "curve"


def test_a_checkpoint_from_elsewhere_is_refused(tmp_path, caplog):
    """What it was made from goes with it, even if somebody copies the folder."""
    caplog.set_level("INFO", logger="tinytrain")
    checkpoint_of(tmp_path / "mine", 3, {"text": "a"})
    other = checkpoint_of(tmp_path / "theirs", 9, {"text": "b"})
    shutil.copytree(other, tmp_path / "mine" / "checkpoint-9")
    assert open_run(tmp_path / "mine", {"text": "a"}) is None
    assert "checkpoint-9: text was b, is a" in caplog.text


def test_fresh_starts_over_in_a_session_that_had_gone_on_from_a_checkpoint(smoke, whole, tmp_path):
    train(small_trainer(smoke, tmp_path / "run", [StopAt(10)]))
    trainer = small_trainer(smoke, tmp_path / "run")
    train(trainer)  # from checkpoint-10
    train(trainer, fresh=True)
    assert same_weights(trainer, whole[0])


def test_fresh_starts_over_and_keeps_the_old_run(smoke, whole, tmp_path):
    """In the same session too, where the model in memory has been trained already."""
    history = HistoryCallback(tmp_path / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(smoke, tmp_path / "checkpoints", [history])
    for number in (1, 2):
        train(trainer, {"a": 1})
        train(trainer, {"a": 1}, fresh=True)
        kept = tmp_path / f"checkpoints-{number}"
        assert not checkpoint_problem(kept / "checkpoint-20")
        assert without_times(kept / "history.jsonl") == whole[1]
        assert without_times(history.path) == whole[1]
        assert same_weights(trainer, whole[0])


# --- what goes wrong --------------------------------------------------------------------------


def test_too_little_memory_is_said_with_the_changes_that_help(smoke, tmp_path):
    train_small = small_trainer(smoke, tmp_path, [NotEnoughMemory(4)])
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(train_small)
    for words in ("8 x 64 tokens", "Tried to allocate 20.00 MiB", "batch_size=4"):
        assert words in str(caught.value)
    for words in ("gradient_accumulation=2", "context_length=32"):
        assert words in str(caught.value)


class NotEnoughMemory(TrainerCallback):
    """Raises what torch raises when a batch has too many rows, from a step on."""

    def __init__(self, rows, step=0):
        self.rows, self.step, self.seen = rows, step, set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state = state
        model.model.layers[1].register_forward_pre_hook(self.before_forward)

    def before_forward(self, module, inputs):
        rows = len(inputs[0])
        if self.state.global_step >= self.step and module.training:
            self.seen.add(rows)
            if rows > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("step", [0, 4, 13], ids=["at once", "before a checkpoint", "after one"])
def test_too_little_memory_halves_the_batch_and_learns_the_same(
    smoke, whole, tmp_path, caplog, step
):
    memory = NotEnoughMemory(2, step)
    trainer = small_trainer(smoke, tmp_path, [memory])
    train(trainer, halve_batch=True)
    assert memory.seen == {8, 4, 2} if step else {4, 2}
    assert trainer.args.per_device_train_batch_size == 2
    assert trainer.args.gradient_accumulation_steps == 4
    assert trainer.state.global_step == smoke.recipe.max_steps
    assert "batch_size=4 with gradient_accumulation=2" in caplog.text
    for name, value in weights(trainer).items():  # sums in another order, else the same
        assert torch.allclose(value, whole[0][name], atol=2e-4), name


def test_a_batch_of_one_cannot_be_halved(smoke, tmp_path):
    trainer = small_trainer(smoke, tmp_path, [NotEnoughMemory(0)], per_device_train_batch_size=1)
    with pytest.raises(torch.OutOfMemoryError, match="context_length=32"):
        train(trainer, halve_batch=True)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_said_and_training_goes_on_when_there_is_room(smoke, whole, small_disk):
    history = HistoryCallback(small_disk / "history.jsonl", smoke.recipe.tokens_per_step)
    folder = small_disk / "checkpoints"
    trainer = small_trainer(smoke, folder, [history, StopAt(10)])
    train(trainer)
    filler = small_disk / "filler"
    room = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(room - 500_000))  # a checkpoint takes 1.2 MB
    with pytest.raises(OSError, match="is full.*checkpoint-10 is whole.*Make space") as caught:
        train(small_trainer(smoke, folder, [history]))
    assert caught.value.errno == 28
    assert not checkpoint_problem(folder / "checkpoint-10")
    assert [path.name for path in folder.iterdir()] == ["checkpoint-10"]
    filler.unlink()
    trainer = small_trainer(smoke, folder, [history])
    train(trainer)
    assert same_weights(trainer, whole[0])
    assert without_times(history.path) == whole[1]


def test_a_folder_that_cannot_be_written_to_is_said(smoke, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only.*choose another folder"):
        small_trainer(smoke, small_disk / "run" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    trainer = small_trainer(smoke, small_disk / "run" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only.*choose another folder"):
        train(trainer)


def test_a_file_in_the_folders_place_is_said(smoke, tmp_path):
    trainer = small_trainer(smoke, tmp_path / "a" / "checkpoints")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*/a \(.*choose another folder"):
        train(trainer)


def test_a_folder_removed_while_training_is_made_again(smoke, whole, tmp_path):
    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 13:
                shutil.rmtree(tmp_path / "run")

    run = tmp_path / "run"
    plot = LivePlotCallback(run / "loss.png", seconds=0)
    history = HistoryCallback(run / "history.jsonl", 512)
    trainer = small_trainer(smoke, run / "checkpoints", [Remove(), history, plot])
    train(trainer)
    assert last_checkpoint(run / "checkpoints").name == "checkpoint-20"
    assert plot.path.is_file() and read_history(history.path)[-1]["end"] == "finished"
    assert same_weights(trainer, whole[0])


def test_two_processes_do_not_train_in_one_folder(smoke, tmp_path):
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoints.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    checkpoint_of(tmp_path / "checkpoints", 7, {"a": 1})
    trainer = small_trainer(smoke, tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="another process trains in .*TINYTRAIN_RUNS"):
        train(trainer, fresh=True)
    assert (tmp_path / "checkpoints" / "checkpoint-7").is_dir()  # nothing was touched
    other.kill()  # no chance to let go of the lock: the system does
    other.wait()
    train(trainer, fresh=True)
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-20"


class Trap:
    """What a malicious file would hold: unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(smoke, tmp_path, name, form):
    train(small_trainer(smoke, tmp_path / "run", [StopAt(10)]))
    path = tmp_path / "run" / "checkpoint-10" / name
    trap = {"state": Trap(tmp_path / "executed")}
    torch.save(trap, path) if form == "torch" else path.write_bytes(pickle.dumps(trap))
    mark = json.loads((path.parent / MARK).read_text())
    mark["files"][name] = path.stat().st_size
    (path.parent / MARK).write_text(json.dumps(mark))
    with pytest.raises(Exception, match="[Ww]eights.?only|weights_only"):
        train(small_trainer(smoke, tmp_path / "run"))
    assert not (tmp_path / "executed").exists()


def test_training_arguments_on_disk_are_not_read_back(smoke, whole, tmp_path):
    train(small_trainer(smoke, tmp_path / "run", [StopAt(10)]))
    path = tmp_path / "run" / "checkpoint-10" / "training_args.bin"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    mark = json.loads((path.parent / MARK).read_text())
    mark["files"][path.name] = path.stat().st_size
    (path.parent / MARK).write_text(json.dumps(mark))
    trainer = small_trainer(smoke, tmp_path / "run")
    train(trainer)
    assert same_weights(trainer, whole[0])
    assert not (tmp_path / "executed").exists()
