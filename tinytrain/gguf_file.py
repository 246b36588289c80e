"""Write an exported model as GGUF, the format of llama.cpp, Ollama and LM Studio.

llama.cpp's own converter is in no package, and rejects a tokenizer that is trained here or reduced.
So GGML's package ``gguf`` is used, as that converter does; `make gguf` compares the results.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tinytrain.common import EXPORT_MARK, atomic_write, hash_file, one_line, write_json

# Ollama writes its templates in Go's language.
_MODELFILE = """\
FROM ./model.gguf
TEMPLATE \"\"\"{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
\"\"\"
PARAMETER stop <|im_end|>
PARAMETER stop <|endoftext|>
PARAMETER temperature TEMPERATURE
"""


def write_gguf(folder: str | Path, name: str = "") -> Path:
    """Write ``model.gguf`` into the folder of an exported Qwen2 model.

    Matrices keep the format that they have there, vectors become float32. Beside the file of a chat
    model goes a ``Modelfile``, for ``ollama create``. ``name`` is what programs show. Another kind
    of model, and a tokenizer that cuts texts differently from Qwen2's, is a ValueError.

    GGUF cannot name the tokenizer's Unicode normalisation (NFC): a text that writes letters and
    accents apart becomes other tokens there. Chinese text is not affected.
    """
    folder = Path(folder)
    path, temporary = folder / "model.gguf", folder / "model.gguf.tmp"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "qwen2":
        raise ValueError(f"write_gguf is for Qwen2 models, and {folder} holds {config.model_type}")
    _check_pre_tokenizer(folder)
    writer = gguf.GGUFWriter(temporary, "qwen2")
    try:
        with contextlib.closing(writer):
            writer.add_type(gguf.GGUFType.MODEL)
            if name:
                writer.add_name(one_line(name))
            _add_sizes(writer, config)
            generation = GenerationConfig.from_pretrained(folder)
            writer.add_sampling_temp(generation.temperature)
            writer.add_sampling_top_p(generation.top_p)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            _add_tokenizer(writer, tokenizer, config.vocab_size)
            special = gguf.SpecialVocab(folder, load_merges=True)
            if tokenizer.chat_template:
                writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
                special.chat_template = _plain_template(tokenizer.chat_template)
            special.add_to_gguf(writer)
            _add_weights(writer, folder, config.num_hidden_layers)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        written = {path.name: hash_file(temporary)}
        if tokenizer.chat_template:
            modelfile = folder / "Modelfile"
            text = _MODELFILE.replace("TEMPERATURE", str(generation.temperature))
            atomic_write(modelfile, text)
            written[modelfile.name] = hash_file(modelfile)
        mark = folder / EXPORT_MARK
        if mark.is_file():  # so that the next export may replace them
            write_json(mark, json.loads(mark.read_text(encoding="utf-8")) | written)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain_template(template: str) -> str:
    """Return a chat template without the tags that mark what is learned from.

    To Jinja itself they are an error. ``if true`` takes their place and trims blanks as they do.
    """
    tag = r"(\{%-?\s*)(end|)generation(?=\s*-?%\})"
    return re.sub(tag, lambda found: found[1] + (found[2] and "endif" or "if true"), template)


def _check_pre_tokenizer(folder: Path) -> None:
    """Raise unless texts are cut into Qwen2's pieces before any merging."""
    # From the file: transformers gives every tokenizer of a Qwen2 model Qwen2's rule.
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rule = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    if saved["pre_tokenizer"] != rule:
        raise ValueError(
            f"the tokenizer in {folder} cuts texts differently from Qwen2's, whose rule the file "
            "would name: take one from tinytrain.tokenization"
        )


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    kind = gguf.LlamaFileType
    writer.add_file_type(kind.MOSTLY_BF16 if "bfloat16" in str(config.dtype) else kind.ALL_F32)
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
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Add the tokens; the model may have more rows than the tokenizer has tokens."""
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kind = gguf.TokenType

    def type_of(number: int) -> int:
        if number not in tokens:
            return kind.UNUSED
        if number not in added:
            return kind.NORMAL
        # As llama.cpp's converter sees it: <|fim_prefix|> too steers, whatever Qwen calls it.
        steers = added[number].special or re.fullmatch(r"<\|.*\|>", tokens[number])
        return kind.CONTROL if steers else kind.USER_DEFINED

    writer.add_tokenizer_model("gpt2")  # byte-level byte-pair encoding
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens.get(n, f"[PAD{n}]") for n in range(vocab_size)])
    writer.add_token_types([type_of(n) for n in range(vocab_size)])
    writer.add_add_bos_token(False)


def _add_weights(writer: gguf.GGUFWriter, folder: Path, layers: int) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for file in sorted(folder.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            values, kind = weight.float().numpy(), None
            if weight.dtype == torch.bfloat16 and weight.ndim > 1:  # vectors stay float32
                kind = gguf.GGMLQuantizationType.BF16
                values = gguf.quantize(values, kind)  # exact: they were bfloat16 before
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(gguf_name, values, raw_dtype=kind)
