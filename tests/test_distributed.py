"""Training shared by several real processes, connected by gloo on the processor.

A fork server that has imported torch once gives each process a start in a fraction of a second;
what is killed runs under the real launcher. Losses are compared in float32 with a tolerance of one
part in ten thousand: sums come about in another order when they are shared.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tinytrain import steps
from tinytrain.__main__ import main
from tinytrain.callbacks import read_history
from tinytrain.recipes import RECIPES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

TOLERANCE = 1e-4
SMOKE = ["train", "--recipe", "smoke"]
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
        self.processes = [
            server.Process(
                target=process,
                args=(rank, number, port, command, str(self.outputs[rank]), patches or {}),
            )
            for rank in range(number)
        ]
        for started in self.processes:
            started.start()

    def end(self, seconds=90):
        """Wait for the end; return the exit codes and what each process has written."""
        until = time.monotonic() + seconds
        for started in self.processes:
            started.join(max(0, until - time.monotonic()))
        hanging = [started for started in self.processes if started.is_alive()]
        for started in hanging:
            started.kill()
        written = [path.read_text(encoding="utf-8") for path in self.outputs]
        assert not hanging, written
        return [started.exitcode for started in self.processes], written


@pytest.fixture(autouse=True)
def own_runs_folder(monkeypatch, tmp_path):
    """Named in the environment, which `--runs` would change for the tests that follow."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def runs(smoke, tmp_path):
    """A folder for runs in which text, tokenizer and blocks are made already."""
    return copy_of(smoke.runs, tmp_path / "runs")


def copy_of(runs, other):
    shutil.copytree(runs, other, ignore=shutil.ignore_patterns("*.lock"))
    return other


def losses(runs, after=0):
    return {
        (line["step"], name): line[name]
        for line in read_history(runs / "smoke")
        for name in ("loss", "eval_loss")
        if name in line and line["step"] > after
    }


