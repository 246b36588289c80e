"""The command line: what it prints, what it writes, and with which code it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinytrain import __main__ as command
from tinytrain import steps
from tinytrain.callbacks import read_history

STEPS = "check data tokenize train evaluate generate tune chat export".split()
ROOT = Path(steps.__file__).parent.parent


@pytest.fixture(autouse=True)
def own_runs_folder(monkeypatch, tmp_path):
    """Named in the environment, which `--runs` would change for the tests that follow."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))


def run(*arguments):
    return command.main([*arguments, "--recipe", "smoke"])


def shell(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tinytrain", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_without_a_step_they_are_listed():
    shown = shell()
    assert shown.returncode == 0
    listed = [line.split()[0] for line in shown.stdout.splitlines() if line.startswith("    ")]
    assert [word for word in listed if word in STEPS] == STEPS
    assert "torchrun --standalone --nproc-per-node 2 -m tinytrain train" in shown.stdout


@pytest.mark.parametrize("step", STEPS)
def test_each_step_explains_itself(step, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([step, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m tinytrain {step}")
    for name in ("--recipe", "--corpus", "--set", "--runs"):
        assert name in shown


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--nope"], ["generate"], ["export", "--to", "x"]]
)
def test_a_wrong_call_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m tinytrain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "--recipe", "pokcet"], "no recipe is called 'pokcet'"),
        (["data", "--corpus", "nowhere.json"], "'nowhere.json' is neither"),
        (["train", "--hours", "1", "--recipe", "smoke"], "either --hours or --recipe"),
        (["data", "--set", "lerning_rate=1"], "'learning_rate' is near"),
        (["data", "--set", "learning_rate"], "write name=value"),
        (["data", "--set", "max_steps=1.5"], "max_steps is '1.5'; it must be a whole number"),
        (["data", "--set", "packing=perhaps"], "packing is 'perhaps'; it must be True or False"),
        (["data", "--set", "learning_rate=nan"], "learning_rate is nan; it must be above 0"),
        (["train", "--recipe", "smoke", "--fsdp"], "here is one"),
        (["train", "--more", "0"], "cannot be made 0 steps longer"),
        (["generate", "法国", "--recipe", "smoke"], "train --recipe smoke"),
    ],
)
def test_an_error_is_one_line_and_ends_with_1(arguments, told, capsys):
    if "--recipe" not in arguments:
        arguments += ["--recipe", "smoke"]
    assert command.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinytrain: ") and told in line
    with pytest.raises((ValueError, OSError)):
        command.main([*arguments, "--debug"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate=1e-3", 1e-3),
        ("epochs=2", 2.0),
        ("max_documents=50", 50),
        ("max_documents=none", None),
        ("packing=False", False),
        ("precision=float32", "float32"),
        ("corpus=a=b.json", "a=b.json"),
    ],
)
def test_a_field_of_the_recipe_gets_its_own_type(text, value):
    name, read = command._parse_change(text)
    assert (name, read) == (text.split("=")[0], value)
    assert type(read) is type(value)


