"""The steps of a run from a shell: ``python -m tinytrain STEP``.

Each step finds the results of earlier ones in the run's folder and builds what is missing, as the
notebooks do, so any of them can be called first. ``torchrun`` or ``accelerate launch`` may start
``train`` and ``tune`` in several processes, which then share one training.

This module joins others as `tinytrain.steps` does; copy from those, not from here.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import gc
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil

from tinytrain import results, runs, steps
from tinytrain.common import (
    check_sampling,
    one_line,
    print_any_character,
    rank,
    safe_text,
    setup_logging,
)
from tinytrain.planning import get_recipe
from tinytrain.recipes import RECIPES, Recipe

_EXAMPLES = """examples:
  python -m tinytrain train --recipe pocket
  python -m tinytrain train --hours 1 --corpus my.jsonl
  python -m tinytrain train --recipe wiki --set learning_rate=2e-3 max_steps=2000
  python -m tinytrain generate "法国的首都是" --temperature 0.8 --top-p 0.9
  python -m tinytrain tune --recipe pocket
  python -m tinytrain chat --recipe pocket
  torchrun --standalone --nproc-per-node 2 -m tinytrain train --recipe wiki
  torchrun --standalone --nproc-per-node 2 -m tinytrain train --recipe qwen-0.5b --fsdp
  accelerate launch --main_process_port 0 --multi_gpu --num_processes 2 -m tinytrain train

