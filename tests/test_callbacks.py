import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tinytrain import callbacks
from tinytrain.checkpoints import train
from tinytrain.common import setup_logging
from tinytrain.evaluation import complete
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.training import build_trainer, training_arguments


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """A real, short training run with all three callbacks."""
    folder = tmp_path_factory.mktemp("run")
    setup_logging(folder / "training.log")
    tokens = smoke.recipe.tokens_per_step
    watching = [
        callbacks.VerboseTrainingCallback(tokens, seconds=0),
        callbacks.HistoryCallback(folder / "history.jsonl", tokens, vocab_size=1024, name="smoke"),
        callbacks.LivePlotCallback(folder / "loss.png", 1024, tokens, folder / "history.jsonl"),
    ]
    arguments = training_arguments(smoke.recipe, folder / "checkpoints", use_cpu=True)
    blocks = smoke.blocks
    model = build_model(smoke.config)
    trainer = build_trainer(model, arguments, blocks["train"], blocks["test"], watching)
    trainer.train()
    return folder, watching, trainer


def test_verbose_collects_the_losses_and_tells_the_course(run, smoke):
    folder, (verbose, *_), trainer = run
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert verbose.train_loss == logged
    assert len(logged) == 10
    text = (folder / "training.log").read_text(encoding="utf-8")
    for words in (
        f"training starts: {trainer.model.num_parameters():,} parameters, 20 steps",
        "epoch 1 of",
        "step 10/20: loss",
        "tokens/s",
        "left",
        "step 20: held-out loss",
        "training ends at step 20",
    ):
        assert words in text


def test_messages_keep_a_distance_and_losses_are_all_collected(caplog):
    caplog.set_level("INFO", logger="tinytrain")
    verbose = callbacks.VerboseTrainingCallback(8, seconds=1000)
    state = TrainerState(max_steps=30)
    model = SimpleNamespace(num_parameters=lambda: 1)
    verbose.on_train_begin(None, state, None, model=model)
    for state.global_step in range(1, 31):
        verbose.on_log(None, state, None, logs={"loss": 2.0, "learning_rate": 0.1})
    told = [r.getMessage().split(":")[0] for r in caplog.records if "loss" in r.getMessage()]
    assert told == ["step 1/30", "step 30/30"]
    assert verbose.train_loss == [2.0] * 30


def test_history_holds_what_the_trainer_logged(run, smoke):
    folder, _, trainer = run
    history = callbacks.read_history(folder / "history.jsonl")
    for name, count in (("loss", 10), ("eval_loss", 2)):
        expected = [(x["step"], x[name]) for x in trainer.state.log_history if name in x]
        assert [(x["step"], x[name]) for x in history if name in x] == expected
        assert len(expected) == count
    assert history[-1]["tokens"] == 20 * smoke.recipe.tokens_per_step
    seconds = [line["seconds"] for line in history]
    assert seconds == sorted(seconds)


def test_an_evaluation_after_the_run_is_not_part_of_its_history(run):
    folder, _, trainer = run
    before = (folder / "history.jsonl").read_bytes()
    trainer.evaluate()
    assert (folder / "history.jsonl").read_bytes() == before
    assert callbacks.read_history(folder)[-1]["end"] == "finished"


def test_the_plot_is_kept_as_a_picture(run):
    picture = imread(run[0] / "loss.png")
    assert picture.shape[:2] == (480, 768)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::7]}) > 5  # it shows something


def test_history_of_a_run_taken_up_again_has_no_step_twice(tmp_path):
    path = tmp_path / "history.jsonl"
    text = "".join(f'{{"step": {s}, "seconds": {s}}}\n' for s in (0, 10, 20, 30))
    path.write_text(
        text.replace("30\n", "20\n") + '{"step": 20, "seconds": 20, "end": "stopped"}\n'
    )
    history = callbacks.HistoryCallback(path, tokens_per_step=8)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=20)
    history.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 30
    history.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    lines = callbacks.read_history(path)
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    assert lines[-1]["seconds"] >= 20  # the time of the earlier sitting counts


