import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.scaling import fitted_rows
from tinytrain import callbacks, planning, results, runs
from tinytrain.checkpoints import train
from tinytrain.common import Speedometer, read_history
from tinytrain.costs import count_parameters
from tinytrain.modeling import recipe_config
from tinytrain.recipes import POCKET, Recipe

PROSE = planning.Text(32_000_000, 0.85, 7.9)
ENDLESS = {"max_steps": 10**9, "save_steps": 10**9, "eval_steps": 10**9, "logging_steps": 1}


# --- the clock ------------------------------------------------------------------------------------


def test_a_run_ends_with_its_time_and_the_rate_with_it(small_trainer, tmp_path):
    history = callbacks.HistoryCallback(tmp_path / "history.jsonl", 512)
    limit = callbacks.TimeLimit(4, warmup_steps=3, spent=1)
    trainer = small_trainer(tmp_path / "checkpoints", [limit, history], **ENDLESS)
    train(trainer)
    steps_done = trainer.state.global_step
    assert steps_done == trainer.state.max_steps and limit.used == pytest.approx(4, abs=1)
    rates = [line["learning_rate"] for line in read_history(tmp_path) if "loss" in line]
    assert rates[0] < max(rates) and rates[-1] < 0.25 * max(rates)
    assert max(rates) < 0.8 * trainer.args.learning_rate  # a quarter of the time was gone
    # A finished run is not trained further.
    again = small_trainer(tmp_path / "checkpoints", [callbacks.TimeLimit(4)], **ENDLESS)
    train(again)
    assert again.state.global_step == steps_done


