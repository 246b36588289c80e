"""The steps of a run, each of which keeps its result on disk for the next.

A notebook shows a step from within; these functions do the same with the same helpers, so that
any notebook can be opened first: what it needs and does not find is built. A result is used again
only if it was built from the same inputs, which are written beside it as ``inputs.json`` (the
fingerprints of text and tokenizer, the numbers that matter, the code of the module). A result is
built under another name and then moved, so that a half-built one is never taken for a whole.

This is the one module that imports the others; copy from those, not from here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import corpus, encyclopedia, hub, modeling, tokenization
from tinytrain.recipes import WATCHED_ONLY, Recipe

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

    from tinytrain.training import GuardedTrainer

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
        path = Path(recipe.corpus).absolute()
        while glob.has_magic(path.name) and not path.exists():  # "texts/*.jsonl" counts as "texts"
            path = path.parent
        name += "-" + path.name.split(".")[0]
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
        A file, or one's own folder or pattern, that `tinytrain.corpus.load_documents` reads.

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
        if path.exists() or glob.glob(str(path), recursive=True):
            return path.absolute()
    raise FileNotFoundError(
        f"the corpus {recipe.corpus!r} is neither 'encyclopedia', 'wikipedia', a file nor a "
        "folder; check the path in TINYTRAIN_CORPUS or in the recipe"
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
        documents = corpus.load_documents(path, folder=folder / "documents")
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
        del documents, split  # an open file cannot be deleted everywhere
        shutil.rmtree(folder / "documents", ignore_errors=True)

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
    return {"text": _text_hash(path), **numbers, "code": _code(corpus)}


def get_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe: Qwen2.5's, whole or reduced, or one of the text's own.

    Parameters
    ----------
    recipe : Recipe
        Its fields under "tokens" decide.

    Returns
    -------
    transformers.PreTrainedTokenizerBase
    """
    if recipe.tokenizer not in ("qwen2.5", "own"):
        raise ValueError(f"tokenizer {recipe.tokenizer!r} is neither 'qwen2.5' nor 'own'")
    if recipe.tokenizer == "qwen2.5" and not _is_reduced(recipe):
        return tokenization.qwen_tokenizer()

    def build(folder: Path, inputs: dict[str, Any]) -> None:
        texts = get_split(recipe)["train"]["text"]
        if recipe.tokenizer == "own":
            tokenizer = tokenization.train_tokenizer(texts, recipe.vocab_size)
        else:
            qwen = tokenization.qwen_tokenizer()
            tokenizer = tokenization.reduce_tokenizer(qwen, texts, recipe.vocab_size)
        tokenizer.save_pretrained(folder)

    inputs = {
        "split": _split_inputs(recipe, get_text(recipe)),
        "tokenizer": recipe.tokenizer,
        "vocab_size": recipe.vocab_size,
        "code": _code(tokenization),
    }
    return tokenization.load_tokenizer(_keep(run_folder(recipe) / "tokenizer", inputs, build))


def _is_reduced(recipe: Recipe) -> bool:
    """Tell whether the recipe keeps only some words of Qwen2.5's vocabulary."""
    size = recipe.vocab_size
    return recipe.tokenizer == "qwen2.5" and size is not None and size < tokenization.QWEN_WORDS


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
        blocks = DatasetDict()
        for half, documents in get_split(recipe).items():
            part = folder / "parts" / half
            length = recipe.context_length
            blocks[half] = make_blocks(documents, tokenizer, length, folder=part)
        blocks.save_to_disk(str(folder / "blocks"))
        del blocks
        shutil.rmtree(folder / "parts", ignore_errors=True)

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
    # A small text may not have the words for the vocabulary that the recipe asks for. More rows
    # than words, as in the published model, are only for the whole of Qwen2.5's.
    padded = recipe.tokenizer == "qwen2.5" and recipe.vocab_size and not _is_reduced(recipe)
    rows = recipe.vocab_size if padded else len(tokenizer)
    return modeling.recipe_config(recipe, rows, tokenizer.eos_token_id)


def get_model(recipe: Recipe, config: Qwen2Config | None = None) -> Qwen2ForCausalLM:
    """Return the untrained model of a recipe, with what saves time and memory in training.

    Parameters
    ----------
    recipe : Recipe
        Its ``seed`` decides the weights; ``loss_rows``, ``attention`` and ``compile`` how fast
        and in how much memory they are trained.
    config : transformers.Qwen2Config, optional
        By default that of `get_config`.

    Returns
    -------
    transformers.Qwen2ForCausalLM
    """
    from tinytrain.loss import save_loss_memory

    model = modeling.build_model(config or get_config(recipe), seed=recipe.seed)
    if recipe.loss_rows:
        save_loss_memory(model, recipe.loss_rows)
    model.set_attn_implementation(recipe.attention)
    if recipe.compile:
        modeling.compile_layers(model)
    return model