exit codes: 0 done; 1 an error, told in a line; 2 a wrong call; 130 stopped before its end (Ctrl-C)
"""


def check(options: argparse.Namespace) -> None:
    """Show what this machine is, and what each recipe would need on it."""
    import pandas as pd

    from tinytrain import costs, hardware

    hardware.check_cuda_availability()
    for what, value in hardware.hardware_report(steps.runs_folder()).items():
        print(f"  {what:16} {value}")
    here = hardware.this_hardware(steps.runs_folder())
    rows = [costs.estimate(recipe, here).row() for recipe in RECIPES.values()]
    print()
    print(pd.DataFrame(rows).set_index("recipe").to_string())


def data(options: argparse.Namespace) -> None:
    """Get the text and split it into documents to learn from and held-out ones."""
    setup_logging()
    split = steps.get_split(options.recipe)
    found = len(steps.get_duplicates(options.recipe))
    print(_shown(steps.get_text(options.recipe)))
    print(f"{len(split['train']):,} documents to learn from, {len(split['test']):,} held out")
    dropped = "left out" if options.recipe.drop_duplicates else "kept"
    print(f"{found:,} held-out documents are in the training set too, and {dropped}")


def tokenize(options: argparse.Namespace) -> None:
    """Make the tokenizer, and blocks of tokens of equal length."""
    from tinytrain.tokenization import tokens_per_character

    setup_logging()
    recipe = options.recipe
    blocks, tokenizer = steps.get_blocks(recipe), steps.get_tokenizer(recipe)
    rate = tokens_per_character(tokenizer, steps.get_split(recipe)["test"][:500]["text"])
    print(f"{len(tokenizer):,} tokens in the vocabulary, {rate:.2f} tokens a character")
    for part, name in (("train", "to learn from"), ("test", "held out")):
        number = len(blocks[part])
        tokens = number * recipe.context_length
        print(f"{number:,} blocks of {recipe.context_length}, {tokens:,} tokens, {name}")


def train(options: argparse.Namespace) -> int:
    """Train, going on from the last checkpoint if there is one; then measure and save the model."""
    from tinytrain.checkpoints import longer_run

    _show_no_bars()
    recipe = options.recipe
    if options.more is not None:
        if recipe.hours:
            raise ValueError(
                "--more counts steps, but this run goes by the clock: give more --hours"
            )
        checkpoints = steps.run_folder(recipe) / "checkpoints"
        recipe = replace(recipe, max_steps=longer_run(checkpoints, options.more))
    spent = time.time() - psutil.Process().create_time()  # Python's start and the plan count too
    result = runs.train_recipe(recipe, options.fresh, options.fsdp, spent)
    if rank() == 0 and result["finished"]:
        print(f"held-out loss  {result['held_out_loss']:.3f}")
        print(f"bits per character  {result['bits_per_character']:.2f}")
        for kind, after in result.get("cloze_after", {}).items():
            before = result["cloze_before"][kind]
            print(f"{kind} questions  {before:.0%} right before training, {after:.0%} after")
        for prompt, text in result["completions"]:
            print(f"{one_line(prompt)} → {one_line(text)}")
        print(f"the model is in {_shown(steps.run_folder(options.recipe) / 'model')}")
    return 0 if result["finished"] else 130


def evaluate(options: argparse.Namespace) -> None:
    """Measure a trained model on the held-out documents, and with questions if there are any."""
    from tqdm import tqdm

    from tinytrain import evaluation, generation

    model, tokenizer = _load_model(options)
    if options.model:
        results.check_held_out(options.recipe, options.model)
    texts = list(steps.get_split(options.recipe)["test"]["text"])
    print(f"{len(texts):,} held-out documents; in brackets, what 95 of 100 such samples would give")
    losses = []
    for start in tqdm(range(0, len(texts), 256), "measuring", disable=None, leave=False):
        some, length = texts[start : start + 256], options.recipe.context_length
        losses += evaluation.document_losses(model, tokenizer, some, context_length=length)
    measures = evaluation.summarize(losses)
    for name in ("bits_per_character", "perplexity", "accuracy"):
        print(f"{name.replace('_', ' '):20} {getattr(measures, name)}")
    if questions := steps.get_questions(options.recipe):
        answers = generation.answer_questions(model, tokenizer, questions)
        shares = evaluation.by_kind(questions, [answer.right for answer in answers])
        for kind, right in shares.items():
            print(f"{kind + ' questions':20} {right} right")


def generate(options: argparse.Namespace) -> None:
    """Let a trained model continue a text, shown as it is written."""
    from tinytrain import generation

    model, tokenizer = _load_model(options)
    begins = iter([options.prompt])  # shown with the first piece: nothing is wrong then

    def show(text: str) -> None:
        print(safe_text(next(begins, "") + text), end="", flush=True)

    generation.generate(model, tokenizer, options.prompt, on_text=show, **_sampling(options))
    print(safe_text(next(begins, "")))


def tune(options: argparse.Namespace) -> int:
    """Tune a trained model on conversations, so that it answers; measure it before and after."""
    from tinytrain import tuning

    _show_no_bars()
    recipe = options.recipe
    if options.model is None:
        with contextlib.suppress(FileNotFoundError):  # then `tune_recipe` trains one first
            recipe = results.trained_recipe(recipe, options.changed)
    result = tuning.tune_recipe(recipe, options.model, fresh=options.fresh)
    if rank() == 0 and result["finished"]:
        print("before and after; in brackets, what 95 of 100 such samples would give")
        for group, after in result["chat_after"].items():
            print(f"{_GROUPS[group]:42} {result['chat_before'][group]!s:23} {after}")
        name = "bits per character of held-out text"
        print(f"{name:42} {result['bits_before']!s:23} {result['bits_after']}")
        print(f"the model is in {_shown(steps.chat_folder(recipe) / 'model')}")
    return 0 if result["finished"] else 130


_GROUPS = {
    "tuned": "right: questions of the conversations",
    "reworded": "right: the same facts, other wordings",
    "untaught": "right: facts that no conversation tells",
    "invented": "right: does not know an invented name",
    "refused": "wrong: does not know a real name",
}


def chat(options: argparse.Namespace) -> None:
    """Talk to a tuned model in the terminal, or pipe questions to it, one a line."""
    from tinytrain.chat import Chat, add_chat_template

    _show_no_bars()
    sampling = _sampling(options)
    if options.model:
        model, tokenizer = results.load_trained(options.recipe, options.model)
    else:
        model, tokenizer = results.load_tuned(options.recipe)
    _converse(Chat(model, add_chat_template(tokenizer), options.system), sampling)


def _converse(talk: Any, sampling: dict[str, Any]) -> None:
    """Answer each line that is typed or comes through a pipe, until there is none."""
    at_terminal = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if at_terminal:
        with contextlib.suppress(ImportError):  # with it, `input` edits lines; Windows has none
            import readline  # noqa: F401
        _note(f"{_CHAT_HELP}; Ctrl-C stops an answer, Ctrl-D leaves")
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends all, not one answer of many
    if sys.stdin:
        sys.stdin.reconfigure(errors="strict")  # in the C locale, Python lets any bytes pass
    while True:
        try:
            text = input("> " if at_terminal else "")
            if text == "/reset":
                talk.reset()
                _note("started over: what was said before is forgotten")
            elif text.startswith("/"):
                _note(_CHAT_HELP)
            else:
                talk.reply(text, on_text=_show_piece, **sampling)
                print()
        except UnicodeDecodeError:
            raise
        except ValueError as error:  # the message is empty or too long
            _note(error)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print(end="\n" * at_terminal)


_CHAT_HELP = "/reset starts over; put a space before a question that begins with /"


def _show_piece(text: str) -> None:
    print(safe_text(text), end="", flush=True)


def _note(text: Any) -> None:
    """Print to stderr, where the warning about dropped turns goes too: stdout has only answers."""
    print(safe_text(text), file=sys.stderr, flush=True)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the chosen parameters of sampling, all in their ranges."""
    knobs = "temperature", "top_k", "top_p", "repetition_penalty"
    chosen = {name: getattr(options, name) for name in knobs}
    check_sampling(**chosen)
    return chosen | {"max_new_tokens": options.max_new_tokens, "seed": options.seed}


