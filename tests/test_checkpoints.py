import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import without_times
from transformers import TrainerCallback

from tinytrain.callbacks import HistoryCallback, LivePlotCallback, read_history
from tinytrain.checkpoints import checkpoint_inputs, last_checkpoint, train
from tinytrain.modeling import build_model


class AtStep(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            self.action()


def differing(trainer, whole):
    """Return the names of the weights that the undisturbed run has not."""
    state = trainer.model.state_dict()
    return [name for name in state if not torch.equal(state[name], whole.weights[name])]


@pytest.fixture
def stopped(whole, tmp_path):
    """The checkpoints of a run that was killed after step 10, and the folder of the run."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-20")
    return folder / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_incomplete_checkpoint_is_passed_over(stopped, caplog):
    checkpoint = stopped / "checkpoint-10"
    files = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert files < set(names(checkpoint))
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert last_checkpoint(stopped) is None, path.name
        path.unlink()
        assert last_checkpoint(stopped) is None, path.name
        path.write_bytes(content)
        assert last_checkpoint(stopped) == checkpoint
    for step in (9, 100):  # the step tells which is the newest, not the alphabet
        shutil.copytree(checkpoint, stopped / f"checkpoint-{step}")
    (stopped / "checkpoint-100" / "model.safetensors").unlink()
    for name in ("12", "best"):
        (stopped / f"checkpoint-{name}").mkdir()
    assert last_checkpoint(stopped) == checkpoint
    assert "checkpoint-12 is passed over: its writing was not finished" in caplog.text
    assert "checkpoint-100 is passed over: model.safetensors is missing or has not" in caplog.text
    assert last_checkpoint(stopped / "nowhere") is None


def test_a_clock_that_jumps_back_does_not_cost_the_newest_checkpoint(small_trainer, tmp_path):
    """The Trainer by itself would take the oldest file for the newest, and delete the new one."""

    class JumpBack(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (4e9, 4e9))  # written, it seems, in the year 2096

    train(small_trainer(tmp_path, [JumpBack()], save_steps=2, max_steps=8, eval_strategy="no"))
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_a_run_breaks_off_is_resumed_and_started_over_in_one_session(
    smoke, small_trainer, whole, tmp_path, caplog
):
    """It ends like one that nothing disturbed, and so does a fresh one; what was there is kept."""
    caplog.set_level("INFO", logger="tinytrain")
    history = HistoryCallback(tmp_path / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(tmp_path / "checkpoints", [history, AtStep(13, lambda: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        train(trainer)
    assert trainer.state.global_step == 13
    train(trainer)
    assert "going on from checkpoint-10; fresh=True would start over" in caplog.text
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []
    assert not differing(trainer, whole)
    assert without_times(history.path) == whole.history

    with pytest.raises(RuntimeError, match="trained already.*make_model"):
        train(trainer, fresh=True)
    kept = tmp_path / "checkpoints-1"
    assert last_checkpoint(kept).name == "checkpoint-20"
    assert without_times(kept / "history.jsonl") == whole.history
    train(trainer, make_model=partial(build_model, smoke.config, seed=smoke.recipe.seed))
    assert without_times(history.path) == whole.history
    assert not differing(trainer, whole)


def test_a_finished_run_is_not_trained_further(smoke, small_trainer, whole, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole.folder / "checkpoints", folder)
    plot = LivePlotCallback(tmp_path / "loss.png")
    again = small_trainer(folder, [plot])
    again.model.model.norm.weight.data.zero_()
    train(again)
    assert again.state.global_step == smoke.recipe.max_steps
    assert names(folder) == names(whole.folder / "checkpoints")
    assert plot.path.is_file()
    assert not differing(again, whole)


def test_checkpoints_of_another_run_are_kept_aside_and_the_difference_named(
    small_trainer, tmp_path, caplog
):
    caplog.set_level("INFO", logger="tinytrain")
    history = HistoryCallback(tmp_path / "history.jsonl", 512)
    for rate in (0.1, 0.2, 0.3):
        trainer = small_trainer(tmp_path / "checkpoints", [history], max_steps=1)
        train(trainer, {"learning_rate": rate, "text": "a"})
    for folder, rate in (("checkpoints-1", 0.1), ("checkpoints-2", 0.2), ("checkpoints", 0.3)):
        checkpoint = last_checkpoint(tmp_path / folder)
        assert checkpoint_inputs(checkpoint) == {"learning_rate": rate, "text": "a"}
        assert (tmp_path / folder / "history.jsonl").exists() == (folder != "checkpoints")
    assert "starting over (checkpoint-1: learning_rate was 0.1, is 0.2)" in caplog.text


# --- what goes wrong --------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("batch", "halve", "changes"),
    [(8, False, ["batch_size=4", "gradient_accumulation=2"]), (1, True, [])],
)
def test_a_batch_that_is_not_halved_is_too_large(small_trainer, tmp_path, batch, halve, changes):
    trainer = small_trainer(tmp_path, [NotEnoughMemory(0)], per_device_train_batch_size=batch)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(trainer, halve_batch=halve)
    for words in (f"{batch} x 64 tokens", "20.00 MiB", "context_length=32", *changes):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("step", "rows"), [(0, 2), (4, 4), (13, 4)], ids=["at once", "before a checkpoint", "after one"]
)
def test_too_little_memory_halves_the_batch_and_learns_the_same(
    smoke, small_trainer, whole, tmp_path, caplog, step, rows
):
    memory = NotEnoughMemory(rows, step)
    trainer = small_trainer(tmp_path, [memory])
    make_model = partial(build_model, smoke.config, seed=smoke.recipe.seed)
    train(trainer, halve_batch=True, make_model=make_model)
    assert memory.seen == {size for size in (8, 4, 2) if size >= rows}
    assert trainer.args.per_device_train_batch_size == rows
    assert trainer.args.gradient_accumulation_steps == 8 // rows
    assert trainer.state.global_step == smoke.recipe.max_steps
    assert "batch_size=4 with gradient_accumulation=2" in caplog.text
    for name, value in trainer.model.state_dict().items():  # sums in another order, else the same
        assert torch.allclose(value, whole.weights[name], atol=2e-4), name


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


def test_a_full_disk_is_said_and_training_goes_on_when_there_is_room(
    smoke, small_trainer, whole, stopped, small_disk
):
    shutil.copytree(stopped.parent, small_disk, dirs_exist_ok=True)
    history = HistoryCallback(small_disk / "history.jsonl", smoke.recipe.tokens_per_step)
    folder = small_disk / "checkpoints"
    room = shutil.disk_usage(small_disk).free - 500_000  # a checkpoint takes 1.2 MB
    (small_disk / "filler").write_bytes(bytes(room))
    with pytest.raises(OSError, match="is full.*checkpoint-10 is complete.*Make space") as caught:
        train(small_trainer(folder, [history]))
    assert caught.value.errno == 28
    assert last_checkpoint(folder) == folder / "checkpoint-10"
    assert names(folder) == ["checkpoint-10"]
    (small_disk / "filler").unlink()
    trainer = small_trainer(folder, [history])
    train(trainer)
    assert not differing(trainer, whole)
    assert without_times(history.path) == whole.history


def test_a_folder_that_cannot_be_made_is_said(small_trainer, tmp_path):
    folder = tmp_path / "a" / "checkpoints"
    trainer = small_trainer(folder)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("a file")
    for start in (partial(train, trainer), partial(small_trainer, folder)):
        with pytest.raises(OSError, match=r"cannot write to .*/a.* \(.*choose another folder"):
            start()


def test_a_folder_removed_while_training_is_made_again(small_trainer, whole, tmp_path):
    run = tmp_path / "run"
    plot = LivePlotCallback(run / "loss.png", seconds=0)
    history = HistoryCallback(run / "history.jsonl", 512)
    trainer = small_trainer(
        run / "checkpoints", [AtStep(13, lambda: shutil.rmtree(run)), history, plot]
    )
    train(trainer)
    assert last_checkpoint(run / "checkpoints").name == "checkpoint-20"
    assert plot.path.is_file() and read_history(history.path)[-1]["end"] == "finished"
    assert not differing(trainer, whole)


def test_two_processes_do_not_train_in_one_folder(small_trainer, stopped):
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, f"{stopped}.lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    trainer = small_trainer(stopped, max_steps=1)
    with pytest.raises(RuntimeError, match="another process trains in .*TINYTRAIN_RUNS"):
        train(trainer, fresh=True)
    assert names(stopped) == ["checkpoint-10"]  # nothing was touched
    other.kill()  # no chance to release the lock: the system does
    other.wait()
    train(trainer, fresh=True)
    assert names(stopped) == ["checkpoint-1"]


class Trap:
    """What a malicious file would hold: unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(small_trainer, stopped, tmp_path, name, form):
    trap = {"state": Trap(tmp_path / "executed")}
    file = io.BytesIO()
    torch.save(trap, file) if form == "torch" else pickle.dump(trap, file)
    path, content = stopped / "checkpoint-10" / name, file.getvalue()
    path.write_bytes(content)
    completion = json.loads((path.parent / "complete.json").read_text())
    completion["files"][name] = len(content)  # so that the checkpoint counts as complete
    del completion["hashes"]  # as in older ones
    (path.parent / "complete.json").write_text(json.dumps(completion))
    trainer = small_trainer(stopped)
    if name == "training_args.bin":  # is never read back
        train(trainer)
    else:
        with pytest.raises(Exception, match="[Ww]eights.?only|weights_only"):
            train(trainer)
    assert not (tmp_path / "executed").exists()
