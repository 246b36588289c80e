"""The steps of a run, each of which keeps its result on disk for the next.

A notebook shows a step from within; these functions do the same with the same helpers, so that
any notebook can be opened first: what it needs and does not find is built. A result is used again
only if it was built from the same inputs, which are written beside it as ``inputs.json`` (the
fingerprints of text and tokenizer, the numbers that matter, the code of the module). A result is
built under another name and then moved, so that a half-built one is never taken for a whole.

This is the one module that imports the others; copy from those, not from here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import corpus, encyclopedia, hub, modeling, tokenization
from tinytrain.recipes import WATCHED_ONLY, Recipe

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase, Qwen2Config

logger = logging.getLogger(__name__)


def project_folder() -> Path:
    """Return the checkout that the working folder is in, or the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "tinytrain").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def runs_folder() -> Path:
    """Return where all runs are kept: ``TINYTRAIN_RUNS``, or ``runs`` in the project's folder."""
    return Path(os.environ.get("TINYTRAIN_RUNS") or project_folder() / "runs").absolute()


def run_folder(recipe: Recipe) -> Path:
    """Return the folder of a run, made if need be.

    A text of one's own gets a folder of its own: ``runs/pocket-mytext`` beside ``runs/pocket``.
    """
    name = recipe.name
    if recipe.corpus not in ("encyclopedia", "wikipedia"):
        name += "-" + Path(recipe.corpus).name.split(".")[0]
    folder = runs_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {folder} ({error.strerror}): choose another folder in TINYTRAIN_RUNS",
        ) from error
    return folder


def get_text(recipe: Recipe, source: str = "modelscope") -> Path:
    """Return the file with the text of a recipe: written, downloaded, or one's own.

    Parameters
    ----------
    recipe : Recipe
        Its ``corpus`` decides.
    source : {"modelscope", "huggingface"}
        Where the Chinese Wikipedia comes from.

    Returns
    -------
    Path
        A file that `tinytrain.corpus.load_documents` reads.

    Raises
    ------
    FileNotFoundError
        If the corpus is a path and nothing is there.
    """
    if recipe.corpus == "encyclopedia":
        inputs = {"seed": recipe.split_seed, "code": _code(encyclopedia)}
        folder = _keep(run_folder(recipe) / "text", inputs, _write_encyclopedia)
        return folder / "encyclopedia.json"
    if recipe.corpus == "wikipedia":
        return hub.download_wikipedia(runs_folder() / "downloads", source=source)
    for path in (Path(recipe.corpus), project_folder() / recipe.corpus):
        if path.exists():
            return path.absolute()
    raise FileNotFoundError(
        f"the corpus {recipe.corpus!r} is neither 'encyclopedia', 'wikipedia' nor a file; "
        "check the path in TINYTRAIN_CORPUS or in the recipe"
    )


def _write_encyclopedia(folder: Path, inputs: dict[str, Any]) -> None:
    encyclopedia.write_encyclopedia(folder / "encyclopedia.json", seed=inputs["seed"])


def get_split(recipe: Recipe) -> DatasetDict:
    """Return the documents in two parts, ``train`` and ``test``.

    What was found twice is written beside them as ``duplicates.json``; see `get_duplicates`.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "text" decide.

    Returns
    -------
    datasets.DatasetDict
        With the columns ``text`` and ``source``.
    """
    from datasets import load_from_disk

    path = get_text(recipe)

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        documents = corpus.load_documents(path)
        if recipe.max_documents is not None and recipe.max_documents < len(documents):
            documents = documents.select(range(recipe.max_documents))
        split = corpus.split_documents(documents, recipe.test_size, recipe.split_seed)
        duplicates = corpus.find_duplicates(split)
        rows = [
            {
                "kind": pair.kind,
                "similarity": pair.similarity,
                "held_out": split["test"][pair.test]["text"][:200],
                "train": split["train"][pair.train]["text"][:200],
            }
            for pair in duplicates
        ]
        _write_json(folder / "duplicates.json", rows)
        if recipe.drop_duplicates:
            split = corpus.drop_duplicates(split, duplicates)
        split.save_to_disk(str(folder / "split"))

    folder = _keep(run_folder(recipe) / "split", _split_inputs(recipe, path), build)
    return load_from_disk(str(folder / "split"))


def get_duplicates(recipe: Recipe) -> list[dict[str, Any]]:
    """Return what `get_split` found in both halves: kind, similarity and how both texts begin."""
    get_split(recipe)
    path = run_folder(recipe) / "split" / "duplicates.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _split_inputs(recipe: Recipe, path: Path) -> dict[str, Any]:
    names = ("max_documents", "test_size", "split_seed", "drop_duplicates")
    numbers = {name: getattr(recipe, name) for name in names}
    return {"text": _sha256(path), **numbers, "code": _code(corpus)}


