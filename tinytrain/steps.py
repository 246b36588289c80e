"""The steps of a run, each of which keeps its result on disk for the next.

A notebook shows a step from within; these functions do the same with the same helpers, so that
any notebook can be opened first: what it needs and does not find is built. A result is used again
only if it was built from the same inputs, which are written beside it as ``inputs.json`` (the
fingerprints of text and tokenizer, the numbers that matter, the code of the module). A result is
built under another name and then moved, so that a half-built one is never taken for a whole.

This module imports the others, as `widgets` and the command line do; copy from those, not from
here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain import corpus, encyclopedia, export, hub, modeling, tokenization
from tinytrain.recipes import DISPLAY_AND_SPEED_FIELDS, Recipe

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Qwen2Config,
        Qwen2ForCausalLM,
        Trainer,
    )

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
        downloads = runs_folder() / "downloads"
        with _one_at_a_time(downloads):
            return hub.download_wikipedia(downloads, source=source)
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
    import torch

    from tinytrain.loss import save_loss_memory

    model = modeling.build_model(config or get_config(recipe), seed=recipe.seed)
    if recipe.loss_rows:
        save_loss_memory(model, recipe.loss_rows, recipe.compile)
    model.set_attn_implementation(recipe.attention)
    if recipe.compile:
        # On a processor to read results from memory takes as long as to compute them again.
        modeling.compile_layers(model, recompute=not torch.cuda.is_available())
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


def train_for(recipe: Recipe, seconds: float, folder: str | Path) -> Trainer:
    """Train a fresh model for about so many seconds, to compare recipes at equal time.

    A probe tells how many steps fit in.

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
    transformers.Trainer
        Its ``model`` is trained; its ``evaluate()`` returns the held-out loss.
    """
    from tinytrain import hardware

    step_seconds, _ = probe(recipe, hardware.choose_precision(recipe.precision).name)
    return train_steps(recipe, max(2, round(seconds / step_seconds)), folder)


def train_steps(recipe: Recipe, number: int, folder: str | Path) -> Trainer:
    """Train a fresh model for so many steps, to compare recipes at equal work.

    The learning rate falls to its end just then; a warm-up takes at most a tenth of the steps.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run; its ``max_steps`` and ``epochs`` are not used.
    number : int
        Steps to train.
    folder : str or Path
        Gets ``history.jsonl``; nothing else is kept.

    Returns
    -------
    transformers.Trainer
        Its ``model`` is trained; its ``evaluate()`` returns the held-out loss.
    """
    from tinytrain import callbacks, checkpoints, hardware, training
    from tinytrain.callbacks.guard import LossGuard

    recipe = replace(
        recipe,
        max_steps=number,
        warmup_steps=min(recipe.warmup_steps, number // 10),
        logging_steps=max(1, number // 50),
    )
    precision = hardware.choose_precision(recipe.precision).name
    blocks, model = get_blocks(recipe), get_model(recipe)
    few = blocks["test"].select(range(min(len(blocks["test"]), recipe.eval_blocks or 64)))
    about = {"vocab_size": model.config.vocab_size, "name": recipe.name}
    history = Path(folder) / "history.jsonl"
    watching = [
        callbacks.HistoryCallback(history, recipe.tokens_per_step, **about),
        LossGuard(find_checkpoint=checkpoints.last_checkpoint),
    ]
    arguments = training.training_arguments(
        recipe, folder, precision, eval_steps=number, save_strategy="no"
    )
    make = get_optimizer(recipe)
    trainer = training.build_trainer(
        model, arguments, blocks["train"], few, watching, make_optimizer=make
    )
    trainer.train()
    return trainer


def share_recipe(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe of one of several processes that make each step of the optimiser together.

    The batch and the accumulation become smaller, so that a step learns from the same blocks as
    in one process, and the same numbers lead to the same result. Where the blocks of a step cannot
    be shared out evenly, there are a few more of them.

    Parameters
    ----------
    recipe : Recipe
        As for one process.
    processes : int
        How many there are.

    Returns
    -------
    Recipe

    Examples
    --------
    >>> from tinytrain.recipes import RECIPES
    >>> mine = share_recipe(RECIPES["wiki"], 2)  # 16 blocks, 4 times
    >>> mine.batch_size, mine.gradient_accumulation
    (16, 2)
    >>> mine = share_recipe(RECIPES["pocket"], 2)  # 8 blocks, once
    >>> mine.batch_size, mine.gradient_accumulation
    (4, 1)
    """
    blocks = math.ceil(recipe.batch_size * recipe.gradient_accumulation / processes)
    sizes = range(1, min(recipe.batch_size, blocks) + 1)
    batch_size = max(size for size in sizes if blocks % size == 0)
    return replace(recipe, batch_size=batch_size, gradient_accumulation=blocks // batch_size)


def train_recipe(recipe: Recipe, fresh: bool = False, fsdp: bool = False) -> dict[str, Any]:
    """Train as notebook 05 does, cell by cell, in one process or in several.

    ``torchrun``, ``accelerate launch`` and, in a notebook, ``accelerate.notebook_launcher`` start
    the processes; each calls this function. One step learns from the same blocks, however many
    processes share it, so a run may go on with another number of them. All read and write one
    folder. Only the first process writes and logs.

    Parameters
    ----------
    recipe : Recipe
        The numbers of the run, as for one process; see `share_recipe`.
    fresh : bool
        Start over even though there is something to go on from; the earlier run is kept aside.
    fsdp : bool
        Give each process only a part of the weights (PyTorch's FSDP), for a model that is too
        large for one GPU. Needs several processes.

    Returns
    -------
    dict
        ``finished`` tells whether the run came to its end. If so, the first process adds what it
        writes to ``summary.json``. The model and its tokenizer are in ``model`` in the run's
        folder, be it finished or stopped.

    Raises
    ------
    ValueError
        If ``fsdp`` is asked of a single process.
    """
    from functools import partial

    import torch

    from tinytrain import callbacks, checkpoints, evaluation, training
    from tinytrain.callbacks.guard import LossGuard
    from tinytrain.common import setup_logging

    first, processes = this_process() == 0, int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --use_fsdp` says it so.
    fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp and processes == 1:
        raise ValueError(
            "FSDP shares a model out to several processes and here is one: start them with "
            "`torchrun --nproc-per-node 2 -m tinytrain train --fsdp`"
        )
    folder = run_folder(recipe)
    if first:
        setup_logging(folder / "training.log")
    # Before the processes are connected: however long it takes, no connection can time out.
    blocks, tokenizer = get_blocks(recipe), get_tokenizer(recipe)
    precision, model = _choose_precision(recipe, processes), get_model(recipe)
    prompts, questions = get_prompts(recipe), get_questions(recipe)
    before = _answer(model, tokenizer, questions) if first else None

    mine = share_recipe(recipe, processes)
    tokens = mine.tokens_per_step * processes
    if processes > 1:
        logger.info(
            "%d processes share each step: %d x %d blocks each, %s tokens in all%s",
            processes,
            mine.gradient_accumulation,
            mine.batch_size,
            f"{tokens:,}",
            "" if tokens == recipe.tokens_per_step else f" (alone: {recipe.tokens_per_step:,})",
        )
    arguments = training.training_arguments(
        mine, folder / "checkpoints", precision, **({"fsdp": True} if fsdp else {})
    )
    about = {"vocab_size": model.config.vocab_size, "name": recipe.name}
    history = callbacks.HistoryCallback(folder / "history.jsonl", tokens, **about)
    plot = callbacks.LivePlotCallback(
        folder / "loss.png",
        model.config.vocab_size,
        tokens,
        history.path,
        callbacks.reference_curve(recipe),
    )
    write = partial(evaluation.complete, tokenizer=tokenizer, max_new_tokens=10)
    watching = [
        callbacks.StopCallback(folder / "STOP"),
        history,
        callbacks.VerboseTrainingCallback(tokens),
        plot,
        callbacks.SampleCallback(write, prompts[:2], recipe.sample_steps, folder / "samples.jsonl"),
        LossGuard(tokenizer=tokenizer, find_checkpoint=checkpoints.last_checkpoint),
    ]
    held_out = blocks["test"]
    few = held_out.select(range(min(len(held_out), recipe.eval_blocks or len(held_out))))
    trainer = training.build_trainer(
        model,
        arguments,
        blocks["train"],
        few,
        watching,
        make_optimizer=get_optimizer(recipe),
    )
    checkpoints.train(
        trainer,
        run_inputs(recipe, precision),
        fresh,
        recipe.halve_batch,
        make_model=partial(get_model, recipe),
    )

    trainer.save_model(str(folder / "model"))
    if first:
        tokenizer.save_pretrained(folder / "model")
    result = {"finished": trainer.state.global_step >= trainer.state.max_steps}
    if result["finished"]:
        loss = trainer.evaluate(held_out, metric_key_prefix="full")["full_loss"]
        if first:
            losses = [line["loss"] for line in callbacks.read_history(folder) if "loss" in line]
            rate = tokenization.tokens_per_character(tokenizer, get_split(recipe)["test"]["text"])
            saved, _ = load_trained(recipe)
            completions = evaluation.complete(saved, tokenizer, prompts, 12)
            result |= {
                "parameters": saved.num_parameters(),
                "precision": precision,
                "train_loss": sum(losses[-10:]) / len(losses[-10:]),
                "held_out_loss": loss,
                "bits_per_character": evaluation.bits_per_character(loss, rate),
                "completions": list(zip(prompts, completions, strict=True)),
            }
            if questions:
                after = _answer(saved, tokenizer, questions)
                result |= {"cloze_before": before, "cloze_after": after}
            save_summary(recipe, **result)
    # Or NCCL complains at the end. Gloo does not, and were it to go before the model that uses it,
    # the process might never end: PyTorch 2.13 then waits for a thread which waits for Python.
    if processes > 1 and "nccl" in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()
    return result


def this_process() -> int:
    """Return the number of this process among those of a run, from 0; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0))


def _choose_precision(recipe: Recipe, processes: int) -> str:
    """Return the same precision in all processes."""
    import torch

    from tinytrain import hardware

    name = hardware.choose_precision(recipe.precision).name
    if processes > 1 and not torch.accelerator.is_available():
        # On a processor the choice is measured, and may come out differently in each process.
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState(cpu=True)
        name = broadcast_object_list([name])[0]
    return name


def _answer(model: Any, tokenizer: Any, questions: list[Any]) -> float:
    from tinytrain import evaluation

    return evaluation.accuracy(evaluation.answer_questions(model, tokenizer, questions))


def get_trained(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the trained model of a recipe and its tokenizer; train it if there is none.

    Parameters
    ----------
    recipe : Recipe
        The recipe of the run. A model trained from other inputs, a changed recipe for example, is
        not taken for it. One whose training was stopped early is.

    Returns
    -------
    model : transformers.PreTrainedModel
        In float32, on the GPU if there is one.
    tokenizer : transformers.PreTrainedTokenizerBase
    """
    folder = run_folder(recipe)
    if not _is_trained(recipe, folder):
        logger.info("recipe %s has not been trained yet: training it now", recipe.name)
        train_recipe(recipe)
    return load_trained(recipe)


def load_trained(
    recipe: Recipe, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a saved model, in float32 and on the GPU if there is one, and its tokenizer.

    Parameters
    ----------
    recipe : Recipe
        Whose run notebook 05 or `train_recipe` has saved it in.
    folder : Path, optional
        Another one to load, with a fast tokenizer.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = folder or run_folder(recipe) / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no trained model in {folder}: notebook 05 makes one, or `python -m "
            f"tinytrain train --recipe {recipe.name}`"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(device)
    return model, tokenization.load_tokenizer(folder)


def _is_trained(recipe: Recipe, folder: Path) -> bool:
    """Tell whether the run's folder holds a model, and one trained from these inputs."""
    from tinytrain.checkpoints import checkpoint_inputs, last_checkpoint

    if not (folder / "model" / "config.json").is_file():
        return False
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        logger.warning("%s has no checkpoints any more: its model is taken as it is", folder.name)
        return True
    before = checkpoint_inputs(checkpoint)
    # The number format depends on the machine; a model may have come from another one.
    return before == json.loads(json.dumps(run_inputs(recipe, before.get("precision", ""))))


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
    """Return what decides the outcome of a training run, for `tinytrain.checkpoints.train`."""
    inputs = {**asdict(recipe), "precision": precision, "text": _text_hash(get_text(recipe))}
    inputs["tokenizer_fingerprint"] = tokenization.fingerprint(get_tokenizer(recipe))
    return {name: value for name, value in inputs.items() if name not in DISPLAY_AND_SPEED_FIELDS}


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
    from tinytrain import hardware

    path = run_folder(recipe) / "summary.json"
    about = {"recipe": recipe.name, "corpus": recipe.corpus, "machine": hardware.machine_name()}
    _write_json(path, {**about, **values})
    return path


def get_about(recipe: Recipe) -> dict[str, Any]:
    """Return what the folder of a run tells about it, for `tinytrain.export.model_card`.

    Parameters
    ----------
    recipe : Recipe
        The recipe of a run that has ended.

    Returns
    -------
    dict
        The facts that are there; a run without ``summary.json`` or ``history.jsonl`` has fewer.
    """
    from importlib.metadata import version

    from tinytrain.callbacks import read_history

    folder = run_folder(recipe)
    tokenizer, split = get_tokenizer(recipe), get_split(recipe)
    kinds = {True: "Qwen2.5's, reduced to the words that the text uses most", False: "Qwen2.5's"}
    own = "byte-level byte pairs, trained on the text"
    left_out = {"name", "corpus", *DISPLAY_AND_SPEED_FIELDS}
    about: dict[str, Any] = {
        "name": f"tinytrain-{folder.name}",
        "text": recipe.corpus,
        "documents": (len(split["train"]), len(split["test"])),
        "tokenizer": own if recipe.tokenizer == "own" else kinds[_is_reduced(recipe)],
        "words": len(tokenizer),
        "recipe": {name: value for name, value in asdict(recipe).items() if name not in left_out},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if (folder / "history.jsonl").is_file():
        about["history"] = read_history(folder / "history.jsonl")
        about |= {name: about["history"][-1].get(name, 0) for name in ("seconds", "tokens")}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        about |= {name: summary[name] for name in summary if name not in ("recipe", "corpus")}
    return about


def export_run(
    recipe: Recipe,
    dtype: str = "float32",
    gguf: bool = False,
    whole_vocabulary: bool = False,
    **about: Any,
) -> Path:
    """Export the trained model of a run to ``export`` in its folder.

    Parameters
    ----------
    recipe : Recipe
        The recipe of a run whose model notebook 05 has saved.
    dtype, gguf
        As in `tinytrain.export.export_model`.
    whole_vocabulary : bool
        For a reduced Qwen2.5 vocabulary: give the model all words again, so that it works with
        Qwen2.5's own tokenizer; see `tinytrain.modeling.expand_vocabulary`. Goes to
        ``export-whole``.
    **about
        Facts for the card that the run's folder does not hold, or holds wrongly.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If there is no trained model.
    ValueError
        If ``whole_vocabulary`` is asked for and the vocabulary is not a reduced one.
    """
    run = run_folder(recipe)
    model, tokenizer = load_trained(recipe)
    facts = {**get_about(recipe), **about}
    if whole_vocabulary:
        if not _is_reduced(recipe):
            raise ValueError(
                f"recipe {recipe.name!r} has no reduced Qwen2.5 vocabulary that could be made whole"
            )
        model, tokenizer = _with_whole_vocabulary(recipe, model, tokenizer)
        facts |= {
            "tokenizer": "Qwen2.5's, whole; trained with a part of it",
            "words": len(tokenizer),
        }
        facts["parameters"] = model.num_parameters()
    return export.export_model(
        model,
        tokenizer,
        run / ("export-whole" if whole_vocabulary else "export"),
        facts,
        dtype=dtype,
        gguf=gguf,
        files=(run / "loss.png", run / "history.jsonl"),
    )


def _with_whole_vocabulary(recipe: Recipe, model: Any, reduced: Any) -> tuple[Any, Any]:
    """Return the model with a row for each word of Qwen2.5, and Qwen2.5's tokenizer."""
    whole = tokenization.qwen_tokenizer()
    blocks = get_blocks(recipe)["train"]
    # Ten tokens for each number of a row that is sought, evenly from the whole text.
    number = min(len(blocks), 1 + 10 * model.config.hidden_size // recipe.context_length)
    some = blocks.select(range(0, len(blocks), len(blocks) // number))["input_ids"]
    ids = tokenization.original_ids(reduced, whole)
    return modeling.expand_vocabulary(model, ids, len(whole), list(some)), whole


def _keep(
    folder: Path, inputs: dict[str, Any], build: Callable[[Path, dict[str, Any]], None]
) -> Path:
    """Return the folder, built anew unless it was built from the same inputs.

    Of several processes of a run, the first on each machine builds and the others wait: should it
    fail, what has started them ends them too.
    """
    while not _is_kept(folder, inputs):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _build(folder, inputs, build)
        else:
            time.sleep(0.1)
    return folder


def _build(
    folder: Path, inputs: dict[str, Any], build: Callable[[Path, dict[str, Any]], None]
) -> None:
    with _one_at_a_time(folder):
        if _is_kept(folder, inputs):  # another process has built it meanwhile
            return
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


def _is_kept(folder: Path, inputs: dict[str, Any]) -> bool:
    note = folder / "inputs.json"
    kept = note.is_file() and note.read_text(encoding="utf-8") == _json(inputs)
    if kept:
        logger.debug("using %s again", folder)
    return kept


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process builds the folder.

    A lock on a file needs no connection between the processes, has no time limit, and the system
    lets go of it even if the one that builds is killed.
    """
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process makes %s: waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
