import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import TrainerCallback, TrainerState

from tinytrain import callbacks, steps
from tinytrain.callbacks.plot import _LossPlot, _plot_history, _smooth
from tinytrain.checkpoints import train
from tinytrain.common import setup_logging
from tinytrain.generation import complete
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
        callbacks.LivePlotCallback(folder / "loss.png", 1024, tokens),
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
    verbose.on_train_begin(None, state, None, model=torch.nn.Linear(1, 1))
    for state.global_step in range(1, 31):
        verbose.on_log(None, state, None, logs={"loss": 2.0, "learning_rate": 0.1})
    told = [r.getMessage().split(":")[0] for r in caplog.records if "loss" in r.getMessage()]
    assert told == ["step 1/30", "step 30/30"]
    assert verbose.train_loss == [2.0] * 30


def test_history_holds_what_the_trainer_logged_and_ends_with_the_run(run, smoke):
    folder, _, trainer = run
    history = callbacks.read_history(folder / "history.jsonl")
    for name, count in (("loss", 10), ("eval_loss", 2)):
        expected = [(x["step"], x[name]) for x in trainer.state.log_history if name in x]
        assert [(x["step"], x[name]) for x in history if name in x] == expected
        assert len(expected) == count
    assert history[-1]["tokens"] == 20 * smoke.recipe.tokens_per_step
    assert history[-1]["end"] == "finished"
    seconds = [line["seconds"] for line in history]
    assert seconds == sorted(seconds)
    trainer.evaluate()
    assert callbacks.read_history(folder) == history