def test_a_run_from_the_start_replaces_the_history(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 10, "seconds": 1}\n')
    history = callbacks.HistoryCallback(path, tokens_per_step=8)
    history.on_train_begin(None, TrainerState(), TrainerControl())
    assert [line["step"] for line in callbacks.read_history(path)] == [0]


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert callbacks.read_history(path) == [{"step": 1, "loss": 2.0}]


def test_smoothing_keeps_a_constant_and_follows_a_fall():
    assert callbacks.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    smoothed = callbacks.smooth([8.0] * 10 + [2.0] * 30)
    assert smoothed[9] == pytest.approx(8.0)
    assert smoothed[-1] == pytest.approx(2.0, abs=0.02)
    assert all(earlier >= later for earlier, later in zip(smoothed, smoothed[1:], strict=False))


def fits(figure):
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


HISTORY = [
    {"step": 0, "max_steps": 4, "tokens_per_step": 512, "vocab_size": 4096, "name": "mine"},
    {"step": 1, "tokens": 512, "seconds": 1.0, "loss": 8.0, "learning_rate": 0.1},
    {"step": 2, "tokens": 1024, "seconds": 2.0, "loss": 7.0, "learning_rate": 0.05},
    {"step": 2, "tokens": 1024, "seconds": 2.5, "eval_loss": 7.5},
]


def test_plot_shows_the_curves_and_the_untrained_loss():
    figure = callbacks.plot_history(HISTORY)
    loss, rate = figure.axes
    raw, smoothed, held_out, untrained = loss.lines
    assert list(raw.get_ydata()) == [8, 7]
    assert list(smoothed.get_ydata()) == pytest.approx(callbacks.smooth([8, 7]))
    assert list(held_out.get_xdata()) == [2] and list(held_out.get_ydata()) == [7.5]
    assert untrained.get_ydata()[0] == pytest.approx(8.318, abs=1e-3)
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05]
    assert rate.get_xlim() == (0, 4) and rate.get_ylim()[1] > 0.1
    assert fits(figure)
    low, high = loss.get_ylim()
    assert low < 7 and high > 8.318
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["mine: step 2 of 4", "train 7.000 · held-out 7.500 · 2 s of training"]
    ticks = [label.get_text() for label in rate.get_xticklabels()]
    assert "2\n1.02k" in ticks  # steps, and tokens under them


def test_what_the_caller_says_goes_before_the_history():
    figure = callbacks.plot_history(HISTORY[1:], vocab_size=100, title="a run")
    assert figure.texts[0].get_text() == "a run"
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(4.605, abs=1e-3)
    assert callbacks.plot_history([]).texts[0].get_text() == "step 0 of 0"


def test_a_curve_keeps_few_points_and_loses_nothing():
    curve = callbacks.Curve(limit=100)
    for x in range(1, 10_001):
        curve.add(x, 2 * x)
    xs, ys = curve.points()
    assert 50 <= len(xs) <= 101
    assert xs == sorted(xs) and xs[-1] > 9_850
    assert ys == pytest.approx([2 * x for x in xs])  # averages of a straight line lie on it
    curve.add(10_001, math.inf)
    assert math.isnan(curve.points()[1][-1])  # a gap, which matplotlib can draw


def test_ten_thousand_points_need_no_more_memory_than_a_thousand(tmp_path):
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 4096, 512, seconds=0)
    state = TrainerState(max_steps=10_000)
    plot.on_train_begin(None, state, None)
    sizes, objects, memory = {}, {}, {}
    tracemalloc.start()
    for state.global_step in range(1, 10_001):
        logs = {"loss": 9 - state.global_step / 2000 + state.global_step % 7 / 10}
        plot.on_log(None, state, None, logs=logs | {"learning_rate": 0.1})
        if state.global_step in (1000, 2000, 10_000):
            plot._draw()
            sizes[state.global_step] = plot.path.stat().st_size
            objects[state.global_step] = len(plot.plot.figure.findobj())
            memory[state.global_step] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    plot.close()
    assert sizes[10_000] < 1.5 * sizes[1000]
    assert objects[10_000] == objects[1000]
    assert memory[10_000] < memory[2000] + 100_000


