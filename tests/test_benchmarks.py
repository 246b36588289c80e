"""The benchmarks run; what they measure is told by running them, never by a timed test."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_text, reference, results
from benchmarks.__main__ import PAGES, SHOWN, benchmark_table, with_tables
from tinytrain import steps
from tinytrain.recipes import RECIPES

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


NAMES = ["overhead", "train_step", "learning", "questions", "tokenization", "estimate", "gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_look_works_and_keeps_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    before = {path: path.read_bytes() for path in RESULTS}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "peer: " in shown.stdout and "nothing is kept" in shown.stdout
    assert {path: path.read_bytes() for path in RESULTS} == before


def test_a_run_of_the_study_tells_what_a_law_needs():
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick"]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert shown.returncode == 0 and "nothing is kept" in shown.stdout, shown.stderr
    row = ast.literal_eval(shown.stdout.splitlines()[0])
    assert row["steps"] == 10 and row["bits_per_character"] > row["pair_bits"] > 0
    assert row["parameters"] == 369_344 and row["text_tokens"] > 500_000
    fitted = [sys.executable, "-m", "benchmarks.scaling", "--fit"]
    shown = subprocess.run(fitted, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert "root mean square" in shown.stdout, shown.stderr
    # Notebook 09 tells the same numbers.
    text = (ROOT / "notebooks" / "09_scale_out.ipynb").read_text(encoding="utf-8")
    runs = re.search(r"(\d+) runs:", shown.stdout)[1]
    usual, most = re.search(r"([\d.]+%) root mean square, ([\d.]+%) at most", shown.stdout).groups()
    assert f"fitted to {runs} of the runs" in text
    assert f"{usual} in the root mean square, and {most} at most" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_say_what_was_measured_and_where(path):
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows
    if path.stem == "scaling":  # no comparisons, but runs
        assert all(row["bits_per_character"] > 0 and row["processor"] for row in rows)
        assert len({row["name"] for row in rows}) == len(rows)
        return
    if path.stem == "gpu_text":
        notes = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
        assert all(f"{run['held_out_loss']:.3f}" in notes for run in rows["runs"].values())
        assert rows["machine"]["gpu"] and rows["runs"]["fp16"]["precision"] == "fp16"
        return
    for row in rows:
        assert row["met"] in (True, False) or row["goal"] is None
        assert {"measure", "ours", "peer", "peer_name", "ratio", "goal", "met"} <= set(row)
        assert row["machine"]["processor"] and row["machine"]["versions"]["torch"]


def test_a_reference_curve_is_the_range_of_its_seeds():
    histories = [
        [{"step": 1, "loss": a}, {"step": 1, "eval_loss": 9.0}, {"step": 2, "loss": b}]
        for a, b in ((3.0, 1.0), (5.0, 2.0))
    ]
    assert reference.curve(histories, "loss") == {
        "step": [1, 2],
        "low": [3.0, 1.0],
        "mean": [4.0, 1.5],
        "high": [5.0, 2.0],
    }


def test_a_reference_holds_what_was_written_and_the_answers_of_all_seeds_become_a_table(
    smoke, tmp_path, monkeypatch
):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    history = reference.train_one(smoke.recipe, tmp_path, "float32")
    samples = reference.samples(smoke.recipe, tmp_path)
    assert samples[0]["step"] == 0 and samples[-1]["step"] == history[-1]["step"] > 0
    assert all(list(sample["texts"]) == steps.get_prompts(smoke.recipe) for sample in samples)
    assert samples[0]["texts"] != samples[-1]["texts"]
    right = reference.right_answers(smoke.recipe, tmp_path)
    assert right["all", "told"] <= 1 and ("works", "reversed") not in right
    two = [right | {("works", "told"): share} for share in (0.5, 1.0)]
    works = reference.table(two).loc["works"]
    assert works["told"] == "75.0% (50.0% to 100.0%)" and works["reversed"] == ""


def test_a_gpu_is_asked_for_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 1 and "needs a CUDA GPU" in shown.stderr


def test_what_a_gpu_is_measured_with_trains_here_too():
    """Small, on the processor: the card's name and peak are all that is missing."""
    found = {name: [] for name in gpu.CONTESTANTS}
    for name in ("the guide's code", "wiki"):
        found[name].append(gpu.measure(name))
        assert found[name][0]["tokens_per_second"] > 0 and found[name][0]["tflops"] > 0
    rows = gpu.table(found, peak=1e-9)
    assert [row["measure"] for row in rows] == [
        "wiki, on a GPU: tokens/s",
        "wiki, on a GPU: TFLOP/s of the model, attention counted",
    ]
    assert rows[1]["met"] and rows[0]["ratio"] == pytest.approx(
        found["wiki"][0]["tokens_per_second"] / found["the guide's code"][0]["tokens_per_second"],
        abs=1e-3,
    )


