"""A training put together: what a run leaves, what it goes by, what is measured."""

import json
from dataclasses import replace

import pytest
import torch

from tinytrain import hardware, results, runs, steps
from tinytrain.callbacks import read_history
from tinytrain.checkpoints import train
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
    same = results.run_inputs(replace(recipe, logging_steps=3, save_steps=7), "float32")
    assert same == results.run_inputs(recipe, "float32")
    assert same != results.run_inputs(replace(recipe, seed=1), "float32")
    assert same != results.run_inputs(recipe, "bf16")


def test_one_gpu_gets_the_batches_that_its_free_memory_holds(monkeypatch):
    wiki = RECIPES["wiki"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15_000_000_000, 16_000_000_000))
    larger = runs.fit_batches(wiki, "fp16")
    assert larger.batch_size > wiki.batch_size and larger.tokens_per_step == wiki.tokens_per_step
    monkeypatch.setenv("WORLD_SIZE", "2")  # the processes might see different free memory
    assert runs.fit_batches(wiki, "fp16") == wiki
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE")
    assert runs.fit_batches(wiki, "float32") == wiki


def test_a_run_keeps_the_precision_that_it_was_begun_in(small_trainer, monkeypatch):
    """Where the machine has it: what was measured there may come out otherwise the next time."""
    recipe = replace(RECIPES["smoke"], precision=None)
    best = hardware.choose_precision()
    assert runs.choose_precision(recipe) == best
    other = "float32" if best.name == "bf16" else "bf16"
    train(small_trainer(steps.run_folder(recipe) / "checkpoints", precision=other, max_steps=1))
    for has_it in (True, False):
        monkeypatch.setattr(hardware, "computes", lambda name, has_it=has_it: has_it)
        name, reason = runs.choose_precision(recipe)
        assert name == (other if has_it else best.name)
        assert ("checkpoint-1 was computed in it" in reason) == has_it
    assert runs.choose_precision(RECIPES["smoke"]).name == "float32"  # the recipe asks for it


def test_the_summary_is_written_beside_the_run(built_in):
    results.save_summary(built_in, held_out_loss=1.5)
    path = steps.run_folder(built_in) / "summary.json"
    assert json.loads(path.read_text(encoding="utf-8"))["held_out_loss"] == 1.5
    path.unlink()


def test_a_probe_measures_and_leaves_nothing(built_in):
    folder = steps.run_folder(built_in)
    before = sorted(folder.rglob("*"))
    seconds, peak = runs.probe(built_in, "float32", number=4)
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
    # It does not depend on its checkpoints, and damaged it is made again from them.
    weights = other.get_input_embeddings().weight
    recipe = replace(recipe, learning_rate=1e-4)
    checkpoints = tmp_path / "smoke" / "checkpoints"
    checkpoints.rename(tmp_path / "elsewhere")
    assert torch.equal(runs.get_trained(recipe)[0].get_input_embeddings().weight, weights)
    (tmp_path / "elsewhere").rename(checkpoints)
    damaged = bytearray(saved.read_bytes())
    damaged[-1000] ^= 1
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match="model.safetensors is missing or damaged"):
        results.load_trained(recipe)
    assert torch.equal(runs.get_trained(recipe)[0].get_input_embeddings().weight, weights)


def test_a_model_is_not_used_for_what_it_was_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    recipe = replace(RECIPES["smoke"], max_steps=2, eval_steps=2, save_steps=2, sample_steps=2)
    recipe = replace(recipe, max_documents=100)
    with pytest.raises(FileNotFoundError, match="smoke/model: .*--set max_documents=100 max_steps"):
        results.load_trained(recipe)
    runs.train_recipe(recipe)
    for change in ({"test_size": 0.5}, {"hidden_size": 128}, {"max_documents": None}, {"seed": 1}):
        other = replace(recipe, **change)
        name, value = next(iter(change.items()))
        kept = f"trained with {name}={getattr(recipe, name)}, and"
        for use in (results.load_trained, results.export_run, results.trained_recipe):
            with pytest.raises(ValueError, match=kept):
                use(other)
        # What was not asked for is taken from the model.
        assert results.trained_recipe(other, asked=()) == recipe
        with pytest.raises(ValueError, match=kept):
            results.trained_recipe(other, asked={name})
    assert "max_documents" in results.export_run(recipe).joinpath("README.md").read_text("utf-8")

    # What a run is started over with has no results of the earlier one.
    runs.train_recipe(replace(recipe, seed=1))
    earlier = {path.name for path in (tmp_path / "smoke" / "checkpoints-1").iterdir()}
    assert {"model", "summary.json", "history.jsonl", "checkpoint-2"} <= earlier


def test_texts_of_the_same_name_have_runs_of_their_own(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"第{n}篇，编号{n * 7}。" * 9}) + "\n" for n in range(60)]
    texts = tmp_path / "A" / "train.jsonl", tmp_path / "B" / "train.jsonl"
    for path, some in zip(texts, (lines[:40], lines[20:]), strict=True):
        path.parent.mkdir()
        path.write_text("".join(some), encoding="utf-8")
    recipe = replace(RECIPES["smoke"], vocab_size=300, context_length=16, max_steps=2)
    first, second = (replace(recipe, corpus=str(path)) for path in texts)
    assert steps.run_folder(first) != steps.run_folder(second)
    runs.train_recipe(first)
    with pytest.raises(FileNotFoundError, match=f"no trained model.*--corpus {texts[1]}"):
        results.load_trained(second)
    # The same text under another path, relative or moved, is the same run.
    folder = steps.run_folder(first)
    monkeypatch.chdir(tmp_path)
    moved = texts[0].rename(tmp_path / "moved.jsonl")
    for path in ("moved.jsonl", "./moved.jsonl", str(moved)):
        again = replace(recipe, corpus=path)
        assert runs.train_recipe(again)["finished"] and steps.run_folder(again) == folder
    assert not (folder / "checkpoints-1").exists()  # not started over
    # Read as lines of plain text it is another one.
    plain = moved.rename(tmp_path / "moved.txt")
    assert not (steps.run_folder(replace(recipe, corpus=str(plain))) / "split").exists()


def test_what_the_trainer_was_given_in_place_of_the_recipe_is_kept(built_in):
    from tinytrain.training import training_arguments

    inputs = results.run_inputs(built_in, "float32")

    def overrides(**given):
        arguments = training_arguments(built_in, "somewhere", "float32", use_cpu=True, **given)
        return results._overrides(inputs, arguments)

    assert overrides() == {}
    assert overrides(learning_rate=1e-4, seed=7) == {"learning_rate": 1e-4, "seed": 7}
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert overrides(**halved) == {}
    assert overrides(per_device_train_batch_size=2) == {"batch_size": 2}
