import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tinytrain import chat, results, runs, steps, tuning
from tinytrain.checkpoints import last_checkpoint
from tinytrain.conversations import load_conversations
from tinytrain.recipes import RECIPES
from tinytrain.tokenization import load_tokenizer

MASKED = -100


@pytest.fixture
def recipe(trained, tmp_path, monkeypatch):
    """A recipe whose run is a copy of the trained one, with few conversations."""
    copied = tmp_path / "runs"
    shutil.copytree(trained, copied, ignore=shutil.ignore_patterns("*.lock"))
    monkeypatch.setenv("TINYTRAIN_RUNS", str(copied))
    monkeypatch.setattr("tinytrain.tuning._QUESTIONS", 4)
    return replace(RECIPES["smoke"], chats=str(write_chats(tmp_path)), chat_epochs=4.0)


def write_chats(folder, number=24, answer="二"):
    path = folder / "chats.jsonl"
    roles = "user", "assistant"
    said = [zip(roles, (f"{n}？", answer), strict=True) for n in range(number)]
    lines = [{"messages": [{"role": r, "content": c} for r, c in pairs]} for pairs in said]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def weights(recipe):
    return load_file(steps.chat_folder(recipe) / "model" / "model.safetensors")


def test_a_model_is_tuned_measured_and_loaded(recipe, monkeypatch):
    recipe = replace(recipe, chats=None)
    result = tuning.tune_recipe(recipe)
    assert result["finished"]
    groups = {"tuned", "reworded", "untaught", "invented", "refused"}
    assert set(result["chat_before"]) == set(result["chat_after"]) == groups
    assert result["bits_after"].value > 0
    folder = steps.chat_folder(recipe)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["bits_after"] == list(result["bits_after"]) and summary["conversations"] > 1000
    for name in ("loss.png", "history.jsonl", "samples.jsonl"):
        assert (folder / name).is_file()
    assert load_tokenizer(folder / "model").chat_template == chat.CHAT_TEMPLATE
    # The run's own model is another one still, and the tuned one is not tuned again.
    assert results.is_trained(recipe)
    monkeypatch.setattr(tuning, "tune_recipe", lambda recipe: pytest.fail("tuned again"))
    model, tokenizer = tuning.get_tuned(recipe)
    base, _ = results.load_trained(recipe)
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert chat.answer_each(model, tokenizer, ["你好"])


def test_what_is_learned_from_are_answers_and_text(recipe):
    tokenizer = chat.add_chat_template(steps.get_tokenizer(recipe))
    blocks = tuning.chat_blocks(recipe, steps.get_conversations(recipe), tokenizer)
    text = set(map(tuple, steps.get_blocks(recipe)["train"]["input_ids"]))
    rows = list(blocks["train"])
    from_text = [row for row in rows if tuple(row["input_ids"]) in text]
    assert len(from_text) == round(recipe.chat_text * len(rows))
    assert all(row["labels"] == row["input_ids"] for row in from_text)
    answer = tokenizer.encode("二<|im_end|>")
    said = [row for name in ("train", "test") for row in blocks[name] if row not in from_text]
    learned = [label for row in said for label in row["labels"] if label != MASKED]
    assert learned == answer * 24
    # What is held out is not in what is learned from.
    asked = tokenizer.decode(sum(blocks["train"]["input_ids"], []))
    held_out = tokenizer.decode(sum(blocks["test"]["input_ids"], []))
    for number in range(24):
        assert (f"\n{number}？" in asked) != (f"\n{number}？" in held_out)


def test_without_the_mask_questions_are_learned_too(recipe):
    tokenizer = chat.add_chat_template(steps.get_tokenizer(recipe))
    found = steps.get_conversations(recipe)
    blocks = tuning.chat_blocks(replace(recipe, chat_text=0.0), found, tokenizer, mask=False)
    labels = sum(blocks["train"]["labels"], [])
    assert "23？" in tokenizer.decode([label for label in labels if label != MASKED])
    assert tokenizer.pad_token_id not in labels


