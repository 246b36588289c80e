import logging
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from tinytrain import common
from tinytrain.common import (
    atomic_write,
    damaged_file,
    format_seconds,
    full_disk,
    hash_files,
    read_json_lines,
    setup_logging,
)


def test_the_format_is_the_guides_on_screen_and_in_the_file(tmp_path, capsys):
    file = tmp_path / "run" / "training.log"
    setup_logging(file)
    logging.getLogger("tinytrain.training").info("步骤 1")
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - INFO: 步骤 1\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert re.fullmatch(line, file.read_text(encoding="utf-8"))


def test_a_texts_control_characters_do_not_reach_terminal_or_log(tmp_path, capsys):
    setup_logging(tmp_path / "training.log")
    logging.getLogger("tinytrain").info("京\x1b[31m\r\x07\x9b\u202e\ud800\t\u3000a\nb")
    shown = "京\\x1b[31m\\r\\x07\\x9b\\u202e\\ud800\t\u3000a\nb\n"
    assert capsys.readouterr().out.endswith(shown)
    assert (tmp_path / "training.log").read_text(encoding="utf-8").endswith(shown)


def test_set_up_twice_shows_each_message_once(tmp_path, capsys):
    setup_logging(tmp_path / "first.log")
    setup_logging(tmp_path / "second.log")
    logging.getLogger("tinytrain").warning("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "first.log").read_text(encoding="utf-8") == ""
    assert (tmp_path / "second.log").read_text(encoding="utf-8").count("once") == 1


def test_the_log_goes_on_where_an_earlier_run_stopped(tmp_path):
    for message in ("before", "after"):
        setup_logging(tmp_path / "training.log").info(message)
    text = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert text.index("before") < text.index("after")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "1 min 15 s"), (3599.7, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "text.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_flipped_bit_and_a_missing_file_are_found_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(bytes(1000))
    (tmp_path / "config").write_text("{}")
    hashes = hash_files(tmp_path)
    assert damaged_file(tmp_path, hashes) is None
    (tmp_path / "a" / "weights").write_bytes(bytes(500) + b"\x01" + bytes(499))
    assert damaged_file(tmp_path, hashes) == "a/weights"
    (tmp_path / "config").unlink()
    assert damaged_file(tmp_path, {"config": hashes["config"]}) == "config"


def test_a_damaged_line_costs_that_line_and_an_unfinished_one_nothing(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    lines = [b'{"step": 1}', b'{"step": \xff2}', '{"text": "a\u2028b\x85"}'.encode(), b"3", b""]
    path.write_bytes(b"\n".join([*lines, b'{"step": 4}', b'{"st']))
    assert read_json_lines(path) == [{"step": 1}, {"text": "a\u2028b\x85"}, {"step": 4}]
    assert [record.args for record in caplog.records] == [(path, 2), (path, 4)]
    caplog.clear()
    for unfinished in ('{"step": 1}\n{"text": "京', '{"step": 1}\n'):
        path.write_bytes(unfinished.encode()[:-1])
        assert read_json_lines(path) == [{"step": 1}] and not caplog.records


def test_the_disk_that_is_full_is_named(tmp_path, monkeypatch):
    here, there = tmp_path / "run", tmp_path / "temporary"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(there))
    free = {here: 10**9, there: 4096}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[path]))
    error = OSError(28, "No space left on device")
    assert full_disk(error, here) == there
    free[here] = 0
    assert full_disk(error, here) == here
    free |= {here: 10**8, there: 10**8}  # a checkpoint was too large for it, and is removed
    assert full_disk(error, here) == here
    assert full_disk(OSError(28, "No space", "/cache/a.py"), here) == Path("/cache")


def test_a_log_that_cannot_be_written_names_its_folder(tmp_path):
    (tmp_path / "run" / "training.log").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write to .*run \(.*\): choose another folder"):
        setup_logging(tmp_path / "run" / "training.log")


@pytest.mark.parametrize(("folder", "has_font"), [("zh", True), ("zh", False), ("en", True)])
def test_plots_of_the_chinese_edition_have_chinese_labels_where_a_font_has_them(
    folder, has_font, tmp_path, monkeypatch
):
    if has_font and not common.chinese_font():
        pytest.skip("no font with Chinese characters is installed")
    if not has_font:
        monkeypatch.setattr(common, "chinese_font", lambda: None)
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    figure, axes = common.new_axes()
    axes.plot([1, 2], [8.0, 7.0], label="recipe smoke")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_xticks([1, 2], ["held-out text", "2"])
    axes.legend()
    figure.draw_without_rendering()  # a missing glyph would warn, which is an error
    shown = [axes.get_xlabel(), axes.get_ylabel(), axes.get_legend().texts[0].get_text()]
    shown.append(axes.get_xticklabels()[0].get_text())
    english = ["step", "loss (nats per token)", "recipe smoke", "held-out text"]
    chinese = ["步数", "损失（每词元 nat）", "配方 smoke", "留出的文本"]
    assert shown == (chinese if folder == "zh" and has_font else english)
    left = common.plot_label("step 1,240 of 3,600, 2 h 01 min left")
    assert left == ("第 1,240 / 3,600 步, 还剩 2 小时 01 分" if chinese == shown else left)


def test_a_font_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "simhei.ttf").write_bytes(b"no font")
    found = "matplotlib.font_manager.findSystemFonts"
    monkeypatch.setattr(found, lambda: [str(tmp_path / "simhei.ttf")])
    assert common.chinese_font.__wrapped__() is None