def test_drawing_waits_and_the_last_state_is_always_drawn(tmp_path, monkeypatch):
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8, seconds=1000)
    drawings = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda: drawings.append(plot._state.global_step) or draw())
    state = TrainerState(max_steps=50)
    plot.on_train_begin(None, state, None)
    for state.global_step in range(1, 51):
        plot.on_step_begin(None, state, None)
        plot.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1})
    assert drawings == [0]
    assert "done" in plot._words()[0] and "400 tokens seen" in plot._words()
    plot.on_train_end(None, state, None)
    assert drawings == [0, 50]
    plot.close()
    assert drawings == [0, 50]  # once is enough


def test_drawing_takes_no_more_than_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """With a clock that we turn, and drawings that take 50 of its milliseconds."""
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8)

    def slow(self):
        now[0] += 0.05
        return b"png"

    monkeypatch.setattr(callbacks.LossPlot, "png", slow)
    state = TrainerState(max_steps=10_000)
    plot.on_train_begin(None, state, None)
    for state.global_step in range(1, 10_001):
        now[0] += 0.1
        plot.on_step_begin(None, state, None)
        if state.global_step == 100:
            assert plot.drawing_seconds > 0.02 * now[0]  # more at first
    assert 170 <= plot.drawing_seconds / 0.05 <= 200
    assert plot.drawing_seconds <= 0.01 * now[0]


def test_the_last_state_is_drawn_when_training_breaks_off(smoke, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise ZeroDivisionError

    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 1024, 512, seconds=1000)
    arguments = training_arguments(smoke.recipe, tmp_path / "checkpoints", use_cpu=True)
    blocks = smoke.blocks
    trainer = build_trainer(
        build_model(smoke.config), arguments, blocks["train"], blocks["test"], [plot, Break()]
    )
    with pytest.raises(ZeroDivisionError):
        train(trainer)
    assert plot.plot.figure.texts[0].get_text().startswith("step 5 of 20")
    expected = plot.plot.png()
    assert plot.path.read_bytes() == expected


def test_a_drawing_before_a_kept_background_is_the_whole_drawing():
    """Faster, and the same to the last pixel as a figure drawn as a whole."""
    plot = callbacks.LossPlot(4096, 4, 512)
    for line in HISTORY[:2]:
        plot.add(line)
    plot.update("first", "line")
    plot.png()
    plot.add(HISTORY[2])
    plot.update("second", "other line", 0.5)
    fast = imread(io.BytesIO(plot.png()))[..., :3]
    plot.figure.canvas.draw()
    slow = np.asarray(plot.figure.canvas.buffer_rgba())[..., :3] / 255
    # Lines lie above the legend in one and below it in the other: nothing else may differ.
    assert (np.abs(fast - slow).max(-1) > 0.1).mean() < 0.002


# --- past, running and other runs --------------------------------------------------------------


def test_replay_draws_a_run_from_its_folder(run):
    figure = callbacks.replay(run[0])
    assert figure.texts[0].get_text() == "smoke: step 20 of 20, finished"
    logged = [line["loss"] for line in run[2].state.log_history if "loss" in line]
    assert list(figure.axes[0].lines[0].get_ydata()) == logged
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(math.log(1024))


def test_replay_follows_a_run_until_its_end(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in HISTORY))
    more = [{**HISTORY[2], "step": 3, "loss": 6.0}, {"step": 3, "seconds": 4, "end": "stopped"}]

    def go_on():
        for line in more:
            time.sleep(0.2)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    thread = threading.Thread(target=go_on)
    thread.start()
    figure = callbacks.replay(path, follow=True, seconds=0.02)
    thread.join()
    assert figure.texts[0].get_text() == "mine: step 3 of 4, stopped"
    assert list(figure.axes[0].lines[0].get_ydata()) == [8, 7, 6]


def test_a_missing_history_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run has written its history there"):
        callbacks.replay(tmp_path)