def test_a_run_that_goes_on_has_the_time_that_was_left(small_trainer, tmp_path, caplog):
    class StopAfter(callbacks.StopCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if limit.used > 2:
                self.reason = "the test"
            super().on_step_end(args, state, control, **kwargs)

    limit = callbacks.TimeLimit(4)
    trainer = small_trainer(tmp_path / "checkpoints", [limit, StopAfter()], **ENDLESS)
    train(trainer)
    assert trainer.state.global_step < trainer.state.max_steps
    # What displays say is left goes by the clock too, not by a speed that may have changed.
    left = Speedometer(512, trainer.state).seconds_left(trainer.state)
    assert left == pytest.approx(4 - limit.used, abs=0.1)
    done = trainer.state.global_step
    limit = callbacks.TimeLimit(4)
    history = callbacks.HistoryCallback(tmp_path / "history.jsonl", 512)
    trainer = small_trainer(tmp_path / "checkpoints", [limit, history], **ENDLESS)
    train(trainer)
    assert done < trainer.state.global_step == trainer.state.max_steps
    assert limit.used == pytest.approx(4, abs=1)
    first, *_, last = [line for line in read_history(tmp_path) if "loss" in line]
    assert last["seconds"] < 3  # of the second sitting alone
    assert first["learning_rate"] < 0.55 * trainer.args.learning_rate


def test_time_is_left_for_what_follows():
    limit = callbacks.TimeLimit(10, reserve=20)
    limit.step_seconds = 0.1  # so that two of the ten seconds are left
    rates = []
    for limit.used in (0, 4, 8, 9):
        rates.append(limit(step=100))
    assert rates == pytest.approx([1, 0.5, 0, 0])


def test_a_time_that_is_gone_before_the_training_is_a_line(smoke, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    recipe = replace(smoke.recipe, hours=0.02)
    with pytest.raises(ValueError, match="1 min 12 s is too short: .* 1 min 10 s already"):
        runs.time_limit(recipe, spent=70)
    assert runs.time_limit(smoke.recipe) == []


# --- other programs -------------------------------------------------------------------------------


def test_cores_that_others_compute_on_are_left_to_them(small_trainer, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, seen = torch.get_num_threads(), set()

    class Watch(callbacks.ShareCores):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            seen.add(torch.get_num_threads())

    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(os.cpu_count())]
    torch.set_num_threads(2)
    try:
        watch = Watch(seconds=0.3)
        trainer = small_trainer(tmp_path, [callbacks.TimeLimit(4), watch], **ENDLESS)
        train(trainer)
        assert 1 in seen and torch.get_num_threads() == 2
        # Who has set the number of threads keeps it.
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        seen.clear()
        train(small_trainer(tmp_path / "fixed", [callbacks.TimeLimit(2), watch], **ENDLESS))
        assert seen == {2}
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.kill()
            other.wait()


def test_what_others_do_for_a_moment_does_not_count(monkeypatch):
    """A system still writes a text to disk, say, when the training begins."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    # Times, and the seconds that this process and all have computed: both cores busy at first.
    looks = iter([(0, 0, 0), (0.1, 0, 0.2), (1.1, 0, 0.9), (2.1, 0, 0.9)])
    monkeypatch.setattr(callbacks.ShareCores, "_look", lambda self: next(looks))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        callbacks.ShareCores().on_train_begin(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- the law --------------------------------------------------------------------------------------


def test_the_law_describes_the_runs_of_the_study():
    errors = [
        planning.expected_bits(
            row["pair_bits"], row["parameters"], row["tokens"] * 1e6, row["text_tokens"]
        )
        / row["bits_per_character"]
        - 1
        for row in fitted_rows()
    ]
    assert len(errors) >= 25 and max(map(abs, errors)) <= planning.EXPECTED_ERROR


def test_of_sizes_nearly_as_good_the_smallest_is_taken():
    small, large = planning.Plan(POCKET, 1, 1, 5.02), planning.Plan(POCKET, 2, 1, 5.0)
    assert planning.best_plan([small, large]) is small
    assert planning.best_plan([small._replace(bits=5.03), large]) is large


def test_the_learning_rate_goes_down_only_above_the_width_of_pocket():
    rates = [planning.sized_recipe(POCKET, width).learning_rate for width in (64, 256, 512)]
    assert rates == [POCKET.learning_rate, POCKET.learning_rate, POCKET.learning_rate / 2]


@pytest.mark.parametrize("width", [64, 256])
def test_a_plan_has_the_shape_that_the_law_was_fitted_to(width):
    recipe = planning.sized_recipe(POCKET, width)
    parameters = count_parameters(recipe_config(recipe))["total"]
    fitted = [row for row in fitted_rows() if row["vocabulary"] == recipe.vocab_size]
    assert {parameters} == {row["parameters"] for row in fitted if row["hidden"] == width}


def test_more_of_everything_is_better_and_a_text_read_again_teaches_less():
    bits = planning.expected_bits(7.9, 1e6, 1e6)
    assert planning.expected_bits(7.9, 2e6, 1e6) < bits > planning.expected_bits(7.9, 1e6, 2e6)
    new, again = (planning.expected_bits(7.9, 1e6, 4e6, there) for there in (4e6, 1e6))
    assert new < again < bits


def test_more_time_wants_a_larger_model():
    sizes = [planning.sized_recipe(POCKET, width) for width in (64, 128, 256, 384, 512)]
    speed = planning.Speed(0.05)
    best = [
        planning.best_plan(planning.make_plans(seconds, PROSE, sizes, speed))
        for seconds in (120, 3600, 48 * 3600)
    ]
    parameters, bits = [plan.parameters for plan in best], [plan.bits for plan in best]
    assert parameters == sorted(set(parameters)) and bits == sorted(bits, reverse=True)


def test_a_short_text_is_read_four_times_and_no_more():
    sizes = [planning.sized_recipe(POCKET, width) for width in (64, 256)]
    short = PROSE._replace(characters=100_000)
    plans = planning.make_plans(24 * 3600, short, sizes, planning.Speed(0.05))
    assert [plan.tokens for plan in plans] == [4 * short.tokens] * 2


def test_the_plot_marks_the_best_size_and_what_is_beyond_the_study():
    sizes = [planning.sized_recipe(POCKET, width) for width in (64, 128, 256, 512)]
    speed = planning.Speed(0.05)
    plans = {
        name: planning.make_plans(seconds, PROSE, sizes, speed)
        for name, seconds in (("1 hour", 3600), ("1 day", 86_400))
    }
    [axes] = planning.plot_plans(plans).axes
    marked = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    best = [planning.best_plan(some) for some in plans.values()]
    assert marked == [plan.parameters for plan in best]
    hour, _, twenty, grey = (text.get_text() for text in axes.get_legend().get_texts())
    assert hour == f"1 hour: {best[0].parameters / 1e6:.1f}M, {best[0].tokens / 1e6:.1f}M tokens"
    assert (twenty, grey) == ("20 tokens a parameter", "larger than measured")


def test_the_next_size_is_as_fast_as_the_nearest_that_was_measured():
    small, middle, large = (planning.sized_recipe(POCKET, width) for width in (64, 128, 512))
    speed = planning.Speed(1.0)
    before = speed(small), speed(large)
    assert before[0] > before[1] > 0
    speed.measured[64] = 0.01
    assert speed(small) == pytest.approx(0.01 * before[0])
    speed.measured[512] = 0.1
    assert speed(large) == pytest.approx(0.1 * before[1]) and speed(middle) < speed(small)


# --- plans ----------------------------------------------------------------------------------------


def write_lessons(path, number):
    """Write a small text of your own, English and traditional Chinese."""
    lines = [
        {"text": f"第{n}課：臺灣的圖書館有{n * 37 % 91}本書，學生們讀了{n % 7}本。" * 3}
        if n % 2
        else {"text": f"Lesson {n}: the library has {n * 37 % 91} books. Read {n % 7}. " * 3}
        for n in range(number)
    ]
    dumped = (json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("\n".join(dumped), encoding="utf-8")
    return path


def test_a_plan_is_a_recipe_and_stays_what_it_was(tmp_path, monkeypatch, capsys):
    text = write_lessons(tmp_path / "mine.jsonl", 400)
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    monkeypatch.setenv("TINYTRAIN_CORPUS", str(text))
    monkeypatch.setenv("TINYTRAIN_HOURS", "0.05")
    recipe = planning.get_recipe()
    told = capsys.readouterr().out
    for part in ("characters", "tokens", "passes", "memory", "bits", "done at"):
        assert part in told
    written = told[told.index("replace(") :]
    assert eval(written, {"replace": replace, "POCKET": POCKET}) == recipe
    assert isinstance(recipe, Recipe) and recipe.corpus == str(text)
    # Some 40,000 characters are learned by heart in less than three minutes.
    assert recipe.hours is None and "too few for 3 min 00 s, the run is shorter" in told
    command = results.shell_command(recipe, "generate")
    assert f"generate --hours 0.05 --corpus {text}" in command and "--set" not in command
    # The second time nothing is measured, and whoever names a recipe gets it.
    monkeypatch.setattr(planning, "_make_plan", None)
    assert planning.get_recipe() == recipe and not capsys.readouterr().out
    assert planning.get_recipe(0.05) == recipe
    assert planning.get_recipe("smoke").name == "smoke"
    assert planning.get_recipe(seed=7) == replace(recipe, seed=7)


def test_a_long_training_gets_larger_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    text = write_lessons(tmp_path / "mine.jsonl", 40_000)
    # Four passes, more than 4M tokens, unless a slow machine cannot make so many in the time.
    recipe = planning.plan(0.5, replace(POCKET, corpus=str(text)))
    assert recipe.batch_size == planning.batch_size(recipe.max_steps * recipe.tokens_per_step)


@pytest.mark.parametrize(
    ("hours", "told"),
    [
        ("soon", "'soon'; it must be a number"),
        ("0.001", "is 0.001; .* from 0.02 on"),
        ("nan", "is nan"),
        ("inf", "is inf"),
    ],
)
def test_a_time_that_is_none_is_refused(hours, told, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_HOURS", hours)
    with pytest.raises(ValueError, match=told):
        planning.get_recipe()


def test_a_text_of_a_few_pages_is_trained_on_in_less_time(tmp_path):
    text = write_lessons(tmp_path / "mine.jsonl", 400)
    command = [sys.executable, "-m", "tinytrain", "train", "--hours", "1"]
    command += ["--corpus", str(text), "--runs", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert not shown.returncode, shown.stdout + shown.stderr
    assert "the run is shorter" in shown.stdout and "bits per character" in shown.stdout


def test_a_minute_and_a_half_of_training_from_the_shell(tmp_path):
    # So much that it is not read four times in the time, on a fast machine either.
    text = write_lessons(tmp_path / "mine.jsonl", 40_000)
    command = [sys.executable, "-m", "tinytrain", "train", "--hours", "0.025"]
    command += ["--corpus", str(text), "--runs", str(tmp_path)]
    start = time.monotonic()
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert not shown.returncode, shown.stdout + shown.stderr
    assert 90 * 0.9 < time.monotonic() - start < 90 * 1.2
    assert "bits per character" in shown.stdout
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert "this run is finished" in shown.stdout + shown.stderr
