"""Training shared by several real processes, connected by gloo on the processor.

A fork server that has imported torch once gives each process a start in a fraction of a second;
what is killed runs under the real launcher. Losses are compared in float32 with a tolerance of one
part in ten thousand: sums come about in another order when they are shared.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import wait_for
from safetensors.torch import load_file
from torch.testing import assert_close

from tinytrain.__main__ import main
from tinytrain.callbacks import read_history
from tinytrain.recipes import RECIPES
from tinytrain.runs import share_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

SMOKE = ["train", "--recipe", "smoke"]
TWO = ["--set", "batch_size=4", "gradient_accumulation=2"]  # two share a step as 4 blocks each
LONG = ["--set", "max_steps=100000", "save_steps=5", "logging_steps=5", "eval_steps=100000"]
LONG += ["sample_steps=100000", "eval_blocks=8"]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tinytrain.checkpoints", "tinytrain.training"])


def process(rank, number, port, arguments, output, patches):
    """Be one of several processes, as a launcher would start it."""
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank in patches:
        patches[rank]()
    sys.exit(main(arguments))


def break_weights():
    """Let the loss of this process be NaN in its fifth step."""
    from transformers import Trainer

    training_step = Trainer.training_step

    def broken(self, model, *args, **kwargs):
        if self.state.global_step == 4:
            self.model.model.norm.weight.data.fill_(float("nan"))
        return training_step(self, model, *args, **kwargs)

    Trainer.training_step = broken


def stop_at_the_worst_moment(number):
    """Send this process a signal in step 6, just after it has told the others that it has none."""
    from tinytrain.callbacks import stop

    gather, steps = stop.gather, itertools.count(1)

    def interrupted(tensor):
        gathered = gather(tensor)
        if next(steps) == 6:
            signal.raise_signal(number)
        return gathered

    stop.gather = interrupted


def allow_fsdp_on_a_cpu():
    """Let FSDP work on CPUs as it does on GPUs: accelerate offers it only there."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer

    create_accelerator = Trainer.create_accelerator_and_postprocess

    def create(self):
        create_accelerator(self)
        if self.args.fsdp:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state.fsdp_plugin = plugin
            self.accelerator.state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP  # it has a copy
            self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Run:
    """Several processes that train in one folder."""

    def __init__(self, runs, number, *arguments, patches=None):
        self.folder = runs / "smoke"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [self.folder / f"output-{rank}.txt" for rank in range(number)]
        command, port = [*SMOKE, "--runs", str(runs), *arguments], free_port()
        self.processes = []
        for rank, output in enumerate(self.outputs):
            arguments = (rank, number, port, command, output, patches or {})
            self.processes.append(server.Process(target=process, args=arguments))
            self.processes[-1].start()

    def end(self, code=0):
        """Wait until all end with an exit code; return what each has written."""
        until = time.monotonic() + 90
        for started in self.processes:
            started.join(max(0, until - time.monotonic()))
        codes = [started.exitcode for started in self.processes]
        for started in self.processes:
            started.kill()  # if it hangs
        written = [path.read_text(encoding="utf-8") for path in self.outputs]
        assert codes == [code] * len(codes), written
        return written


@pytest.fixture
def runs(smoke, tmp_path):
    """A folder for runs in which text, tokenizer and blocks are made already."""
    return copy_of(smoke.runs, tmp_path / "runs")


def copy_of(runs, other, *without):
    shutil.copytree(runs, other, ignore=shutil.ignore_patterns("*.lock", *without))
    return other


def losses(runs):
    return {
        (line["step"], name): line[name]
        for line in read_history(runs / "smoke")
        for name in ("loss", "eval_loss")
        if name in line
    }


def nearly(losses):
    assert losses
    return pytest.approx(losses, rel=1e-4)


def held_out_loss(runs):
    """Of all blocks, whose last batch is not full."""
    return json.loads((runs / "smoke/summary.json").read_text(encoding="utf-8"))["held_out_loss"]