def nearly(losses):
    assert losses
    return pytest.approx(losses, rel=TOLERANCE)


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def whole_checkpoints(runs):
    found = (runs / "smoke" / "checkpoints").glob("checkpoint-*/complete.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in found)


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """One process: 4 blocks, twice, a step."""
    runs = copy_of(smoke.runs, tmp_path_factory.mktemp("alone") / "runs")
    arguments = ["--set", "batch_size=4", "gradient_accumulation=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYTRAIN_RUNS", "which --runs replaces")
        assert main([*SMOKE, "--runs", str(runs), *arguments]) == 0
    return runs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes that begin with nothing, not even a text: 4 blocks each, once, a step."""
    runs = tmp_path_factory.mktemp("two") / "runs"
    run = Run(runs, 2, "--set", "batch_size=4", "gradient_accumulation=2")
    codes, run.written = run.end()
    assert codes == [0, 0], run.written
    run.runs = runs
    return run


def test_two_processes_learn_what_one_with_twice_the_accumulation_learns(alone, two):
    assert len(losses(alone)) == 12
    assert losses(two.runs) == nearly(losses(alone))
    first = read_history(two.folder)[0]
    assert first["tokens_per_step"] == 512


def test_only_the_first_process_writes_and_logs(two):
    first, second = two.written
    assert "2 processes share each step: 1 x 4 blocks each, 512 tokens in all" in first
    assert "training ends at step 20" in first and "bits per character" in first
    # No line of the log, no result, and no warning either.
    assert second.strip() == ""
    log = (two.folder / "training.log").read_text(encoding="utf-8")
    messages = [line.split(": ", 1)[1] for line in log.splitlines()]
    assert "training starts" in log and len(messages) == len(set(messages))
    steps_of_history = [line["step"] for line in read_history(two.folder) if "loss" in line]
    assert steps_of_history == list(range(2, 21, 2))
    samples = (two.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [10, 20]
    assert whole_checkpoints(two.runs) == [10, 20]


def stopped_at_10(runs, other):
    """Return a copy of a run as it would be if it had been killed after step 10."""
    copy_of(runs, other)
    shutil.rmtree(other / "smoke" / "checkpoints" / "checkpoint-20")
    return other


@pytest.mark.parametrize("number", [1, 4])
def test_what_two_have_begun_others_finish(number, two, tmp_path):
    runs = stopped_at_10(two.runs, tmp_path / "runs")
    codes, written = Run(runs, number, "--set", "batch_size=4", "gradient_accumulation=2").end()
    assert codes == [0] * number, written
    assert "going on from checkpoint-10" in written[0]
    assert losses(runs) == nearly(losses(two.runs))
    assert not (runs / "smoke" / "checkpoints-1").exists()


def test_parts_of_the_weights_learn_the_same(alone, runs, tmp_path):
    """FSDP: each process holds half of each matrix, of the embedding and of Muon's averages."""
    change = ["--set", "batch_size=4", "gradient_accumulation=2"]
    fsdp = dict.fromkeys((0, 1), allow_fsdp_on_a_cpu)
    codes, written = Run(runs, 2, *change, "--fsdp", patches=fsdp).end()
    assert codes == [0, 0], written
    assert losses(runs) == nearly(losses(alone))
    last = runs / "smoke" / "checkpoints" / "checkpoint-20"
    assert (last / "pytorch_model_fsdp.bin").is_file()  # or it was not FSDP
    import torch
    from transformers import AutoModelForCausalLM

    sharded, whole = (
        AutoModelForCausalLM.from_pretrained(folder / "smoke" / "model").state_dict()
        for folder in (runs, alone)
    )
    assert list(sharded) == list(whole)
    for name, weights in whole.items():
        torch.testing.assert_close(sharded[name], weights, rtol=1e-3, atol=1e-4)

    begun = stopped_at_10(runs, tmp_path / "begun")
    code = main([*SMOKE, "--runs", str(begun), *change])
    assert code == 1  # its optimiser is stored in parts
    codes, written = Run(begun, 2, *change, "--fsdp", patches=fsdp).end()
    assert codes == [0, 0], written
    assert "going on from checkpoint-10" in written[0]
    assert losses(begun) == nearly(losses(alone))


def test_a_loss_that_one_process_alone_sees_stops_all(runs):
    codes, written = Run(runs, 2, patches={1: break_weights}).end()
    assert codes == [1, 1], written
    assert "step 5: the loss is nan; the step was not made" in written[0]
    # The first process names the blocks of the other one too: 4 and 4.
    named = written[0].split("Its batch is blocks ")[1].split(" of the training set")[0]
    assert len(named.split(", ")) == 8


def test_what_interrupts_one_process_stops_all_after_the_same_step(runs):
    run = Run(runs, 2, *LONG)
    wait_for(lambda: whole_checkpoints(runs))
    os.kill(run.processes[1].pid, signal.SIGINT)
    codes, written = run.end()
    assert codes == [130, 130], written
    assert "by another process; a checkpoint is saved" in written[0]
    last = whole_checkpoints(runs)[-1]
    assert f"stopped at step {last}" in written[0]
    assert (runs / "smoke" / "model" / "model.safetensors").is_file()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


def end(started):
    """Kill a launcher and what it has started."""
    for running in [*psutil.Process(started.pid).children(recursive=True), started]:
        with suppress(psutil.Error):
            running.kill()
    started.wait()


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.soak)]
)
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(launcher, runs):
    port = ["--main_process_port", str(free_port())] if launcher == "accelerate" else []
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, "-m", "tinytrain", *SMOKE]
    command += ["--runs", str(runs), *LONG]
    root = str(Path(steps.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    output = runs / "output.txt"
    with output.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_for(lambda: whole_checkpoints(runs))
        workers = {}
        for child in psutil.Process(started.pid).children(recursive=True):
            with suppress(psutil.Error):
                workers[child.environ().get("RANK")] = child
        workers["1"].kill()
        assert started.wait(30) != 0
    finally:
        if started.poll() is None:
            end(started)
    assert not workers["0"].is_running()
    last = whole_checkpoints(runs)[-1]
    log = (runs / "smoke" / "training.log").read_text(encoding="utf-8")
    assert "rank 0 ends (" in log  # and what gloo says
    assert f"the same command goes on from checkpoint-{last}" in log
    assert f"Signal {signal.SIGKILL} (SIGKILL) received by PID {workers['1'].pid}" in (
        output.read_text(encoding="utf-8")
    )

    run = Run(runs, 2, *LONG)
    wait_for(lambda: whole_checkpoints(runs)[-1] > last)
    for running in run.processes:
        running.kill()
    assert f"going on from checkpoint-{last}" in run.outputs[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [2, 3, 4, 7])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_shared_out(name, number):
    recipe = RECIPES[name]
    mine = runs.share_recipe(recipe, number)
    tokens = mine.tokens_per_step * number
    assert mine.batch_size <= recipe.batch_size
    if recipe.tokens_per_step % (number * recipe.context_length) == 0:
        assert tokens == recipe.tokens_per_step
    else:
        extra = (tokens - recipe.tokens_per_step) // recipe.context_length
        assert 0 < extra < number
    assert runs.share_recipe(recipe, 1) == recipe