def test_the_plot_is_kept_as_a_picture_and_is_the_only_display(run):
    picture = imread(run[0] / "loss.png")
    assert picture.shape[:2] == (480, 768)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::7]}) > 5  # it shows something
    names = {type(callback).__name__ for callback in run[2].callback_handler.callbacks}
    assert not names & {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback"}


def test_history_of_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "history.jsonl"
    steps_and_seconds = ((0, 0), (10, 10), (20, 20), (30, 20))
    lines = [{"step": step, "seconds": seconds} for step, seconds in steps_and_seconds]
    lines.append({"step": 20, "seconds": 20, "end": "stopped"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = callbacks.HistoryCallback(path, tokens_per_step=8)
    state = TrainerState(global_step=20)
    history.on_train_begin(None, state, None)
    state.global_step = 30
    history.on_log(None, state, None, logs={"loss": 1.0})
    lines = callbacks.read_history(path)
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    assert lines[-1]["seconds"] >= 20  # the time of the earlier sitting counts


def test_a_run_from_the_start_replaces_the_history(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "lo')  # still being written
    assert callbacks.read_history(path) == [{"step": 10, "loss": 2.0}]
    history = callbacks.HistoryCallback(path, tokens_per_step=8, name="mine")
    history.on_train_begin(None, TrainerState(), None)
    (first,) = callbacks.read_history(path)
    assert first["step"] == 0 and first["name"] == "mine"


def test_smoothing_keeps_a_constant_and_follows_a_fall():
    assert _smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    smoothed = _smooth([8.0] * 10 + [2.0] * 30)
    assert smoothed[9] == pytest.approx(8.0)
    assert smoothed[-1] == pytest.approx(2.0, abs=0.02)
    assert all(earlier >= later for earlier, later in zip(smoothed, smoothed[1:], strict=False))
    assert _smooth([]) == []


def fits(figure):
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


HISTORY = [
    {"step": 0, "max_steps": 4, "tokens_per_step": 512, "vocab_size": 4096, "name": "mine"},
    {"step": 1, "tokens": 512, "seconds": 1.0, "loss": 8.0, "learning_rate": 0.1},
    {"step": 2, "tokens": 1024, "seconds": 2.0, "loss": 7.0, "learning_rate": 0.05},
    {"step": 2, "tokens": 1024, "seconds": 2.5, "eval_loss": 7.5},
]


def test_plot_shows_the_curves_and_the_loss_of_a_uniform_guess():
    figure = _plot_history(HISTORY).figure
    loss, rate = figure.axes
    raw, smoothed, held_out, uniform = loss.lines
    assert list(raw.get_ydata()) == [8, 7]
    assert list(smoothed.get_ydata()) == pytest.approx(_smooth([8, 7]))
    assert list(held_out.get_xdata()) == [2] and list(held_out.get_ydata()) == [7.5]
    assert uniform.get_ydata()[0] == pytest.approx(8.318, abs=1e-3)
    assert uniform.get_label() == "uniform guess: ln(4,096) = 8.32"
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05]
    assert rate.get_xlim() == (0, 4) and rate.get_ylim()[1] > 0.1
    assert fits(figure)
    low, high = loss.get_ylim()
    assert low < 7 and high > 8.318
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["mine: step 2 of 4", "train 7.000 · held-out 7.500 · 2 s of training"]
    ticks = [label.get_text() for label in rate.get_xticklabels()]
    assert "2\n1.02k" in ticks  # steps, and tokens under them
    start = {"step": 0, "max_steps": 0, "seconds": 0.0}
    assert _plot_history([start]).figure.texts[0].get_text() == "step 0 of 0"


def test_a_loss_that_is_not_finite_is_a_gap():
    plot = _LossPlot()
    plot.add([{"step": step, "loss": loss} for step, loss in enumerate([8.0, math.inf, 6.0])])
    plot.update("", "", 3)
    raw, smoothed, _ = plot.figure.axes[0].lines
    assert np.isnan(raw.get_ydata()).tolist() == [False, True, False]
    assert np.isfinite(smoothed.get_ydata()).all() and plot.png()


def test_ten_thousand_points_make_no_larger_picture_than_a_thousand(tmp_path):
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 4096, 512)
    state = TrainerState(max_steps=10_000)
    plot.on_train_begin(None, state, None)
    sizes, objects = [], []
    for last in (1000, 10_000):
        for step in range(state.global_step + 1, last + 1):
            line = {"step": step, "loss": 9 - step / 2000 + step % 7 / 10, "learning_rate": 0.1}
            state.log_history.append(line)
        state.global_step = last
        plot._draw()
        sizes.append(plot.path.stat().st_size)
        objects.append(len(plot._plot.figure.findobj()))
    plot.close()
    assert sizes[1] < 1.5 * sizes[0] and objects[1] == objects[0]


def test_drawing_waits_and_the_last_state_is_always_drawn(tmp_path, monkeypatch):
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8, seconds=1000)
    drawings = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda: drawings.append(plot._state.global_step) or draw())
    state = TrainerState(max_steps=50, log_history=[{"step": 0, "loss": 3.0}])  # a resumed run's
    plot.on_train_begin(None, state, None)
    assert list(plot._plot.figure.axes[0].lines[0].get_ydata()) == [3.0]
    for state.global_step in range(1, 51):
        plot.on_step_begin(None, state, None)
    assert drawings == [0]
    plot.on_train_end(None, state, None)
    assert drawings == [0, 50]
    headline, details = (text.get_text() for text in plot._plot.figure.texts)
    assert headline.endswith("done") and "400 tokens seen" in details
    plot.close()
    assert drawings == [0, 50]  # once is enough