def export(options: argparse.Namespace) -> None:
    """Write a trained model as a folder to share, with a model card; GGUF and upload if asked."""
    from tinytrain.hub import upload

    _show_no_bars()
    setup_logging()
    if not options.chat:
        options.recipe = results.trained_recipe(options.recipe, options.changed)
    folder = results.export_run(options.recipe, options.dtype, options.gguf, options.chat)
    if options.upload:
        print(upload(folder, options.upload, to=options.to, private=not options.public))


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a trained model, on the GPU if there is one, and its tokenizer.

    The run's own goes with the recipe that it was trained with, whatever was changed then.
    """
    _show_no_bars()
    if options.model is None:
        options.recipe = results.trained_recipe(options.recipe, options.changed)
    return results.load_trained(options.recipe, options.model)


def _show_no_bars() -> None:
    """Leave out transformers' bars, one for each file of weights; without a terminal, all bars."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (sys.stderr and sys.stderr.isatty()):
        datasets.disable_progress_bars()


def _shown(path: Path) -> Path:
    """Return a path as you would write it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _parse_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options describe."""
    has_gpu = False
    if not (options.recipe or options.hours or os.environ.get("TINYTRAIN_RECIPE")):
        import torch

        has_gpu = torch.cuda.is_available()
    if options.hours is not None and options.recipe:
        raise ValueError("--hours makes a recipe of its own: give either --hours or --recipe")
    changes = dict(_parse_change(text) for text in options.set)
    options.changed = set(changes)
    if options.corpus:
        changes["corpus"] = options.corpus
    if getattr(options, "chats", None):
        changes["chats"] = options.chats
    name = options.recipe if options.hours is None else options.hours
    return get_recipe(name, has_gpu, **changes)


def _parse_change(text: str) -> tuple[str, Any]:
    """Read ``name=value`` for a field of a recipe, in the field's own type if the value has it.

    Examples
    --------
    >>> _parse_change("learning_rate=1e-3"), _parse_change("max_documents=none")
    (('learning_rate', 0.001), ('max_documents', None))
    """
    name, equals, value = text.partition("=")
    names = [field.name for field in fields(Recipe) if field.name != "name"]
    if not equals or name not in names:
        near = difflib.get_close_matches(name, names, 1)
        wrong = f"a recipe has no {name!r}" if equals else "write name=value"
        advice = f"{near[0]!r} is near" if near else "tinytrain/recipes.py lists the names"
        raise ValueError(f"--set {text}: {wrong}; {advice}")
    kind = typing.get_type_hints(Recipe)[name]
    kinds = typing.get_args(kind) or (kind,)
    constant = {"none": None, "true": True, "false": False}.get(value.lower(), value)
    if type(constant) in kinds:
        return name, constant
    if kinds[0] is not bool:
        with contextlib.suppress(ValueError):  # the recipe itself says what it must be
            return name, kinds[0](value)
    return name, value