def probe(recipe: Recipe, precision: str, steps: int = 6) -> tuple[float, int]:
    """Train for a few real steps, to correct `tinytrain.modeling.estimate`; keep nothing.

    Parameters
    ----------
    recipe : Recipe
        The recipe of the run.
    precision : {"float32", "bf16", "fp16"}
        What it will be trained in.
    steps : int
        Steps to make, three at least: the first two are slower and not counted.

    Returns
    -------
    step_seconds : float
        The median time of a step.
    peak_memory : int
        The most bytes in use meanwhile; see `tinytrain.hardware.peak_memory`.
    """
    import tempfile

    from tinytrain import hardware, training

    blocks, clock = get_blocks(recipe), training.StepClock()
    halves = blocks["train"], blocks["test"]
    make = get_optimizer(recipe)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training.training_arguments(
            recipe, folder, precision, max_steps=steps, save_strategy="no", eval_strategy="no"
        )
        model = get_model(recipe)
        trainer = training.build_trainer(model, arguments, *halves, [clock], make_optimizer=make)
        hardware.peak_memory(reset=True)
        trainer.train()
    return clock.seconds(), hardware.peak_memory()


def train_for(recipe: Recipe, seconds: float, folder: str | Path) -> GuardedTrainer:
    """Train a fresh model for about so many seconds, to compare recipes at equal time.

    A probe tells how many steps fit in, and the learning rate falls to its end just then; a
    warm-up takes at most a tenth of them.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run; its ``max_steps`` and ``epochs`` are not used.
    seconds : float
        Time to train.
    folder : str or Path
        Gets ``history.jsonl``; nothing else is kept.

    Returns
    -------
    tinytrain.training.GuardedTrainer
        Its ``model`` is trained; its ``evaluate()`` returns the held-out loss.
    """
    from tinytrain import callbacks, hardware, training

    precision = hardware.choose_precision(recipe.precision).name
    step_seconds, _ = probe(recipe, precision)
    number = max(2, round(seconds / step_seconds))
    recipe = replace(
        recipe,
        max_steps=number,
        warmup_steps=min(recipe.warmup_steps, number // 10),
        logging_steps=max(1, number // 50),
    )
    blocks, model = get_blocks(recipe), get_model(recipe)
    few = blocks["test"].select(range(min(len(blocks["test"]), recipe.eval_blocks or 64)))
    about = {"vocab_size": model.config.vocab_size, "name": recipe.name}
    history = Path(folder) / "history.jsonl"
    watching = [callbacks.HistoryCallback(history, recipe.tokens_per_step, **about)]
    arguments = training.training_arguments(
        recipe, folder, precision, eval_steps=number, save_strategy="no"
    )
    make = get_optimizer(recipe)
    trainer = training.build_trainer(
        model, arguments, blocks["train"], few, watching, make_optimizer=make
    )
    trainer.train()
    return trainer


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
        import torch

        from tinytrain.optimizer import muon_adamw

        return muon_adamw(
            model,
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
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
            "大熊猫主要吃",
        ]
    return [text.strip()[:12] for text in get_split(recipe)["test"][:5]["text"]]


def get_questions(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return prompts, answers and domains of cloze questions; none for a text not built in."""
    return encyclopedia.cloze_questions() if recipe.corpus == "encyclopedia" else []


def run_inputs(recipe: Recipe, precision: str) -> dict[str, Any]:
    """Return what decides the outcome of a training run, for `tinytrain.training.open_run`."""
    inputs = {**asdict(recipe), "precision": precision, "text": _text_hash(get_text(recipe))}
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


def _text_hash(path: Path) -> str:
    """Return a hash of the text: of one file, or of the names and hashes of several."""
    files = corpus.text_files(path)
    hashes = [_sha256_of(file, *_version(file)) for file in files]
    if files == [path]:
        return hashes[0]
    names = "".join(f"{hash_} {file.name}\n" for hash_, file in zip(hashes, files, strict=True))
    return hashlib.sha256(names.encode()).hexdigest()


def _version(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written to."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


@cache
def _sha256_of(path: Path, *version: int) -> str:
    """Return the hash of a file, which takes seconds for a large one and is asked for often."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code(module: Any) -> str:
    """Return a fingerprint of a module's code: changed code may give another result."""
    return _sha256(Path(sys.modules[module.__name__].__file__))[:16]
