import io
import json
import math
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matplotlib.image import imread
from transformers import TrainerCallback, TrainerState

from tinytrain import callbacks, steps
from tinytrain.callbacks.plot import _LossPlot
from tinytrain.checkpoints import train
from tinytrain.common import append_json_line, format_count, setup_logging, write_json_lines
from tinytrain.generation import complete
from tinytrain.recipes import RECIPES

SIGHUP = getattr(signal, "SIGHUP", getattr(signal, "SIGBREAK", None))


@pytest.fixture(scope="module")
def run(smoke, small_trainer, tmp_path_factory):
    """A real, short training run with all callbacks that show something."""
    folder = tmp_path_factory.mktemp("run")
    setup_logging(folder / "training.log")
    tokens = smoke.recipe.tokens_per_step
    write = partial(complete, tokenizer=smoke.tokenizer, max_new_tokens=4)
    watching = [
        callbacks.VerboseTrainingCallback(tokens, seconds=1000),
        callbacks.HistoryCallback(folder / "history.jsonl", tokens, vocab_size=1024, name="smoke"),
        callbacks.LivePlotCallback(folder / "loss.png", 1024, tokens),
        callbacks.SampleCallback(write, ["法国", "北京"], 8, folder / "samples.jsonl"),
    ]
    trainer = small_trainer(folder / "checkpoints", watching)
    trainer.train()
    return folder, watching, trainer


@pytest.fixture
def heard():
    """Signals that arrive at the handlers from before the training."""
    heard, numbers = [], (signal.SIGINT, signal.SIGTERM, SIGHUP)
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


def test_messages_and_history_tell_the_course(run, smoke):
    folder, (verbose, *_), trainer = run
    log = (folder / "training.log").read_text(encoding="utf-8")
    for words in (
        f"training starts: {trainer.model.num_parameters():,} parameters, 20 steps",
        "epoch 1 of",
        "tokens/s",
        "step 20: held-out loss",
        "training ends at step 20",
    ):
        assert words in log
    # Messages about the loss keep a distance; the first and the last always come.
    assert re.findall(r"step (\d+)/20: loss .* left", log) == ["2", "20"]

    history = callbacks.read_history(folder / "history.jsonl")
    for name, count in (("loss", 10), ("eval_loss", 2)):
        expected = [(x["step"], x[name]) for x in trainer.state.log_history if name in x]
        assert [(x["step"], x[name]) for x in history if name in x] == expected
        assert len(expected) == count
    assert verbose.train_loss == [line["loss"] for line in history if "loss" in line]
    assert history[-1]["tokens"] == 20 * smoke.recipe.tokens_per_step
    assert history[-1]["end"] == "finished"
    seconds = [line["seconds"] for line in history]
    assert seconds == sorted(seconds)
    trainer.evaluate()
    assert callbacks.read_history(folder) == history


def test_a_resumed_run_goes_on_in_its_history_and_a_new_one_replaces_it(tmp_path):
    path = tmp_path / "history.jsonl"
    steps_and_seconds = ((0, 0), (10, 10), (20, 20), (30, 20))
    lines = [{"step": step, "seconds": seconds} for step, seconds in steps_and_seconds]
    damaged = {"stup": 20, "seconds": 20}
    write_json_lines(path, [*lines, damaged, {"step": 20, "seconds": 20, "end": "stopped"}])
    history = callbacks.HistoryCallback(path, tokens_per_step=8, name="mine")
    state = TrainerState(global_step=20)
    history.on_train_begin(None, state, None)
    state.global_step = 30
    history.on_log(None, state, None, logs={"loss": 1.0})
    lines = callbacks.read_history(path)
    assert [line["step"] for line in lines] == [0, 10, 20, 30]  # none twice
    assert lines[-1]["seconds"] >= 20  # the time of the earlier sitting counts
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # still being written
    assert callbacks.read_history(path) == lines
    history.on_train_begin(None, TrainerState(), None)
    (first,) = callbacks.read_history(path)
    assert first["step"] == 0 and first["name"] == "mine"


