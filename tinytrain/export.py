"""Write a trained model as a folder that needs nothing of tinytrain, with a model card.

The card says what the model was trained on, how far, and what it must not be used for; it is worded
in ``data/model_card.md``.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from tinytrain.common import (
    EXPORT_MARK,
    format_count,
    format_seconds,
    hash_file,
    hash_files,
    one_line,
    write_json,
    writing_to,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_CARD_TEMPLATE = Path(__file__).parent / "data" / "model_card.md"
_LICENSES = {"encyclopedia": "mit", "wikipedia": "cc-by-sa-3.0"}
_DATASETS = {"wikipedia": ["pleisto/wikipedia-cn-20230720-filtered"]}


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    files: Sequence[str | Path] = (),
    finish: Callable[[Path], Any] | None = None,
) -> Path:
    """Write a folder that plain transformers loads and a hub shows.

    An earlier export there is replaced at the very end. Only files that an export wrote, and nobody
    changed since, are replaced or removed (``.tinytrain.json`` remembers them); anything else in
    their place is a FileExistsError.

    Parameters
    ----------
    model, tokenizer
        The trained model, without what `tinytrain.loss` or `compile_layers` changed in it, and its
        tokenizer. With a chat template (ChatML's), the folder is that of a chat model.
    folder : str or Path
        Where to write: a new folder, an empty one or an earlier export.
    facts : mapping, optional
        What the card says of the run; see `_model_card`. The name is by default the folder's.
    dtype : {"float32", "bfloat16"}
        Format of the weights. bfloat16 takes half the space and moves the logits a little.
    files : sequence of path
        Files to add, such as ``loss.png`` (then shown in the card), if they are there.
    finish : callable, optional
        Called with the folder before it takes its place, to write more into it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is neither 'float32' nor 'bfloat16'")
    folder = Path(folder).expanduser().absolute()
    with writing_to(folder):
        building = _place_beside(folder)
        try:
            building.mkdir(parents=True)
            _plain_model(model, tokenizer, dtype).save_pretrained(building)
            _plain_tokenizer(tokenizer, model.config).save_pretrained(building)
            for file in map(Path, files):
                if file.is_file():
                    shutil.copyfile(file, building / file.name)
            measured = {
                "name": folder.name,
                "parameters": model.num_parameters(),
                "context": model.config.max_position_embeddings,
                "dtype": dtype,
                "talks": bool(tokenizer.chat_template),
                "picture": "loss.png" if (building / "loss.png").is_file() else None,
            }
            card = _model_card({**measured, **(facts or {})})
            (building / "README.md").write_text(card, encoding="utf-8")
            if finish:
                finish(building)
            for file in building.glob("*.safetensors"):
                file.chmod(0o644)  # the library writes them for their owner alone
            _take_place(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    place = os.path.relpath(folder) if folder.drive == Path.cwd().drive else folder
    logger.info("exported to %s: %s", place, ", ".join(sorted(os.listdir(folder))))
    return folder


def _place_beside(folder: Path) -> Path:
    """Return where to write what will replace an earlier export."""
    is_export = (folder / EXPORT_MARK).is_file()
    if folder.is_file() or (folder.is_dir() and not is_export and any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is a file, or holds something other than an earlier export, and is left "
            "alone: move it away or name a new folder"
        )
    folder = folder.resolve()  # not the link that may lead there
    building = folder.with_name(f"{folder.name}.tinytrain-export")
    shutil.rmtree(building, ignore_errors=True)  # of an export that was killed
    return building


def _take_place(new: Path, folder: Path) -> None:
    """Put a finished export into its place; files that are not ours stay as they are."""
    hashes, old = hash_files(new), _unchanged_files(folder)
    for name in sorted(hashes.keys() - old):
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder / name} is not as an export wrote it and would be overwritten: move it "
                "away or rename it, or export to a new folder"
            )
    write_json(new / EXPORT_MARK, hashes)
    folder.mkdir(exist_ok=True)
    # config.json goes first and comes last: what is killed in between does not pass for a model.
    for name in sorted(old, key=lambda name: name != "config.json"):
        (folder / name).unlink()
    for name in [EXPORT_MARK, *sorted(hashes, key=lambda name: name == "config.json")]:
        os.replace(new / name, folder / name)


def _unchanged_files(folder: Path) -> set[str]:
    """Return the names of the files that an export wrote and nobody has changed since."""
    try:
        hashes = json.loads((folder / EXPORT_MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    own = [name for name in hashes if (folder / name).is_file() and Path(name).name == name]
    return {name for name in own if hash_file(folder / name) == hashes[name]}


def _plain_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dtype: str
) -> PreTrainedModel:
    """Return the model as transformers itself would have built it, sharing the weights."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = copy.deepcopy(model.config)
    config.use_cache = True  # the Trainer turns it off
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(getattr(torch, dtype))
    plain.config.dtype = dtype
    stops, temperature = config.eos_token_id, 0.8
    if tokenizer.chat_template:
        # Nearly always the likeliest token. Not do_sample=False: `transformers chat` ignores that.
        stops = [tokenizer.convert_tokens_to_ids("<|im_end|>"), config.eos_token_id]
        temperature = 0.1
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=stops,
        pad_token_id=config.eos_token_id,
        # Always the likeliest token goes in circles; a small model's unlikely ones are nonsense.
        do_sample=True,
        temperature=temperature,
        top_p=0.95,
        max_new_tokens=max(16, min(128, config.max_position_embeddings // 2)),
    )
    return plain


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast, config: Any) -> PreTrainedTokenizerFast:
    """Return a copy that knows the model's context, without traces of the last call."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_position_embeddings
    # Several prompts at once: each must end where writing begins. Saved is what is in init_kwargs.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def _model_card(facts: Mapping[str, Any]) -> str:
    """Return the model card: a README.md with metadata for Hugging Face and ModelScope.

    The facts have the names that ``data/model_card.md`` uses; one that is missing, None or NaN is
    left out. ``text`` is "encyclopedia", "wikipedia" or a path, of which only the file is told.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = {n: v for n, v in facts.items() if v is not None and v == v}  # NaN is not itself
    text = facts.get("text", "")
    [prompt, *_], *_ = facts.get("completions") or [["北京是"]]
    values = {
        **facts,
        "model_id": one_line(facts["name"]),  # as Hugging Face's own template calls it
        "text_file": PureWindowsPath(text).name,  # either kind of slash
        "chats_file": PureWindowsPath(facts.get("chats", "")).name,
        "prompt": repr(one_line(prompt)),
    }
    data = ModelCardData(
        language="zh",
        license=one_line(facts.get("license") or _LICENSES.get(text, "unknown")),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qwen2", "chinese", "from-scratch", "tinytrain"],
        datasets=_DATASETS.get(text),
        # ModelScope's names of library and task, which Hugging Face ignores.
        frameworks=["Pytorch"],
        tasks=["text-generation"],
    )
    helpers = [one_line, format_count, format_seconds]
    helpers = {"escape": _escape} | {helper.__name__: helper for helper in helpers}
    # Where this file was copied without its template: Hugging Face's own form, to be filled in.
    template = str(_CARD_TEMPLATE) if _CARD_TEMPLATE.is_file() else None
    return f"{ModelCard.from_template(data, template, **values, **helpers)}\n"


def _escape(text: Any) -> str:
    """Return a text that markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", one_line(text))