def test_the_text_is_got_and_cut_into_blocks(capsys, tmp_path):
    texts = [f"第{n}篇：北京是中国的首都，编号{n * 7}。" * 3 for n in range(80)]
    lines = [json.dumps({"content": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    mine = ["--corpus", str(tmp_path / "mine.jsonl"), "--runs", str(tmp_path / "elsewhere")]
    assert run("data", *mine) == 0
    shown = capsys.readouterr().out
    assert "72 documents to learn from, " in shown
    assert run("tokenize", *mine, "--set", "context_length=16", "vocab_size=270") == 0
    shown = capsys.readouterr().out
    assert "blocks of 16, " in shown and "270 tokens in the vocabulary" in shown
    assert list((tmp_path / "elsewhere").glob("smoke-mine-*/blocks"))


def test_training_leaves_what_the_notebook_leaves(trained):
    folder = trained / "smoke"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["held_out_loss"] < 6.5 and summary["bits_per_character"] > 0
    assert summary["cloze_after"].keys() == {"told", "reworded", "reversed"}
    names = "history.jsonl loss.png samples.jsonl training.log model/tokenizer.json"
    for name in names.split():
        assert (folder / name).is_file(), name
    assert [line["end"] for line in read_history(folder) if "end" in line] == ["finished"]


@pytest.fixture
def with_model(trained, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(trained))


def test_what_is_finished_is_not_trained_again_unless_asked(trained, with_model, tmp_path, capsys):
    def changed():
        return (trained / "smoke" / "checkpoints" / "checkpoint-20").stat().st_mtime_ns

    before = changed()
    assert run("train") == 0
    assert "nothing is trained" in capsys.readouterr().out and changed() == before
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs, ignore=shutil.ignore_patterns("*.lock"))
    assert run("train", "--more", "4", "--runs", str(runs)) == 0
    assert "24 steps in place of 20" in capsys.readouterr().out
    for name, key in (("history.jsonl", "loss"), ("samples.jsonl", "texts")):
        steps = [line["step"] for line in read_history(runs / "smoke" / name) if key in line]
        assert steps == sorted(set(steps)) and steps[-1] == 24  # one row, none twice
    assert run("train", "--fresh", "--runs", str(runs), "--set", "max_steps=2") == 0
    assert (runs / "smoke" / "checkpoints-1" / "checkpoint-20").is_dir()


def test_a_model_is_measured(trained, with_model, capsys):
    assert run("evaluate") == 0
    shown = capsys.readouterr().out
    summary = json.loads((trained / "smoke" / "summary.json").read_text(encoding="utf-8"))
    (line,) = [line for line in shown.splitlines() if line.startswith("bits per character")]
    # By whole documents here, by blocks of 64 tokens there.
    assert float(line.split()[3]) == pytest.approx(summary["bits_per_character"], rel=0.05)
    assert "perplexity" in shown and "told questions" in shown and "reversed questions" in shown


def test_a_model_is_not_measured_on_what_it_was_trained_on(trained, with_model, capsys):
    for change in ("test_size=0.5", "max_documents=100", "hidden_size=128"):
        for step in (["evaluate"], ["generate", "北京"], ["export"]):
            assert run(*step, "--set", change) == 1
            assert f"trained with {change.split('=')[0]}=" in capsys.readouterr().err
    model = ["--model", str(trained / "smoke" / "model")]
    assert run("evaluate", *model, "--set", "test_size=0.5") == 1
    assert "Add --set test_size=0.1" in capsys.readouterr().err
    assert run("generate", "北京", *model, "--set", "test_size=0.5", "--max-new-tokens", "1") == 0


def test_a_text_is_continued_on_stdout_alone(with_model, capsys):
    knobs = ["--max-new-tokens", "8", "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9"]
    shown = shell("generate", "法国的首都是", "--recipe", "smoke", *knobs, "--seed", "2")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.startswith("法国的首都是") and len(shown.stdout) > 8
    assert run("generate", "法国的首都是", *knobs, "--seed", "2") == 0
    assert capsys.readouterr().out == shown.stdout


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
def test_output_in_an_old_encoding_has_escapes(encoding, with_model):
    """As on Windows, where a file or a pipe gets what Chinese or Western programs used to write."""
    shown = subprocess.run(
        [sys.executable, "-m", "tinytrain", "generate", "法国♥", "--recipe", "smoke"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    assert shown.returncode == 0 and shown.stderr == b""
    assert shown.stdout.startswith("法国♥".encode(encoding, errors="backslashreplace"))


@pytest.mark.skipif(sys.platform == "win32", reason="sh and /dev/full")
@pytest.mark.parametrize(
    ("redirected", "status", "told"),
    [("| true", "141", ""), (">&-", "0", ""), (">/dev/full", "1", "No space left on device; free")],
)
def test_output_that_nobody_takes(redirected, status, told, with_model, tmp_path):
    command = f"{{ '{sys.executable}' -m tinytrain generate 北京 --recipe smoke"
    command = f"{command}; echo $? >'{tmp_path}/status'; }} {redirected}"
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (tmp_path / "status").read_text().strip() == status
    assert len(shown.stderr.splitlines()) == bool(told) and told in shown.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            MemoryError(),
            r"out of memory \(MemoryError\). Training needs less with a smaller b",
        ),
        (
            RuntimeError("[x]\nDefaultCPUAllocator: can't allocate memory"),
            r"out of memory \(\[x\]\)",
        ),
        (AssertionError(), r"AssertionError: no message \(--debug shows where\)"),
        (KeyError("name"), r"KeyError: 'name' \(--debug shows where\)"),
        (ValueError("seed is -1"), "seed is -1"),
        (
            OSError(28, "No space left on device"),
            r"\[Errno 28\] No .*; free are .* GB in .*, .* GB in .*",
        ),
        (OSError(28, "No space", "a.txt"), r"\[Errno 28\] No space: 'a.txt'"),
    ],
)
def test_every_error_says_something(error, told, monkeypatch, capsys, tmp_path):
    (tmp_path / "runs").mkdir()

    def fail(recipe):
        raise error

    monkeypatch.setattr(steps, "get_split", fail)
    assert run("data") == 1
    assert re.fullmatch(f"tinytrain: {told}.*\n", capsys.readouterr().err)


def test_home_may_be_written_as_a_wave(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert run("generate", "北京", "--runs", "~/mine") == 1
    assert (tmp_path / "mine" / "smoke").is_dir()
    monkeypatch.setenv("TINYTRAIN_RUNS", "~/other")
    assert steps.runs_folder() == tmp_path / "other"


def test_a_text_appears_as_it_is_written(with_model, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: pieces.append("".join(text)))
    assert run("generate", "北京", "--max-new-tokens", "20", "--temperature", "2") == 0
    assert len(pieces) > 3 and pieces[0].startswith("北京")


def test_a_model_is_exported_and_who_uploads_must_say_who(trained, with_model, monkeypatch, capsys):
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    assert run("export", "--dtype", "bfloat16", "--upload", "me") == 1
    assert "'me' must have the form" in capsys.readouterr().err
    exported = trained / "smoke" / "export"
    assert (exported / "README.md").read_text(encoding="utf-8").count("bfloat16")
    import torch
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    assert command.main(["export", "--recipe", "pocket", "--set", "max_documents=40"]) == 1
    assert "no trained model" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(smoke, tmp_path):
    runs = tmp_path / "runs"
    # Another test may have trained there: what it wrote is not what is waited for.
    earlier = shutil.ignore_patterns("*.lock", "history.jsonl", "checkpoints*")
    shutil.copytree(smoke.runs, runs, ignore=earlier)
    arguments = ["train", "--recipe", "smoke", "--runs", str(runs), "--set", "eval_blocks=8"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tinytrain", *arguments, "max_steps=100000"],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    folder = runs / "smoke"
    until = time.monotonic() + 90
    while not any("loss" in line for line in history(folder)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    told = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "by the interrupt; a checkpoint is saved" in told and "Traceback" not in told
    last = history(folder)[-1]
    assert last["end"] == "stopped"
    assert (folder / "checkpoints" / f"checkpoint-{last['step']}" / "complete.json").is_file()
    assert command.main(["generate", "北京", "--recipe", "smoke", "--runs", str(runs)]) == 0


def history(folder):
    return read_history(folder) if (folder / "history.jsonl").is_file() else []


def test_check_tells_what_fits(capsys):
    assert run("check") == 0
    shown = capsys.readouterr().out
    assert "precision" in shown and "because" in shown
    for name in ("smoke", "pocket", "wiki", "qwen-0.5b"):
        assert name in shown