@pytest.mark.parametrize(
    ("rows", "overrides", "expected"),
    [
        # Of 7 rows 6 and 1, and again; all at once; twice 3, leaving one out; more than are needed.
        (7, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, [6, 7, 13, 14]),
        (7, {"gradient_accumulation_steps": 100}, [7, 14, 21, 28]),
        (7, {"dataloader_drop_last": True, "per_device_train_batch_size": 3}, [3, 6, 9, 12]),
        (100, {}, [2, 4, 6, 8]),
    ],
)
def test_the_tokens_are_those_that_were_seen(
    smoke, plain_trainer, tmp_path, rows, overrides, expected
):
    """Counted by the Trainer itself too; short steps are not whole ones."""
    history = callbacks.HistoryCallback(tmp_path / "history.jsonl", 8 * 64)  # for another batch
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png")
    trainer = plain_trainer([history, plot], include_num_input_tokens_seen="all", **overrides)
    trainer.train_dataset = smoke.blocks["train"].select(range(rows))
    trainer.train()
    lines = [line for line in callbacks.read_history(history.path) if "loss" in line]
    assert [line["tokens"] for line in lines] == [64 * seen for seen in expected]
    assert trainer.state.num_input_tokens_seen == 64 * expected[-1]
    details = plot._plot.figure.texts[1].get_text()
    assert f"{format_count(64 * expected[-1])} tokens seen" in details


# --- the plot ----------------------------------------------------------------------------------


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
SMOOTHED = [8, 7]  # too few to smooth


def test_plot_shows_the_curves_and_the_loss_of_a_uniform_guess(tmp_path):
    path = tmp_path / "history.jsonl"
    write_json_lines(path, HISTORY)
    figure = callbacks.replay(path)
    loss, rate = figure.axes
    raw, smoothed, held_out, uniform = loss.lines
    assert list(raw.get_ydata()) == [8, 7]
    assert list(smoothed.get_ydata()) == pytest.approx(SMOOTHED)
    assert list(held_out.get_xdata()) == [2] and list(held_out.get_ydata()) == [7.5]
    assert uniform.get_ydata()[0] == pytest.approx(8.318, abs=1e-3)
    assert uniform.get_label() == "uniform guess: ln(4,096) = 8.32"
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05]
    assert rate.get_xlim() == (0, 4) and rate.get_ylim()[1] > 0.1
    assert fits(figure)
    assert loss.get_ylim()[0] < 7 and loss.get_ylim()[1] > 8.318
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["mine: step 2 of 4", "train 7.000 · held-out 7.500 · 2 s of training"]
    ticks = [label.get_text() for label in rate.get_xticklabels()]
    assert "2\n1.02k" in ticks  # steps, and tokens under them
    counted = {"counting tokens": 5.1, "counting pairs": 3.2}
    write_json_lines(path, [HISTORY[0] | {"lines": counted}, *HISTORY[1:]])
    drawn = {line.get_label(): line.get_ydata()[0] for line in callbacks.replay(path).axes[0].lines}
    assert drawn["counting tokens: 5.10"] == 5.1 and drawn["counting pairs: 3.20"] == 3.2
    write_json_lines(path, [{"step": 0, "max_steps": 0, "seconds": 0.0}])
    assert callbacks.replay(path).texts[0].get_text() == "step 0 of 0"


def test_the_axis_follows_a_loss_that_falls():
    plot, history = _LossPlot(4096), []
    for step, loss in enumerate((8.3, 6.1, 2.2)):
        history.append({"step": step, "loss": loss})
        plot.update(history, "", [], 3)
        low, high = plot.figure.axes[0].get_ylim()
        assert low <= loss < low + 2 and high == 9