@pytest.mark.parametrize(("x", "last"), [("tokens", 1024), ("seconds", 2.0), ("step", 2)])
def test_runs_are_drawn_over_one_another(tmp_path, x, last):
    for name, factor in (("seed", 1.0), ("wiki", 0.5)):
        (tmp_path / name).mkdir()
        lines = [
            line | {"loss": line["loss"] * factor} if "loss" in line else line for line in HISTORY
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "history.jsonl").write_text(text)
    paths = {name: tmp_path / name for name in ("seed", "wiki")}
    figure = callbacks.plot_runs(paths, x=x)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["seed"].get_ydata()) == pytest.approx(callbacks.smooth([8, 7]))
    assert list(lines["wiki"].get_ydata()) == pytest.approx(callbacks.smooth([4, 3.5]))
    assert lines["seed"].get_xdata()[-1] == last
    assert lines["seed"].get_color() != lines["wiki"].get_color()
    assert fits(figure)
    with pytest.raises(ValueError, match="tokens, seconds, step"):
        callbacks.plot_runs(paths, x="epochs")


def test_the_reference_is_that_of_the_pocket_recipe_and_no_other():
    reference = callbacks.reference_curve(replace(RECIPES["pocket"], seed=7, logging_steps=1))
    assert len(reference["seeds"]) >= 4
    band = reference["train"]
    assert band["step"][-1] == RECIPES["pocket"].max_steps
    for low, mean, high in zip(band["low"], band["mean"], band["high"], strict=True):
        assert low <= mean <= high
    for name in ("smoke", "seed", "wiki"):
        assert callbacks.reference_curve(RECIPES[name]) is None
    assert callbacks.reference_curve(replace(RECIPES["pocket"], learning_rate=1e-3)) is None


@pytest.mark.parametrize(
    ("shift", "words"), [(0, ": normal"), (1, "higher than usual"), (-1, "lower than usual")]
)
def test_is_this_normal(shift, words):
    reference = callbacks.reference_curve(RECIPES["pocket"])
    band = reference["train"]
    rows = zip(band["step"][:100], band["mean"][:100], strict=True)
    history = [{"step": step, "loss": loss + shift} for step, loss in rows]
    assert words in callbacks.is_this_normal(history, reference)
    assert "nothing to compare" in callbacks.is_this_normal([], reference)


def test_the_plot_shows_the_reference_behind_the_curve():
    reference = callbacks.reference_curve(RECIPES["pocket"])
    figure = callbacks.plot_history(HISTORY, reference=reference)
    (band,) = figure.axes[0].collections
    assert "other seeds" in band.get_label()
    assert band.get_zorder() < figure.axes[0].lines[0].get_zorder()


# --- samples -----------------------------------------------------------------------------------


def test_samples_are_taken_every_so_many_steps_and_at_the_end(smoke, tmp_path):
    write = partial(complete, tokenizer=smoke.tokenizer, max_new_tokens=4)
    samples = callbacks.SampleCallback(write, ["法国", "北京"], 8, tmp_path / "samples.jsonl")
    recipe = replace(smoke.recipe, max_steps=20)
    arguments = training_arguments(recipe, tmp_path / "checkpoints", use_cpu=True)
    blocks = smoke.blocks
    trainer = build_trainer(
        build_model(smoke.config), arguments, blocks["train"], blocks["test"], [samples]
    )
    train(trainer)
    lines = callbacks.read_history(samples.path)
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert lines[-1]["texts"] == complete(trainer.model, smoke.tokenizer, ["法国", "北京"], 4)
    table = samples.table().splitlines()
    assert table[0] == "法国" and table[5] == "北京"
    assert [row.split()[0] for row in table[1:4]] == ["8", "16", "20"]


