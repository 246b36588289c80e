import errno
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import without_times
from transformers import TrainerCallback

from tinytrain.callbacks import (
    HistoryCallback,
    LivePlotCallback,
    LossError,
    LossGuard,
    read_history,
)
from tinytrain.checkpoints import last_checkpoint, longer_run, train
from tinytrain.modeling import build_model
from tinytrain.training import _learning_rates


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
    assert "checkpoint-100 is passed over: model.safetensors is missing" in caplog.text
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
        mark = last_checkpoint(tmp_path / folder) / "complete.json"
        assert json.loads(mark.read_text())["inputs"] == {"learning_rate": rate, "text": "a"}
        assert (tmp_path / folder / "history.jsonl").exists() == (folder != "checkpoints")
    assert "starting over (checkpoint-1: learning_rate was 0.1, is 0.2)" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.008, is 0.001"),
        ({"per_device_train_batch_size": 2}, "batch of a step was 8, is 2"),
        ({"gradient_accumulation_steps": 2}, "batch of a step was 8, is 16"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear, is cosine"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
            "lr_scheduler_kwargs was None, is {'power",
        ),
        ({"max_steps": 9}, "max_steps was 20, is 9"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, None),
        ({"per_device_eval_batch_size": 4, "weight_decay": 0.10, "optim": "adamw_torch"}, None),
        ({"precision": "bf16"}, None),
    ],
)
def test_arguments_that_decide_the_outcome_do_not_change_unnoticed(
    small_trainer, stopped, caplog, change, named
):
    caplog.set_level("INFO", logger="tinytrain")
    trainer = small_trainer(
        stopped, [AtStep(1, lambda: 1 / 0), AtStep(11, lambda: 1 / 0)], **change
    )
    with pytest.raises(ZeroDivisionError):
        train(trainer, {"new_field": None})
    assert trainer.state.global_step == (1 if named else 11)
    assert (named or "going on from checkpoint-10") in caplog.text
    kept = stopped.with_name("checkpoints-1")
    assert kept.exists() == bool(named)
    assert ("computed in float32 so far, from here on in bf16" in caplog.text) == (
        "precision" in change
    )


def test_what_an_older_or_a_newer_version_does_not_know_forbids_no_resume(small_trainer, stopped):
    mark = stopped / "checkpoint-10" / "complete.json"
    completion = json.loads(mark.read_text())
    del completion["arguments"], completion["hashes"]
    mark.write_text(json.dumps(completion))
    trainer = small_trainer(stopped, [AtStep(11, lambda: 1 / 0)], learning_rate=1e-3)
    with pytest.raises(ZeroDivisionError):
        train(trainer, {"new_field": 1})
    assert trainer.state.global_step == 11


def test_another_rhythm_is_followed_when_a_run_goes_on(smoke, small_trainer, stopped):
    history = HistoryCallback(stopped.parent / "history.jsonl", smoke.recipe.tokens_per_step)
    train(small_trainer(stopped, [history], logging_steps=5, eval_steps=6, save_steps=4))
    steps = [(line["step"], "loss" in line) for line in read_history(history.path)[1:-1]]
    assert steps[-6:] == [
        (10, False),
        (12, False),
        (15, True),
        (18, False),
        (20, True),
        (20, False),
    ]
    assert names(stopped) == ["checkpoint-16", "checkpoint-20"]


def test_a_run_is_made_longer(smoke, small_trainer, whole, tmp_path, caplog):
    """Finished or not; killed on the way, it ends like one that was not."""
    caplog.set_level("INFO", logger="tinytrain")
    ends = {}
    for name in ("finished", "killed", "unfinished"):
        shutil.copytree(whole.folder, tmp_path / name)
        folder = tmp_path / name / "checkpoints"
        if name == "unfinished":
            shutil.rmtree(folder / "checkpoint-20")
        assert longer_run(folder, 16) == (20 if name == "unfinished" else 36)
        history = HistoryCallback(tmp_path / name / "history.jsonl", smoke.recipe.tokens_per_step)
        watching = [history, AtStep(33, lambda: 1 / 0)] if name == "killed" else [history]
        if name == "killed":
            with pytest.raises(ZeroDivisionError):
                train(small_trainer(folder, watching, max_steps=36))
            assert longer_run(folder, 16) == 36
        trainer = small_trainer(folder, [history], max_steps=36)
        train(trainer)
        ends[name] = without_times(history.path), trainer.model.state_dict()
    assert "36 steps in place of 20" in caplog.text and "0.0038 at step 21 and" in caplog.text
    assert ends["killed"][0] == ends["finished"][0]
    for weight, value in ends["finished"][1].items():
        assert torch.equal(value, ends["killed"][1][weight]), weight
    for start, name in ((20, "finished"), (10, "unfinished")):
        lines = ends[name][0]
        assert lines[0]["max_steps"] == 36
        logged = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
        assert list(logged) == list(range(2, 37, 2))  # none twice
        rates = _learning_rates(replace(smoke.recipe, max_steps=36), 36)
        later = {step: rates[step - 1] for step in logged if step > start}
        assert {step: logged[step] for step in later} == pytest.approx(later)


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


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    small_trainer, whole, stopped, tmp_path, caplog, name
):
    """One bit is another; the folder that is written over must not pass for whole half-way."""
    newer = stopped / "checkpoint-12"
    shutil.copytree(stopped / "checkpoint-10", newer)
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newer / name).write_bytes(content)
    assert last_checkpoint(stopped) == newer  # a look at the sizes does not tell
    trainer = small_trainer(stopped, [AtStep(11, lambda: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        train(trainer)
    assert trainer.state.global_step == 11
    assert f"checkpoint-12 is passed over: {name} is damaged" in caplog.text
    assert last_checkpoint(stopped).name == "checkpoint-10"


def test_with_no_whole_checkpoint_left_what_there_is_is_kept_aside(small_trainer, stopped, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    (stopped / "checkpoint-10" / "complete.json").write_text("[1, 2")
    history = HistoryCallback(stopped.parent / "history.jsonl", 512)
    train(small_trainer(stopped, [history], max_steps=1))
    assert "checkpoint-10 is passed over: complete.json is missing or damaged" in caplog.text
    aside = stopped.with_name("checkpoints-1")
    assert "kept as checkpoints-1" in caplog.text and (aside / "history.jsonl").is_file()


def test_weights_that_are_not_finite_are_no_checkpoint(small_trainer, tmp_path, caplog):
    """The guard stops the run only a step later, and points to one that can be gone on from."""
    guard = LossGuard(find_checkpoint=last_checkpoint)
    callbacks = [guard, AtStep(4, lambda: trainer.model.model.norm.weight.data.fill_(math.nan))]
    trainer = small_trainer(tmp_path, callbacks, save_steps=2, eval_strategy="no")
    trainer.args.save_total_limit = 1
    with pytest.raises(LossError, match="last good checkpoint is checkpoint-2") as caught:
        train(trainer)
    assert caught.value.step == 5 and names(tmp_path) == ["checkpoint-2"]
    assert "checkpoint-4 is not kept: its weights are not finite" in caplog.text


def test_a_file_system_that_cannot_sync_is_no_error(small_trainer, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    train(small_trainer(tmp_path, max_steps=1))
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


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