def test_the_plot_is_kept_as_a_picture_is_the_only_display_and_can_be_replayed(run):
    folder, _, trainer = run
    picture = imread(folder / "loss.png")
    assert picture.shape[:2] == (480, 768)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::7]}) > 5  # it shows something
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert not names & {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback"}
    figure = callbacks.replay(folder)
    assert figure.texts[0].get_text() == "smoke: step 20 of 20, finished"
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert list(figure.axes[0].lines[0].get_ydata()) == logged


def test_a_loss_that_is_not_finite_is_a_gap():
    plot = _LossPlot()
    history = [{"step": step, "loss": loss} for step, loss in enumerate([8.0, math.inf, 6.0])]
    plot.update(history, "", [], 3)
    raw, smoothed, _ = plot.figure.axes[0].lines
    assert np.isnan(raw.get_ydata()).tolist() == [False, True, False]
    assert np.isfinite(smoothed.get_ydata()).all() and plot.png()


def test_the_smoothed_line_does_not_lag_behind_a_falling_loss():
    plot = _LossPlot()
    falling = [9.0 - step / 10 + (-1) ** step for step in range(40)]
    plot.update([{"step": step, "loss": loss} for step, loss in enumerate(falling)], "", [], 40)
    smoothed = plot.figure.axes[0].lines[1].get_ydata()
    off = np.array(smoothed) - [9.0 - step / 10 for step in range(40)]
    assert abs(off[4:-4]).max() < 0.2 and abs(off).max() <= 1


def test_ten_thousand_points_make_no_larger_picture_than_a_thousand():
    plot, sizes = _LossPlot(4096, 512), []
    for steps_made in (range(1, 1001), range(1, 10_001)):
        losses = [(step, 9 - step / 2000 + step % 7 / 10) for step in steps_made]
        history = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in losses]
        plot.update(history, "", [], 10_000)
        sizes.append(len(plot.png()))
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize(
    ("seconds", "early", "least", "most"), [(1.5, 5, 170, 200), (100, 1, 10, 12)]
)
def test_drawing_takes_no_more_than_a_hundredth_of_the_time_and_ends_with_the_last_state(
    tmp_path, monkeypatch, seconds, early, least, most
):
    """With a clock that we turn, and drawings that take 50 of its milliseconds."""
    now, drawn = [0.0], []
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8, seconds=seconds)
    state = TrainerState(max_steps=10_000, log_history=[{"step": 0, "loss": 3.0}])  # of before

    def slow(self):
        now[0] += 0.05
        drawn.append(state.global_step)
        return b"png"

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_LossPlot, "png", slow)
    plot.on_train_begin(None, state, None)
    assert list(plot._plot.figure.axes[0].lines[0].get_ydata()) == [3.0]
    for state.global_step in range(1, 10_001):
        now[0] += 0.1
        plot.on_step_begin(None, state, None)
    plot.on_train_end(None, state, None)
    plot.close()  # once is enough
    assert sum(step <= 100 for step in drawn) >= early  # at first they come quickly
    assert least <= len(drawn) <= most
    assert plot.drawing_seconds <= 0.01 * now[0]
    assert drawn[0] == 0 and drawn[-1] == 10_000 > drawn[-2]
    headline, details = (text.get_text() for text in plot._plot.figure.texts)
    assert headline.endswith("done") and "80k tokens seen" in details


def test_the_last_state_is_drawn_when_training_breaks_off(small_trainer, tmp_path, heard):
    """Before a SIGTERM takes its course, for which the callback named last waits."""

    def fail():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    drawn = []
    signal.signal(signal.SIGTERM, lambda *_: drawn.append(plot.path.read_bytes()))
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 1024, 512, seconds=1000)
    with pytest.raises(ZeroDivisionError):
        train(
            small_trainer(tmp_path / "checkpoints", [plot, AtStep(fail), callbacks.StopCallback()])
        )
    assert plot._plot.figure.texts[0].get_text().startswith("step 1 of 20")
    assert drawn == [plot._plot.png()]


def test_a_drawing_before_a_kept_background_is_the_whole_drawing():
    """Faster, and the same to the last pixel as a figure drawn as a whole."""
    plot = _LossPlot(4096, 512)
    plot.update(HISTORY[:2], "first", ["line"], 4)
    plot.png()
    plot.update(HISTORY, "second", ["other line"], 4)
    fast = imread(io.BytesIO(plot.png()))[..., :3]
    plot.figure.canvas.draw()
    slow = np.asarray(plot.figure.canvas.buffer_rgba())[..., :3] / 255
    # Lines lie above the legend in one and below it in the other: nothing else may differ.
    assert (np.abs(fast - slow).max(-1) > 0.1).mean() < 0.002