def _build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tinytrain",
        description="Train a Chinese language model from scratch, step by step.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_subparsers(metavar="STEP", title="steps, in their order", prog=parser.prog)
    common = _common_options()
    add_options = {
        train: _add_training_options,
        evaluate: _add_model_option,
        generate: _add_generation_options,
        tune: _add_tuning_options,
        chat: _add_chat_options,
        export: _add_export_options,
    }
    for step in (check, data, tokenize, train, evaluate, generate, tune, chat, export):
        summary = (step.__doc__ or "").split("\n")[0]  # python -OO has none
        added = chosen.add_parser(
            step.__name__, parents=[common], help=summary, description=summary, allow_abbrev=False
        )
        added.set_defaults(step=step)
        if step in add_options:
            add_options[step](added)
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    names = f"one of {', '.join(RECIPES)} (default: wiki with a GPU, pocket without)"
    add("--recipe", metavar="NAME", help=names)
    add("--hours", type=float, help="make a recipe for the time you have, e.g. 0.5")
    add("--corpus", metavar="FILE", help="a text of your own, in place of its own")
    changes = "change hyperparameters of the recipe (tinytrain/recipes.py lists them), "
    changes += "e.g. --set learning_rate=1e-3 max_steps=500"
    add("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help=changes)
    add("--runs", metavar="FOLDER", help="where all runs are kept (default: runs)")
    add("--debug", action="store_true", help="show where an error happened")
    return common


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fresh", action="store_true", help="start over; the earlier run is kept beside")
    add("--more", type=int, metavar="STEPS", help="train a finished run so many steps longer")
    add("--fsdp", action="store_true", help="shard the weights over the processes (FSDP)")


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    about = "a trained model (default: the recipe's)"
    parser.add_argument("--model", type=Path, metavar="FOLDER", help=about)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    _add_model_option(parser)
    parser.add_argument("prompt", type=utf8, help="the beginning, e.g. 法国的首都是")
    _add_sampling_options(parser, max_new_tokens=100, temperature=1.0)


def _add_tuning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "a model in Hugging Face format to begin with (default: the recipe's)"
    add("--model", type=Path, metavar="FOLDER", help=about)
    add("--chats", metavar="FILE", help="conversations of your own, also modelscope:OWNER/NAME")
    add("--fresh", action="store_true", help="start over; the earlier tuning is kept beside")


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    _add_model_option(parser)
    parser.add_argument("--system", type=utf8, metavar="TEXT", help="a system turn to begin with")
    _add_sampling_options(parser, max_new_tokens=128, temperature=0.0)


def _add_sampling_options(
    parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float
) -> None:
    for name, default, meaning in (
        ("--max-new-tokens", max_new_tokens, "where to stop at the latest"),
        ("--temperature", temperature, "0 takes the likeliest token; the higher, the wilder"),
        ("--top-k", 0, "sample only from so many of the likeliest tokens; 0 from all"),
        ("--top-p", 1.0, "sample only from the likeliest that have this probability together"),
        ("--repetition-penalty", 1.0, "above 1: avoid tokens that are there already"),
    ):
        kind = {"type": type(default), "default": default, "metavar": "NUMBER"}
        parser.add_argument(name, **kind, help=f"{meaning} (default: {default})")
    about = "the same seed writes the same text"
    parser.add_argument("--seed", type=int, metavar="NUMBER", help=about)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--chat", action="store_true", help="the model that was tuned on conversations")
    add("--gguf", action="store_true", help="add a file for llama.cpp")
    about = "number format of the weights; bfloat16 takes half the space (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=about)
    add("--upload", metavar="OWNER/NAME", help="upload it to a hub")
    hubs = ("modelscope", "huggingface")
    add("--to", choices=hubs, default="modelscope", help="which hub (default: modelscope)")
    add("--public", action="store_true", help="let everybody see it (default: you alone)")


def utf8(argument: str) -> str:
    """Return an argument; raise a ValueError if it was not UTF-8, which no tokenizer takes."""
    argument.encode()
    return argument


def _in_words(error: Exception) -> str:
    """Return what an error says, with what to do where the error itself does not know."""
    said = str(error).strip()
    if isinstance(error, MemoryError) or re.search(r"can't allocate memory|bad_alloc", said):
        return (
            f"out of memory ({(said or type(error).__name__).splitlines()[0]}). Training needs "
            "less with a smaller batch_size, context_length or hidden_size (--set), other steps "
            "with less text; `check` shows what there is"
        )
    if said.startswith("[Errno 28] No space") and not getattr(error, "filename", None):
        folders = filter(Path.exists, (steps.runs_folder(), Path(tempfile.gettempdir())))
        free = (f"{shutil.disk_usage(place).free / 1e9:.1f} GB in {place}" for place in folders)
        return f"{said}; free are {', '.join(free)}"
    if said and isinstance(error, ValueError | OSError | RuntimeError | ImportError):
        return said
    return f"{type(error).__name__}: {said or 'no message'} (--debug shows where)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a step; returns the exit status."""
    print_any_character()
    parser = _build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "step"):
        parser.print_help()
        return 0
    process = rank()
    if process and options.step not in (train, tune):
        return 0  # the other steps are done by the first process alone
    try:
        if options.runs:
            os.environ["TINYTRAIN_RUNS"] = os.path.abspath(os.path.expanduser(options.runs))
        options.recipe = _parse_recipe(options)
        status = options.step(options) or 0
        print(end="", flush=True)  # a full disk shows itself here
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as `| head` has
            return 128 + 13  # what a shell shows of a program that SIGPIPE has ended
        name = f"tinytrain (rank {process})" if process else "tinytrain"
        print(safe_text(f"{name}: {_in_words(error)}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Importing PyTorch and transformers makes 400,000 objects. The garbage collector would search
    # them again and again meanwhile, and once more at the end: up to a second each time.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    sys.exit(main())