def test_what_no_gpu_has_measured_yet_is_told_in_the_table(monkeypatch):
    name = gpu.label("guide's model", "peak")
    row = {"measure": name, "ours": 3.0, "peer": 9.0, "peer_name": "the guide's code"}
    row |= {"ratio": 0.333, "goal": 0.35, "met": True, "machine": results("hours")[0]["machine"]}
    monkeypatch.setattr("benchmarks.__main__.results", lambda name: [row] if name == "gpu" else [])
    table = benchmark_table()
    assert f"| {name} | 3.0 | 9.0 (the guide's code) | 0.333 | 0.35: yes |" in table
    with_a_goal = [comparison for comparison in gpu.COMPARISONS if comparison[3]]
    assert table.count("not measured") == len(with_a_goal) - 1


def test_runs_beside_each_other_become_a_band(tmp_path, monkeypatch):
    """Recipe `smoke` in place of `wiki`, on the processor."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))
    small = {"WIKI": RECIPES["smoke"], "FOLDER": tmp_path, "RESULT": tmp_path / "result.json"}
    for name, value in small.items():
        monkeypatch.setattr(gpu_text, name, value)
    short = {"max_steps": 6, "logging_steps": 2, "eval_steps": 3, "eval_blocks": 4}
    monkeypatch.setattr(gpu_text, "RHYTHM", {})
    monkeypatch.setattr(gpu_text, "BESIDE", {f"seed {n}": {"seed": n, **short} for n in range(2)})
    monkeypatch.setattr(gpu_text, "ROOT", tmp_path)
    for name in gpu_text.BESIDE:
        gpu_text.train(name, "encyclopedia")
    gpu_text.keep("encyclopedia")
    kept = json.loads(gpu_text.RESULT.read_text(encoding="utf-8"))
    assert kept["train"]["step"] == [2, 4, 6] and kept["held_out"]["step"] == [3, 6]
    assert kept["train"]["low"][-1] < kept["train"]["high"][-1]
    assert all(run["steps"] == 6 and len(run["samples"]) == 5 for run in kept["runs"].values())


@pytest.mark.parametrize("page", PAGES[:2])
def test_the_shares_of_a_gpus_peak_are_told_as_they_were_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    kept = {(row["measure"], row["peer_name"]): row["ratio"] for row in results("gpu")}
    for name in ("wiki", "qwen-0.5b"):
        share = kept[gpu.label(name, "tflops"), "the card's dense bf16 peak"]
        assert f"{share:.0%}" in text
    times = kept[gpu.label("wiki", "tokens_per_second"), "the guide's code"]
    assert f"{times:.1f}" in text


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_the_results_that_are_kept(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = ["benchmarks"] if "README" in page else [*SHOWN, "machine"]
    assert all(f"<!-- {name}: begin -->" in text for name in shown)
    assert with_tables(text, "zh" in page) == text
    assert with_tables(text.replace("|", "¦"), "zh" in page) != text.replace("|", "¦")


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_what_a_time_is_enough_for_is_told_as_it_was_measured(page):
    """Expected and measured bits, and what the model wrote; notebook 09 has the same numbers."""
    kept = {row["measure"]: row for row in results("hours") if row["peer_name"] == "measured"}
    text = (ROOT / page).read_text(encoding="utf-8")
    told = re.findall(
        r"^\| (\d+) (?:minutes|分钟) \| (.+?)[,，] ?(.+?) \| (.+) \|$", text, re.MULTILINE
    )
    assert [minutes for minutes, *_ in told] == ["5", "20", "60"]
    notebook = (ROOT / "notebooks" / "09_scale_out.ipynb").read_text(encoding="utf-8")
    for minutes, expected, measured, line in told:
        row = kept[f"{minutes} minutes, prose: bits per character"]
        assert float(expected) == pytest.approx(row["ours"], abs=0.006) and expected in notebook
        assert float(measured) == pytest.approx(row["peer"], abs=0.006) and measured in notebook
        assert line in dict(row["samples"]).values()
        written = row["samples"] + row["sampled"]
        shown = re.findall(rf"\| {minutes} minutes \| (.+?) \| (.+?) \|", notebook)
        assert len(shown) == 3
        for prompt, text in shown:
            assert [w for p, w in written if p == prompt and w.startswith(text)], text