def test_drawing_takes_no_more_than_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """With a clock that we turn, and drawings that take 50 of its milliseconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8)

    def slow(self):
        now[0] += 0.05
        return b"png"

    monkeypatch.setattr(_LossPlot, "png", slow)
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
    assert plot._plot.figure.texts[0].get_text().startswith("step 5 of 20")
    assert plot.path.read_bytes() == plot._plot.png()


def test_a_drawing_before_a_kept_background_is_the_whole_drawing():
    """Faster, and the same to the last pixel as a figure drawn as a whole."""
    plot = _LossPlot(4096, 512)
    plot.add(HISTORY[:2])
    plot.update("first", "line", 4)
    plot.png()
    plot.add(HISTORY[2:])
    plot.update("second", "other line", 4)
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
    assert list(lines["seed"].get_ydata()) == pytest.approx(_smooth([8, 7]))
    assert list(lines["wiki"].get_ydata()) == pytest.approx(_smooth([4, 3.5]))
    assert lines["seed"].get_xdata()[-1] == last
    assert lines["seed"].get_color() != lines["wiki"].get_color()
    assert fits(figure)
    with pytest.raises(ValueError, match="tokens, seconds, step"):
        callbacks.plot_runs(paths, x="epochs")


def test_the_reference_is_that_of_the_pocket_recipe_and_no_other():
    reference = steps.reference_curve(replace(RECIPES["pocket"], seed=7, logging_steps=1))
    assert len(reference["seeds"]) >= 4
    band = reference["train"]
    assert band["step"][-1] == RECIPES["pocket"].max_steps
    for low, mean, high in zip(band["low"], band["mean"], band["high"], strict=True):
        assert low <= mean <= high
    for name in ("smoke", "seed", "wiki"):
        assert steps.reference_curve(RECIPES[name]) is None
    assert steps.reference_curve(replace(RECIPES["pocket"], learning_rate=1e-3)) is None


@pytest.mark.parametrize(
    ("shift", "words"), [(0, ": normal"), (1, "higher than usual"), (-1, "lower than usual")]
)
def test_is_this_normal(shift, words):
    reference = steps.reference_curve(RECIPES["pocket"])
    band = reference["train"]
    rows = zip(band["step"][:100], band["mean"][:100], strict=True)
    history = [{"step": step, "loss": loss + shift} for step, loss in rows]
    assert words in callbacks.is_this_normal(history, reference)
    assert "nothing to compare" in callbacks.is_this_normal([], reference)


def test_the_plot_shows_the_reference_behind_the_curve():
    axes = _LossPlot(reference=steps.reference_curve(RECIPES["pocket"])).figure.axes[0]
    (band,) = axes.collections
    assert "other seeds" in band.get_label()
    assert band.get_zorder() < axes.lines[0].get_zorder()


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


def test_a_resumed_run_keeps_its_samples_and_shows_few(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = '{"step": %d, "texts": ["<b>\\n字\u2028。"]}\n'  # U+2028 ends no line of JSON
    path.write_text("".join(sample % step for step in range(1, 31)), encoding="utf-8")
    samples = callbacks.SampleCallback(lambda model, prompts: ["新"], ["问"], 5, path)
    state = TrainerState(global_step=28)
    samples.on_train_begin(None, state, None)
    samples.on_train_end(None, state, None)
    assert [json.loads(line)["step"] for line in path.open()] == list(range(1, 29))
    shown = [row.split(maxsplit=1) for row in samples.table().splitlines()[1:]]
    assert shown == [[str(step), "<b> 字 。"] for step in (1, 4, 7, 10, 13, 16, 19, 22, 25, 28)]
    state.global_step = 30
    samples.on_step_end(None, state, None)
    assert samples.table().splitlines()[-1].endswith("30  新")
    with pytest.raises(ValueError, match="at least 1"):
        callbacks.SampleCallback(lambda: None, [], 0, path)


# --- notebook and terminal ---------------------------------------------------------------------

TRAINING = """
import sys
from datasets import load_from_disk
from transformers import Qwen2Config
from tinytrain import callbacks, steps
from tinytrain.callbacks.plot import _LossPlot, _plot_history, _smooth
from tinytrain.common import setup_logging
from tinytrain.modeling import build_model
from tinytrain.recipes import RECIPES
from tinytrain.checkpoints import train
from tinytrain.training import build_trainer, training_arguments
run = {run!r}
setup_logging(run + "/training.log")
blocks = load_from_disk(run + "/blocks")
watching = [
    callbacks.HistoryCallback(run + "/history.jsonl", 512),
    callbacks.VerboseTrainingCallback(512, seconds=0),
    callbacks.LivePlotCallback(run + "/loss.png", 1024, 512, seconds=0.1),
    callbacks.SampleCallback(lambda model, prompts: ["巴黎"], ["法国的首都是"], 10, run + "/text"),
    callbacks.StopCallback(run + "/STOP"),
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
    for words in ("training starts", "| 20/20 [", "step/s, train ", "held-out ", " tokens/s]"):
        assert words in shown
    assert re.search(r"[\r\n] *\r?[\d-]+ [\d:]+ - INFO: training ends", shown)  # above the bar
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
    assert not any("text/html" in output.get("data", {}) for output in outputs)


# --- stopping (real processes: test_kill_and_resume.py) ----------------------------------------


@pytest.fixture
def heard():
    """Signals that arrive at the handlers from before the training."""
    heard, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: heard.append(number)) for number in numbers]
    yield heard
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class AtStep(TrainerCallback):
    """Does something in the second step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.action()


def raise_both(heard):
    heard.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    return heard == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("evaluates", ["steps", "no"])
def test_a_signal_ends_a_plain_trainer_in_good_order(
    plain_trainer, tmp_path, heard, number, evaluates
):
    saved = []  # what there is when the signal takes its course
    signal.signal(signal.SIGTERM, lambda *_: saved.extend(tmp_path.glob("*/model.safetensors")))
    stop = callbacks.StopCallback()
    watching = [AtStep(lambda: signal.raise_signal(number)), stop]
    trainer = plain_trainer(watching, eval_strategy=evaluates, eval_steps=10)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [path.parent.name for path in tmp_path.glob("*/model.safetensors")] == ["checkpoint-2"]
    evaluated = any("eval_loss" in line for line in trainer.state.log_history)
    assert evaluated == (number == signal.SIGINT and evaluates == "steps")
    for _ in range(2):
        assert len(saved) == (number == signal.SIGTERM)  # once, without a close and with it
        stop.close()
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    assert raise_both(heard)


def test_signals_are_as_before_when_a_plain_trainer_has_finished_or_failed(plain_trainer, heard):
    stop = callbacks.StopCallback()
    plain_trainer([stop]).train()
    assert raise_both(heard)
    trainer = plain_trainer([stop, AtStep(lambda: 1 / 0)])
    for _ in range(2):  # the second begins where the first has left its handlers
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGINT, signal.SIGTERM] * 2 and stop.reason is None
    # Another one that trains is not stopped by a callback that it does not have.
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    other = plain_trainer([AtStep(lambda: signal.raise_signal(signal.SIGINT))])
    other.train()
    assert heard[-1] == signal.SIGINT and stop.reason is None and other.state.global_step == 4
    assert raise_both(heard)


def test_a_second_interrupt_stops_a_plain_trainer_at_once(plain_trainer, heard):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop = callbacks.StopCallback()
    with pytest.raises(KeyboardInterrupt, match="a second time"):
        plain_trainer([AtStep(twice), stop]).train()
    assert raise_both(heard)


def test_a_stop_file_from_before_does_not_stop_the_next_run(plain_trainer, tmp_path, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    (tmp_path / "STOP").touch()
    stop = callbacks.StopCallback(tmp_path / "STOP")
    trainer = plain_trainer([stop])
    trainer.train()
    assert trainer.state.global_step == 4 and "left from before" in caplog.text


def test_any_thread_may_ask_and_train_outside_the_main_one(plain_trainer, heard):
    before = signal.getsignal(signal.SIGINT)
    stop = callbacks.StopCallback()
    trainer = plain_trainer([AtStep(lambda: stop.ask("a friend")), stop])
    thread = threading.Thread(target=trainer.train)
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) == before
        thread.join(0.1)
    assert trainer.state.global_step == 2 and stop.reason == "a friend"
