"""Tests of downloads and uploads: the real clients against a hub on this machine."""

import importlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hubs import TOKEN, Hub, sha256

from tinytrain import export, hub, steps
from tinytrain.common import EXPORT_MARK, hash_files, write_json
from tinytrain.hub import download_dataset, download_wikipedia, upload
from tinytrain.recipes import RECIPES

HUBS = ("modelscope", "huggingface")
WIKIPEDIA = "wikipedia-cn-20230720-filtered"
FILE = f"{WIKIPEDIA}.json"
# Larger than two of the 10 MB pieces in which Hugging Face's client writes.
TEXT = random.Random(0).randbytes(25_000_000)
both_hubs = pytest.mark.parametrize("name", HUBS)


@pytest.fixture
def server():
    with serving() as server:
        yield server


@contextmanager
def serving():
    server = Hub()
    for owner in ("AI-ModelScope", "pleisto"):
        server.repositories[f"datasets/{owner}/{WIKIPEDIA}"] = {
            "files": {FILE: TEXT, "README.md": b"text"}
        }
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def clients(server, monkeypatch, tmp_path):
    """Clients that talk to this machine, have no log-in, and leave the home folder alone."""
    for variable in ("HOME", "USERPROFILE", "MODELSCOPE_CACHE", "MODELSCOPE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    unset = "MODELSCOPE_API_TOKEN HF_TOKEN HF_HUB_OFFLINE http_proxy HTTP_PROXY all_proxy ALL_PROXY"
    for variable in unset.split():
        monkeypatch.delenv(variable, raising=False)
    for variable in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, server.endpoint)
    # Read from the environment once, when the client was first imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home/token"))
    # Plain HTTP, of which the server sees every byte; there is a test of Xet as well.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


# --- downloads --------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["MODELSCOPE_ENDPOINT", "HF_ENDPOINT"])
def test_the_hub_that_answers_is_chosen(server, tmp_path, monkeypatch, capsys, variable):
    with serving() as other:
        other.mode = 503
        monkeypatch.setenv(variable, other.endpoint)
        assert download_wikipedia(tmp_path).read_bytes() == TEXT
    shown = capsys.readouterr().out
    assert f"({server.endpoint}): answers in" in shown and f"({other.endpoint}): no answer" in shown


@both_hubs
def test_wikipedia_alone_is_fetched_and_then_reused_without_the_hub(server, tmp_path, name):
    path = download_wikipedia(tmp_path / "data", name)
    assert path == tmp_path / "data" / FILE
    assert path.read_bytes() == TEXT
    assert {request["file"] for request in server.requests} == {FILE}
    assert sum(request["sent"] for request in server.requests) <= len(TEXT) + 1
    home = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert home <= {"session"}, "a client keeps files in the home directory"

    before = len(server.requests)
    assert download_wikipedia(tmp_path / "data", name) == path
    assert len(server.requests) == before


@both_hubs
def test_a_cut_connection_is_resumed_at_once(server, tmp_path, name, impatient):
    server.mode = "cut"
    assert download_wikipedia(tmp_path, name).read_bytes() == TEXT
    transfers = [request for request in server.requests if request["sent"] > 1]
    assert [request["start"] > 10_000_000 for request in transfers] == [False, True]


