import importlib
import json
import linecache
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinytrain import results, steps
from tinytrain.recipes import RECIPES


@pytest.fixture(autouse=True)
def own_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Recipe ``smoke`` on a text of the reader's own."""
    path = tmp_path / "我的.jsonl"
    towns = ["北京", "上海", "天津", "重庆", "广州", "深圳", "成都", "杭州"]
    texts = [f"第{n}篇：{towns[n % 8]}是中国的一座城市，编号{n * 7}。" * 3 for n in range(80)]
    lines = [json.dumps({"content": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return replace(RECIPES["smoke"], corpus=str(path), vocab_size=400, context_length=32)


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_any_step_builds_what_it_lacks(mine):
    blocks = steps.get_blocks(mine)
    assert len(blocks["train"]) > len(blocks["test"]) > 0
    assert {len(row) for row in blocks["train"]["input_ids"]} == {32}
    assert re.fullmatch(r"smoke-我的-[0-9a-f]{8}", steps.run_folder(mine).name)
    config = steps.get_config(mine)
    assert config.vocab_size == len(steps.get_tokenizer(mine))
    assert config.max_position_embeddings >= 32


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {}, "blank lines between its parts"),
        (3, {}, r"training set, 2 document\(s\) with \d+ tokens, fills no block of 32"),
        (10, {}, "held-out set, 1 document.*fills no block of 32: take more text, or a"),
        (30, {"packing": False}, "tokens at most .packing=false takes each.*fills no block of 32"),
    ],
)
def test_a_text_too_short_is_told_before_anything_empty_is_kept(
    mine, tmp_path, number, change, message
):
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(f"第{n}天有{n % 3}只鸟。" for n in range(number)), encoding="utf-8")
    recipe = replace(mine, corpus=str(path), **change)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            steps.get_blocks(recipe)
    assert not (steps.run_folder(recipe) / "blocks").exists()
    if number == 10:  # the advice works
        fits = int(re.search(r"context_length of (\d+)", str(error.value))[1])
        assert len(steps.get_blocks(replace(recipe, context_length=fits))["test"]) == 1


def test_a_second_call_uses_what_is_there(mine):
    steps.get_blocks(mine)
    before = modified(steps.run_folder(mine))
    steps.get_blocks(mine)
    assert modified(steps.run_folder(mine)) == before


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({"split_seed": 1}, {"split", "tokenizer", "blocks"}),
        ({"vocab_size": 300}, {"tokenizer", "blocks"}),
        ({"context_length": 16}, {"blocks"}),
        ({"packing": False}, {"blocks"}),
        ({"max_characters": 1000}, {"split", "tokenizer", "blocks"}),
        ({"learning_rate": 1.0}, set()),
    ],
)
def test_only_what_a_change_concerns_is_rebuilt(mine, change, rebuilt):
    steps.get_blocks(mine)
    folder = steps.run_folder(mine)
    before = {part: modified(folder / part) for part in ("split", "tokenizer", "blocks")}
    steps.get_blocks(replace(mine, **change))
    assert {part for part in before if modified(folder / part) != before[part]} == rebuilt


def test_a_changed_text_is_never_served_from_the_old_blocks(mine):
    steps.get_blocks(mine)
    path = Path(mine.corpus)
    path.write_text(path.read_text(encoding="utf-8").replace("北京", "南京"), encoding="utf-8")
    tokenizer = steps.get_tokenizer(mine)
    text = tokenizer.decode(
        [i for row in steps.get_blocks(mine)["train"]["input_ids"] for i in row]
    )
    assert "南京" in text and "北京" not in text


def test_what_breaks_off_leaves_nothing_half_built(mine, monkeypatch):
    steps.get_blocks(mine)
    before = modified(steps.run_folder(mine))

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(steps.tokenization, "pack_documents", fails)
    with pytest.raises(OSError, match="no space"):
        steps.get_blocks(replace(mine, context_length=16))
    assert modified(steps.run_folder(mine)) == before