def test_a_run_taken_up_again_keeps_its_samples_and_shows_few(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = '{"step": %d, "texts": ["<b>\\n字"]}\n'
    path.write_text("".join(sample % step for step in range(1, 31)), encoding="utf-8")
    samples = callbacks.SampleCallback(lambda model, prompts: ["新"], ["问"], 5, path, rows=4)
    state = TrainerState(global_step=28)
    samples.on_train_begin(None, state, None)
    samples.on_train_end(None, state, None)
    assert [line["step"] for line in callbacks.read_history(path)] == list(range(1, 29))
    assert samples.table().split() == "问 1 <b> 字 10 <b> 字 19 <b> 字 28 <b> 字".split()
    state.global_step = 30
    samples.on_step_end(None, state, None)
    assert samples.table().splitlines()[-1].endswith("30  新")
    with pytest.raises(ValueError, match="at least 1"):
        callbacks.SampleCallback(lambda: None, [], 0)


# --- notebook and terminal ---------------------------------------------------------------------

TRAINING = """
import sys
from datasets import load_from_disk
from transformers import Qwen2Config
from tinytrain import callbacks
from tinytrain.common import setup_logging
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.checkpoints import train
from tinytrain.training import build_trainer, training_arguments
run = {run!r}
setup_logging(run + "/training.log")
blocks = load_from_disk(run + "/blocks")
history = callbacks.HistoryCallback(run + "/history.jsonl", 512)
watching = [
    callbacks.StopCallback(run + "/STOP", button=True),
    history,
    callbacks.VerboseTrainingCallback(512, seconds=0),
    callbacks.LivePlotCallback(run + "/loss.png", 1024, 512, history.path, seconds=0.1),
    callbacks.SampleCallback(lambda model, prompts: ["巴黎"], ["法国的首都是"], 10),
]
arguments = training_arguments(RECIPES["smoke"], run + "/checkpoints", use_cpu=True)
model = build_model(Qwen2Config.from_pretrained(run))
trainer = build_trainer(model, arguments, blocks["train"], blocks["test"], watching)
train(trainer)
"""


@pytest.fixture
def script(smoke, tmp_path):
    smoke.blocks.save_to_disk(str(tmp_path / "blocks"))
    smoke.config.save_pretrained(tmp_path)
    return TRAINING.format(run=str(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_one_bar_with_the_numbers(script, tmp_path):
    import pexpect

    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    child = pexpect.spawn(
        sys.executable, [str(tmp_path / "script.py")], dimensions=(24, 100), encoding="utf-8"
    )
    child.expect(pexpect.EOF, timeout=120)
    child.close()
    shown = child.before
    assert child.exitstatus == 0, shown
    for words in ("training starts", "step 20 of 20, done", "━━━", "tokens/s", "GB of memory"):
        assert words in shown
    assert "10.2k tokens seen" in shown
    assert "step 10/20: loss" not in shown  # the bar says it
    assert "step 10/20: loss" in (tmp_path / "training.log").read_text()


def test_without_a_terminal_there_are_lines(script, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout
    assert "step 10/20: loss" in shown and "step 20: 法国的首都是 → 巴黎" in shown
    assert "\x1b" not in shown


def test_a_notebook_gets_one_picture_that_is_replaced(script, tmp_path):
    """In a real kernel; what the front end receives is written down."""
    import nbformat
    from nbclient import NotebookClient

    messages = []

    class Listener(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            messages.append(msg)
            return super().process_message(msg, cell, cell_index)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(script)])
    client = Listener(notebook, timeout=120)
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, *client.km.kernel_spec.argv[1:]]
    client.execute()
    pictures = [
        (msg["msg_type"], msg["content"]["transient"].get("display_id"), msg["content"]["data"])
        for msg in messages
        if "image/png" in msg["content"].get("data", {})
    ]
    kinds = [kind for kind, _, _ in pictures]
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"}
    assert len({display for _, display, _ in pictures}) == 1
    assert pictures[-1][2]["text/plain"].startswith("step 20 of 20, done")
    outputs = notebook.cells[0].outputs
    kept = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(kept) == 1 and kept[0]["data"] == pictures[-1][2]  # the last state is what stays
    text = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "training starts" in text and "step 10/20: loss" not in text and "巴黎" not in text
    assert "Writing model" not in text
    samples = [o["data"]["text/plain"] for o in outputs if "巴黎" in str(o.get("data"))]
    assert len(samples) == 1 and samples[0].splitlines()[0] == "法国的首都是"
    button = "No Stop button" if callbacks.button_problem() else "widget-view"
    assert any(button in str(output.get("data")) for output in outputs)
    assert not any("text/html" in output.get("data", {}) for output in outputs)


# --- stopping (real signals: test_kill_and_resume.py) ------------------------------------------


def test_a_stop_file_from_before_does_not_stop_the_next_run(tmp_path, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    (tmp_path / "STOP").touch()
    stop = callbacks.StopCallback(tmp_path / "STOP")
    state, control = TrainerState(max_steps=9), TrainerControl()
    stop.on_train_begin(None, state, control)
    stop.on_step_end(None, state, control)
    stop.close()
    assert not control.should_training_stop
    assert "left from before" in caplog.text


def test_anyone_may_ask_and_the_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = callbacks.StopCallback()
    state, control = TrainerState(max_steps=9), TrainerControl()
    stop.on_train_begin(None, state, control)
    assert signal.getsignal(signal.SIGINT) != before[0]
    thread = threading.Thread(target=stop.ask, args=("a thread",))
    thread.start()
    thread.join()
    stop.on_step_end(None, state, control)
    assert control.should_training_stop and control.should_save
    assert control.should_evaluate and control.should_log
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_outside_the_main_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    stop = callbacks.StopCallback()
    thread = threading.Thread(target=stop.on_train_begin, args=(None, TrainerState(), None))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before
    stop.close()


@pytest.mark.skipif(bool(callbacks.button_problem()), reason=str(callbacks.button_problem()))
def test_a_click_reaches_a_busy_kernel():
    """A real kernel that is busy, and the messages that JupyterLab sends for a click."""
    from jupyter_client.manager import start_new_kernel

    code = (
        "import time\nfrom tinytrain.callbacks import StopCallback\n"
        "stop = StopCallback(button=True)\nstop._show_button()\n"
        "end = time.time() + 20\n"
        "while time.time() < end and not stop.reason: time.sleep(0.05)\n"
        "print('asked by', stop.reason)"
    )
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(code)
        comm, printed = None, ""
        while "asked by" not in printed:
            msg = client.get_iopub_msg(timeout=30)
            content = msg["content"]
            if msg["msg_type"] == "comm_open":
                if content["data"]["state"].get("description") == "Stop":
                    comm = content["comm_id"]
            elif "widget-view" in str(content.get("data")):  # now it can be clicked
                client.control_channel.send(client.session.msg("create_subshell_request"))
                reply = client.get_control_msg(timeout=10)["content"]
                data = {"method": "custom", "content": {"event": "click"}}
                click = client.session.msg("comm_msg", {"comm_id": comm, "data": data})
                click["header"]["subshell_id"] = reply["subshell_id"]
                client.shell_channel.send(click)
            elif msg["msg_type"] == "stream":
                printed += content["text"]
            elif msg["msg_type"] == "error":
                raise AssertionError("\n".join(content["traceback"]))
        assert printed.strip() == "asked by the Stop button"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_where_a_click_cannot_arrive_it_is_said(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VSCODE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(callbacks.importlib.metadata, "version", lambda name: "7.4.0")
    assert callbacks.button_problem() is None
    monkeypatch.setenv("VSCODE_PID", "1")
    assert "VS Code" in callbacks.button_problem()
    monkeypatch.setattr(callbacks.importlib.metadata, "version", lambda name: "6.17.1")
    assert (
        callbacks.button_problem() == "ipykernel 6.17.1 hears no widget while a cell runs (7 does)"
    )


def test_the_trainers_own_metrics_are_left_alone():
    metrics = {"eval_loss": 1.0, "eval_runtime": 2.0}
    callbacks.VerboseTrainingCallback(8).on_evaluate(None, TrainerState(), None, metrics=metrics)
    assert json.dumps(metrics) == '{"eval_loss": 1.0, "eval_runtime": 2.0}'


def test_our_callbacks_replace_the_trainers_displays(run):
    names = {type(callback).__name__ for callback in run[2].callback_handler.callbacks}
    assert isinstance(run[2], Trainer)
    assert not names & {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "1 min 15 s"), (3599.7, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert callbacks.format_seconds(seconds) == text