def test_a_killed_download_continues_where_it_stopped(server, tmp_path):
    """With ModelScope's client; Hugging Face's begins again."""
    server.mode, name = "stall", "modelscope"
    code = "import sys; from tinytrain.hub import download_wikipedia as f; f(*sys.argv[1:])"
    arguments = [str(tmp_path / "data"), name]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        assert server.stalled.wait(120)
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size > 10_000_000 for p in (tmp_path / "data").glob("wiki*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "data" / FILE).exists()

    server.mode = "ok"
    server.requests.clear()
    assert download_wikipedia(*arguments).read_bytes() == TEXT
    (transfer,) = [request for request in server.requests if request["sent"] > 1]
    assert transfer["start"] > 10_000_000
    assert [path.name for path in (tmp_path / "data").glob("wiki*")] == [FILE]


@pytest.fixture
def impatient(monkeypatch):
    """Hugging Face's client waits a second before each further try."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def test_after_a_stop_two_versions_of_a_file_are_not_joined(server, tmp_path, impatient):
    server.mode = "cut always"
    with pytest.raises(ConnectionError, match="transfer stopped .* run this again"):
        download_wikipedia(tmp_path, "huggingface")
    assert not (tmp_path / FILE).exists()
    server.mode = "ok"
    server.repositories[f"datasets/pleisto/{WIKIPEDIA}"]["files"][FILE] = TEXT[::-1]
    assert download_wikipedia(tmp_path, "huggingface").read_bytes() == TEXT[::-1]


@both_hubs
@pytest.mark.parametrize(
    "mode, error, words",
    [
        (404, FileNotFoundError, "HTTP 404"),
        (503, ConnectionError, "HTTP 503"),
        ("silent", ConnectionError, "cannot be reached (ReadTimeout"),
    ],
)
def test_errors_say_soon_what_to_do(server, tmp_path, monkeypatch, name, mode, error, words):
    server.mode = mode
    monkeypatch.setattr(hub, "_TIMEOUT", 0.5 if mode == "silent" else 20)
    started = time.monotonic()
    with pytest.raises(error, match=re.escape(words)) as caught:
        download_wikipedia(tmp_path / "data", name)
    assert time.monotonic() - started < 25  # the clients alone would try for minutes
    for word in [*HUBS, 'recipe "pocket"', "TINYTRAIN_CORPUS=path"]:
        assert word in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("modelscope", "log-in", "stopped .* log-in page"),
        ("modelscope", "wrong", "stopped .*Hash mismatch"),
        ("huggingface", "log-in", "stopped .* log-in page"),
        ("huggingface", "too short", "transfer stopped .* run this again"),
    ],
)
def test_what_is_not_the_file_is_never_kept_for_it(server, tmp_path, name, mode, words, impatient):
    server.mode = mode
    with pytest.raises(ConnectionError, match=words) as caught:
        download_wikipedia(tmp_path, name)
    for word in (server.endpoint, WIKIPEDIA, *HUBS, "_ENDPOINT"):
        assert word in str(caught.value)
    assert not (tmp_path / FILE).exists()
    server.mode = "ok"
    assert download_wikipedia(tmp_path, name).read_bytes() == TEXT
    assert [path.name for path in tmp_path.glob("wiki*")] == [FILE]


@both_hubs
def test_a_hub_that_cannot_be_reached(exported, tmp_path, name, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for variable in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, endpoint)
    with pytest.raises(ConnectionError, match=f"{endpoint}.*cannot be reached .*Another source is"):
        download_wikipedia(tmp_path / "data", name)
    with pytest.raises(ConnectionError, match=f"{endpoint}.*cannot be reached .*Check the network"):
        upload(exported, "ann/tiny", name, TOKEN)


@both_hubs
def test_the_data_of_a_dataset_by_name(server, tmp_path, name):
    files = {"train.jsonl": b"{}\n", "data/test.json.gz": b"gz", "data/a.parquet": TEXT[:3000]}
    other = {"README.md": b"about", "load.py": b"code", "picture.png": b"png"}
    server.repositories["datasets/ann/talks"] = {"files": files | other}
    folder = tmp_path / "talks"
    [file] = download_dataset("ann/talks", folder, name, "train.jsonl")
    assert file.read_bytes() == files["train.jsonl"] and len(server.requests) == 1
    paths = download_dataset("ann/talks", folder, name)
    assert paths == sorted(folder / file for file in files)
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths} == files
    # Nothing else is there, but for the notes of the clients.
    found = {path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert {path for path in found if not path.name.startswith(".")} == set(paths)
    assert {request["file"] for request in server.requests} == {*files}
    before = len(server.requests)
    assert download_dataset("ann/talks", folder, name) == paths
    assert len(server.requests) == before
    assert not [path for path in (tmp_path / "home").rglob("*.jsonl")]


@both_hubs
def test_conversations_come_from_a_hub_by_name(server, tmp_path, name, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))
    line = '{"instruction": "%s？", "output": "好。"}\n'
    files = {"a.jsonl": (line % "一").encode(), "b.jsonl": (line % "二").encode()}
    server.repositories["datasets/ann/talks"] = {"files": files}
    for chats, asked in ((f"{name}:ann/talks", "一二"), (f"{name}:ann/talks/b.jsonl", "二")):
        found = steps.get_conversations(replace(RECIPES["smoke"], chats=chats))["messages"]
        assert [messages[0]["content"] for messages in found] == [f"{each}？" for each in asked]


@both_hubs
def test_a_dataset_that_cannot_be_had(server, tmp_path, name, monkeypatch):
    with pytest.raises(FileNotFoundError, match="bob/none.* no such public.* Check the name"):
        download_dataset("bob/none", tmp_path, name)
    server.repositories["datasets/ann/pictures"] = {"files": {"a.png": b"png"}}
    with pytest.raises(FileNotFoundError, match=r"ann/pictures.* has none of \*.jsonl"):
        download_dataset("ann/pictures", tmp_path, name)
    server.mode = 503
    with pytest.raises(ConnectionError, match="HTTP 503.*Try again later"):
        download_dataset("ann/pictures", tmp_path, name)


# --- uploads ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder like those of `export_model`, which are loaded in test_export.py."""
    folder = tmp_path_factory.mktemp("exported")
    card = export._model_card({"name": "tiny", "text": "encyclopedia"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    for seed, name in enumerate(("model.safetensors", "model.gguf", "loss.png")):
        (folder / name).write_bytes(random.Random(seed).randbytes(300_000))
    write_json(folder / EXPORT_MARK, hash_files(folder))
    return folder


def contents(folder, names=None):
    names = names or {*os.listdir(folder)} - {EXPORT_MARK}
    return {name: (folder / name).read_bytes() for name in names}


@both_hubs
def test_an_upload_comes_back_the_same_and_can_be_replaced(server, name, exported, tmp_path):
    address = upload(exported, "ann/tiny", name, TOKEN)
    assert address.startswith(server.endpoint) and address.endswith("ann/tiny")
    repository, sent = server.repositories["ann/tiny"], contents(exported)
    assert repository["files"] == sent
    assert repository["private"] is True
    if name == "modelscope":
        assert repository["license"] == "mit"
    client = importlib.import_module({"huggingface": "huggingface_hub"}.get(name, name))
    back = tmp_path / "back"
    client.snapshot_download("ann/tiny", local_dir=back, endpoint=server.endpoint, token=TOKEN)
    assert contents(back, sent) == sent

    folder = shutil.copytree(exported, tmp_path / "copy")
    card = (folder / "README.md").read_text(encoding="utf-8") + "\nMore.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    upload(folder, "ann/tiny", name, TOKEN, private=False)
    assert repository["files"] == {**sent, "README.md": card.encode()}
    assert repository["private"] is True  # as its owner has made it
    assert server.commits == 2
    assert {*os.listdir(folder)} == {*os.listdir(exported)} == {*sent, EXPORT_MARK}
    upload(folder, "ann/public", name, TOKEN, private=False)
    assert server.repositories["ann/public"]["private"] is False


@both_hubs
def test_only_files_of_the_export_are_uploaded(server, name, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "a [1].png").write_bytes(b"picture")
    sent = contents(folder)
    write_json(folder / EXPORT_MARK, [*sent, "gone.png"])
    (folder / "README.md").write_text(sent["README.md"].decode() + "mine", encoding="utf-8")
    for foreign in (".env", "notes.txt", "a 1.png", ".git/config", "x/y.json"):
        (folder / foreign).parent.mkdir(exist_ok=True)
        (folder / foreign).write_text("TOKEN=1", encoding="utf-8")
    upload(folder, "ann/tiny", name, TOKEN)
    files = server.repositories["ann/tiny"]["files"]
    assert files.keys() == sent.keys()
    assert files["README.md"].endswith(b"mine")


@pytest.mark.skipif(sys.platform == "win32", reason="a folder's address is written otherwise")
def test_by_hugging_faces_faster_protocol_too(server, exported, tmp_path, monkeypatch):
    """Where hf_xet is installed, it is what the client uses for large files."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    server.xet_storage = tmp_path / "storage"
    server.xet_storage.mkdir()
    upload(exported, "ann/tiny", "huggingface", TOKEN)
    files, sent = server.repositories["ann/tiny"]["files"], contents(exported)
    large = {"model.safetensors", "model.gguf", "loss.png"}
    assert files == {k: sha256(v) if k in large else v for k, v in sent.items()}
    assert not server.blobs
    stored = sum(path.stat().st_size for path in server.xet_storage.rglob("*") if path.is_file())
    assert stored > 900_000  # three random files


@pytest.mark.parametrize(
    ("name", "variable"), zip(HUBS, ("MODELSCOPE_API_TOKEN", "HF_TOKEN"), strict=True)
)
def test_the_token_may_come_from_the_environment(server, name, variable, exported, monkeypatch):
    with pytest.raises(PermissionError, match=f"access token from https://.*{variable}"):
        upload(exported, "ann/tiny", name)
    assert "ann/tiny" not in server.repositories
    monkeypatch.setenv(variable, TOKEN)
    upload(exported, "ann/tiny", name)
    assert "model.safetensors" in server.repositories["ann/tiny"]["files"]


@both_hubs
@pytest.mark.parametrize(
    ("repo_id", "token", "mode", "error", "words"),
    [
        ("ann/tiny", "secret-of-nobody", "ok", PermissionError, "not known there .HTTP 401"),
        ("bob/tiny", TOKEN, "ok", PermissionError, "the name is someone else's"),
        ("ann/tiny", TOKEN, 418, ConnectionError, r"HTTP 418: tea only, Bearer \*\*\*"),
        ("ann/tiny", TOKEN + "\n x", "ok", OSError, "stopped"),  # a client quotes such a header
    ],
)
def test_errors_say_what_to_do_and_never_the_token(
    server, name, exported, repo_id, token, mode, error, words, capsys
):
    server.mode = mode
    with pytest.raises(error, match=words) as caught:
        upload(exported, repo_id, name, token)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert token not in shown and "secret-of" not in shown
    message = str(caught.value)
    assert name in message and repo_id in message and len(message) < 400 and "\n" not in message
    assert repo_id not in server.repositories or not server.repositories[repo_id]["files"]


def test_what_cannot_be_done_is_said(exported, tmp_path):
    with pytest.raises(ValueError, match="'github'; choose one of modelscope, huggingface"):
        download_wikipedia(tmp_path, "github")
    with pytest.raises(ValueError, match="'github'; choose one of modelscope, huggingface"):
        upload(exported, "ann/tiny", "github", TOKEN)
    with pytest.raises(FileNotFoundError, match="is no exported model: export it first"):
        upload(tmp_path, "ann/tiny", "huggingface", TOKEN)
    with pytest.raises(ValueError, match="'tiny' must have the form"):
        upload(exported, "tiny", "huggingface", TOKEN)
