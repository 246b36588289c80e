"""The model: a Qwen2 configuration that fits together, the model it describes, and its first loss.

The model itself is transformers' ``Qwen2ForCausalLM``: what is trained here loads everywhere.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytrain.common import evaluating, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

    from tinytrain.recipes import Recipe

logger = logging.getLogger(__name__)

QWEN2_5_0_5B: dict[str, Any] = {
    "vocab_size": 151_936,  # rows of the embedding: 151,665 tokens, rounded up to 128 x 1,187
    "hidden_size": 896,  # width of the vector that represents a token inside the model
    "intermediate_size": 4864,  # width of the MLP in each layer
    "num_hidden_layers": 24,
    "num_attention_heads": 14,  # each 896 / 14 = 64 wide
    "num_key_value_heads": 2,  # 7 query heads share each key and value (grouped-query attention)
    "max_position_embeddings": 32_768,  # the longest text the model was trained on, in tokens
    "rope_theta": 1_000_000.0,  # base of the rotary position encoding; large for long texts
    "tie_word_embeddings": True,  # one matrix reads tokens in and predicts them out
    "bos_token_id": 151_643,  # <|endoftext|>
    "eos_token_id": 151_643,  # <|endoftext|>
}
"""Qwen2.5-0.5B, under the names of its ``config.json``, where it differs from Qwen2's defaults."""


def qwen2_config(
    vocab_size: int,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int = 2,
    context_length: int = 512,
    eos_token_id: int,
    tie_word_embeddings: bool = True,
) -> Qwen2Config:
    """Return the Qwen2.5-0.5B configuration in another size.

    ``AutoConfig.from_pretrained(parent, num_hidden_layers=12)`` keeps the parent's 24
    ``layer_types``: the model trains and then fails when it is first saved. This one fits. Sizes
    that do not fit together are a ValueError.

    Parameters
    ----------
    vocab_size : int
        Rows of the embedding: at least ``len(tokenizer)``.
    hidden_size, intermediate_size, num_hidden_layers : int
        Width of the model, a multiple of ``2 * num_attention_heads``; width of the MLP; layers.
    num_attention_heads, num_key_value_heads : int
        Query heads, and heads of keys and values, each shared by as many query heads.
    context_length : int
        Tokens of a training block, saved as ``max_position_embeddings`` (not as GPT-2's
        ``n_ctx``): tools that serve the model take it for the longest text it can read.
    eos_token_id : int
        The end-of-text token, which separates documents and so also begins a text (bos). It is no
        padding token: Qwen2 would start its row of the embedding at zero and never train it.
    tie_word_embeddings : bool
        Whether input and output share one matrix.

    Examples
    --------
    >>> config = qwen2_config(151_665, hidden_size=512, intermediate_size=2048,
    ...                       num_hidden_layers=12, num_attention_heads=8, eos_token_id=151_643)
    >>> len(config.layer_types)
    12
    """
    from transformers import Qwen2Config

    if hidden_size % (2 * num_attention_heads):
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of {2 * num_attention_heads}: "
            f"{num_attention_heads} attention heads share it, and each rotates pairs of values"
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"{num_attention_heads} attention heads cannot share {num_key_value_heads} key/value "
            "heads evenly; make num_attention_heads a multiple of num_key_value_heads"
        )
    if not 0 <= eos_token_id < vocab_size:
        raise ValueError(
            f"eos_token_id {eos_token_id} is outside the vocabulary of {vocab_size}; "
            "vocab_size must be at least len(tokenizer)"
        )
    changes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "max_window_layers": num_hidden_layers,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    }
    return Qwen2Config(**QWEN2_5_0_5B | changes)


def recipe_config(
    recipe: Recipe, vocab_size: int | None = None, eos_token_id: int = 0
) -> Qwen2Config:
    """Return the configuration of a recipe's model.

    ``vocab_size``, the rows of the embedding, is by default that of the recipe, or all tokens of
    Qwen2.5. The end-of-text token has no influence on sizes.
    """
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads context_length"
    sizes = {name: getattr(recipe, name) for name in names.split()}
    vocab_size = vocab_size or recipe.vocab_size or 151_665
    return qwen2_config(vocab_size, eos_token_id=eos_token_id, **sizes)