def test_replay_follows_a_run_until_its_end(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run has written its history there"):
        callbacks.replay(tmp_path)
    path = tmp_path / "history.jsonl"
    write_json_lines(path, HISTORY)
    more = [{**HISTORY[2], "step": 3, "loss": 6.0}, {"step": 3, "seconds": 4, "end": "stopped"}]

    for seconds, line in zip((0.2, 0.4), more, strict=True):
        threading.Timer(seconds, append_json_line, (path, line)).start()
    figure = callbacks.replay(path, follow=True, seconds=0.02)
    assert figure.texts[0].get_text() == "mine: step 3 of 4, stopped"
    assert list(figure.axes[0].lines[0].get_ydata()) == [8, 7, 6]


def test_runs_are_drawn_over_one_another(tmp_path):
    paths = {"seed": tmp_path / "seed.jsonl", "wiki": tmp_path / "wiki.jsonl"}
    write_json_lines(paths["seed"], HISTORY)
    halved = [line | {"loss": line["loss"] / 2} if "loss" in line else line for line in HISTORY]
    write_json_lines(paths["wiki"], halved)
    figure = callbacks.plot_runs(paths)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["seed"].get_ydata()) == pytest.approx(SMOOTHED)
    assert list(lines["wiki"].get_ydata()) == pytest.approx([loss / 2 for loss in SMOOTHED])
    assert lines["seed"].get_xdata()[-1] == 1024
    assert lines["seed"].get_color() != lines["wiki"].get_color()
    assert fits(figure)


def test_a_run_is_compared_with_other_seeds_of_the_pocket_recipe():
    reference = steps.reference_curve(replace(RECIPES["pocket"], seed=7, logging_steps=1))
    assert len(reference["seeds"]) >= 4
    band = reference["train"]
    assert band["step"][-1] == RECIPES["pocket"].max_steps
    for low, mean, high in zip(band["low"], band["mean"], band["high"], strict=True):
        assert low <= mean <= high
    for name in ("smoke", "seed", "wiki"):
        assert steps.reference_curve(RECIPES[name]) is None
    assert steps.reference_curve(replace(RECIPES["pocket"], learning_rate=1e-3)) is None
    axes = _LossPlot(reference=reference).figure.axes[0]
    (drawn,) = axes.collections
    assert "other seeds" in drawn.get_label()
    assert drawn.get_zorder() < axes.lines[0].get_zorder()

    rows = list(zip(band["step"][:100], band["mean"][:100], strict=True))
    for shift, words in ((0, ": normal"), (1, "higher than usual"), (-1, "lower than usual")):
        history = [{"step": step, "loss": loss + shift} for step, loss in rows]
        assert words in callbacks.is_this_normal(history, reference)
    assert "nothing to compare" in callbacks.is_this_normal([], reference)


# --- samples -----------------------------------------------------------------------------------


def test_samples_are_taken_every_so_many_steps_and_at_the_end(run, smoke):
    _, (*_, samples), trainer = run
    lines = callbacks.read_history(samples.path)
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert lines[-1]["texts"] == complete(trainer.model, smoke.tokenizer, ["法国", "北京"], 4)
    table = samples.table().splitlines()
    assert table[0] == "法国" and table[5] == "北京"
    assert [row.split()[0] for row in table[1:4]] == ["8", "16", "20"]


def test_a_resumed_run_keeps_its_samples_and_shows_few(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = '{"step": %d, "texts": ["<b>\\n字\u2028。"]}\n'  # U+2028 ends no line of JSON
    path.write_text("".join(sample % n for n in range(1, 31)), encoding="utf-8")
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


# --- in a notebook


@pytest.fixture
def script(smoke, tmp_path, monkeypatch):
    """Code that trains in a folder of its own, where only the text is prepared."""
    earlier = shutil.ignore_patterns("*.lock", "history.jsonl", "checkpoints*", "model")
    shutil.copytree(smoke.runs, tmp_path / "runs", ignore=earlier)
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))
    return "from tinytrain import recipes, runs\n_ = runs.train_recipe(recipes.RECIPES['smoke'])"


