"""``python -m tinytrain chat`` and ``tune``: what a terminal shows, and what a pipe gets."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import tinytrain
from tinytrain import __main__ as command
from tinytrain import results, steps
from tinytrain.chat import add_chat_template, encode_conversation
from tinytrain.evaluation import Interval, share
from tinytrain.recipes import RECIPES
from tinytrain.tokenization import train_tokenizer

ROOT = Path(tinytrain.__file__).parent.parent
FRANCE, HELLO, ENDLESS = ("法国的首都是哪里？", "巴黎。"), ("你好", "你好！"), ("说", "啊" * 90)


def taught_to_chat(context=192, more=()):
    """Return a model that knows answers by heart, one of which never ends, and its tokenizer."""
    pairs = [FRANCE, HELLO, *more]
    texts = ["".join(pair) for pair in [*pairs, ENDLESS]] * 3 + ["user\nassistant\nsystem\n"] * 3
    tokenizer = add_chat_template(train_tokenizer(texts, 400))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    limits = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    model = Qwen2ForCausalLM(Qwen2Config(**limits, **sizes, **heads, bos_token_id=None))
    rows = []
    for said in [ENDLESS, *([*first, *second] for first in pairs for second in pairs)]:
        roles = ["user", "assistant"] * (len(said) // 2)
        messages = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
        ids, labels = encode_conversation(tokenizer, messages)
        end = -2 if said is ENDLESS else None  # without the end of the turn
        rows.append((torch.tensor([ids[:end]]), torch.tensor([labels[:end]])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for ids, labels in rows:
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tuned model, as a folder in Hugging Face format."""
    path = tmp_path_factory.mktemp("tuned")
    model, tokenizer = taught_to_chat()
    for place, context in ((path, 192), (path / "long", 2048)):
        model.config.max_position_embeddings = context
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return path


def arguments(folder, *more):
    return ["-m", "tinytrain", "chat", "--recipe", "smoke", "--model", str(folder), *more]


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONUTF8", "1")


def pipe(folder, lines, *more):
    text = "\n".join(lines)
    call = [sys.executable, *arguments(folder, *more)]
    return subprocess.run(
        call, input=text, capture_output=True, text=True, encoding="utf-8", timeout=200
    )


# A pipe


def test_a_pipe_gets_the_answers_on_stdout_alone(folder, environment):
    lines = [FRANCE[0], "", "长" * 99, "/reset", "/rest", HELLO[0]]
    shown = pipe(folder, lines)
    assert (shown.returncode, shown.stdout) == (0, "巴黎。\n你好！\n")
    empty, long, reset, unknown = shown.stderr.splitlines()
    assert "is empty" in empty and "too long" in long
    assert "started over" in reset and unknown.startswith("/reset starts over")


def test_dropped_turns_are_told_in_a_plain_line_each_time(folder, environment):
    shown = pipe(folder, [FRANCE[0]] * 12, "--max-new-tokens", "8", "--system", "你好")
    assert shown.stdout == "巴黎。\n" * 12
    lines = shown.stderr.splitlines()
    assert 0 < len(lines) < 12
    for line in lines:
        assert re.fullmatch(r"The conversation is longer than 192 tokens: .* dropped", line)


