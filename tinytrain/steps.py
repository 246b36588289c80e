"""The steps before a training, each of which keeps its result on disk for the next.

A notebook shows a step from within; these functions do the same with the same helpers, so that you
can open any notebook first: what it needs and does not find is built. A result is used again only
if it was built from the same inputs, which are written beside it as ``inputs.json``: hashes of the
text and of the tokenizer, the hyperparameters that matter, and the code of the functions that
decide the result. A result that was damaged since, as the hashes of its files tell, is rebuilt.

This module joins the others, as `runs`, `widgets` and the command line do; copy from those, not
from here.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import (
    conversations,
    corpus,
    duplicates,
    encyclopedia,
    hub,
    modeling,
    qwen,
    tokenization,
)
from tinytrain.common import damaged_file, encode_each, hash_files, write_json, writing_to
from tinytrain.recipes import CHAT_FIELDS, DISPLAY_AND_SPEED_FIELDS, Recipe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

logger = logging.getLogger(__name__)

_DATA = Path(__file__).with_name("data")


def _project_folder() -> Path:
    """Return the checkout that the working folder is in, or the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "tinytrain").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def runs_folder() -> Path:
    """Return where all runs are kept: ``TINYTRAIN_RUNS``, or ``runs`` in the project's folder."""
    folder = os.environ.get("TINYTRAIN_RUNS") or _project_folder() / "runs"
    return Path(os.path.expanduser(folder)).absolute()


def run_folder(recipe: Recipe) -> Path:
    """Return the folder of a run, made if need be.

    A text of your own has a folder of its own, ``runs/pocket-mytext-1a2b3c4d`` beside
    ``runs/pocket``. The last part is a hash of the text: other texts of the same name have other
    folders, and the same text has this one wherever you move it.
    """
    folder = runs_folder() / recipe.name
    if recipe.corpus not in ("encyclopedia", "wikipedia"):
        path = get_text(recipe)
        digest = text_hash(path)[:8]
        while glob.has_magic(path.name) and not path.exists():  # "texts/*.jsonl" counts as "texts"
            path = path.parent
        name = re.sub(r"\W+", "_", path.resolve().name.lstrip(".").split(".")[0])[:40]
        earlier = sorted(folder.parent.glob(f"{recipe.name}-*-{digest}"))  # before it was renamed
        folder = earlier[0] if earlier else folder.with_name(f"{recipe.name}-{name}-{digest}")
    _check_length(folder)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_length(folder: Path) -> None:
    """Say before the work, not in the middle of it, that a folder's name is too long for Windows.

    That takes 259 characters, of which the files of a run need up to 80, unless long paths are on.
    """
    if sys.platform == "win32" and len(str(folder)) > 259 - 80:
        import ctypes

        if not ctypes.WinDLL("ntdll").RtlAreLongPathsEnabled() & 1:
            raise OSError(
                f"{folder}: the name is too long for Windows. Choose a shorter folder "
                "(TINYTRAIN_RUNS), or allow long paths: set LongPathsEnabled to 1, see "
                "https://learn.microsoft.com/windows/win32/fileio/maximum-file-path-limitation"
            )


def chat_folder(recipe: Recipe) -> Path:
    """Return where the tuning of a run's model is kept: ``chat`` in the run's folder."""
    return run_folder(recipe) / "chat"


def get_text(recipe: Recipe) -> Path:
    """Return the file with the text of a recipe: written, downloaded, or your own.

    Parameters
    ----------
    recipe : Recipe
        Its ``corpus`` decides; the Wikipedia comes from the hub that answers sooner.

    Returns
    -------
    Path
        A file, or your own folder or pattern, that `tinytrain.corpus.load_documents` reads.

    Raises
    ------
    FileNotFoundError
        If the corpus is a path and nothing is there.
    """
    if recipe.corpus == "encyclopedia":
        files = [Path(encyclopedia.__file__), _DATA / "encyclopedia.json", _DATA / "phrases.json"]
        inputs = {"seed": recipe.split_seed, "code": [_file_hash(file)[:16] for file in files]}
        folder = run_folder(recipe) / "text"
        return _build_once(folder, inputs, _write_encyclopedia, lambda f: f / "encyclopedia.json")
    if recipe.corpus == "wikipedia":
        downloads = runs_folder() / "downloads"
        with one_at_a_time(downloads):
            return hub.download_wikipedia(downloads)
    for path in (Path(recipe.corpus), _project_folder() / recipe.corpus):
        if path.exists() or corpus.matching_files(path):
            return path.absolute()
    raise FileNotFoundError(
        f"the corpus {recipe.corpus!r} is neither 'encyclopedia', 'wikipedia', a file nor a "
        "folder; check the path in TINYTRAIN_CORPUS or in the recipe"
    )


