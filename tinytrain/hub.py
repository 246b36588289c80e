"""Download text and conversations, and upload a model, by ModelScope's and Hugging Face's clients.

Two things are added to the clients. One small request asks first whether the hub answers at all:
they repeat a failed one for minutes. And an error says what to do next, and never shows your token.
ModelScope's client also continues a download that was killed.

For a mirror, set ``MODELSCOPE_ENDPOINT`` or ``HF_ENDPOINT``. (None is chosen for you: the client
would send your token there.)
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tinytrain.common import EXPORT_MARK, one_line

logger = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for a hub's first answer
_WIKIPEDIA_FILE = "wikipedia-cn-20230720-filtered.json"
# Of conversations, as `tinytrain.conversations.load_conversations` reads them.
_DATA_FILES = [
    f"*.{kind}{packed}" for kind in ("jsonl", "json", "parquet") for packed in ("", ".gz", ".xz")
]
_COMMIT = {"commit_message": "Upload of tinytrain"}


def choose_source() -> str:
    """Return the hub that answers sooner from here, "modelscope" or "huggingface"; print how soon.

    If neither answers, it is "modelscope", whose download then says what to do.
    """
    clients = {name: hub(hub.wikipedia) for name, hub in _HUBS.items()}
    with ThreadPoolExecutor() as threads:
        answers = threads.map(_seconds_to_answer, (hub.dataset_url for hub in clients.values()))
    seconds = dict(zip(clients, answers, strict=True))
    for name, client in clients.items():
        said = "no answer" if math.isinf(seconds[name]) else f"answers in {seconds[name]:.1f} s"
        print(f"{name} ({client.endpoint}): {said}")
    return min(seconds, key=seconds.get)


def _seconds_to_answer(url: str) -> float:
    """Return how long a hub takes to show what it is asked for; infinity if it does not."""
    import requests

    start = time.monotonic()
    try:
        with requests.get(url, timeout=5, stream=True) as response:
            response.raise_for_status()
    except requests.RequestException:
        return math.inf
    return time.monotonic() - start


def download_wikipedia(folder: str | Path, source: str | None = None) -> Path:
    """Download the guide's text: 254,547 articles of Chinese Wikipedia, 524 MB.

    A file that is in the folder already is used without asking the hub, which is "modelscope" or
    "huggingface"; by default that of `choose_source`.

    Raises
    ------
    FileNotFoundError
        If the hub does not have the file.
    ConnectionError
        If the hub cannot be reached or answers with an error, or the transfer stops.
    """
    path = Path(folder) / _WIKIPEDIA_FILE
    if path.is_file():
        logger.info("%s: nothing to download", folder)
        return path
    source = source or choose_source()
    hub = _find_hub(source)
    (other,) = {*_HUBS} - {source}
    advice = (
        f' Another source is "{other}", a mirror can be named in {hub.endpoint_variable}. Without '
        'a network, take the built-in text (recipe "pocket") or a file of your own '
        "(TINYTRAIN_CORPUS=path)."
    )
    _download(source, hub.wikipedia, Path(folder), [_WIKIPEDIA_FILE], advice)
    return path


def download_dataset(
    name: str, folder: str | Path, source: str = "modelscope", file: str = ""
) -> list[Path]:
    """Download a dataset's files of JSON lines, JSON and parquet, also packed as gz or xz.

    The name is ``"owner/name"``; `file` may be one file of the dataset, or a pattern. The dataset's
    own folders come below `folder`; a file that you have is not downloaded again. It raises what
    `download_wikipedia` does.
    """
    advice = f" Check the name; another source is {' or '.join({*_HUBS} - {source})}."
    return _download(source, name, Path(folder), [file] if file else _DATA_FILES, advice)


def _download(source: str, name: str, folder: Path, wanted: list[str], advice: str) -> list[Path]:
    client = _find_hub(source)(name)
    logger.info("downloading %s from %s to %s", name, source, folder)
    place = f"{source} ({client.endpoint}, {name})"
    _transfer(client.dataset_url, partial(client.download, folder, wanted), place, advice)
    found = {path for kind in wanted for path in folder.rglob(kind) if path.is_file()}
    notes = folder / ".cache"  # of the clients
    if not (files := sorted(path for path in found if notes not in path.parents)):
        raise FileNotFoundError(f"{place}: has none of {' '.join(wanted)}.{advice}")
    return files


def upload(
    folder: str | Path,
    repo_id: str,
    to: str = "modelscope",
    token: str | None = None,
    private: bool = True,
) -> str:
    """Upload an exported model to ModelScope or Hugging Face, and return its address there.

    A repository that is there already gets the files as a new version. Only files of the export
    are sent, as you edited them; notes, keys and other files of yours in the folder are not.

    Parameters
    ----------
    folder : str or Path
        From `tinytrain.export.export_model`.
    repo_id : str
        Your name (or an organisation's) and the model's: ``"name/model"``.
    to : {"modelscope", "huggingface"}
        Which hub.
    token : str, optional
        Your access token; by default ``MODELSCOPE_API_TOKEN``, ``HF_TOKEN`` or the client's own
        log-in. It is never shown.
    private : bool
        Whether a new repository is for you alone. Read the card before you change that.

    Raises
    ------
    FileNotFoundError
        If the folder is not an export.
    PermissionError
        If there is no token, or it is not known, or must not write there.
    ConnectionError
        If the hub cannot be reached or answers with an error, or the transfer stops.
    """
    hub, folder = _find_hub(to), Path(folder)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id):
        raise ValueError(f"repo_id {repo_id!r} must have the form 'your-name/model-name'")
    if not (folder / EXPORT_MARK).is_file():
        raise FileNotFoundError(
            f"{folder} is no exported model: export it first (tinytrain.export.export_model)"
        )
    names = json.loads((folder / EXPORT_MARK).read_text(encoding="utf-8"))
    files = sorted(glob.escape(name) for name in names)
    client = hub(repo_id, token)
    advice = f" Get an access token from {hub.token_page}, for token=... or {hub.token_variable}."
    if not client.token:
        raise PermissionError(f"{to} wants to know who uploads.{advice}")
    logger.info("uploading to %s/%s: %s", client.endpoint, repo_id, ", ".join(files))
    place = f"{to} ({client.endpoint}, {repo_id})"
    send = partial(client.upload, folder, files, private)
    return _transfer(client.endpoint, send, place, advice, client.token)


class _ModelScope:
    """One repository of modelscope.cn, by the package ``modelscope``."""

    wikipedia = "AI-ModelScope/wikipedia-cn-20230720-filtered"
    token_variable, endpoint_variable = "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT"
    token_page = "https://modelscope.cn/my/myaccesstoken"

    def __init__(self, repo_id: str, token: str | None = None):
        from modelscope_hub import HubConfig

        config = HubConfig(token=token or None)
        self.repo_id, self.endpoint, self.token = repo_id, config.endpoint, config.token
        self.dataset_url = f"{self.endpoint}/api/v1/datasets/{repo_id}"

    def download(self, folder: Path, wanted: list[str]) -> None:
        from modelscope import dataset_snapshot_download

        # With a cache of its own it leaves no lock files in the home directory.
        places = {"local_dir": folder, "cache_dir": folder / ".cache", "endpoint": self.endpoint}
        dataset_snapshot_download(self.repo_id, allow_patterns=wanted, **places)

    def upload(self, folder: Path, files: list[str], private: bool) -> str:
        from huggingface_hub import ModelCard
        from modelscope.hub.api import HubApi

        api = HubApi(endpoint=self.endpoint, token=self.token)
        facts = {"license": ModelCard.load(folder / "README.md").data.license}
        facts["visibility"] = "private" if private else "public"
        api.create_repo(self.repo_id, exist_ok=True, **facts)
        # Without its cache: that would be a file among those to upload.
        api.upload_folder(self.repo_id, folder, allow_patterns=files, use_cache=False, **_COMMIT)
        return f"{self.endpoint}/models/{self.repo_id}"


class _HuggingFace:
    """One repository of huggingface.co, by the package ``huggingface_hub``."""

    wikipedia = "pleisto/wikipedia-cn-20230720-filtered"
    token_variable, endpoint_variable = "HF_TOKEN", "HF_ENDPOINT"
    token_page = "https://huggingface.co/settings/tokens, one that may write"

    def __init__(self, repo_id: str, token: str | None = None):
        from huggingface_hub import HfApi, get_token

        # The client reads HF_ENDPOINT only when it is imported first.
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        self.repo_id, self.endpoint, self.token = repo_id, self.api.endpoint, token or get_token()
        self.dataset_url = f"{self.endpoint}/api/datasets/{repo_id}"

    def download(self, folder: Path, wanted: list[str]) -> None:
        self.api.snapshot_download(
            self.repo_id, repo_type="dataset", local_dir=folder, allow_patterns=wanted
        )

    def upload(self, folder: Path, files: list[str], private: bool) -> str:
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repo_id, folder_path=folder, allow_patterns=files, **_COMMIT
        )
        return f"{self.endpoint}/{self.repo_id}"


_HUBS = {"modelscope": _ModelScope, "huggingface": _HuggingFace}


def _find_hub(name: str) -> type[_ModelScope] | type[_HuggingFace]:
    if name not in _HUBS:
        raise ValueError(f"unknown hub {name!r}; choose one of {', '.join(_HUBS)}")
    return _HUBS[name]


def _transfer(
    url: str, transfer: Callable[[], Any], place: str, advice: str, token: str = ""
) -> Any:
    """Ask whether a hub answers, then transfer; what either raises says what to do."""
    import requests

    begun = False
    try:
        with requests.get(url, timeout=_TIMEOUT, stream=True) as response:
            if not token:  # before an upload, any answer will do
                response.raise_for_status()
        begun = True
        return transfer()
    except Exception as error:
        if begun and getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise  # it is the disk that cannot go on
        failure = _explained(error, begun, place, advice, token)
    # Not chained: the client's own message may hold the header that carries the token.
    raise failure


def _explained(error: Exception, begun: bool, place: str, advice: str, token: str) -> OSError:
    """Return a client's exception as one that says what to do; with a token it was an upload."""
    causes = [error]
    # ModelScope's client keeps what went wrong file by file.
    while cause := (
        next(iter(getattr(causes[-1], "failed_files", {}).values()), None) or causes[-1].__cause__
    ):
        causes.append(cause)
    answers = [answer for cause in causes for answer in (cause, getattr(cause, "response", None))]
    statuses = (getattr(answer, "status_code", None) for answer in answers)
    status = next(filter(None, statuses), None)
    if status in (401, 403, 404) and not token:
        return FileNotFoundError(f"{place}: there is no such public file (HTTP {status}).{advice}")
    if status == 401:
        return PermissionError(f"{place}: the token is not known there (HTTP 401).{advice}")
    if status in (403, 404, 409) and token:
        return PermissionError(
            f"{place}: the token must not write there (HTTP {status}). Either it only reads, or "
            "the name is someone else's: take one of your own, and a token that may write."
        )
    said = causes[-1]
    if token:  # not an upload's last cause: it may quote a part of the token, in a header
        said = getattr(error, "server_message", None) or getattr(error, "message", None) or ""
        said = said.replace(token, "***")
    said, kind = one_line(said)[:150], type(causes[-1]).__name__
    if status is not None:
        problem = f"the hub has an error (HTTP {status}: {said}). Try again later."
    elif begun:
        problem = (
            f"the transfer stopped ({kind}: {said}). Check that no log-in page or proxy answers in "
            "place of the hub, and run this again."
        )
    else:
        problem = f"cannot be reached ({kind}: {said}). Check the network."
    return ConnectionError(f"{place}: {problem}{'' if token else advice}")
