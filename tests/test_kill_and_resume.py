"""Real processes that are killed, told to end, or interrupted in the middle of training.

A fork server that has imported torch once gives each attempt a process of its own in a fraction
of a second; the signals are real, and nothing of the training is replaced.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import DatasetDict

from tinytrain.recipes import RECIPES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# Many checkpoints, so that a good part of the time goes into saving; dropout, so that the random
# state counts; more than one pass over the text, so that the order of the second counts.
RECIPE = replace(RECIPES["smoke"], max_steps=24, save_steps=4, eval_steps=8, logging_steps=2)
LONG = replace(RECIPE, max_steps=10_000, logging_steps=1, save_steps=1000, eval_steps=1000)
KILLS = int(os.environ.get("TINYTRAIN_KILLS", 4))

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        f"tinytrain.{name}"
        for name in ("checkpoints", "training", "callbacks", "modeling", "optimizer")
    ]
)


def run(folder, config, blocks, delay, recipe):
    """Train in this process, as notebook 05 does, and leave the weights at the end."""
    import torch
    from datasets import disable_progress_bars, load_from_disk
    from transformers import Qwen2Config

    from tinytrain import callbacks, runs
    from tinytrain.checkpoints import train
    from tinytrain.common import setup_logging
    from tinytrain.loss import save_loss_memory
    from tinytrain.modeling import build_model
    from tinytrain.training import build_trainer, training_arguments

    torch.set_num_threads(1)
    disable_progress_bars()
    folder = Path(folder)
    with open(folder / "output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    setup_logging(folder / "training.log")
    blocks = load_from_disk(str(blocks))
    model = build_model(Qwen2Config(**config), seed=1)
    save_loss_memory(model, recipe.loss_rows)
    tokens = recipe.tokens_per_step
    history = callbacks.HistoryCallback(folder / "history.jsonl", tokens)
    watching = [
        history,
        callbacks.VerboseTrainingCallback(tokens),
        callbacks.LivePlotCallback(folder / "loss.png", 1024, tokens, seconds=0.2),
        Slow(delay),
        callbacks.StopCallback(folder / "STOP"),
    ]
    arguments = training_arguments(recipe, folder / "checkpoints", use_cpu=True)
    trainer = build_trainer(
        model, arguments, blocks["train"], blocks["test"], watching, runs.get_optimizer(recipe)
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

    def start(folder, delay=0.0, recipe=RECIPE):
        folder.mkdir(parents=True, exist_ok=True)
        process = server.Process(target=run, args=(str(folder), config, str(blocks), delay, recipe))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing disturbs, and how long its training takes."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    process.join(120)
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    return folder


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def kill(process):
    with suppress(ProcessLookupError):  # it has come to its end just before
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    return process.exitcode == -signal.SIGKILL


def same_weights(folder, other):
    import torch

    mine, theirs = (torch.load(f / "weights.pt", weights_only=True) for f in (folder, other))
    return [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def history(folder):
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def last_step(folder):
    try:
        return json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def beginnings(folder):
    log = folder / "training.log"
    return log.read_text().count("training starts") if log.exists() else 0


def ends_like(folder, whole, start):
    process = start(folder)
    process.join(120)
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    assert same_weights(folder, whole)
    assert history(folder) == history(whole)


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
        wait_for((checkpoint / file).exists)
        assert kill(process)
        if not (checkpoint / "complete.json").exists():  # nearly always
            unfinished.append(step)
    ends_like(tmp_path, whole, start)
    log = (tmp_path / "training.log").read_text()
    assert "going on from checkpoint-" in log
    for step in unfinished:
        assert f"checkpoint-{step} is passed over: its writing was not finished" in log


def stop(start, folder, ask, least):
    """Start a training, ask it to stop at a step or soon after; return step and exit code."""
    process = start(folder, delay=0.1)
    wait_for(lambda: last_step(folder) >= least)
    ask(process, folder)
    process.join(30)
    step = last_step(folder)
    assert least <= step < 24
    assert (folder / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    assert f"stopped at step {step} by " in (folder / "training.log").read_text()
    return step, process.exitcode


def test_sigterm_saves_a_checkpoint_before_the_end(start, whole, tmp_path):
    step, exit_code = stop(start, tmp_path, lambda process, folder: process.terminate(), 6)
    assert exit_code == -signal.SIGTERM  # the signal took its course
    assert not (tmp_path / "weights.pt").exists()
    process = start(tmp_path)
    process.join(60)
    log = (tmp_path / "training.log").read_text()
    assert "by SIGTERM" in log and f"going on from checkpoint-{step};" in log
    assert same_weights(tmp_path, whole)


def interrupt(process, folder):
    os.kill(process.pid, signal.SIGINT)


def touch(process, folder):
    (folder / "STOP").touch()


def test_asked_to_stop_it_saves_evaluates_draws_and_goes_on(start, tmp_path):
    step = 0
    for ask in (interrupt, touch):
        step, exit_code = stop(start, tmp_path, ask, step + 4)
        assert exit_code == 0
        assert (tmp_path / "weights.pt").exists()  # what comes after the training was reached
        *_, evaluation, end = history(tmp_path)
        assert end["end"] == "stopped"
        assert evaluation["step"] == step and evaluation["eval_loss"] > 0
        assert (tmp_path / "loss.png").stat().st_size > 0
        assert not (tmp_path / "STOP").exists()
        assert "the same call goes on from it" in (tmp_path / "training.log").read_text()
    process = start(tmp_path)
    process.join(60)
    assert history(tmp_path)[-1] == {"step": 24, "tokens": 24 * 512, "end": "finished"}


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    process = start(tmp_path, delay=3)
    wait_for((tmp_path / "loss.png").exists)  # by the callback before the one that listens
    time.sleep(0.5)
    begun = time.monotonic()
    interrupt(process, tmp_path)
    time.sleep(0.2)
    interrupt(process, tmp_path)
    process.join(30)
    assert time.monotonic() - begun < 2.5
    assert process.exitcode == 1
    assert "KeyboardInterrupt" in (tmp_path / "output.txt").read_text()


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