def test_blocks_that_edited_code_makes_differ_for_a_run_as_well(mine, monkeypatch):
    before, pack = results.run_inputs(mine, "float32"), steps.tokenization.pack_documents

    def pack_fewer(documents, *arguments, **options):
        return pack(documents.select(range(len(documents) // 2)), *arguments, **options)

    monkeypatch.setattr(steps.tokenization, "pack_documents", pack_fewer)
    after = results.run_inputs(mine, "float32")
    assert [name for name in after if after[name] != before[name]] == ["blocks"]


def test_duplicates_are_dropped_or_only_counted(mine):
    path = Path(mine.corpus)
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n" + text, encoding="utf-8")  # each document twice
    kept = steps.get_split(replace(mine, drop_duplicates=False))
    found = steps.get_duplicates(replace(mine, drop_duplicates=False))
    assert len(kept["train"]) + len(kept["test"]) == 160
    assert found and found[0]["held_out"] == found[0]["train"]
    dropped = steps.get_split(mine)
    assert len(dropped["test"]) == len(kept["test"]) - len(found)
    assert len(dropped["train"]) == len(kept["train"])


def test_of_a_long_text_a_random_part_is_taken(mine):
    whole, part = (steps.get_split(replace(mine, max_characters=some)) for some in (None, 500))
    texts = whole["train"]["text"][: len(part["train"])]
    assert part["train"]["text"][:] == texts
    assert 0 <= sum(map(len, texts)) - 500 < len(texts[-1])
    assert part["test"]["text"][:] == whole["test"]["text"][:]
    assert texts != sorted(texts, key=lambda text: int(text[1 : text.index("篇")]))


def test_a_folder_of_shards_is_a_text_too(mine, tmp_path):
    lines = Path(mine.corpus).read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path / "texts.d"
    folder.mkdir()
    for number in range(4):
        part = "".join(lines[number * 20 : number * 20 + 20])
        (folder / f"part-{number}.jsonl").write_text(part, encoding="utf-8")
    whole = steps.get_split(mine)
    shards = replace(mine, corpus=f"{folder}{os.sep}")
    pattern = replace(mine, corpus=str(folder / "part-?.jsonl"))
    for recipe in (shards, pattern):
        assert steps.run_folder(recipe).name.startswith("smoke-texts-")
        split = steps.get_split(recipe)
        assert split["train"]["text"][:] == whole["train"]["text"][:]
    before = modified(steps.run_folder(shards) / "split")
    steps.get_split(shards)
    assert modified(steps.run_folder(shards) / "split") == before
    (folder / "part-2.jsonl").unlink()
    assert sum(map(len, steps.get_split(shards).values())) == 60


def test_what_is_only_needed_meanwhile_does_not_stay(mine):
    steps.get_blocks(mine)
    kept = {path.name for path in steps.run_folder(mine).rglob("*") if path.is_dir()}
    assert kept == {"split", "tokenizer", "blocks", "train", "test"}


def test_a_missing_text_is_said_with_its_name(mine):
    with pytest.raises(FileNotFoundError, match="nowhere.json.*TINYTRAIN_CORPUS"):
        steps.get_split(replace(mine, corpus="nowhere.json"))


def test_a_relative_path_is_found_from_the_notebooks_folder(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in ("tinytrain", "notebooks", "texts"):
        (project / name).mkdir(parents=True)
    (project / "texts" / "a.txt").write_text("一\n", encoding="utf-8")
    monkeypatch.chdir(project / "notebooks")
    recipe = replace(RECIPES["smoke"], corpus="texts/a.txt")
    assert steps.get_text(recipe) == project / "texts" / "a.txt"
    monkeypatch.delenv("TINYTRAIN_RUNS")
    assert steps.runs_folder() == project / "runs"


@pytest.mark.skipif(sys.platform == "win32", reason="there the first call would raise")
@pytest.mark.parametrize("long_paths", [0, 1])
def test_on_windows_a_folder_with_too_long_a_name_is_told_at_once(mine, monkeypatch, long_paths):
    """This is no Windows: what it says of itself is faked, so only our answer is tested."""
    system = SimpleNamespace(RtlAreLongPathsEnabled=lambda: long_paths)
    monkeypatch.setattr("ctypes.WinDLL", lambda name: system, raising=False)
    monkeypatch.setenv("TINYTRAIN_RUNS", os.environ["TINYTRAIN_RUNS"] + "/" + "long" * 45)
    folder = steps.run_folder(mine)
    monkeypatch.setattr(steps.sys, "platform", "win32")
    if long_paths:
        assert steps.run_folder(mine) == folder
    else:
        with pytest.raises(OSError, match=r"too long for Windows.*TINYTRAIN_RUNS.*LongPaths"):
            steps.run_folder(mine)
    monkeypatch.setenv("TINYTRAIN_RUNS", os.path.dirname(os.environ["TINYTRAIN_RUNS"]))
    assert steps.run_folder(mine).is_dir()


def test_the_guides_hyperparameters_reach_the_model():
    config = steps.get_config(RECIPES["seed"])
    from tinytrain.costs import count_parameters, estimate
    from tinytrain.hardware import KNOWN_GPUS

    assert count_parameters(config)["total"] == 123_287_552
    # Recipe "wiki" has the same layers, and fewer rows.
    wiki = estimate(RECIPES["wiki"], KNOWN_GPUS[0]).parameters["total"]
    assert wiki + (151_665 - 32_768) * 512 == 123_287_552
    assert count_parameters(steps.get_config(RECIPES["qwen-0.5b"]))["total"] == 494_032_768


def test_prompts_and_questions_fit_the_text(mine):
    assert steps.get_questions(mine) == []
    held_out = steps.get_split(mine)["test"]["text"]
    assert [p for p in steps.get_prompts(mine) if not any(t.startswith(p) for t in held_out)] == []
    assert len(steps.get_questions(RECIPES["pocket"])) >= 200
    assert len(steps.get_prompts(RECIPES["pocket"])) == 5


@pytest.fixture
def built_in(smoke, monkeypatch):
    """Recipe ``smoke`` in the folder where its text is built already."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    return smoke.recipe


def test_the_model_of_a_recipe_saves_what_the_recipe_says(built_in):
    plain = steps.get_model(replace(built_in, loss_rows=None))
    saving = steps.get_model(replace(built_in, loss_rows=16))
    ids = torch.arange(40)[None]
    assert plain(input_ids=ids, labels=ids).logits is not None
    assert saving(input_ids=ids, labels=ids).logits is None
    assert torch.equal(plain(ids).logits, saving(ids).logits)
    products = steps.get_model(replace(built_in, attention="eager"))
    chosen = [model.config._attn_implementation for model in (plain, products)]
    assert chosen == ["sdpa", "eager"]


@pytest.mark.parametrize(("rows", "graphs"), [(None, 1), (16, 2)])
def test_a_recipe_that_compiles_does_so_with_layers_and_loss(built_in, rows, graphs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = steps.get_model(replace(built_in, loss_rows=rows, compile=True))
    ids = torch.arange(33)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_qwens_tokens_can_be_reduced_by_the_recipe(mine):
    recipe = replace(mine, tokenizer="qwen2.5", vocab_size=600)
    tokenizer = steps.get_tokenizer(recipe)
    assert len(tokenizer) <= 600 and steps.get_config(recipe).vocab_size == len(tokenizer)
    assert len(steps.get_tokenizer(replace(recipe, vocab_size=None))) == 151_665
    padded = replace(recipe, vocab_size=151_936)
    assert steps.get_config(padded).vocab_size == 151_936


def test_a_killed_build_is_cleared_away(mine):
    folder = steps.run_folder(mine)
    for run in range(2):  # before a build, and beside a result
        leftover = folder / f"blocks.0123abc{run}.building"
        (leftover / "parts").mkdir(parents=True)
        steps.get_blocks(mine)
        assert not list(folder.glob("*.building"))


def test_a_damaged_result_is_built_again(mine, caplog):
    caplog.set_level("INFO")
    steps.get_blocks(mine)
    folder = steps.run_folder(mine)
    before = {path: path.read_bytes() for path in modified(folder)}
    parts = ("split", "tokenizer", "blocks")
    for number, (path, content) in enumerate(sorted(before.items())):
        if path.suffix == ".lock":
            continue
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        damage = (flipped, content[: len(content) // 2], None)[number % 3]
        path.unlink() if damage is None else path.write_bytes(damage)
        caplog.clear()
        steps.get_blocks(mine)
        steps.get_split(mine)
        part = path.relative_to(folder).parts[0]
        assert re.search(f"{part} (is|was) .* is rebuilt", caplog.text) and part in parts
        if path.suffix == ".arrow":
            assert path.read_bytes() == content


def test_a_result_is_loaded_before_another_process_may_replace_it(tmp_path):
    def build(folder, inputs):
        (folder / "number").write_text(str(inputs["number"]))

    def load(folder):
        return (folder / "number").read_text()

    def load_slowly(folder):
        other.start()
        other.join(0.5)
        return load(folder)

    arguments = (tmp_path / "result", {"number": 2}, build, load)
    other = threading.Thread(target=steps._build_once, args=arguments)
    assert steps._build_once(tmp_path / "result", {"number": 1}, build, load_slowly) == "1"
    other.join()
    assert load(tmp_path / "result") == "2"


def test_only_code_that_decides_a_result_rebuilds_it(tmp_path, monkeypatch):
    """Three versions of a module: another colour of a plot, another constant of a helper."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "WIDTH = 4\n\ndef cut(text):\n    return _part(text)\n\ndef _part(text):\n"
    text += "    return text[:WIDTH]\n\ndef plot(text):\n    return 'blue'\n"
    hashes = []
    for old, new in (("", ""), ("blue", "red"), ("WIDTH = 4", "WIDTH = 5")):
        (tmp_path / "cutting.py").write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.delitem(sys.modules, "cutting", raising=False)
        linecache.clearcache()
        hashes.append(steps._code_hash(importlib.import_module("cutting").cut))
    assert hashes[0] == hashes[1] != hashes[2]
