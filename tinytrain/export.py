"""Take a trained model out of the house: a Hugging Face folder with a model card, GGUF, an upload.

A model that only its own project can read is lost with the project. So the folder written here
holds nothing of tinytrain: weights as safetensors, a configuration, a tokenizer, and a card that
says what the model was trained on, how far, and what it must not be used for. Whether it is still
the same model is not believed but tried: `round_trip` loads it in a fresh process, in which
tinytrain cannot be imported, and compares the scores.

GGUF is the format of llama.cpp, Ollama and LM Studio. llama.cpp's own converter comes with no
package that could be depended on (it lies in the source archive of llama-cpp-python), and it knows
a tokenizer by the ids that it gives to a fixed text: one trained here, or a reduced one, it turns
away. Hence the file is written with GGML's package ``gguf``, on which that converter stands too;
the tests hold both results against one another, value by value.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

GGUF_FILE = "model.gguf"

# What is known about the texts that one does not bring oneself.
_TEXTS: dict[str, dict[str, Any]] = {
    "encyclopedia": {
        "is": "the encyclopedia built into tinytrain: short Chinese articles that a program writes "
        "from a list of some 1,700 facts, each told dozens of times",
        "license": "mit",
        "licensed": "The text is part of tinytrain and under the MIT license, and so is the model.",
        "limit": "It has read nothing but short articles made from templates. It knows their "
        "facts and their phrasings, and no other Chinese.",
    },
    "wikipedia": {
        "is": "the Chinese Wikipedia of July 2023 in the filtered edition "
        "`wikipedia-cn-20230720-filtered`",
        "license": "cc-by-sa-3.0",
        "datasets": ["pleisto/wikipedia-cn-20230720-filtered"],
        "licensed": "The text is by the authors of Wikipedia, under CC BY-SA 3.0. Whether a model "
        "is an adaptation of the text it learned from is not settled; the same license is the "
        "careful choice.",
        "limit": "It has read an encyclopedia only: no conversations, no stories, little code, "
        "nothing later than July 2023, and Wikipedia's gaps and biases with it.",
    },
}
_OWN_TEXT = {
    "license": "unknown",
    "licensed": "The license of the text is not known to the program that wrote this card. "
    "**Whoever publishes the model has to find it out and name it here.**",
    "limit": "It has read only the text named above, and what is wrong or private in there may "
    "come out again, word for word.",
}


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    about: Mapping[str, Any],
    *,
    dtype: str = "float32",
    gguf: bool = False,
    files: Sequence[str | Path] = (),
) -> Path:
    """Write a folder that plain transformers loads and a hub shows.

    Everything is written under another name first and then moved: what goes wrong leaves an
    earlier export as it was.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The trained model. It stays as it is; what `tinytrain.loss` or compiled layers changed in
        it is left behind.
    tokenizer : transformers.PreTrainedTokenizerFast
        Its tokenizer.
    folder : str or Path
        Where to write. An earlier export there is replaced; anything else is not touched.
    about : mapping
        The facts of the run for the card; see `model_card`.
    dtype : {"float32", "bfloat16"}
        Number format of the weights. bfloat16 takes half the space and keeps 8 bits of each
        number's 24, which moves the scores a little: `round_trip` says how far.
    gguf : bool
        Whether to add ``model.gguf``; see `write_gguf`.
    files : sequence of path
        Files to lay beside it, such as ``loss.png`` (then shown in the card) and
        ``history.jsonl``. Those that do not exist are passed over.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If ``dtype`` is something else.
    FileExistsError
        If the folder holds anything but an earlier export.
    ModuleNotFoundError
        If ``gguf`` is asked for and the package is not installed.

    Examples
    --------
    >>> export_model(model, tokenizer, "mine", {"name": "mine"})  # doctest: +SKIP
    PosixPath('mine')
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is neither 'float32' nor 'bfloat16'")
    if gguf:
        _gguf_package()  # better missed now than after the weights are written
    folder = Path(folder).absolute()
    if folder.exists() and not _is_export(folder) and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds something other than an earlier export and is left alone: "
            "name a new folder"
        )
    building = folder.with_name(f"{folder.name}.{os.getpid()}.building")
    building.mkdir(parents=True)
    try:
        _plain_model(model, dtype).save_pretrained(building)
        _plain_tokenizer(tokenizer, model.config).save_pretrained(building)
        for file in map(Path, files):
            if file.is_file():
                shutil.copyfile(file, building / file.name)
        found = {"picture": "loss.png"} if (building / "loss.png").is_file() else {}
        found |= {"gguf": GGUF_FILE} if gguf else {}
        parameters = model.num_parameters()
        sizes = {"parameters": parameters, "context": model.config.max_position_embeddings}
        card = model_card({**sizes, "dtype": dtype, **found, **about})
        (building / "README.md").write_text(card, encoding="utf-8")
        if gguf:
            write_gguf(building, name=str(about.get("name", "")))
        for file in building.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        _move(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("exported to %s: %s", folder, ", ".join(sorted(os.listdir(folder))))
    return folder


def _is_export(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("README.md", "config.json"))


def _move(building: Path, folder: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    before = building.with_name(f"{folder.name}.{os.getpid()}.before")
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(building, folder)
    except OSError:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _plain_model(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
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
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
        # Always the most likely word soon goes in circles; of all words, a small model's unlikely
        # ones are nonsense. In between lies readable text.
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=max(16, min(128, config.max_position_embeddings // 2)),
    )
    return plain


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast, config: Any) -> PreTrainedTokenizerFast:
    """Return a copy without what the last call left behind, that knows the model's context."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def round_trip(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    texts: Sequence[str],
    gguf: bool = False,
) -> float:
    """Load an export in a fresh process and compare what it says with the model in hand.

    In that process tinytrain cannot be imported: what loads there loads everywhere.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that was exported.
    tokenizer : transformers.PreTrainedTokenizerFast
        Its tokenizer.
    folder : str or Path
        From `export_model`.
    texts : sequence of str
        What to compare on.
    gguf : bool
        Load weights and tokenizer from ``model.gguf`` instead.

    Returns
    -------
    float
        The largest difference between any two scores: 0.0 for float32 weights.

    Raises
    ------
    ValueError
        If a text becomes other ids there.
    RuntimeError
        If the folder cannot be loaded; the message is transformers'.
    """
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "folder": str(Path(folder).absolute()),
            "file": {"gguf_file": GGUF_FILE} if gguf else {},
            # The same one: fused and plain products round differently.
            "attention": model.config._attn_implementation,
            "device": str(model.device),
            "texts": list(texts),
            "result": str(Path(scratch) / "result.safetensors"),
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ELSEWHERE],
            input=json.dumps(job),
            encoding="utf-8",
            cwd=scratch,
            capture_output=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        )
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{folder} cannot be loaded by transformers alone: {error}")
        there = load_file(job["result"])

    largest, training = 0.0, model.training
    model.eval()
    for number, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if not torch.equal(ids, there[f"ids{number}"]):
            raise ValueError(f"the exported tokenizer reads {text!r} otherwise")
        with torch.no_grad():
            scores = model(input_ids=ids.to(model.device)).logits.float().cpu()
        largest = max(largest, (scores - there[f"scores{number}"]).abs().max().item())
    model.train(training)
    return largest


_ELSEWHERE = """
import json, sys
sys.modules["tinytrain"] = None  # whoever imports it now gets an error
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(
    job["folder"], attn_implementation=job["attention"], **job["file"]
).to(job["device"]).eval()
tokenizer = AutoTokenizer.from_pretrained(job["folder"], **job["file"])
result = {}
for number, text in enumerate(job["texts"]):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=ids.to(model.device)).logits.float().cpu()
    result |= {f"ids{number}": ids, f"scores{number}": scores.contiguous()}
save_file(result, job["result"])
"""


def model_card(about: Mapping[str, Any]) -> str:
    """Return the model card: a README.md with metadata for Hugging Face and ModelScope.

    Only what is known is said: a fact that is missing leaves its line out.

    Parameters
    ----------
    about : mapping
        ``name`` of the model. ``text``: "encyclopedia", "wikipedia" or the path of a text of one's
        own, of which only the file's name is told; ``license`` if it is known better than here.
        ``parameters``, ``context``, ``dtype``, ``documents`` (in each half), ``tokenizer`` (in
        words), ``words``, ``recipe`` (the numbers of the run), ``history`` (from
        `tinytrain.callbacks.read_history`), ``precision``, ``machine``, ``seconds``, ``tokens``.
        ``held_out_loss``, ``bits_per_character``, its ``interval`` (low and high), ``cloze_after``
        (a share), ``completions`` (pairs), ``picture`` and ``gguf`` (names of files beside the
        card), ``versions`` (of libraries).

    Returns
    -------
    str
        Markdown after a block of YAML.

    Raises
    ------
    KeyError
        If there is no name.

    Examples
    --------
    >>> card = model_card({"name": "mine", "text": "/home/me/diary.txt"})
    >>> "diary.txt" in card, "/home/me" in card
    (True, False)
    """
    from huggingface_hub import ModelCard

    text = _TEXTS.get(about.get("text", ""), _OWN_TEXT)
    size = f" of {_count(about['parameters'])} parameters" if "parameters" in about else ""
    parts = [
        f"# {_escaped(about['name'])}",
        f"A Chinese language model{size}, trained from scratch with tinytrain, a tutorial. "
        "It continues a text; it was not tuned to follow instructions or to converse.\n\n"
        "这是一个教学用的小型中文语言模型：只会续写文本，不会按指令回答；所写内容不可当作事实。",
        _how_to_load(about),
        _limits(about, text),
        _data(about, text),
        _training(about),
        _results(about),
    ]
    body = "\n\n".join(part for part in parts if part)
    data = _metadata(about, text)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _metadata(about: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """Return the block of YAML, with which hubs sort, filter and show a model."""
    from huggingface_hub import EvalResult, ModelCardData

    measures = [("loss", "held_out_loss", "Loss on held-out text (nats per token)")]
    measures += [("bits_per_character", "bits_per_character", "Bits per character")]
    name = _one_line(about["name"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="documents of the text that were kept out of training",
            metric_type=kind,
            metric_name=label,
            metric_value=round(about[key], 4),
        )
        for kind, key, label in measures
        if _is_number(about.get(key))
    ]
    return ModelCardData(
        language="zh",
        license=about.get("license") or text["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qwen2", "chinese", "from-scratch", "tinytrain"],
        datasets=text.get("datasets"),
        model_name=name if results else None,
        eval_results=results or None,
        # What ModelScope calls the library and the task; Hugging Face passes over both.
        frameworks=["Pytorch"],
        tasks=["text-generation"],
    )


def _how_to_load(about: Mapping[str, Any]) -> str:
    prompt = about["completions"][0][0] if about.get("completions") else "北京是"
    lines = [
        "## How to use it",
        "In this folder, or with the model's name on a hub in the place of the dot:",
        "```python\nfrom transformers import pipeline\n\n"
        'write = pipeline("text-generation", ".")\n'
        f'print(write({_one_line(prompt)!r})[0]["generated_text"])\n```',
    ]
    if about.get("gguf"):
        lines.append(
            f"`{about['gguf']}` holds the same weights for llama.cpp and what builds on it: "
            f"`llama-completion -m {about['gguf']} -p PROMPT`."
        )
    return "\n\n".join(lines)


def _limits(about: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    size = (
        f"It has {_count(about['parameters'])} parameters"
        if "parameters" in about
        else "It is small"
    )
    lines = [
        f"{size}; the assistants one talks to have billions. What it writes sounds like its text "
        "and need not be true.",
        "It is a base model. It does not follow instructions, has no notion of a conversation, "
        "and was not trained to decline anything.",
        "It repeats itself, above all when always the most likely word is taken.",
        text["limit"],
        "It must not be used to inform, advise or decide about people, nor anywhere a wrong "
        "sentence does harm. It is there to learn from.",
    ]
    if "context" in about:
        lines.insert(
            3, f"It has never seen more than {about['context']:,} tokens at once, prompt included."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _data(about: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    # Backslashes too: a path may come from Windows.
    name = re.split(r"[\\/]", str(about.get("text", "")))[-1]
    what = text.get("is") or (
        f"a text of its maker's own, {_code(name)}" if name else "not recorded"
    )
    lines = [f"Text: {what}. {text['licensed']}"]
    if "documents" in about:
        train, held_out = about["documents"]
        lines.append(
            f"{train:,} documents to learn from; {held_out:,} were held out to measure on."
        )
    if "tokenizer" in about:
        words = f", {about['words']:,} tokens" if "words" in about else ""
        lines.append(f"Tokenizer: {about['tokenizer']}{words}.")
    return "## Data\n\n" + "\n\n".join(lines)


def _training(about: Mapping[str, Any]) -> str:
    facts = {
        "precision": about.get("precision"),
        "machine": about.get("machine"),
        "time": _duration(about["seconds"]) if "seconds" in about else None,
        "tokens seen": f"{about['tokens']:,}" if "tokens" in about else None,
        "weights saved in": about.get("dtype"),
    }
    facts |= {f"`{name}`": value for name, value in about.get("recipe", {}).items()}
    facts |= {name: version for name, version in about.get("versions", {}).items()}
    rows = [(name, _escaped(value)) for name, value in facts.items() if value is not None]
    parts = [_table(("", ""), rows)] if rows else []
    if about.get("picture"):
        parts.append(f"![The losses and the learning rate of the run]({about['picture']})")
    if curve := _curve(about.get("history", ())):
        parts.append(_table(("step", "training loss", "held-out loss"), curve))
        parts.append(
            "Losses are in nats per token; the training loss is the mean since the last row."
        )
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _curve(history: Sequence[Mapping[str, Any]], rows: int = 8) -> list[tuple[str, str, str]]:
    """Return step, training loss and held-out loss in a few rows, from first to last."""
    table, losses = [], []
    for line in history:
        if "loss" in line:
            losses.append(line["loss"])
        if "eval_loss" in line:
            train = f"{sum(losses) / len(losses):.3f}" if losses else ""
            table.append((f"{line['step']:,}", train, f"{line['eval_loss']:.3f}"))
            losses = []
    if not table:
        kept = [line for line in history if "loss" in line]
        table = [(f"{line['step']:,}", f"{line['loss']:.3f}", "") for line in kept]
    if len(table) > rows:
        last = len(table) - 1
        table = [table[round(i * last / (rows - 1))] for i in range(rows)]
    return table


def _results(about: Mapping[str, Any]) -> str:
    rows = []
    if _is_number(about.get("held_out_loss")):
        rows.append(("loss on held-out text, nats per token", f"{about['held_out_loss']:.3f}"))
    if _is_number(about.get("bits_per_character")):
        value = f"{about['bits_per_character']:.3f}"
        if about.get("interval"):
            low, high = about["interval"]
            value += f" (95% interval {low:.3f} to {high:.3f})"
        rows.append(("bits per character of held-out text", value))
    if _is_number(about.get("cloze_after")):
        rows.append(("questions about facts of the text, right", f"{about['cloze_after']:.0%}"))
    parts = [_table(("measured", ""), rows)] if rows else []
    if about.get("completions"):
        # No line is only backticks, which would end the block.
        lines = [f"{_one_line(p)} → {_one_line(t)}" for p, t in about["completions"]]
        parts.append("What it writes, always taking the most likely word, not chosen by anyone:")
        parts.append("\n".join(["```text", *lines, "```"]))
    return "## Results\n\n" + "\n\n".join(parts) if parts else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _one_line(text: Any) -> str:
    """Return a text without line breaks and characters that cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _escaped(text: Any) -> str:
    """Return a text that markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """Return a text as code, whatever backticks it holds."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{_one_line(text)}{padding}{fence}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _count(number: int) -> str:
    """Return a number of parameters as people say it: 140k, 4.20M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def write_gguf(folder: str | Path, path: str | Path | None = None, name: str = "") -> Path:
    """Write an exported Qwen2 model as one GGUF file, for llama.cpp and what builds on it.

    Parameters
    ----------
    folder : str or Path
        From `export_model`.
    path : str or Path, optional
        Where to write; by default ``model.gguf`` in the folder.
    name : str
        What programs show as the model's name.

    Returns
    -------
    Path
        The file: the same numbers as in the folder, vectors as float32, matrices in its format.

    Raises
    ------
    ModuleNotFoundError
        If the package ``gguf`` is not installed.
    ValueError
        If it is not a Qwen2 model, or its tokenizer cuts texts differently from Qwen2's, which
        llama.cpp could not do.

    Notes
    -----
    GGUF has no word for the tokenizer's Unicode normalisation (NFC): a text that writes letters
    and accents apart becomes other tokens there. Chinese is not concerned.
    """
    gguf = _gguf_package()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = Path(folder)
    path = Path(path) if path else folder / GGUF_FILE
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen2":
        raise ValueError(f"write_gguf is for Qwen2 models, and {folder} holds {config.model_type}")
    _check_cuts_like_qwen2(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, "qwen2")
    try:
        with contextlib.closing(writer):
            writer.add_type(gguf.GGUFType.MODEL)
            if name:
                writer.add_name(name)
            _add_sizes(writer, gguf, config)
            generation = GenerationConfig.from_pretrained(folder)
            writer.add_sampling_temp(generation.temperature)
            writer.add_sampling_top_p(generation.top_p)
            _add_tokenizer(writer, gguf, tokenizer, folder, config.vocab_size)
            _add_weights(writer, gguf, folder, config.num_hidden_layers)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError(
            "a GGUF file is written with GGML's package gguf: pip install gguf"
        ) from error
    return gguf


def _check_cuts_like_qwen2(folder: Path) -> None:
    """Make sure that a text is cut into the same pieces before any merging."""
    from transformers import Qwen2Tokenizer

    # From the file: transformers gives every tokenizer of a Qwen2 model Qwen2's rule.
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rule = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    if saved["pre_tokenizer"] != rule:
        raise ValueError(
            f"the tokenizer in {folder} cuts texts differently from Qwen2's, the rule that the "
            "file would name: take one of tinytrain.tokenization"
        )


def _add_sizes(writer: Any, gguf: Any, config: Any) -> None:
    bf16 = str(config.dtype).removeprefix("torch.") == "bfloat16"
    kind = gguf.LlamaFileType
    writer.add_file_type(kind.MOSTLY_BF16 if bf16 else kind.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int
) -> None:
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kind = gguf.TokenType

    def type_of(number: int) -> int:
        if number not in words:
            return kind.UNUSED
        if number not in added:
            return kind.NORMAL
        # As llama.cpp's converter sees it: <|fim_prefix|> too steers, whatever Qwen calls it.
        steers = added[number].special or re.fullmatch(r"<\|.*\|>", words[number])
        return kind.CONTROL if steers else kind.USER_DEFINED

    writer.add_tokenizer_model("gpt2")  # byte-level byte-pair encoding
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([type_of(number) for number in range(rows)])
    writer.add_add_bos_token(False)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer)


def _add_weights(writer: Any, gguf: Any, folder: Path, layers: int) -> None:
    import torch
    from safetensors.torch import load_file

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for file in sorted(folder.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            numbers = weight.float().numpy()
            # llama.cpp wants vectors, which are few, in float32.
            narrow = weight.dtype == torch.bfloat16 and weight.ndim > 1
            format_ = gguf.GGMLQuantizationType.BF16 if narrow else None
            if narrow:
                numbers = gguf.quantize(numbers, format_)  # exact: they were bfloat16 before
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight", ".bias")), numbers, raw_dtype=format_
            )


_TOKENS = {
    "modelscope": ("MODELSCOPE_API_TOKEN", "https://modelscope.cn/my/myaccesstoken"),
    "huggingface": ("HF_TOKEN", "https://huggingface.co/settings/tokens, one that may write"),
}


def upload(
    folder: str | Path,
    repo_id: str,
    to: str = "modelscope",
    token: str | None = None,
    endpoint: str | None = None,
    private: bool = True,
) -> str:
    """Upload an export to ModelScope or Hugging Face, by the hub's own client.

    A repository that is there already gets the files as a new version.

    Parameters
    ----------
    folder : str or Path
        From `export_model`.
    repo_id : str
        Your name (or an organisation's) and the model's: ``"name/model"``.
    to : {"modelscope", "huggingface"}
        Which hub.
    token : str, optional
        Your access token; by default ``MODELSCOPE_API_TOKEN`` or ``HF_TOKEN``, or what the
        client's own log-in has kept. It is never shown.
    endpoint : str, optional
        Address of the hub, for a mirror; by default the hub's own, or what
        ``MODELSCOPE_ENDPOINT`` or ``HF_ENDPOINT`` says.
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
    ConnectionError
        If the hub cannot be reached or answers with an error.
    """
    if to not in _TOKENS:
        raise ValueError(f"unknown hub {to!r}; choose one of {', '.join(_TOKENS)}")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id):
        raise ValueError(f"repo_id {repo_id!r} must have the form 'your-name/model-name'")
    folder = Path(folder)
    if not _is_export(folder):
        raise FileNotFoundError(
            f"{folder} has no config.json with a README.md: export the model first "
            "(tinytrain.export.export_model)"
        )
    import requests

    variable, where = _TOKENS[to]
    client = _modelscope if to == "modelscope" else _huggingface
    token, endpoint, send = client(folder, repo_id, token, endpoint, private)
    if not token:
        raise PermissionError(
            f"{to} wants to know who uploads: get an access token from {where}, and pass it as "
            f"token=... or in the environment variable {variable}"
        )
    logger.info("uploading %s to %s", folder, f"{endpoint}/{repo_id}")
    try:
        # Asked first because the clients go on trying for a long while.
        requests.head(endpoint, timeout=20)
        return send()
    except Exception as error:
        failure = _explained(error, f"{to} ({repo_id})", variable, where, token)
    # Not chained: the client's own message may hold the header that carries the token.
    raise failure


def _explained(error: Exception, place: str, variable: str, where: str, token: str) -> OSError:
    """Turn a client's exception into one that says what to do."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    codes = [
        getattr(link, "status_code", None)
        or getattr(getattr(link, "response", None), "status_code", None)
        for link in chain
    ]
    status = next((code for code in codes if code), None)
    if status == 401:
        return PermissionError(
            f"{place}: the token is not known there (HTTP 401). Get a new one from {where}, "
            f"for token=... or {variable}."
        )
    if status in (403, 404, 409):
        return PermissionError(
            f"{place}: the token must not write there (HTTP {status}). Either it only reads, or "
            "the name is someone else's: take one of your own, and a token that may write."
        )
    words = getattr(error, "server_message", None) or getattr(error, "message", None) or ""
    words = _one_line(words).replace(token, "***")[:150]
    if status is not None:
        return ConnectionError(
            f"{place}: the hub answers with an error (HTTP {status}: {words}). Try again later."
        )
    kind = type(chain[-1]).__name__
    return ConnectionError(
        f"{place}: the upload stopped ({': '.join(filter(None, (kind, words)))}). Check the "
        "network and run it again; what has arrived need not be sent twice."
    )


def _modelscope(
    folder: Path, repo_id: str, token: str | None, endpoint: str | None, private: bool
) -> tuple[str | None, str, Callable[[], str]]:
    """Return the token, the hub's address, and what uploads."""
    try:
        from modelscope.hub.api import HubApi
        from modelscope_hub import HubConfig
    except ImportError as error:
        raise ImportError(
            "the client of ModelScope is not installed; run `pip install modelscope`, or take "
            'to="huggingface"'
        ) from error
    from huggingface_hub import ModelCard

    config = HubConfig(endpoint=endpoint, token=token or None)
    api = HubApi(endpoint=config.endpoint, token=config.token)

    def send() -> str:
        card = ModelCard.load(folder / "README.md")
        api.create_repo(
            repo_id,
            visibility="private" if private else "public",
            license=card.data.license,
            exist_ok=True,
        )
        # Without its cache: that would be a file among those to upload.
        api.upload_folder(repo_id, folder, commit_message="Upload of tinytrain", use_cache=False)
        return f"{config.endpoint}/models/{repo_id}"

    return config.token, config.endpoint, send


def _huggingface(
    folder: Path, repo_id: str, token: str | None, endpoint: str | None, private: bool
) -> tuple[str | None, str, Callable[[], str]]:
    """Return the token, the hub's address, and what uploads."""
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    api = HfApi(endpoint=endpoint, token=token)

    def send() -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload of tinytrain")
        return f"{api.endpoint}/{repo_id}"

    return token, api.endpoint, send
