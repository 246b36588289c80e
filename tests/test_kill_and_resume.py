"""Real processes that are killed, told to end, or interrupted in the middle of training.

A fork server that has imported torch once gives each attempt a process of its own in a fraction
of a second; the signals are real, and nothing of the training is replaced.
"""

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

from tinytrain.recipes import RECIPES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# Many checkpoints, so that a good part of the time goes into saving; dropout, so that the random
# state counts; more than one pass over the text, so that the order of the second counts.
RECIPE = replace(
    RECIPES["smoke"], max_documents=80, max_steps=48, save_steps=4, eval_steps=8, logging_steps=2
)
KILLS = int(os.environ.get("TINYTRAIN_KILLS", 20))

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [f"tinytrain.{name}" for name in ("training", "callbacks", "modeling", "loss", "optimizer")]
)


LONG = replace(RECIPE, max_steps=10_000, logging_steps=1, save_steps=1000, eval_steps=1000)


def run(folder, config, blocks, delay, recipe):
    """Train in this process, as notebook 05 does, and leave the weights at the end."""
    import torch
    from datasets import disable_progress_bars, load_from_disk
    from transformers import Qwen2Config

    from tinytrain import callbacks, steps
    from tinytrain.common import setup_logging
    from tinytrain.loss import save_loss_memory
    from tinytrain.modeling import build_model
    from tinytrain.training import build_trainer, train, training_arguments

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
    halves, make = (blocks["train"], blocks["test"]), steps.get_optimizer(recipe)
    trainer = build_trainer(model, arguments, *halves, watching, make_optimizer=make)
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
    few = smoke.blocks
    few["train"] = few["train"].select(range(min(180, len(few["train"]))))
    few["test"] = few["test"].select(range(8))
    few.save_to_disk(str(blocks))
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
    kills = number = 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / f"run-{number}"
        while True:
            begun = beginnings(folder)
            process = start(folder)
            wait_for(lambda f=folder, p=process, n=begun: beginnings(f) > n or not p.is_alive())
            process.join(chance.uniform(0, seconds))  # waits so long, or until it ends
            if not kill(process):
                break
            kills += 1
            print(f"run {number} killed at step {last_step(folder)}")
            if kills % 5 == 0:
                break
        ends_like(folder, whole, start)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
def test_killed_while_it_saves_a_run_ends_like_one_never_stopped(start, whole, tmp_path, file):
    process = start(tmp_path)
    wait_for((tmp_path / "checkpoints" / "checkpoint-12" / file).exists)
    assert kill(process)
    unfinished = not (tmp_path / "checkpoints" / "checkpoint-12" / "complete.json").exists()
    ends_like(tmp_path, whole, start)
    log = (tmp_path / "training.log").read_text()
    assert "going on from checkpoint-" in log
    if unfinished:  # nearly always
        assert "checkpoint-12 is passed over: its writing was not finished" in log


def test_sigterm_saves_a_checkpoint_before_the_end(start, whole, tmp_path):
    process = start(tmp_path, delay=0.1)
    wait_for(lambda: last_step(tmp_path) >= 6)
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM  # the signal took its course
    step = last_step(tmp_path)
    assert 6 <= step < 48
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    assert f"stopped at step {step} by SIGTERM" in (tmp_path / "training.log").read_text()
    assert not (tmp_path / "weights.pt").exists()
    process = start(tmp_path)
    process.join(60)
    assert f"going on from checkpoint-{step};" in (tmp_path / "training.log").read_text()
    assert same_weights(tmp_path, whole)


def interrupt(process, folder):
    os.kill(process.pid, signal.SIGINT)


def touch(process, folder):
    (folder / "STOP").touch()


@pytest.mark.parametrize("ask", [interrupt, touch])
def test_asked_to_stop_it_saves_evaluates_draws_and_goes_on(start, tmp_path, ask):
    process = start(tmp_path, delay=0.1)
    wait_for(lambda: last_step(tmp_path) >= 6)
    ask(process, tmp_path)
    process.join(30)
    assert process.exitcode == 0
    assert (tmp_path / "weights.pt").exists()  # what comes after the training was reached
    *_, evaluation, end = history(tmp_path)
    step = end["step"]
    assert 6 <= step < 48
    assert end["end"] == "stopped"
    assert evaluation["step"] == step and evaluation["eval_loss"] > 0
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert not (tmp_path / "STOP").exists()
    log = (tmp_path / "training.log").read_text()
    assert f"stopped at step {step}" in log and "the same call goes on from it" in log
    process = start(tmp_path)
    process.join(60)
    assert history(tmp_path)[-1] == {"step": 48, "tokens": 48 * 512, "end": "finished"}


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


def test_the_lock_of_a_killed_process_is_free(start, whole, tmp_path):
    first = start(tmp_path, delay=0.2)
    wait_for(lambda: last_step(tmp_path) >= 2)
    second = start(tmp_path)
    second.join(30)
    assert second.exitcode == 1
    assert "another process trains in" in (tmp_path / "output.txt").read_text()
    assert kill(first)
    ends_like(tmp_path, whole, start)


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
