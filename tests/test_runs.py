"""A training put together: what a run leaves, what it goes by, what is measured."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tinytrain import runs, steps
from tinytrain.callbacks import read_history
from tinytrain.recipes import RECIPES


@pytest.fixture(autouse=True)
def own_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def built_in(smoke, monkeypatch):
    """Recipe ``smoke`` in the folder where its text is built already."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    return smoke.recipe


def test_what_you_watch_does_not_make_another_run(built_in):
    recipe = built_in
    same = runs.run_inputs(replace(recipe, logging_steps=3, save_steps=7), "float32")
    assert same == runs.run_inputs(recipe, "float32")
    assert same != runs.run_inputs(replace(recipe, seed=1), "float32")
    assert same != runs.run_inputs(recipe, "bf16")


def test_the_summary_is_written_beside_the_run(built_in):
    runs.save_summary(built_in, held_out_loss=1.5)
    path = steps.run_folder(built_in) / "summary.json"
    assert json.loads(path.read_text(encoding="utf-8"))["held_out_loss"] == 1.5
    path.unlink()


def test_a_probe_measures_and_leaves_nothing(built_in):
    folder = steps.run_folder(built_in)
    before = sorted(folder.rglob("*"))
    seconds, peak = runs.probe(built_in, "float32", steps=4)
    assert 0.001 < seconds < 60
    assert 100_000_000 < peak < 100_000_000_000
    assert sorted(folder.rglob("*")) == before


def test_training_for_some_seconds_plans_its_schedule_for_them(built_in, tmp_path):
    short, longer = (runs.train_for(built_in, seconds, tmp_path / "run") for seconds in (0.01, 5))
    assert short.state.global_step == 2 < longer.state.global_step
    assert longer.evaluate()["eval_loss"] < short.evaluate()["eval_loss"]
    # The rate has fallen to nearly nothing at the end.
    lines = read_history(tmp_path / "run")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[-1] < 0.1 * max(rates)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["history.jsonl"]


def test_a_run_shorter_than_its_logging_and_its_warm_up_is_measured_and_remarked_on(
    tmp_path, capsys
):
    path = tmp_path / "ten.txt"
    texts = [f"第{n}天，我走了{n * 3}公里，看见一条河和一座小城。" * 9 for n in range(10)]
    path.write_text("\n\n".join(texts), encoding="utf-8")
    recipe = replace(RECIPES["smoke"], corpus=str(path), max_steps=2, logging_steps=50)
    result = runs.train_recipe(replace(recipe, warmup_steps=200, sample_steps=2))
    assert result["finished"] and 3 < result["train_loss"] < 7
    assert "the learning rate rises for 200 steps and the run has 2" in capsys.readouterr().out


def test_a_trained_model_is_trained_once_and_only_from_the_same_inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    recipe = replace(RECIPES["smoke"], max_steps=2, eval_steps=2, save_steps=2, sample_steps=2)
    model, tokenizer = runs.get_trained(recipe)
    saved = tmp_path / "smoke" / "model" / "model.safetensors"
    made = saved.stat().st_mtime_ns
    again, _ = runs.get_trained(recipe)
    assert saved.stat().st_mtime_ns == made
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert len(tokenizer) == model.config.vocab_size

    other, _ = runs.get_trained(replace(recipe, learning_rate=1e-4))
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    # Without its checkpoints a model is what there is.
    shutil.rmtree(tmp_path / "smoke" / "checkpoints")
    kept, _ = runs.get_trained(recipe)
    assert torch.equal(kept.get_input_embeddings().weight, other.get_input_embeddings().weight)