def test_a_text_in_another_encoding_is_told(folder, environment):
    call = [sys.executable, *arguments(folder)]
    shown = subprocess.run(call, input="你好\n".encode("gbk"), capture_output=True, timeout=200)
    assert (shown.returncode, shown.stdout) == (1, b"")
    assert re.fullmatch(rb"tinytrain: 'utf-8' codec can't decode byte 0xc4 .*\r?\n", shown.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_all_that_comes_through_a_pipe(folder, environment):
    call = [sys.executable, *arguments(folder)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write("".join([ENDLESS[0], "\n"] * 9999).encode())
        process.stdin.close()
        assert process.stdout.read(3) == "啊".encode()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


# A terminal


@pytest.fixture
def terminal(folder, environment):
    """Return a function that starts a conversation in a terminal of its own."""
    pexpect = pytest.importorskip("pexpect", reason="no terminals on Windows")
    started = []

    def start(*more):
        environment = os.environ | {"TERM": "dumb"}
        options = {"encoding": "utf-8", "env": environment, "timeout": 200}
        options |= {"dimensions": (24, 400)}  # no line is scrolled
        child = pexpect.spawn(sys.executable, arguments(folder, *more), **options)
        started.append(child)
        child.delaybeforesend = 0
        child.expect_exact("Ctrl-D leaves\r\n> ")
        return child

    yield start
    for child in started:
        child.close(force=True)


def ask(child, text):
    """Type a line, and return what is shown until the next prompt."""
    child.sendline(text)
    child.expect_exact(f"{text}\r\n")
    child.expect_exact("> ")
    return child.before.replace("\r\n", "\n")


def test_a_conversation_in_a_terminal(terminal):
    child = terminal("--max-new-tokens", "8")
    assert ask(child, FRANCE[0]) == "巴黎。\n"
    assert "is empty" in ask(child, "") and "too long" in ask(child, "长" * 99)
    assert "put a space before" in ask(child, "/rest") and ask(child, " /rest").count("\n") == 1
    while "oldest turns are dropped" not in (shown := ask(child, FRANCE[0])):
        assert shown == "巴黎。\n"
    assert shown.count("dropped") == 1 and shown.endswith("\n巴黎。\n")
    assert "started over" in ask(child, "/reset")
    assert ask(child, FRANCE[0]) == "巴黎。\n"  # there is room again
    child.sendeof()
    child.expect_exact("\r\n")
    child.wait()
    assert child.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, folder):
    child = terminal("--max-new-tokens", "1500", "--model", str(folder / "long"))
    child.sendline(ENDLESS[0])
    child.expect_exact("啊啊")  # it writes
    child.sendintr()
    child.expect_exact("\r\n> ")
    assert child.before.count("啊") < 4000  # in 1,500 tokens would be 6,000
    assert ask(child, HELLO[0]) == "你好！\n"
    child.send("half a quest")
    child.expect_exact("half a quest")
    child.sendintr()
    child.expect_exact("\r\n> ")
    assert ask(child, FRANCE[0]) == "巴黎。\n"
    child.sendeof()
    rest = child.read()
    child.wait()
    assert child.exitstatus == 0 and "Traceback" not in rest


# Without a conversation


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "`python -m tinytrain tune --recipe smoke --runs "),
        (["--model", "nowhere"], "no model in nowhere"),
        (["--top-p", "0"], "top_p 0.0 is not between"),
    ],
)
def test_what_cannot_be_talked_to_is_a_line(more, told, runs, capsys):
    assert command.main(["chat", "--recipe", "smoke", *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinytrain: ") and told in line


@pytest.mark.parametrize("call", [["generate", "\udcff"], ["chat", "--system", "\udcff"]])
def test_bytes_that_are_no_utf8_are_a_wrong_call(call, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(call)
    assert "invalid utf8 value" in capsys.readouterr().err


def test_a_tokenizer_without_turns_is_told(folder, tmp_path, runs, capsys):
    Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    plain = Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    plain.add_tokens(AddedToken("<|im_start|>"))
    plain.save_pretrained(tmp_path)
    assert command.main(["chat", "--recipe", "smoke", "--model", str(tmp_path)]) == 1
    assert "the tokenizer has no token <|im_end|>: take" in capsys.readouterr().err


# Tuning


@pytest.fixture
def tuning(monkeypatch, runs):
    """Tuning that takes no time, and keeps what it was called with."""
    groups = "tuned", "reworded", "untaught", "invented", "refused"
    result = {
        "finished": True,
        "chat_before": dict.fromkeys(groups, share(0, 100)),
        "chat_after": {group: share(99 - n, 100) for n, group in enumerate(groups)},
        "bits_before": Interval(3.512, 3.4, 3.6),
        "bits_after": Interval(3.6, 3.5, 3.7),
    }
    calls = []

    def tune_recipe(recipe, base=None, fresh=False):
        calls.append((recipe, base, fresh))
        return result

    monkeypatch.setattr("tinytrain.tuning.tune_recipe", tune_recipe)
    return SimpleNamespace(calls=calls, result=result)


def test_tuning_tells_what_was_right_before_and_after(tuning, folder, capsys):
    call = ["tune", "--recipe", "smoke", "--model", str(folder), "--chats", "mine.jsonl"]
    assert command.main([*call, "--fresh"]) == 0
    recipe = replace(RECIPES["smoke"], chats="mine.jsonl")
    assert tuning.calls == [(recipe, folder, True)]
    _, *lines, last = capsys.readouterr().out.splitlines()
    ends = [re.split(r" {2,}", line)[-2:] for line in lines]
    shares = [[str(share(0, 100)), str(share(99 - n, 100))] for n in range(5)]
    assert ends == [*shares, ["3.51 (3.4 to 3.6)", "3.6 (3.5 to 3.7)"]]
    assert last == f"the model is in {steps.run_folder(recipe) / 'chat' / 'model'}"


def test_a_tuning_that_was_stopped_ends_with_130(tuning, folder, capsys):
    tuning.result["finished"] = False
    assert command.main(["tune", "--recipe", "smoke", "--model", str(folder)]) == 130
    assert capsys.readouterr().out == ""


def test_the_run_s_own_model_is_tuned_with_the_recipe_that_it_has(tuning, monkeypatch):
    """Else another one would be trained in its place."""
    trained = replace(RECIPES["smoke"], learning_rate=0.5)
    monkeypatch.setattr(results, "trained_recipe", lambda recipe, changed: trained)
    assert command.main(["tune", "--recipe", "smoke"]) == 0
    assert tuning.calls == [(trained, None, False)]


def test_without_a_model_one_is_trained_first(tuning, capsys):
    assert command.main(["tune", "--recipe", "smoke"]) == 0
    assert tuning.calls == [(RECIPES["smoke"], None, False)]