def get_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe: Qwen2.5's, or one trained on the training half.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "tokens" decide.

    Returns
    -------
    transformers.PreTrainedTokenizerBase
    """
    if recipe.tokenizer == "qwen2.5":
        return tokenization.qwen_tokenizer()
    if recipe.tokenizer != "own":
        raise ValueError(f"tokenizer {recipe.tokenizer!r} is neither 'qwen2.5' nor 'own'")

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        texts = get_split(recipe)["train"]["text"]
        tokenization.train_tokenizer(texts, recipe.vocab_size).save_pretrained(folder)

    inputs = {
        "split": _split_inputs(recipe, get_text(recipe)),
        "vocab_size": recipe.vocab_size,
        "code": _code(tokenization),
    }
    return tokenization.load_tokenizer(_keep(run_folder(recipe) / "tokenizer", inputs, build))


def get_blocks(recipe: Recipe) -> DatasetDict:
    """Return the token blocks of both halves, ``train`` and ``test``.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "tokens" decide.

    Returns
    -------
    datasets.DatasetDict
        With the column ``input_ids``: int32 lists of ``recipe.context_length``.
    """
    from datasets import DatasetDict, load_from_disk

    tokenizer = get_tokenizer(recipe)
    make_blocks = tokenization.pack_documents if recipe.packing else tokenization.chunk_documents

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        blocks = {
            half: make_blocks(documents, tokenizer, recipe.context_length)
            for half, documents in get_split(recipe).items()
        }
        DatasetDict(blocks).save_to_disk(str(folder / "blocks"))

    inputs = {
        "split": _split_inputs(recipe, get_text(recipe)),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "context_length": recipe.context_length,
        "packing": recipe.packing,
        "code": _code(tokenization),
    }
    folder = _keep(run_folder(recipe) / "blocks", inputs, build)
    return load_from_disk(str(folder / "blocks"))


def get_config(recipe: Recipe) -> Qwen2Config:
    """Return the configuration of a recipe's model, fitted to its tokenizer.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "model" decide.

    Returns
    -------
    transformers.Qwen2Config
    """
    tokenizer = get_tokenizer(recipe)
    # A small text may not have enough merges for the vocabulary that the recipe asks for.
    own = recipe.tokenizer == "own"
    return modeling.qwen2_config(
        vocab_size=len(tokenizer) if own or recipe.vocab_size is None else recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        context_length=recipe.context_length,
        eos_token_id=tokenizer.eos_token_id,
    )


def get_optimizer(recipe: Recipe) -> Callable[..., Any] | None:
    """Return what makes the optimiser of a recipe, for `tinytrain.training.build_trainer`.

    Parameters
    ----------
    recipe : Recipe
        Its ``optimizer`` decides, its other fields under "optimisation" give the numbers.

    Returns
    -------
    callable or None
        None stands for the Trainer's own AdamW.

    Raises
    ------
    ValueError
        If there is no optimiser of that name.
    """
    if recipe.optimizer == "adamw":
        return None
    if recipe.optimizer != "muon":
        raise ValueError(f"optimizer {recipe.optimizer!r} is neither 'adamw' nor 'muon'")

    def make(model: Any, arguments: Any) -> Any:
        from tinytrain.optimizer import muon_adamw

        return muon_adamw(
            model,
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
        )

    return make


def get_prompts(recipe: Recipe) -> list[str]:
    """Return five beginnings to let a model complete: of known facts, or of held-out documents."""
    if recipe.corpus == "encyclopedia":
        return [
            "法国的首都是",
            "日本的货币是",
            "立春的下一个节气是",
            "春节的时候，人们会",
            "大熊猫",
        ]
    return [text.strip()[:12] for text in get_split(recipe)["test"][:5]["text"]]


def get_questions(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return prompts, answers and domains of cloze questions; none for a text not built in."""
    return encyclopedia.cloze_questions() if recipe.corpus == "encyclopedia" else []


def run_inputs(recipe: Recipe, precision: str) -> dict[str, Any]:
    """Return what decides the outcome of a training run, for `tinytrain.training.open_run`."""
    inputs = {**asdict(recipe), "precision": precision, "text": _sha256(get_text(recipe))}
    inputs["tokenizer_fingerprint"] = tokenization.fingerprint(get_tokenizer(recipe))
    return {name: value for name, value in inputs.items() if name not in WATCHED_ONLY}


def save_summary(recipe: Recipe, **values: Any) -> Path:
    """Write what came of a run to ``summary.json`` in its folder.

    Parameters
    ----------
    recipe : Recipe
        The recipe of the run.
    **values
        Results that JSON can hold.

    Returns
    -------
    Path
        The file written.
    """
    path = run_folder(recipe) / "summary.json"
    _write_json(path, {"recipe": recipe.name, "corpus": recipe.corpus, **values})
    return path


def _keep(
    folder: Path, inputs: dict[str, Any], build: Callable[[Path, dict[str, Any]], None]
) -> Path:
    """Return the folder, built anew unless it was built from the same inputs."""
    note = folder / "inputs.json"
    if note.is_file() and note.read_text(encoding="utf-8") == _json(inputs):
        logger.debug("using %s again", folder)
        return folder
    if folder.exists():
        logger.info("%s was made from other inputs and is made anew", folder.name)
    building = folder.with_name(f"{folder.name}.{os.getpid()}.building")
    building.mkdir(parents=True)
    try:
        build(building, inputs)
        (building / "inputs.json").write_text(_json(inputs), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False)


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_json(values), encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code(module: Any) -> str:
    """Return a fingerprint of a module's code: changed code may give another result."""
    return _sha256(Path(sys.modules[module.__name__].__file__))[:16]
