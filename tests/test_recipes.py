import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tinytrain import recipes
from tinytrain.modeling import recipe_config
from tinytrain.recipes import RECIPES, Recipe, get_recipe, with_width


def test_seed_is_the_guide_number_for_number():
    seed = RECIPES["seed"]
    guide = {
        "test_size": 0.1,
        "split_seed": 2222,
        "tokenizer": "qwen2.5",
        "vocab_size": None,
        "context_length": 512,
        "packing": False,
        "drop_duplicates": False,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "learning_rate": 2e-5,
        "lr_scheduler": "cosine",
        "warmup_steps": 200,
        "weight_decay": 0.1,
        "batch_size": 16,
        "gradient_accumulation": 8,
        "logging_steps": 50,
        "eval_steps": 500,
        "save_steps": 500,
    }
    assert {name: getattr(seed, name) for name in guide} == guide
    assert seed.tokens_per_step == 16 * 8 * 512


def test_the_environment_selects_recipe_text_and_length(monkeypatch):
    assert get_recipe().name == "pocket"
    assert get_recipe(has_gpu=True).name == "wiki"
    monkeypatch.setenv("TINYTRAIN_RECIPE", "smoke")
    assert get_recipe(has_gpu=True).name == "smoke"
    assert get_recipe("seed").name == "seed"  # a name in the notebook wins
    assert get_recipe(RECIPES["wiki"]) is RECIPES["wiki"]
    monkeypatch.setenv("TINYTRAIN_CORPUS", "my/text.jsonl")
    assert get_recipe("seed").corpus == "my/text.jsonl"
    monkeypatch.setenv("TINYTRAIN_MAX_STEPS", "60")
    assert get_recipe("seed").max_steps == 60
    monkeypatch.setenv("TINYTRAIN_MAX_STEPS", "0")
    with pytest.raises(ValueError, match="TINYTRAIN_MAX_STEPS is '0'"):
        get_recipe("seed")


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match="'pocked'.*smoke, pocket, seed, wiki, qwen-0.5b"):
        get_recipe("pocked")


IMPOSSIBLE = {
    "corpus": [""],
    "max_documents": [0, -3],
    "test_size": [0, 1, 2, -0.1, float("nan")],
    "split_seed": [-1, 10**19, 1.5],
    "drop_duplicates": ["yes", None],
    "tokenizer": ["qwen", None],
    "vocab_size": [0, "many"],
    "context_length": [1, 0, None, True],
    "hidden_size": [0, 100, 4],  # no multiple of twice the heads; heads of one value
    "num_attention_heads": [0, 3],
    "num_key_value_heads": [0, 3, 8],
    "optimizer": ["sgd"],
    "learning_rate": [0, -1e-3, float("inf"), float("nan"), "high"],
    "lr_scheduler": ["up"],
    "warmup_steps": [-1, 0.1],
    "weight_decay": [-0.1, float("inf")],
    "adam_beta2": [1, -0.1],
    "batch_size": [0, 2.5],
    "epochs": [0, -1, float("inf")],
    "max_steps": [0, -2],
    "seed": [-1, 10**19],
    "precision": ["fp32", "float16"],
    "loss_rows": [0, -3],
    "attention": ["fast"],
    "sample_steps": [0],
    "eval_blocks": [0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values]
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=r"^\w+ is .+; it must (be|divide) \w+") as error:
        replace(RECIPES["pocket"], **{name: value})
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_path_may_be_a_path_and_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    recipe = replace(RECIPES["smoke"], corpus=Path("~") / "texts.jsonl")
    assert recipe.corpus == str(tmp_path / "texts.jsonl")
    monkeypatch.setenv("TINYTRAIN_CORPUS", "~/texts.jsonl")
    assert get_recipe("smoke") == recipe


def test_every_schedule_is_one_of_the_trainers():
    from transformers.trainer_utils import SchedulerType

    assert set(recipes._CHOICES["lr_scheduler"]) <= {kind.value for kind in SchedulerType}


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["pocket"].learning_rate = 1.0


def test_a_wider_recipe_keeps_the_size_of_its_heads():
    wide = with_width(RECIPES["qwen-0.5b"], 960)
    assert (wide.num_attention_heads, wide.num_key_value_heads) == (15, 1)
    assert wide.intermediate_size == pytest.approx(960 * 4864 / 896, abs=1)
    for recipe in RECIPES.values():
        assert with_width(recipe, recipe.hidden_size) == recipe
        head = recipe.hidden_size // recipe.num_attention_heads
        for heads in range(1, 33):
            assert recipe_config(with_width(recipe, heads * head)).hidden_size == heads * head
    with pytest.raises(ValueError, match="no multiple of 64"):
        with_width(RECIPES["pocket"], 100)


def test_every_number_has_a_comment_that_says_why():
    source = Path(recipes.__file__).read_text(encoding="utf-8")
    body = source[source.index("class Recipe") : source.index("@property")]
    commented = set(re.findall(r"^    (\w+): [^#\n]+  # .{10,}$", body, re.M))
    # The widths of the model are explained together, at the last of each group.
    together = {"name", "hidden_size", "num_hidden_layers", "weight_decay", "epochs"}
    together |= {"logging_steps", "eval_steps", "save_steps", "lr_scheduler"}
    assert {field.name for field in dataclasses.fields(Recipe)} - commented <= together
