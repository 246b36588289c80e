import json
from types import SimpleNamespace

import pytest
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tinytrain import callbacks
from tinytrain.logs import setup_logging
from tinytrain.modeling import build_model
from tinytrain.training import build_trainer, training_arguments


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """A real, short training run with all three callbacks."""
    folder = tmp_path_factory.mktemp("run")
    setup_logging(folder / "training.log")
    tokens = smoke.recipe.tokens_per_step
    watching = [
        callbacks.VerboseTrainingCallback(tokens, seconds=0),
        callbacks.HistoryCallback(folder / "history.jsonl", tokens),
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


def test_the_plot_is_kept_as_a_picture(run):
    from matplotlib.image import imread

    picture = imread(run[0] / "loss.png")
    assert picture.shape[:2] == (432, 768)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::7]}) > 5  # it shows something


def test_history_of_a_run_taken_up_again_has_no_step_twice(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(f'{{"step": {s}, "seconds": {s}}}\n' for s in (10, 20, 30)))
    history = callbacks.HistoryCallback(path, tokens_per_step=8)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=20)
    history.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 30
    history.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    lines = callbacks.read_history(path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["seconds"] >= 20  # the time of the earlier sitting counts


def test_a_run_from_the_start_replaces_the_history(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 10, "seconds": 1}\n')
    history = callbacks.HistoryCallback(path, tokens_per_step=8)
    history.on_train_begin(None, TrainerState(), TrainerControl())
    assert callbacks.read_history(path) == []


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


def test_plot_shows_the_curves_and_the_untrained_loss():
    history = [{"step": s, "tokens": 8 * s, "loss": 9 - s, "learning_rate": 0.1} for s in (1, 2)]
    history.append({"step": 2, "tokens": 16, "eval_loss": 7.5})
    figure = callbacks.plot_history(history, vocab_size=4096, title="a run")
    loss, rate = figure.axes
    raw, smoothed, held_out, untrained = loss.lines
    assert list(raw.get_ydata()) == [8, 7]
    assert list(held_out.get_xdata()) == [2] and list(held_out.get_ydata()) == [7.5]
    assert untrained.get_ydata()[0] == pytest.approx(8.318, abs=1e-3)
    assert loss.get_title(loc="left") == "a run"
    assert rate.get_xlabel() == "step, of 8 tokens"
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height  # nothing cut off
    low, high = loss.get_ylim()
    assert low < 7 and high > 8.318


def test_many_drawings_do_not_grow():
    plot = callbacks.LossPlot(4096)
    history = [{"step": step, "loss": 5.0, "learning_rate": 0.1} for step in range(1, 200)]
    plot.update(history)
    objects = len(plot.figure.findobj())
    small = len(plot.png())
    for _ in range(20):
        plot.update(history * 20)
    assert len(plot.figure.findobj()) == objects
    assert len(plot.png()) < 3 * small


def test_drawing_waits_and_the_last_state_is_always_drawn(tmp_path, monkeypatch):
    plot = callbacks.LivePlotCallback(tmp_path / "loss.png", 100, 8, seconds=1000)
    drawings = []
    draw = plot._draw
    monkeypatch.setattr(
        plot, "_draw", lambda state: drawings.append(state.global_step) or draw(state)
    )
    state = TrainerState(max_steps=50)
    plot.on_train_begin(None, state, None)
    for state.global_step in range(1, 51):
        plot.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1})
    assert drawings == []
    plot.on_train_end(None, state, None)
    assert drawings == [50]
    assert plot._pause >= plot.seconds
    assert "step 50 of 50" in plot._summary(state) and "done" in plot._summary(state)


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
