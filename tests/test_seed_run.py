"""The guide's real model with the real tokenizer, on the path that the pocket recipe takes."""

import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinytrain import steps
from tinytrain.encyclopedia import build_encyclopedia
from tinytrain.generation import complete
from tinytrain.modeling import build_model, initial_loss
from tinytrain.recipes import RECIPES
from tinytrain.training import build_trainer, training_arguments


@pytest.mark.timeout(900)
def test_two_steps_of_recipe_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    # The guide keeps full chunks only, so the text needs articles longer than 512 tokens.
    articles = build_encyclopedia()[:600]
    text = "\n\n".join(
        " ".join(article["completion"].replace("\n", " ") for article in articles[i : i + 20])
        for i in range(0, 600, 20)
    )
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    recipe = replace(RECIPES["seed"], corpus=str(tmp_path / "long.txt"))

    blocks = steps.get_blocks(recipe)
    tokenizer = steps.get_tokenizer(recipe)
    assert len(tokenizer) == 151_665
    assert len(blocks["train"][0]["input_ids"]) == 512
    model = build_model(steps.get_config(recipe), seed=recipe.seed)
    assert model.num_parameters() == 123_287_552
    measured = initial_loss(model, blocks["test"][:1]["input_ids"])
    assert measured == pytest.approx(math.log(151_665), abs=0.3)

    # A batch of one instead of sixteen: the same path in the memory of a small machine.
    arguments = training_arguments(
        recipe,
        tmp_path / "checkpoints",
        use_cpu=True,
        max_steps=2,
        warmup_steps=0,
        save_steps=2,
        save_only_model=True,  # a third of what a checkpoint takes
        eval_strategy="no",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    trainer = build_trainer(model, arguments, blocks["train"], blocks["test"])
    trainer.train()
    assert trainer.state.global_step == 2

    saved = tmp_path / "checkpoints" / "checkpoint-2"
    tokenizer.save_pretrained(saved)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    again = AutoTokenizer.from_pretrained(saved)
    prompts = ["法国的首都是"]
    assert complete(loaded, again, prompts, 5) == complete(trainer.model, tokenizer, prompts, 5)
