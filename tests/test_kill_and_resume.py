"""Real processes that are killed, told to end, or interrupted in the middle of training.

A fork server that has imported torch once gives each attempt a process of its own in a fraction
of a second; the signals are real, and nothing of the training is replaced.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import wait_for, without_times
from datasets import DatasetDict

from tinytrain.recipes import RECIPES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# Many checkpoints, so that a good part of the time goes into saving; dropout, so that the random
# state counts; more than one pass over the text, so that the order of the second counts.
RECIPE = replace(RECIPES["smoke"], max_steps=24, save_steps=4, eval_steps=8, logging_steps=2)
LONG = replace(RECIPE, max_steps=10_000, logging_steps=1, save_steps=1000, eval_steps=1000)
KILLS = int(os.environ.get("TINYTRAIN_KILLS", 4))

server = multiprocessing.get_context("forkserver")
modules = ("checkpoints", "training", "callbacks", "modeling", "optimizer", "__main__", "export")
server.set_forkserver_preload([f"tinytrain.{name}" for name in modules])


def run(folder, config, blocks, delay, recipe, terminal=None):
    """Train in this process, as notebook 05 does, and leave the weights at the end.

    With the name of a terminal, in a session of its own that ends when the terminal closes; with
    "nohup", as that command starts it.
    """
    import torch
    from datasets import disable_progress_bars, load_from_disk
    from transformers import Qwen2Config

    from tinytrain import callbacks, runs
    from tinytrain.checkpoints import train
    from tinytrain.common import setup_logging
    from tinytrain.loss import save_loss_memory
    from tinytrain.modeling import build_model

    torch.set_num_threads(1)
    disable_progress_bars()
    folder = Path(folder)
    # Who runs the tests under nohup has SIGHUP ignored in all processes.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if terminal == "nohup" else signal.SIG_DFL)
    if terminal == "nohup":
        terminal = None
    elif terminal:
        os.setsid()
    output = os.open(terminal or folder / "output.txt", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    setup_logging(folder / "training.log")
    blocks = load_from_disk(str(blocks))
    model = build_model(Qwen2Config(**config), seed=1)
    save_loss_memory(model, recipe.loss_rows)
    tokens = recipe.tokens_per_step
    watching = [
        callbacks.HistoryCallback(folder / "history.jsonl", tokens),
        callbacks.VerboseTrainingCallback(tokens),
        callbacks.LivePlotCallback(folder / "loss.png", 1024, tokens, seconds=0.2),
        Slow(delay),
        callbacks.StopCallback(folder / "STOP"),
    ]
    trainer = runs.assemble(
        recipe, folder / "checkpoints", "float32", watching, model, blocks, use_cpu=True
    )
    train(trainer, json.loads(json.dumps(asdict(recipe))))
    torch.save(model.state_dict(), folder / "weights.pt")


class Slow:
    """Takes its time at each step; a class of its own, since it travels to another process."""

    def __new__(cls, delay):
        from transformers import TrainerCallback

        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(delay)

        return type("Slow", (TrainerCallback,), {"on_step_begin": on_step_begin})()


@pytest.fixture(scope="module")
def start(smoke, tmp_path_factory):
    """Return a function that starts a training in a folder."""
    blocks = tmp_path_factory.mktemp("blocks") / "blocks"
    sizes = {"train": 90, "test": 8}
    few = {split: smoke.blocks[split].select(range(size)) for split, size in sizes.items()}
    DatasetDict(few).save_to_disk(str(blocks))
    config = smoke.config.to_dict() | {"attention_dropout": 0.1}

    def start(folder, delay=0.0, recipe=RECIPE, terminal=None):
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (str(folder), config, str(blocks), delay, recipe, terminal)
        process = server.Process(target=run, args=arguments)
        process.start()
        return process

    return start


def finish(start, folder):
    process = start(folder)
    process.join(120)
    assert process.exitcode == 0, (folder / "output.txt").read_text()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing disturbs, and how long its training takes."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start, folder)
    return folder


def kill(process):
    with suppress(ProcessLookupError):  # it has come to its end just before
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    return process.exitcode == -signal.SIGKILL


def same_weights(folder, other):
    import torch

    mine, theirs = (torch.load(f / "weights.pt", weights_only=True) for f in (folder, other))
    return [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def last_step(folder):
    try:
        return json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def beginnings(folder):
    log = folder / "training.log"
    return log.read_text().count("training starts") if log.exists() else 0


def ends_like(folder, whole, start):
    finish(start, folder)
    assert same_weights(folder, whole)
    assert without_times(folder) == without_times(whole)


def test_killed_at_random_moments_a_run_ends_like_one_never_stopped(start, whole, tmp_path):
    """A new run for each few kills, so that all parts of a run are hit."""
    seed = random.randrange(10**6)
    print(f"random.Random({seed})")
    chance = random.Random(seed)
    seconds = json.loads((whole / "history.jsonl").read_text().splitlines()[-1])["seconds"]
    kills = 0
    for number in itertools.count(1):
        folder = tmp_path / f"run-{number}"
        alive = True
        while alive and kills < 4 * number and kills < KILLS:
            begun = beginnings(folder)
            process = start(folder)
            wait_for(lambda f=folder, p=process, n=begun: beginnings(f) > n or not p.is_alive())
            process.join(chance.uniform(0, seconds))  # waits so long, or until it ends
            alive = kill(process)
            kills += alive
            print(f"run {number} killed at step {last_step(folder)}" if alive else "it had ended")
        ends_like(folder, whole, start)
        if kills >= KILLS:
            break


def test_killed_while_it_saves_a_run_ends_like_one_never_stopped(start, whole, tmp_path):
    """Killed at the first, at one in the middle and at the last file of three checkpoints."""
    unfinished = []
    for step, file in ((8, "model.safetensors"), (12, "optimizer.pt"), (16, "trainer_state.json")):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{step}"
        process = start(tmp_path)
        wait_for((checkpoint / file).exists, every=0.001)
        assert kill(process)
        if not (checkpoint / "complete.json").exists():  # nearly always
            unfinished.append(step)
    ends_like(tmp_path, whole, start)
    log = (tmp_path / "training.log").read_text()
    assert "going on from checkpoint-" in log
    for step in unfinished:
        assert f"checkpoint-{step} is passed over: its writing was not finished" in log


STEPS = ("data", "tokenize", "train", "evaluate", "export")
CHANGING = r"\.(lock|log|png|bin)$|^checkpoints|/state.json|/inputs.json|/.tinytrain.json|/README"
QUICK = ["--recipe", "smoke", "--set", "max_steps=8", "save_steps=2", "eval_steps=4"]


def command(runs, step):
    """Make a step of the command line; each process has the same number, as in a container."""
    import torch

    from tinytrain.__main__ import main

    os.getpid = lambda: 7
    torch.set_num_threads(1)
    output = os.open(f"{runs}-{step}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main([step, "--runs", str(runs), *QUICK]))


def results(runs):
    """Return what the steps have written, without what differs each time: dates and durations."""
    found, evaluated = {}, Path(f"{runs}-evaluate.txt").read_text(encoding="utf-8")
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs / "smoke").as_posix() if path.is_file() else ""
        if name and not re.search(CHANGING, name):
            found[name] = path.read_bytes()
    for name in ("history.jsonl", "export/history.jsonl"):
        found[name] = without_times(runs / "smoke" / name)
    return found | {"evaluated": evaluated.splitlines()[-5:]}


def test_killed_in_every_step_of_a_run_the_results_are_the_same(tmp_path):
    """From the text to the export, with process numbers that repeat."""
    chance = random.Random(seed := random.randrange(10**6))
    print(f"random.Random({seed})")
    whole, runs, kills = tmp_path / "whole" / "runs", tmp_path / "runs", 0
    whole.parent.mkdir()
    seconds = {}
    for step in STEPS:
        begin = time.monotonic()
        process = server.Process(target=command, args=(whole, step))
        process.start()
        process.join(120)
        assert process.exitcode == 0, Path(f"{whole}-{step}.txt").read_text()
        seconds[step] = time.monotonic() - begin
    while kills < KILLS:
        shutil.rmtree(runs, ignore_errors=True)
        for step in STEPS:
            for attempt in (1, 2):  # killed, then to its end
                process = server.Process(target=command, args=(runs, step))
                process.start()
                process.join(chance.uniform(0, seconds[step]) if attempt == 1 else 120)
                if attempt == 1:
                    kills += kill(process)
            assert process.exitcode == 0, Path(f"{runs}-{step}.txt").read_text()
        after, before = results(runs), results(whole)
        assert list(after) == list(before)
        assert [name for name in before if after[name] != before[name]] == []


def stop(start, folder, how, least):
    """Start a training, stop it by a signal or a file at a step or soon after."""
    process = start(folder, delay=0.1)
    wait_for(lambda: last_step(folder) >= least)
    if how == "file":
        (folder / "STOP").touch()
    else:
        os.kill(process.pid, how)
    process.join(30)
    step = last_step(folder)
    assert least <= step < 24
    assert (folder / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    assert f"stopped at step {step} by " in (folder / "training.log").read_text()
    return step, process.exitcode


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, "file"])
def test_asked_to_stop_a_run_ends_in_good_order_and_goes_on(start, whole, tmp_path, how):
    step, exit_code = stop(start, tmp_path, how, 5)
    # Such a signal takes its course; else what comes after the training is reached.
    fatal = how in (signal.SIGTERM, signal.SIGHUP)
    assert exit_code == (-how if fatal else 0)
    assert (tmp_path / "weights.pt").exists() != fatal
    assert "the same call goes on from it" in (tmp_path / "training.log").read_text()
    *_, last, end = without_times(tmp_path)
    assert end["end"] == "stopped"
    assert last["step"] == step and ("eval_loss" in last) != fatal
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert not (tmp_path / "STOP").exists()
    finish(start, tmp_path)
    assert f"going on from checkpoint-{step};" in (tmp_path / "training.log").read_text()
    assert without_times(tmp_path)[-1] == {"step": 24, "tokens": 2 * 90 * 64, "end": "finished"}
    if fatal:  # else an evaluation more, and dropout draws other numbers
        assert same_weights(tmp_path, whole)


def test_a_closed_window_costs_nothing_and_nohup_is_heeded(start, whole, tmp_path):
    """A real terminal that closes, so that whatever is printed from then on fails."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    seen = []

    def goes_on():
        with suppress(BlockingIOError):  # nothing new, or nobody has opened it yet
            seen.append(os.read(master, 10_000))
        return last_step(tmp_path) >= 5

    process = start(tmp_path, delay=0.1, terminal=os.ttyname(slave))
    wait_for(goes_on)
    os.close(slave)
    os.close(master)
    process.join(30)
    step = last_step(tmp_path)
    assert b"training starts" in b"".join(seen)
    assert process.exitcode == -signal.SIGHUP and 5 <= step < 24
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    process = start(tmp_path, delay=0.02, terminal="nohup")
    wait_for(lambda: last_step(tmp_path) > step)
    os.kill(process.pid, signal.SIGHUP)
    process.join(30)
    assert process.exitcode == 0 and last_step(tmp_path) == 24
    assert same_weights(tmp_path, whole)


@pytest.mark.soak
def test_soak_ten_thousand_logged_steps_do_not_grow(start, tmp_path):
    """Memory and files of a run that logs and draws ten thousand times as long as it takes."""
    import psutil

    process = start(tmp_path, recipe=LONG)
    sizes = {}
    while process.is_alive():
        step = last_step(tmp_path)
        for mark in (2000, 9000):
            if step >= mark and mark not in sizes:
                memory = psutil.Process(process.pid).memory_info().rss
                sizes[mark] = memory, (tmp_path / "loss.png").stat().st_size
        time.sleep(0.2)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert last_step(tmp_path) == 10_000
    assert sizes[9000][0] < sizes[2000][0] + 50e6
    assert sizes[9000][1] < 1.5 * sizes[2000][1]