def whole_checkpoints(runs):
    found = (runs / "smoke" / "checkpoints").glob("checkpoint-*/complete.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in found)


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """One process: 4 blocks, twice, a step."""
    runs = copy_of(smoke.runs, tmp_path_factory.mktemp("alone") / "runs")
    Run(runs, 1, *TWO).end()
    return runs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes that begin with nothing, not even a text: 4 blocks each, once, a step."""
    runs = tmp_path_factory.mktemp("two") / "runs"
    run = Run(runs, 2, *TWO)
    run.runs, run.written = runs, run.end()
    return run


def test_two_processes_learn_what_one_with_twice_the_accumulation_learns(alone, two):
    assert len(losses(alone)) == 12
    assert losses(two.runs) == nearly(losses(alone))
    assert held_out_loss(two.runs) == pytest.approx(held_out_loss(alone), rel=1e-4)
    assert read_history(two.folder)[0]["tokens_per_step"] == 512


def test_only_the_first_process_writes_and_logs(two):
    first, second = two.written
    assert "2 processes share each step: 1 x 4 blocks each, 512 tokens in all" in first
    assert "training ends at step 20" in first and "bits per character" in first
    # Lines, since this is neither a terminal nor a notebook.
    assert "step 20/20: loss" in first and "step 20: 法国的首都是 → " in first
    assert "\x1b" not in first
    # No line of the log, no result, and no warning either.
    assert second.strip() == ""
    log = (two.folder / "training.log").read_text(encoding="utf-8")
    messages = [line.split(": ", 1)[1] for line in log.splitlines()]
    assert "training starts" in log and len(messages) == len(set(messages))
    logged = [line["step"] for line in read_history(two.folder) if "loss" in line]
    assert logged == list(range(2, 21, 2))
    samples = read_history(two.folder / "samples.jsonl")
    assert [line["step"] for line in samples] == [10, 20]
    assert whole_checkpoints(two.runs) == [10, 20]


@pytest.mark.parametrize("number", [1, 4])
def test_what_two_have_begun_others_finish(number, two, tmp_path):
    runs = copy_of(two.runs, tmp_path / "runs", "checkpoint-20")  # as if killed after step 10
    written = Run(runs, number, *TWO).end()
    assert "going on from checkpoint-10" in written[0]
    assert losses(runs) == nearly(losses(two.runs))
    assert not (runs / "smoke" / "checkpoints-1").exists()


def test_parts_of_the_weights_learn_the_same(alone, runs, tmp_path):
    """FSDP: each process holds half of each matrix, of the embedding and of Muon's averages."""
    fsdp = dict.fromkeys((0, 1), allow_fsdp_on_a_cpu)
    Run(runs, 2, *TWO, "--fsdp", patches=fsdp).end()
    assert losses(runs) == nearly(losses(alone))
    last = runs / "smoke" / "checkpoints" / "checkpoint-20"
    assert (last / "pytorch_model_fsdp.bin").is_file()  # or it was not FSDP
    sharded, whole = (load_file(r / "smoke/model/model.safetensors") for r in (runs, alone))
    assert_close({name: sharded[name] for name in whole}, whole, rtol=1e-3, atol=1e-4)

    begun = copy_of(runs, tmp_path / "begun", "checkpoint-20")
    (written,) = Run(begun, 1, *TWO).end(code=1)  # the optimiser is stored in parts
    assert "checkpoint-10 was made with FSDP" in written
    written = Run(begun, 2, *TWO, "--fsdp", patches=fsdp).end()
    assert "going on from checkpoint-10" in written[0]
    assert losses(begun) == nearly(losses(alone))


def test_a_loss_that_one_process_alone_sees_stops_all(runs):
    written = Run(runs, 2, patches={1: break_weights}).end(code=1)
    assert "step 5: the loss is nan; the step was not made" in written[0]
    # The first process names the blocks of the other one too: 4 and 4.
    assert re.search(r"Its batch is blocks (\d+, ){7}\d+ of the training set", written[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_what_stops_one_process_stops_all_after_the_same_step(number, code, runs):
    patches = {1: partial(stop_at_the_worst_moment, number)}
    written = Run(runs, 2, *LONG, patches=patches).end(code)
    assert "stopped at step 7 by another process; a checkpoint is saved" in written[0]
    assert whole_checkpoints(runs) == [5, 7]
    # A signal that ends the process leaves time for a checkpoint only.
    assert (runs / "smoke" / "model").exists() == (number == signal.SIGINT)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.soak)]
)
def test_a_killed_process_ends_the_run_and_what_goes_on_is_said(launcher, runs):
    port = ["--main_process_port", str(free_port())] if launcher == "accelerate" else []
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, "-m", "tinytrain", *SMOKE]
    command += ["--runs", str(runs), *LONG]
    place = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    output = runs / "output.txt"
    with output.open("w") as file:
        started = psutil.Popen(command, stdout=file, stderr=file, env=os.environ | place)
    workers = {}
    try:
        wait_for(lambda: whole_checkpoints(runs))
        for child in started.children(recursive=True):
            with suppress(psutil.Error):
                workers[child.environ().get("RANK")] = child
        workers["1"].kill()
        assert started.wait(30) != 0
        assert not workers["0"].is_running()
    finally:
        with suppress(psutil.NoSuchProcess):
            for running in [*started.children(recursive=True), started]:
                running.kill()
    log = (runs / "smoke" / "training.log").read_text(encoding="utf-8")
    assert "other inputs" not in log  # what one process has built fits all
    assert "rank 0 ends (" in log  # and what gloo says
    assert f"the same command goes on from checkpoint-{whole_checkpoints(runs)[-1]}" in log
    told = output.read_text(encoding="utf-8")
    assert f"(SIGKILL) received by PID {workers['1'].pid}" in told


@pytest.mark.parametrize("number", [2, 3, 4, 7])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_shared_out(name, number):
    recipe = RECIPES[name]
    mine = share_recipe(recipe, number)
    tokens = mine.tokens_per_step * number
    assert mine.batch_size <= recipe.batch_size
    if recipe.tokens_per_step % (number * recipe.context_length) == 0:
        assert tokens == recipe.tokens_per_step
    else:
        assert 0 < (tokens - recipe.tokens_per_step) // recipe.context_length < number
    assert share_recipe(recipe, 1) == recipe