def test_a_notebook_gets_one_picture_that_is_replaced(script):
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
    pictures = [msg for msg in messages if "image/png" in msg["content"].get("data", {})]
    kinds = [msg["msg_type"] for msg in pictures]
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"}
    assert len({msg["content"]["transient"].get("display_id") for msg in pictures}) == 1
    last = pictures[-1]["content"]["data"]
    assert last["text/plain"].startswith("step 20 of 20, done")
    outputs = notebook.cells[0].outputs
    kept = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(kept) == 1 and kept[0]["data"] == last  # the last state is what stays
    text = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "training starts" in text and "step 20/20: loss" not in text and "→" not in text
    assert "Writing model" not in text
    shown = [output["data"]["text/plain"] for output in outputs if "data" in output]
    assert len([table for table in shown if table.startswith("法国的首都是\n")]) == 1
    assert not any("text/html" in output.get("data", {}) for output in outputs)


# --- stopping (real processes: test_kill_and_resume.py) ----------------------------------------


def raise_both(heard):
    heard.clear()
    for number in (signal.SIGINT, signal.SIGTERM, SIGHUP):
        signal.raise_signal(number)
    return heard == [signal.SIGINT, signal.SIGTERM, SIGHUP]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, SIGHUP])
@pytest.mark.parametrize("evaluates", ["steps", "no"])
def test_a_signal_ends_a_plain_trainer_in_good_order(
    plain_trainer, tmp_path, heard, number, evaluates
):
    saved = []  # what there is when the signal takes its course
    if number != signal.SIGINT:
        signal.signal(number, lambda *_: saved.extend(tmp_path.glob("*/model.safetensors")))
    stop = callbacks.StopCallback()
    watching = [AtStep(lambda: signal.raise_signal(number)), stop]
    trainer = plain_trainer(watching, eval_strategy=evaluates, eval_steps=10)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [path.parent.name for path in tmp_path.glob("*/model.safetensors")] == ["checkpoint-2"]
    evaluated = any("eval_loss" in line for line in trainer.state.log_history)
    assert evaluated == (number == signal.SIGINT and evaluates == "steps")
    for _ in range(2):
        assert len(saved) == (number != signal.SIGINT)  # once, without a close and with it
        stop.close()
    signal.signal(number, lambda number, _: heard.append(number))
    assert raise_both(heard)


def test_signals_are_as_before_when_a_plain_trainer_has_failed(plain_trainer, heard):
    stop = callbacks.StopCallback()
    trainer = plain_trainer([stop, AtStep(lambda: 1 / 0)])
    for _ in range(2):  # the second begins where the first has left its handlers
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    # Another one that trains is not stopped by a callback that it does not have.
    other = plain_trainer([AtStep(lambda: signal.raise_signal(signal.SIGINT))])
    other.train()
    assert heard[-1] == signal.SIGINT and stop.reason is None and other.state.global_step == 4
    assert raise_both(heard)


def test_a_second_interrupt_stops_a_plain_trainer_at_once(plain_trainer, heard):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="a second time"):
        plain_trainer([AtStep(twice), callbacks.StopCallback()]).train()
    assert raise_both(heard)


def test_a_file_stops_a_run_outside_the_main_thread(plain_trainer, tmp_path, heard, caplog):
    caplog.set_level("INFO", logger="tinytrain")
    (tmp_path / "STOP").touch()  # one from before does not stop the next run
    before = signal.getsignal(signal.SIGINT)
    stop = callbacks.StopCallback(tmp_path / "STOP")

    def touch():
        time.sleep(1.1)  # it looks once a second
        (tmp_path / "STOP").touch()

    trainer = plain_trainer([AtStep(touch), stop])
    thread = threading.Thread(target=trainer.train)
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) == before
        thread.join(0.1)
    assert trainer.state.global_step == 2 and stop.reason == "the file STOP"
    assert "left from before" in caplog.text