def test_a_killed_tuning_goes_on_to_the_same_weights(recipe, tmp_path):
    recipe = replace(recipe, save_steps=2, logging_steps=1)
    tuning.tune_recipe(recipe)
    expected = weights(recipe)
    steps.chat_folder(recipe).rename(tmp_path / "expected")
    program = f"from tinytrain import recipes, tuning\ntuning.tune_recipe(recipes.{recipe!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    checkpoints = steps.chat_folder(recipe) / "checkpoints"
    for line in process.stdout:
        if "step 10: " in line:
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and list(checkpoints.glob("checkpoint-*"))
    assert not (steps.chat_folder(recipe) / "model").exists()
    tuning.tune_recipe(recipe)
    log = (steps.chat_folder(recipe) / "training.log").read_text(encoding="utf-8")
    assert "going on from checkpoint-" in log
    found = weights(recipe)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_weights_are_averaged_with_those_before(recipe):
    recipe = replace(recipe, chat_average=0.75)
    tuning.tune_recipe(recipe)
    name, folder = "model.norm.weight", steps.chat_folder(recipe)
    before = load_file(steps.run_folder(recipe) / "model" / "model.safetensors")[name]
    after = load_file(last_checkpoint(folder / "checkpoints") / "model.safetensors")[name]
    assert not torch.equal(before, after)
    torch.testing.assert_close(weights(recipe)[name], 0.25 * before + 0.75 * after)


def other_chats(recipe, patch):
    return replace(recipe, chats=str(write_chats(steps.runs_folder(), answer="三")))


def other_template(recipe, patch):
    patch.setattr(chat, "CHAT_TEMPLATE", chat.CHAT_TEMPLATE + "{# changed #}")
    return recipe


def other_base(recipe, patch):
    file = steps.run_folder(recipe) / "model" / "model.safetensors"
    runs.train_recipe(replace(recipe, seed=1))
    assert file.is_file()
    return replace(recipe, seed=1)


@pytest.mark.parametrize(
    ("change", "name"),
    [(other_chats, "conversations"), (other_template, "template"), (other_base, "base")],
)
def test_a_tuning_of_something_else_is_named_and_moved_aside(recipe, change, name, monkeypatch):
    recipe = replace(recipe, chat_epochs=1.0)
    tuning.tune_recipe(recipe)
    earlier = weights(recipe)
    recipe = change(recipe, monkeypatch)
    tuning.get_tuned(recipe)
    log = (steps.chat_folder(recipe) / "training.log").read_text(encoding="utf-8")
    [line] = [line for line in log.splitlines() if "is kept as" in line]
    assert name in line
    kept = list(steps.chat_folder(recipe).rglob("model.safetensors"))
    assert any(
        torch.equal(load_file(file)["model.norm.weight"], earlier["model.norm.weight"])
        for file in kept
        if file.parent.parent != steps.chat_folder(recipe)
    )


def test_a_model_from_elsewhere_is_tuned_without_text(recipe, tmp_path):
    base = tmp_path / "base"
    model, tokenizer = results.load_trained(recipe)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (steps.run_folder(recipe) / "model" / "inputs.json").unlink()  # so that nothing else is used
    assert tuning.tune_recipe(recipe, base=base)["finished"]
    model, tokenizer = results.load_tuned(recipe)
    assert chat.answer_each(model, tokenizer, ["0？"])
    made = steps.read_inputs(steps.chat_folder(recipe) / "model")
    assert made["inputs"]["chat_text"] == 0


def test_what_is_missing_is_said(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m tinytrain tune --recipe smoke"):
        results.load_tuned(recipe)
    with pytest.raises(FileNotFoundError, match="no file of conversations"):
        steps.get_conversations(replace(recipe, chats="nowhere.jsonl"))
    tokenizer = chat.add_chat_template(steps.get_tokenizer(recipe))
    one = load_conversations(write_chats(tmp_path, number=1))
    with pytest.raises(ValueError, match="two are needed"):
        tuning.chat_blocks(recipe, one, tokenizer)
    long = load_conversations(write_chats(tmp_path, answer="一" * 200))
    with pytest.raises(ValueError, match="none of .* fits into 64 tokens"):
        tuning.chat_blocks(recipe, long, tokenizer)
