"""The answers to the exercises: their code runs after the notebook's, and shows what they say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tinytrain import runs
from tinytrain.modeling import build_model, qwen2_config
from tinytrain.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = ("answers.md", "answers.zh-CN.md")
NOTEBOOKS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}

# Cells that take long, or start processes, and from which no answer needs anything.
LEFT_OUT = {
    "04": ["task-costs-code", "task-explore-code", "task-probe-code"],
    "06": ["0a2b0972", "743a1efb"],
    "09": ["0c1dbdf0", "4112850f", "a3fb3079", "86011f67", "8d2d23cd", "b090f6b8", "23e194a5"]
    + ["d5545650"],
    "10": ["ask-10", "ask-12", "ask-14", "ask-15", "ask-17", "ask-19", "ask-24", "ask-26"],
}

# What the code of an answer prints, and both pages tell.
NUMBERS = {
    "01.1": ["59,904", "60,000"],
    "01.2": ["256"],
    "04.1": ["0.611", "0.7"],
    "04.3": ["3.03", "3.61"],
}

# What else an answer says, as it is printed; what depends on a full training is left out.
CLAIMS = {
    "01.4": r"T4 +25\.9 GB +no .*\n.*\n.*\nA100-40G +25\.9 GB +yes +1[0-9] min",
    "02.3": r"^(8|9)\d%$",
    "02.4": r"broken\.json",
    "03.1": r"\('🐼', \d+\)(, \('<0x[^']+', \d+\)){2}(, \('[149]', \d+\)){4}\]",
    "03.3": r"qwen: 7 of 151,665.*\nown: \d{3} of",
    "03.4": r"^0 of 1,\d{3}$",
    "06.3": r"^\d\d% of the loss in a tenth of the tokens$",
    "09.4": r"^320 million .* [0-4]\.\d passes\n100,000 .* 4\.0 passes$",
}


def answers(number, page="answers.md"):
    """Return the code of the answers to a notebook, by their numbers."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^### ({number}\.\d+) .*?\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    code = {name: re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S) for name, part in found}
    return {name: "\n\n".join(blocks) for name, blocks in code.items() if blocks}


def cells_of(number):
    """Return the code cells of a notebook by their ids, without the one that installs."""
    cells = json.loads(NOTEBOOKS[number].read_text(encoding="utf-8"))["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    _, *others = code.items()
    return {name: source.replace("%matplotlib inline\n", "") for name, source in others}


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_each_exercise_has_an_answer_with_the_same_code_in_both_editions(number):
    cells = json.loads(NOTEBOOKS[number].read_text(encoding="utf-8"))["cells"]
    exercises = "".join(cells[-1]["source"]).split("## Try it")[1]
    asked = {f"{number}.{n}" for n in re.findall(r"^(\d+)\. ", exercises, re.MULTILINE)}
    headings = []
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        headings.append(re.findall(rf"^### ({number}\.\d+) ", text, re.MULTILINE))
        assert answers(number) == answers(number, page)
    assert asked <= set(headings[0]) and headings[0] == headings[1]


@pytest.fixture(scope="module")
def folder(smoke, tmp_path_factory):
    """A folder of runs, in which the first notebook that needs a trained model leaves it."""
    folder = tmp_path_factory.mktemp("answers") / "elsewhere"  # as exercise 09.1 calls it
    return shutil.copytree(smoke.runs, folder, ignore=shutil.ignore_patterns("*.lock"))


@pytest.fixture
def names(folder, monkeypatch):
    """What a notebook has in its namespace when its second cell begins."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(folder))
    monkeypatch.delenv("TINYTRAIN_COMPARE", raising=False)
    monkeypatch.chdir(folder.parent)
    yield {"recipe": "smoke", "display": print}
    torch.set_grad_enabled(True)  # which notebook 07 turns off


@pytest.mark.parametrize("number", [number for number in NOTEBOOKS if number != "07"])
def test_the_answers_run_and_show_what_they_say(number, names, capsys):
    cells = cells_of(number)
    for name in LEFT_OUT.get(number, ()):
        del cells[name]
    if number == "09":  # whose answer looks at a run
        runs.get_trained(RECIPES["smoke"])
    for source in cells.values():
        exec(re.sub(r"^STEPS = .*", "STEPS = 2", source, flags=re.MULTILINE), names)
    pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
    capsys.readouterr()
    for name, source in answers(number).items():
        exec(source, names)
        shown = capsys.readouterr().out
        assert re.search(CLAIMS.get(name, ""), shown, re.MULTILINE), (name, shown)
        for value in NUMBERS.get(name, ()):
            assert re.search(rf"(?<![\d.,]){value}(?!\d)", shown), (name, value, shown)
            for page in pages:
                section = page.split(f"### {name} ")[1].split("\n##")[0]
                prose = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
                assert re.search(rf"(?<![\d.,]){value}(?!\d)", prose), (name, value)


@pytest.fixture
def look_inside(names, smoke, monkeypatch):
    """The names of notebook 07, for a model with two pairs of keys and values."""
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
    monkeypatch.setattr(runs, "get_trained", lambda recipe: (model.eval(), smoke.tokenizer))
    return names


def test_the_answers_to_07_make_its_assertions_pass(look_inside, capsys):
    exercises = {}
    for name, source in cells_of("07").items():
        exec(source, look_inside)
        shown = capsys.readouterr().out
        if "  # exercise" in source:
            assert shown.startswith("not yet: "), name
            _, exercises[name] = source.split("\n\n\n", 1)
    assert len(exercises) == 3
    found = list(answers("07").values())
    for answer, check in zip(found[:3], exercises.values(), strict=True):
        exec(answer, look_inside)
        exec(check, look_inside)
        assert capsys.readouterr().out.startswith("right")
    logits = look_inside["plain"](look_inside["ids"])
    for answer in found[3:]:
        exec(answer, look_inside)
        assert capsys.readouterr().out
    assert torch.equal(look_inside["plain"](look_inside["ids"]), logits)  # all was put back
