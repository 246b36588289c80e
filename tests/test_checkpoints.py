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
from tinytrain.checkpoints import _open_run, last_checkpoint, train
from tinytrain.modeling import build_model


class StopAt(TrainerCallback):
    """Ends a run early, once, without a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            self.step = None


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


def checkpoint_of(folder, step, inputs=None):
    """A folder that looks like a checkpoint; only complete if it has inputs."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    (path / "trainer_state.json").write_text("{}")
    if inputs is not None:
        files = {"model.safetensors": 7, "trainer_state.json": 2}
        (path / "complete.json").write_text(json.dumps({"inputs": inputs, "files": files}))
    return path


def test_an_incomplete_checkpoint_is_passed_over(tmp_path, caplog):
    checkpoint_of(tmp_path, 9, {})
    checkpoint_of(tmp_path, 10)
    cut = checkpoint_of(tmp_path, 100, {})
    (cut / "model.safetensors").write_text("wei")
    (checkpoint_of(tmp_path, 101, {}) / "trainer_state.json").unlink()
    (checkpoint_of(tmp_path, 102, {}) / "complete.json").write_text('{"inputs": {}, "fi')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 is passed over: its writing was not finished" in caplog.text
    assert "checkpoint-100 is passed over: model.safetensors is missing or has not" in caplog.text
    assert "checkpoint-101 is passed over: trainer_state.json is missing or has not" in caplog.text
    assert "checkpoint-102 is passed over: its writing was not finished" in caplog.text
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_every_file_of_a_real_checkpoint_is_missed(stopped):
    checkpoint = stopped / "checkpoint-10"
    files = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert files < set(names(checkpoint))
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert last_checkpoint(stopped) is None, path.name
        path.write_bytes(content)
        assert last_checkpoint(stopped) == checkpoint


def test_a_clock_that_jumps_back_does_not_cost_the_newest_checkpoint(small_trainer, tmp_path):
    """The Trainer by itself would take the oldest file for the newest, and delete the new one."""

    class JumpBack(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (4e9, 4e9))  # written, it seems, in the year 2096

    train(small_trainer(tmp_path, [JumpBack()], save_steps=2, max_steps=8, eval_strategy="no"))
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_a_stopped_run_resumed_in_the_same_session_ends_like_one_never_stopped(
    smoke, small_trainer, whole, tmp_path, caplog
):
    caplog.set_level("INFO", logger="tinytrain")
    history = HistoryCallback(tmp_path / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(tmp_path / "checkpoints", [history, StopAt(13)])
    train(trainer)
    assert trainer.state.global_step == 13
    train(trainer)
    assert "going on from checkpoint-10; fresh=True would start over" in caplog.text
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []
    assert not differing(trainer, whole)
    assert without_times(history.path) == whole.history


def test_a_finished_run_is_not_trained_further(smoke, small_trainer, whole, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole.folder / "checkpoints", folder)
    before = names(folder)
    plot = LivePlotCallback(tmp_path / "loss.png")
    again = small_trainer(folder, [plot])
    with torch.no_grad():
        again.model.model.norm.weight.zero_()
    train(again)
    assert again.state.global_step == smoke.recipe.max_steps
    assert names(folder) == before
    assert plot.path.is_file()
    assert not differing(again, whole)


def test_checkpoints_of_another_run_are_refused_and_the_difference_named(tmp_path, caplog):
    """What it was made from goes with it, even if somebody copies the folder."""
    caplog.set_level("INFO", logger="tinytrain")
    folder, history = tmp_path / "checkpoints", tmp_path / "history.jsonl"
    for number in (1, 2):
        history.write_text(f"curve {number}")
        checkpoint_of(folder, 3, {"learning_rate": 0.2, "text": "a"})
        other = checkpoint_of(tmp_path / f"theirs-{number}", 7, {"learning_rate": 0.1, "text": "a"})
        shutil.copytree(other, folder / "checkpoint-7")
        inputs = {"learning_rate": 0.2, "text": "a"}
        assert _open_run(folder, inputs, fresh=False, files=[history]) is None
        aside = tmp_path / f"checkpoints-{number}"
        assert (aside / "checkpoint-7").is_dir()
        assert (aside / "history.jsonl").read_text() == f"curve {number}"
    assert "starting over (checkpoint-7: learning_rate was 0.1, is 0.2)" in caplog.text


def test_fresh_starts_over_and_keeps_the_old_run(smoke, small_trainer, whole, stopped):
    """In the same session too, where the model in memory has been trained already."""
    history = HistoryCallback(stopped.parent / "history.jsonl", smoke.recipe.tokens_per_step)
    trainer = small_trainer(stopped, [history])
    train(trainer)  # from checkpoint-10
    assert not differing(trainer, whole)
    with pytest.raises(RuntimeError, match="trained already.*make_model"):
        train(trainer, fresh=True)
    kept = stopped.with_name("checkpoints-1")
    assert last_checkpoint(kept).name == "checkpoint-20"
    assert without_times(kept / "history.jsonl") == whole.history
    train(trainer, make_model=partial(build_model, smoke.config, seed=smoke.recipe.seed))
    assert without_times(history.path) == whole.history
    assert not differing(trainer, whole)


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


def test_too_little_memory_is_said_with_the_changes_that_help(small_trainer, tmp_path):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(small_trainer(tmp_path, [NotEnoughMemory(4)]))
    for words in ("8 x 64 tokens", "Tried to allocate 20.00 MiB", "batch_size=4"):
        assert words in str(caught.value)
    for words in ("gradient_accumulation=2", "context_length=32"):
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


def test_a_batch_of_one_cannot_be_halved(small_trainer, tmp_path):
    trainer = small_trainer(tmp_path, [NotEnoughMemory(0)], per_device_train_batch_size=1)
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


def test_a_full_disk_is_said_and_training_goes_on_when_there_is_room(
    smoke, small_trainer, whole, stopped, small_disk
):
    shutil.copytree(stopped.parent, small_disk, dirs_exist_ok=True)
    history = HistoryCallback(small_disk / "history.jsonl", smoke.recipe.tokens_per_step)
    folder = small_disk / "checkpoints"
    filler = small_disk / "filler"
    room = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(room - 500_000))  # a checkpoint takes 1.2 MB
    with pytest.raises(OSError, match="is full.*checkpoint-10 is complete.*Make space") as caught:
        train(small_trainer(folder, [history]))
    assert caught.value.errno == 28
    assert last_checkpoint(folder) == folder / "checkpoint-10"
    assert names(folder) == ["checkpoint-10"]
    filler.unlink()
    trainer = small_trainer(folder, [history])
    train(trainer)
    assert not differing(trainer, whole)
    assert without_times(history.path) == whole.history