def _write_encyclopedia(folder: Path, inputs: dict[str, Any]) -> None:
    encyclopedia.write_encyclopedia(folder / "encyclopedia.json", seed=inputs["seed"])


def get_split(recipe: Recipe) -> DatasetDict:
    """Return the documents of the training set, ``train``, and of the held-out set, ``test``.

    The recipe's fields under "text" decide. Columns are ``text`` and ``source``. The duplicates
    found are written beside them as ``duplicates.json``; see `get_duplicates`.
    """
    return _get_split(recipe)[0]


def get_duplicates(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the pairs that `get_split` found: kind, similarity and how both texts begin."""
    return _get_split(recipe)[1]


def _get_split(recipe: Recipe) -> tuple[DatasetDict, list[dict[str, Any]]]:
    from datasets import load_from_disk

    path = get_text(recipe)

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        documents = corpus.load_documents(path, recipe.text_field, folder / "documents")
        if text_hash(path) != inputs["text"]:
            raise RuntimeError(f"{path} has changed while it was read: do the same again")
        if recipe.max_documents is not None and recipe.max_documents < len(documents):
            documents = documents.select(range(recipe.max_documents))
        split = corpus.split_documents(documents, recipe.test_size, recipe.split_seed)
        split["train"] = first_characters(split["train"], recipe.max_characters)
        found = duplicates.find_duplicates(split)
        rows = [
            {
                "kind": pair.kind,
                "similarity": pair.similarity,
                "held_out": split["test"][pair.test]["text"][:200],
                "train": split["train"][pair.train]["text"][:200],
            }
            for pair in found
        ]
        write_json(folder / "duplicates.json", rows)
        if recipe.drop_duplicates:
            split = duplicates.drop_duplicates(split, found)
        split.save_to_disk(str(folder / "split"))
        del documents, split  # Windows cannot delete an open file
        shutil.rmtree(folder / "documents", ignore_errors=True)

    def load(folder: Path) -> tuple[DatasetDict, list[dict[str, Any]]]:
        found = json.loads((folder / "duplicates.json").read_text(encoding="utf-8"))
        return load_from_disk(str(folder / "split")), found

    return _build_once(run_folder(recipe) / "split", _split_inputs(recipe, path), build, load)


def _split_inputs(recipe: Recipe, path: Path) -> dict[str, Any]:
    names = "text_field", "max_documents", "test_size", "split_seed"
    names += "max_characters", "drop_duplicates"
    code = _code_hash(
        corpus.load_documents,
        corpus.split_documents,
        first_characters,
        duplicates.find_duplicates,
        duplicates.drop_duplicates,
    )
    return {"text": text_hash(path), **{n: getattr(recipe, n) for n in names}, "code": code}


def first_characters(documents: Dataset, number: int | None) -> Dataset:
    """Return the first documents, of so many characters together; None takes all."""
    if number is None:
        return documents
    kept = 0
    for text in documents["text"]:
        if number <= 0:
            break
        kept, number = kept + 1, number - len(text)
    return documents.select(range(kept))


def get_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe: Qwen2.5's, full or reduced, or one trained on the text."""
    if recipe.tokenizer == "qwen2.5" and not is_reduced(recipe):
        return qwen.qwen_tokenizer()

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        texts = get_split(recipe)["train"]["text"]
        if recipe.tokenizer == "own":
            tokenizer = tokenization.train_tokenizer(texts, recipe.vocab_size)
        else:
            tokenizer = qwen.reduce_tokenizer(qwen.qwen_tokenizer(), texts, recipe.vocab_size)
        tokenizer.save_pretrained(folder)

    inputs = {
        "split": _split_inputs(recipe, get_text(recipe)),
        "tokenizer": recipe.tokenizer,
        "vocab_size": recipe.vocab_size,
        "code": _code_hash(tokenization.train_tokenizer, qwen.reduce_tokenizer),
    }
    folder = run_folder(recipe) / "tokenizer"
    return _build_once(folder, inputs, build, tokenization.load_tokenizer)


def is_reduced(recipe: Recipe) -> bool:
    """Tell whether the recipe keeps only some of the tokens of Qwen2.5's vocabulary."""
    size = recipe.vocab_size
    return recipe.tokenizer == "qwen2.5" and size is not None and size < qwen.QWEN_VOCAB_SIZE


def get_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> DatasetDict:
    """Return the token blocks of the training set, ``train``, and of the held-out set, ``test``.

    The recipe's fields under "tokens" decide; the tokenizer is that of `get_tokenizer`, if you
    have it already. The column ``input_ids`` holds int32 lists of ``recipe.context_length``.
    """
    from datasets import DatasetDict, load_from_disk

    tokenizer = tokenizer or get_tokenizer(recipe)
    make_blocks = tokenization.pack_documents if recipe.packing else tokenization.chunk_documents

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        blocks = DatasetDict()
        for name, documents in get_split(recipe).items():
            part = folder / "parts" / name
            blocks[name] = make_blocks(documents, tokenizer, recipe.context_length, folder=part)
            if not len(blocks[name]):
                raise ValueError(_no_block(recipe, name, documents, tokenizer))
        blocks.save_to_disk(str(folder / "blocks"))
        del blocks
        shutil.rmtree(folder / "parts", ignore_errors=True)

    inputs = {
        "split": _split_inputs(recipe, get_text(recipe)),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "context_length": recipe.context_length,
        "packing": recipe.packing,
        "code": _code_hash(make_blocks, encode_each),
    }
    folder = run_folder(recipe) / "blocks"
    return _build_once(folder, inputs, build, lambda f: load_from_disk(str(f / "blocks")))


def blocks_hash(recipe: Recipe) -> str:
    """Return a hash of the blocks of a recipe: it tells the text, the split and the code."""
    get_blocks(recipe)
    files = read_inputs(run_folder(recipe) / "blocks")["files"]
    kept = {name: value for name, value in files.items() if name.endswith(".arrow")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _no_block(recipe: Recipe, name: str, documents: Dataset, tokenizer: Any) -> str:
    """Return what is missing where a text does not fill a single block, and what to do."""
    each = [len(ids) + recipe.packing for ids in encode_each(tokenizer, documents["text"])]
    most = sum(each) if recipe.packing else max(each, default=0)
    how = "" if recipe.packing else " at most (packing=false takes each by itself)"
    return (
        f"the {'training' if name == 'train' else 'held-out'} set, {len(each):,} document(s) with "
        f"{most:,} tokens{how}, fills no block of {recipe.context_length}: take more text, or a "
        f"context_length of {most} or less"
    )


def get_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen2Config:
    """Return the configuration of a recipe's model, fitted to its tokenizer.

    The recipe's fields under "model" decide; the tokenizer is that of `get_tokenizer`, if you
    have it already.
    """
    tokenizer = tokenizer or get_tokenizer(recipe)
    # A small text may give fewer tokens than the recipe asks for. More rows than tokens, as in the
    # published model, make sense only for the full vocabulary of Qwen2.5.
    padded = recipe.tokenizer == "qwen2.5" and recipe.vocab_size and not is_reduced(recipe)
    rows = recipe.vocab_size if padded else len(tokenizer)
    return modeling.recipe_config(recipe, rows, tokenizer.eos_token_id)


def get_model(recipe: Recipe, config: Qwen2Config | None = None) -> Qwen2ForCausalLM:
    """Return the untrained model of a recipe, with what saves time and memory in training.

    Its ``seed`` decides the weights; ``loss_rows``, ``attention`` and ``compile`` how fast and in
    how much memory they are trained. The configuration is that of `get_config` by default.
    """
    from tinytrain.hardware import use_no_more_cores

    use_no_more_cores()
    return prepare(modeling.build_model(config or get_config(recipe), seed=recipe.seed), recipe)


def prepare(model: Qwen2ForCausalLM, recipe: Recipe) -> Qwen2ForCausalLM:
    """Change a model so that it trains as the recipe says, in less time and memory; return it."""
    import torch

    from tinytrain.loss import save_loss_memory

    if recipe.loss_rows:
        save_loss_memory(model, recipe.loss_rows, recipe.compile)
    model.set_attn_implementation(recipe.attention)
    if recipe.compile:
        # On a processor, reading results from memory takes as long as computing them again.
        modeling.compile_layers(model, recompute=not torch.cuda.is_available())
    return model


def get_prompts(recipe: Recipe) -> list[str]:
    """Return five prompts for a model to complete: of known facts, or of held-out documents."""
    if recipe.corpus == "encyclopedia":
        return [
            "法国的首都是",
            "日本的货币是",
            "立春的下一个节气是",
            "春节的时候，人们会",
            "大熊猫主要吃",
        ]
    return [text.strip()[:12] for text in get_split(recipe)["test"][:5]["text"]]


def get_questions(recipe: Recipe) -> list[encyclopedia.Question]:
    """Return cloze questions, told, reworded and reversed; none for a text not built in."""
    return encyclopedia.cloze_questions() if recipe.corpus == "encyclopedia" else []


def get_conversations(recipe: Recipe) -> Dataset:
    """Return the conversations to tune a model on, in a column ``messages``.

    ``recipe.chats`` names a file, or a dataset on a hub: ``modelscope:owner/name`` or
    ``huggingface:owner/name``, and ``/file.jsonl`` after it for one of its files. By default they
    are written from the table of facts, and have a column ``kind`` too.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    from datasets import Dataset, concatenate_datasets

    chats = recipe.chats
    if chats is None:
        return Dataset.from_list(conversations.write_conversations(encyclopedia.read_facts()))
    if found := re.fullmatch(r"(modelscope|huggingface):([^/]+/[^/]+)/?(.*)", chats):
        source, name, file = found.groups()
        folder = runs_folder() / "downloads" / source / name
        with one_at_a_time(folder):
            files = hub.download_dataset(name, folder, source, file)
        return concatenate_datasets([conversations.load_conversations(path) for path in files])
    for path in (Path(chats), _project_folder() / chats):
        if path.exists():
            return conversations.load_conversations(path)
    raise FileNotFoundError(
        f"there is no file of conversations {chats!r}; check TINYTRAIN_CHATS or the recipe. A "
        "dataset on a hub is named modelscope:owner/name or huggingface:owner/name"
    )


def reference_curve(recipe: Recipe) -> dict[str, Any] | None:
    """Return what is normal for a recipe: the course of its loss with several other seeds.

    Made by ``python -m benchmarks.reference``, which also says what machine it ran on.

    Returns
    -------
    dict or None
        ``train`` and ``held_out``, each with lists of equal length: ``step``, and the ``low``,
        ``mean`` and ``high`` of the loss of all ``seeds``. ``samples`` are what the first seed's
        model wrote after each prompt, at a few steps from 0 (untrained). None if there is no
        reference for these hyperparameters; the seed, and what only affects display and speed,
        may differ.
    """
    reference = json.loads((_DATA / "reference.json").read_text(encoding="utf-8"))
    ignored = {"seed", *DISPLAY_AND_SPEED_FIELDS, *CHAT_FIELDS}
    same = all(
        reference["recipe"].get(k) == v for k, v in asdict(recipe).items() if k not in ignored
    )
    return reference if same else None


def _build_once(
    folder: Path,
    inputs: dict[str, Any],
    build: Callable[[Path, dict[str, Any]], None],
    load: Callable[[Path], Any],
) -> Any:
    """Return what is loaded from the folder, rebuilt unless it was built from the same inputs.

    It is loaded before another process, with other inputs, may rebuild the folder. In a distributed
    run the first process of each machine builds and the others wait; should it fail, the launcher
    ends them too.
    """
    inputs = json.loads(json.dumps(inputs))  # as they will be read back
    while True:
        with one_at_a_time(folder):
            for leftover in folder.parent.glob(f"{folder.name}.*.building"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
            reason = _why_build(folder, inputs)
            if reason and os.environ.get("LOCAL_RANK", "0") == "0":
                if folder.exists():
                    logger.info("%s %s and is rebuilt", folder.name, reason)
                _build(folder, inputs, build)
                reason = ""
            if not reason:
                return load(folder)
        time.sleep(0.1)


def _build(
    folder: Path, inputs: dict[str, Any], build: Callable[[Path, dict[str, Any]], None]
) -> None:
    building, old = (
        folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.building") for _ in range(2)
    )
    building.mkdir(parents=True)
    try:
        build(building, inputs)
        write_json(building / "inputs.json", {"inputs": inputs, "files": hash_files(building)})
        if folder.exists():
            os.replace(folder, old)  # so that no kill leaves a part of it under its name
        os.replace(building, folder)
    finally:
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _why_build(folder: Path, inputs: dict[str, Any]) -> str:
    """Return why a result has to be built, or an empty string."""
    built = read_inputs(folder)
    if built is None:
        return "is incomplete"
    if built["inputs"] != inputs:
        return "was made from other inputs"
    damaged = find_damage(folder)
    return f"is damaged ({damaged})" if damaged else ""


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """Return what ``inputs.json`` says of a result; None if it is missing or damaged."""
    try:
        built = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
        return built if {"inputs", "files"} <= built.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def find_damage(folder: Path) -> str | None:
    """Return the first file of a result that is not as it was built, or None."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _find_damage(folder, *((path, *_version(path)) for path in files))


@cache
def _find_damage(folder: Path, *files: tuple) -> str | None:
    """Read the whole result, which takes a while and is asked for often."""
    built = read_inputs(folder)
    return damaged_file(folder, built["files"]) if built else "inputs.json"


def one_at_a_time(folder: Path) -> AbstractContextManager:
    """Wait until no other process builds the folder.

    A lock on a file needs no connection between the processes, has no time limit, and the system
    releases it even if its owner is killed.
    """
    from filelock import FileLock, Timeout

    if folder.parent.exists() and not os.access(folder.parent, os.W_OK):
        return nullcontext()  # somebody else's run: nothing can be built there, but read
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        with writing_to(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            return lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process makes %s: waiting for it", folder.name)
        return lock.acquire()


def text_hash(path: Path) -> str:
    """Return a hash of the text: of its files and their names, without the folder.

    Of a single file's name only the format counts: ``.json`` and ``.txt`` are read differently.
    """
    files = corpus.text_files(path)
    names = [file.name for file in files]
    if len(files) == 1:
        names = [Path(names[0].removesuffix(".gz").removesuffix(".xz")).suffix]
    lines = [f"{_file_hash(file)} {name}\n" for file, name in zip(files, names, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    return _hash_of_version(path, *_version(path))


def _version(path: Path) -> tuple[int, int, int]:
    about = path.stat()  # what changes when a file is written to
    return about.st_ino, about.st_size, about.st_mtime_ns


@cache
def _hash_of_version(path: Path, *version: int) -> str:
    """Return the hash of a file, which takes seconds for a large one and is asked for often."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code_hash(*functions: Callable[..., Any]) -> str:
    """Return a hash of functions and of all that they use of their own modules.

    Changed code may give another result, so that what it built is rebuilt; the rest of a module, a
    plot for example, may change freely.
    """
    found: dict[str, str] = {}
    wanted = list(functions)
    while wanted:
        function = wanted.pop()
        module = sys.modules[function.__module__]
        source = inspect.getsource(function)
        found[f"{module.__name__}.{function.__qualname__}"] = source
        for name in set(re.findall(r"\b[A-Za-z_]\w*\b", source)) & vars(module).keys():
            value, key = getattr(module, name), f"{module.__name__}.{name}"
            if key in found:
                continue
            if getattr(value, "__module__", None) == module.__name__:
                wanted.append(value)
            elif isinstance(value, re.Pattern):
                found[key] = value.pattern
            elif isinstance(value, str | int | float | tuple | list | dict | frozenset):
                text = repr(sorted(value) if isinstance(value, frozenset) else value)
                found[key] = re.sub(r" at 0x\w+", "", text)  # addresses differ in each process
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
