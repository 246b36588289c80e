"""The answers to the exercises: their code runs after the notebook's, and is what was asked for."""

import json
import re
from pathlib import Path

import pytest
import torch

from tinytrain import runs
from tinytrain.modeling import build_model, qwen2_config

ROOT = Path(__file__).parent.parent
PAGES = ("answers.md", "answers.zh-CN.md")


def answers(number, page="answers.md"):
    """Return the blocks of code in the answers to a notebook."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {number} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def cells_of(name):
    """Return the code cells of a notebook by their ids, without the one that installs."""
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}


def test_both_editions_have_the_same_code():
    pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
    numbers = [re.findall(r"^## (\d+) ", page, re.MULTILINE) for page in pages]
    assert numbers[0] == numbers[1] != []
    for number in numbers[0]:
        assert answers(number) == answers(number, "answers.zh-CN.md")


@pytest.fixture
def look_inside(smoke, monkeypatch):
    """The names that notebook 07 defines, on a model with two pairs of keys and values."""
    config = qwen2_config(
        len(smoke.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=smoke.tokenizer.eos_token_id,
    )
    model = build_model(config, seed=1)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    monkeypatch.setattr(runs, "get_trained", lambda recipe: (model.eval(), smoke.tokenizer))
    names = {"recipe": "smoke"}
    yield names
    torch.set_grad_enabled(True)  # which the notebook turns off


def test_the_answers_to_07_make_its_assertions_pass(look_inside, capsys):
    _, *cells = cells_of("07_look_inside").items()
    exercises = {}
    for name, source in cells:
        exec(source, look_inside)
        shown = capsys.readouterr().out
        if "  # exercise" in source:
            assert shown.startswith("not yet: "), name
            _, exercises[name] = source.split("\n\n\n", 1)
    assert len(exercises) == 3
    answered, others = answers("07")[:3], answers("07")[3:]
    for answer, check in zip(answered, exercises.values(), strict=True):
        exec(answer, look_inside)
        exec(check, look_inside)
        assert capsys.readouterr().out.startswith("right")
    logits = look_inside["plain"](look_inside["ids"])
    for answer in others:
        exec(answer, look_inside)
        assert capsys.readouterr().out
    assert torch.equal(look_inside["plain"](look_inside["ids"]), logits)  # all was put back