def build_model(config: Qwen2Config, seed: int = 0) -> Qwen2ForCausalLM:
    """Build a model with random weights in float32, which the seed decides.

    They stay float32 in mixed precision too, so that a small update is not rounded away. The global
    random state stays as it was.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU alone; GPUs keep their state
        # AutoModelForCausalLM.from_config would make them bfloat16 where the configuration says so.
        model = Qwen2ForCausalLM(config)
    # Only for generating: texts that end earlier than others are filled up with end-of-text.
    model.generation_config.pad_token_id = config.eos_token_id
    return model


def load_model(folder: str | Path) -> PreTrainedModel:
    """Load a causal language model in float32 from a folder, your own or a stranger's.

    No code in the folder is run, no pickle is opened, and no weight may be missing in the files:
    transformers alone would draw it at random. A FileNotFoundError says that files are missing, a
    ValueError that they are damaged or do not fit together.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_log

    folder = Path(folder)
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: it needs config.json, and the weights as safetensors (a .bin "
            "may be a pickle, which can run any code, and is not opened: ask for safetensors, or "
            "convert it where you trust it, by save_pretrained of transformers)"
        )
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()  # else a table of what does not fit, however long
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    except Exception as error:  # each part of the libraries has its own
        said = one_line(error)
        if "trust_remote_code" in said:
            said = "it needs code of its own, which is never run here"
        raise ValueError(
            f"{folder} cannot be loaded ({said[:200]}): make or download it again"
        ) from error
    finally:
        transformers_log.set_verbosity(level)
    wrong = [f"{kind}: {min(map(str, names))}" for kind, names in found.items() if names]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json ({'; '.join(wrong)})")
    return model


def compile_layers(model: PreTrainedModel, recompute: bool = False) -> None:
    """Let torch.compile fuse what happens inside each layer between the matrix products.

    The layers are ``model.model.layers``, as in Qwen2 and Llama, and are changed in place. One
    compilation, a quarter of a minute on a laptop, serves all. Training becomes faster and keeps
    less for the backward pass; evaluation and generation, with their changing lengths, run
    uncompiled, and so does all where compiling fails, for example without a C++ compiler. With
    ``recompute``, the backward pass computes a layer's results, except attention's, a second time
    instead of keeping them.
    """
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint
    from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = "attention" in str(operation)  # takes long to compute for its size
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_tell_failure_in_a_line)
    kind = type(model.model.layers[0])
    layer = kind.forward
    if recompute:
        # PyTorch warns of operations in place, of which these layers have none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        contexts = functools.partial(selective, policy)
        layer = functools.partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    compiled = torch.compile(layer)

    @functools.wraps(kind.forward)
    def forward(self, *args: Any, **kwargs: Any):
        if not self.training:
            return kind.forward(self, *args, **kwargs)
        # With the cache of keys and values, which knows the layer's number and which training does
        # not read, each layer would be compiled by itself.
        return compiled(self, *args, **kwargs | {"past_key_values": None})

    # A class of its own, as in tinytrain.loss: copies of the model keep their own parts.
    faster = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for layer in model.model.layers:
        layer.__class__ = faster


_warn_once = functools.cache(logger.warning)


def _tell_failure_in_a_line(record: logging.LogRecord) -> bool:
    """Warn in place of PyTorch, which prints some hundred lines for each part that fails."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and record.levelno == logging.WARNING:
        said = str(error).strip().split("\n")[0]
        _warn_once(
            f"torch.compile fails here ({type(error).__name__}: {said}): the run goes on "
            "uncompiled, which is only slower. It needs a C++ compiler (g++, or clang on macOS); "
            "compile=False tries no more"
        )
    return error is None


def initial_loss(model: PreTrainedModel, input_ids: Sequence[Sequence[int]]) -> float:
    """Return the mean cross-entropy of a model on some blocks, in nats per token.

    For an untrained model it should be a little above ``ln(vocab_size)``, the loss of a uniform
    guess: random logits that vary by ``sigma`` add about ``sigma ** 2 / 2``. Much more points at a
    mistake in the initial weights, much less at one in the labels. ``input_ids`` has the shape
    (blocks, context_length).
    """
    import torch

    with evaluating(model):
        # One block at a time: the logits of a large vocabulary fill the memory.
        blocks = torch.as_tensor(input_ids, device=model.device).long().split(1)
        losses = [model(input_ids=block, labels=block).loss.item() for block in blocks]
    return sum(losses) / len(losses)
