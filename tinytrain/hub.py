"""Download text and conversations, and upload a model, by ModelScope's and Hugging Face's clients.

Three things are added to the clients. One small request asks first whether the hub answers at all:
they repeat a failed one for minutes. An interrupted download continues where it stopped, and is
compared with the hub's hash: ModelScope's client does so, Hugging Face's not for a file outside its
cache. (The price is Xet, its faster protocol, which cannot be resumed.) And an error says what to
do next, and never shows your token.

For a mirror, set ``MODELSCOPE_ENDPOINT`` or ``HF_ENDPOINT``.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tinytrain.common import EXPORT_MARK, one_line

logger = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for a hub's first answer, and until the next piece of a transfer
_SLOW_SECONDS = 60.0  # with less than 1 kB/s for so long, a transfer is given up
_WIKIPEDIA_FILE = "wikipedia-cn-20230720-filtered.json"
# Of conversations, as `tinytrain.conversations.load_conversations` reads them.
_DATA_FILES = [
    f"*.{kind}{packed}" for kind in ("jsonl", "json", "parquet") for packed in ("", ".gz", ".xz")
]
_COMMIT = {"commit_message": "Upload of tinytrain"}
# What is uploaded of a folder without the list of what an export wrote.
_EXPORTED = "README.md *config.json tokenizer.json model*.safetensors* *.gguf *.png".split()


def download_wikipedia(folder: str | Path, source: str = "modelscope") -> Path:
    """Download the guide's text: 254,547 articles of Chinese Wikipedia, 524 MB.

    A file that is there already is used without asking the hub.

    Parameters
    ----------
    folder : str or Path
        Where to put the file; it is made if it does not exist.
    source : {"modelscope", "huggingface"}
        Which hub.

    Returns
    -------
    Path
        The file, ``wikipedia-cn-20230720-filtered.json`` in the folder.

    Raises
    ------
    ValueError
        If there is no such hub.
    ImportError
        If the client of ModelScope is not installed.
    FileNotFoundError
        If the hub does not have the file.
    ConnectionError, TimeoutError
        If the hub cannot be reached, answers with an error or not in time, or the transfer stops.
    """
    hub = _find_hub(source)
    path = Path(folder) / _WIKIPEDIA_FILE
    if path.is_file():
        logger.info("%s: nothing to download", folder)
        return path
    client = hub(hub.wikipedia)
    (other,) = {*_HUBS} - {source}
    advice = (
        f' Another source is "{other}", a mirror can be named in {hub.endpoint_variable}. Without '
        'a network, take the built-in text (recipe "pocket") or a file of your own '
        "(TINYTRAIN_CORPUS=path)."
    )
    logger.info("downloading %s from %s to %s", path.name, source, folder)
    place = f"{source} ({client.endpoint}, {hub.wikipedia}/{path.name})"
    _transfer(client.file_url(path.name), partial(client.download, path), place, advice)
    return path


def download_dataset(
    name: str, folder: str | Path, source: str = "modelscope", file: str = ""
) -> list[Path]:
    """Download a dataset's files of JSON lines, JSON and parquet, also packed as gz or xz.

    The hub is asked each time which there are; a file that you have is not downloaded again.

    Parameters
    ----------
    name : str
        Its owner and name: ``"owner/name"``.
    folder : str or Path
        Where to put the files, in the dataset's own folders; nothing is deleted there.
    source : {"modelscope", "huggingface"}
        Which hub.
    file : str
        One file of the dataset, or a pattern; by default all.

    Returns
    -------
    list of Path
        The files, in the order of their names.

    Raises
    ------
    ValueError, ImportError, FileNotFoundError, ConnectionError, TimeoutError
        As for `download_wikipedia`, and if the dataset has no such file.
    """
    client, folder = _find_hub(source)(name), Path(folder)
    wanted = [file] if file else _DATA_FILES
    (other,) = {*_HUBS} - {source}
    advice = f' Check the name; another source is "{other}", or a file of your own.'
    logger.info("downloading %s from %s to %s", name, source, folder)
    place = f"{source} ({client.endpoint}, {name})"
    _transfer(client.dataset_url, partial(client.download_dataset, folder, wanted), place, advice)
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
    """Upload an exported model to ModelScope or Hugging Face.

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

    Returns
    -------
    str
        The address at which the model can be seen.

    Raises
    ------
    ValueError
        If there is no such hub, or the repository's name is not of that form.
    FileNotFoundError
        If the folder is not an export.
    PermissionError
        If there is no token, or it is not known, or must not write there.
    ConnectionError, TimeoutError
        If the hub cannot be reached, answers with an error or not in time, or the transfer stops.
    """
    hub = _find_hub(to)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id):
        raise ValueError(f"repo_id {repo_id!r} must have the form 'your-name/model-name'")
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ("README.md", "config.json")):
        raise FileNotFoundError(
            f"{folder} has no config.json with a README.md: export the model first "
            "(tinytrain.export.export_model)"
        )
    try:
        names = [*json.loads((folder / EXPORT_MARK).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        names = [path.name for pattern in _EXPORTED for path in folder.glob(pattern)]
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
        try:
            import modelscope  # noqa: F401
            from modelscope_hub import HubConfig
        except ImportError as error:
            raise ImportError(
                "the client of ModelScope is not installed; run `pip install modelscope`, or take "
                '"huggingface"'
            ) from error
        config = HubConfig(token=token or None)
        self.repo_id, self.endpoint, self.token = repo_id, config.endpoint, config.token

    def file_url(self, name: str) -> str:
        query = f"repo?Revision=master&FilePath={name}"
        return f"{self.endpoint}/api/v1/datasets/{self.repo_id}/{query}"

    def download(self, path: Path) -> None:
        from modelscope import dataset_snapshot_download

        dataset_snapshot_download(
            self.repo_id,
            local_dir=path.parent,
            # With a cache of its own it leaves no lock files in the home directory.
            cache_dir=path.parent / ".cache",
            allow_patterns=[path.name],
            endpoint=self.endpoint,
        )
        if not path.is_file():  # for the client an empty list of files is a success
            raise ValueError("nothing arrived")

    @property
    def dataset_url(self) -> str:
        return f"{self.endpoint}/api/v1/datasets/{self.repo_id}"

    def download_dataset(self, folder: Path, wanted: list[str]) -> None:
        from modelscope import dataset_snapshot_download

        places = {"local_dir": folder, "cache_dir": folder / ".cache", "endpoint": self.endpoint}
        dataset_snapshot_download(self.repo_id, allow_patterns=wanted, **places)

    def upload(self, folder: Path, files: list[str], private: bool) -> str:
        from huggingface_hub import ModelCard
        from modelscope.hub.api import HubApi

        api = HubApi(endpoint=self.endpoint, token=self.token)
        api.create_repo(
            self.repo_id,
            visibility="private" if private else "public",
            license=ModelCard.load(folder / "README.md").data.license,
            exist_ok=True,
        )
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

    def file_url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, repo_type="dataset", endpoint=self.endpoint)

    def download(self, path: Path) -> None:
        from huggingface_hub import get_hf_file_metadata

        url = self.file_url(path.name)
        found = get_hf_file_metadata(url, timeout=_TIMEOUT, endpoint=self.endpoint)
        sha256 = found.etag or ""  # of a large file
        if not (found.commit_hash and found.size and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError("no hash of it is named")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named after its version, so that parts of two versions are never joined.
        incomplete = path.with_name(f"{path.name}.{sha256[:16]}.incomplete")
        with incomplete.open("a+b") as file:
            _continue(file, url, found.size)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                file.truncate(0)
                raise ValueError("its SHA-256 differs")
        os.replace(incomplete, path)

    @property
    def dataset_url(self) -> str:
        return f"{self.endpoint}/api/datasets/{self.repo_id}"

    def download_dataset(self, folder: Path, wanted: list[str]) -> None:
        places = {"repo_type": "dataset", "local_dir": folder}
        self.api.snapshot_download(self.repo_id, allow_patterns=wanted, **places)

    def upload(self, folder: Path, files: list[str], private: bool) -> str:
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repo_id, folder_path=folder, allow_patterns=files, **_COMMIT
        )
        return f"{self.endpoint}/{self.repo_id}"


def _continue(file: BinaryIO, url: str, size: int) -> None:
    """Download what a file lacks of its size, from Hugging Face, as long as it makes progress."""
    from huggingface_hub.utils import get_session
    from tqdm.auto import tqdm

    bar = tqdm(initial=file.tell(), total=size, unit="B", unit_scale=True, disable=None)
    while file.tell() < size:
        begin = before = file.tell()
        headers = {"Range": f"bytes={begin}-", "Accept-Encoding": "identity"}
        options = {"headers": headers, "timeout": _TIMEOUT, "follow_redirects": True}
        until = time.monotonic() + _SLOW_SECONDS
        try:
            with get_session().stream("GET", url, **options) as response:
                response.raise_for_status()
                if response.status_code != 206:  # the whole file
                    before = file.seek(0)
                    file.truncate()
                for piece in response.iter_raw():
                    bar.update(file.write(piece))
                    if file.tell() > size:
                        break
                    if time.monotonic() > until:
                        if file.tell() - before < _SLOW_SECONDS * 1024:
                            raise TimeoutError(f"less than 1 kB/s for {_SLOW_SECONDS:g} seconds")
                        before, until = file.tell(), time.monotonic() + _SLOW_SECONDS
            if file.tell() <= begin:
                raise ValueError("it ends too early")
        except Exception as error:  # a cut connection; OSError is the disk's, or the one above
            if isinstance(error, OSError) or file.tell() <= begin:
                raise
            time.sleep(1)
    file.truncate(size)


_HUBS = {"modelscope": _ModelScope, "huggingface": _HuggingFace}


def _find_hub(name: str) -> type[_ModelScope] | type[_HuggingFace]:
    if name not in _HUBS:
        raise ValueError(f"unknown hub {name!r}; choose one of {', '.join(_HUBS)}")
    return _HUBS[name]


def _transfer(
    url: str, transfer: Callable[[], Any], place: str, advice: str, token: str = ""
) -> Any:
    """Ask a hub for one byte, then transfer; what either raises says what to do."""
    import requests

    begun, first_byte = False, {"Range": "bytes=0-0"}
    try:
        with requests.get(url, headers=first_byte, timeout=_TIMEOUT, stream=True) as response:
            if not token:  # before an upload, any answer will do
                response.raise_for_status()
        begun = True
        return transfer()
    except Exception as error:
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
    advice = "" if token else advice
    # Not an upload's last cause: it may quote a part of the token, in a header.
    said = getattr(error, "server_message", None) or getattr(error, "message", None)
    said = (said or "").replace(token, "***") if token else said or causes[-1]
    said = one_line(said)[:150]
    if status is not None:
        said = f"HTTP {status}: {said}"
        return ConnectionError(f"{place}: the hub has an error ({said}). Try again later.{advice}")
    kind = type(causes[-1]).__name__
    wrong = isinstance(causes[-1], ValueError) or re.match("File(Integrity|SizeMismatch)", kind)
    if begun and wrong and not token:
        return ConnectionError(
            f"{place}: the answer is not the file ({one_line(causes[-1])[:150]}) and is not kept: "
            f"maybe a log-in page or a proxy answers instead of the hub.{advice}"
        )
    number = getattr(error, "errno", None)
    if begun and number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        return OSError(number, f"{place}: the transfer stopped, as the disk says: {error}")
    if not begun and "timeout" in kind.lower():
        return TimeoutError(
            f"{place}: no answer within {_TIMEOUT:g} seconds. Check the network.{advice}"
        )
    what, hint = "cannot be reached", ""
    if begun:
        what, hint = "the transfer stopped", " and run this again: it continues where it stopped"
    said = f"{kind}: {said}" if said else kind
    return ConnectionError(f"{place}: {what} ({said}). Check the network{hint}.{advice}")