def test_a_folder_that_cannot_be_written_to_is_said(small_trainer, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only.*choose another folder"):
        small_trainer(small_disk / "run" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    trainer = small_trainer(small_disk / "run" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only.*choose another folder"):
        train(trainer)


def test_a_file_in_the_folders_place_is_said(small_trainer, tmp_path):
    trainer = small_trainer(tmp_path / "a" / "checkpoints")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*/a \(.*choose another folder"):
        train(trainer)


def test_a_folder_removed_while_training_is_made_again(small_trainer, whole, tmp_path):
    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 13:
                shutil.rmtree(tmp_path / "run")

    run = tmp_path / "run"
    plot = LivePlotCallback(run / "loss.png", seconds=0)
    history = HistoryCallback(run / "history.jsonl", 512)
    trainer = small_trainer(run / "checkpoints", [Remove(), history, plot])
    train(trainer)
    assert last_checkpoint(run / "checkpoints").name == "checkpoint-20"
    assert plot.path.is_file() and read_history(history.path)[-1]["end"] == "finished"
    assert not differing(trainer, whole)


def test_two_processes_do_not_train_in_one_folder(small_trainer, tmp_path):
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoints.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    checkpoint_of(tmp_path / "checkpoints", 7, {"a": 1})
    trainer = small_trainer(tmp_path / "checkpoints", max_steps=1)
    with pytest.raises(RuntimeError, match="another process trains in .*TINYTRAIN_RUNS"):
        train(trainer, fresh=True)
    assert (tmp_path / "checkpoints" / "checkpoint-7").is_dir()  # nothing was touched
    other.kill()  # no chance to release the lock: the system does
    other.wait()
    train(trainer, fresh=True)
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-1"


class Trap:
    """What a malicious file would hold: unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def replace_file(path, content):
    """Write a file of a checkpoint so that the checkpoint counts as complete."""
    path.write_bytes(content)
    completion = json.loads((path.parent / "complete.json").read_text())
    completion["files"][path.name] = len(content)
    (path.parent / "complete.json").write_text(json.dumps(completion))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(small_trainer, stopped, tmp_path, name, form):
    trap = {"state": Trap(tmp_path / "executed")}
    torch.save(trap, tmp_path / "trap") if form == "torch" else None
    content = (tmp_path / "trap").read_bytes() if form == "torch" else pickle.dumps(trap)
    replace_file(stopped / "checkpoint-10" / name, content)
    with pytest.raises(Exception, match="[Ww]eights.?only|weights_only"):
        train(small_trainer(stopped))
    assert not (tmp_path / "executed").exists()


def test_training_arguments_on_disk_are_not_read_back(small_trainer, whole, stopped, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "executed"))
    replace_file(stopped / "checkpoint-10" / "training_args.bin", trap)
    trainer = small_trainer(stopped)  # in a new session
    train(trainer)
    assert not differing(trainer, whole)
    assert not (tmp_path / "executed").exists()
