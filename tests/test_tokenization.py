import copy
import html
import itertools
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytrain import common, tokenization
from tinytrain.common import cut_text, encode_text, text_encoder
from tinytrain.tokenization import (
    chunk_documents,
    fingerprint,
    load_tokenizer,
    pack_documents,
    show_tokens,
    train_tokenizer,
)

disable_progress_bars()

SENTENCES = [
    "北京是中国的首都，位于华北平原的北部。",
    "上海是中国的城市，位于长江的入海口。",
    "长江是中国最长的河流，全长6300多千米。",
    "黄河是中国第二长的河流，发源于青海省。",
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind.",
]
# Unassigned characters are left out: Python and the tokenizer may know different Unicode versions.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=80)
chinese = st.text("北京上海是中国的首都，。长江6300the <|endoftext|>\n", max_size=60)
EACH_CUT = pytest.mark.parametrize("cut", [pack_documents, chunk_documents])


@pytest.fixture(scope="module")
def small():
    return train_tokenizer(SENTENCES * 3, vocab_size=320)


def documents(texts):
    return Dataset.from_dict({"text": texts})


def plain(tokenizer, text):
    return tokenizer(text, split_special_tokens=True)["input_ids"]


# The tokenizer


def test_training_gives_the_vocabulary_asked_for_in_every_process(small):
    assert len(small) == 320
    assert small.eos_token == small.pad_token == "<|endoftext|>" and small.padding_side == "left"
    assert small("<|endoftext|>")["input_ids"] == [small.eos_token_id]
    assert len(small("是中国")["input_ids"]) < len("是中国".encode())
    program = (
        "import json, sys; from tinytrain import tokenization as t;"
        "tokenizer = t.train_tokenizer(json.loads(sys.argv[1]) * 3, vocab_size=320);"
        "print(t.fingerprint(tokenizer))"
    )
    command = [sys.executable, "-c", program, json.dumps(SENTENCES)]
    output = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[1])
    assert output.strip() == fingerprint(small)


@given(any_text | chinese)
@settings(deadline=None)
def test_decoding_gives_the_text_back(small, text):
    assert small.decode(small(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_no_token_is_longer_than_four_chinese_characters(caplog):
    tokenizer = train_tokenizer(["中华人民共和国中央人民政府" * 5] * 20, 300)
    # Each byte is written as one letter here.
    tokens = tokenizer.convert_ids_to_tokens(list(range(1, len(tokenizer))))
    assert 9 < max(map(len, tokens)) <= 12
    # So there are too few pairs for the vocabulary, which is logged.
    assert 259 < len(tokenizer) < 300 and "not 300" in caplog.text


def test_training_reads_so_many_characters_and_no_more(monkeypatch):
    def texts():
        yield "北京是中国的首都。" * 20
        yield "上海是一座城市。" * 20
        raise AssertionError("read on after it had enough")

    monkeypatch.setattr(tokenization, "_MAX_TRAINING_CHARACTERS", 340)
    limited = train_tokenizer(texts(), 280)
    whole = train_tokenizer(itertools.islice(texts(), 2), 280)
    assert fingerprint(limited) == fingerprint(whole)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (SENTENCES, 259, "vocab_size=259 is too small"),
        ([], 300, "texts are empty"),
        (["", "  "], 300, "texts are empty"),
        (["北京", "上海"], 300, "no pair of bytes occurs twice"),
    ],
)
def test_training_on_nothing_is_refused(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size)


def test_folders_without_a_usable_tokenizer_are_named(small, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(FileNotFoundError, match="Qwen.*needs tokenizer.json"):
        load_tokenizer("Qwen/Qwen2.5-0.5B")
    small.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        good = (tmp_path / name).read_bytes()
        for damaged in (good[: len(good) // 2], b"", good[:99] + b"\xff" + good[100:]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged"):
                load_tokenizer(tmp_path)
        (tmp_path / name).write_bytes(good)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(small)
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        load_tokenizer(tmp_path)


def test_a_fingerprint_tells_tokenizers_apart_whatever_they_did_before(small, tmp_path):
    before = fingerprint(small)
    small("<|endoftext|>", split_special_tokens=True)
    small(SENTENCES, truncation=True, max_length=3, padding=True)
    pack_documents(documents(SENTENCES), small, 1)
    assert fingerprint(small) == before
    assert small("<|endoftext|>")["input_ids"] == [small.eos_token_id]
    small.save_pretrained(tmp_path)
    other_end = load_tokenizer(tmp_path)
    assert fingerprint(other_end) == before
    other_end.eos_token = "!"
    tokenizers = [small, train_tokenizer(SENTENCES * 3, vocab_size=321), other_end]
    assert len({fingerprint(tokenizer) for tokenizer in tokenizers}) == 3


# Chunks and blocks


@given(texts=st.lists(any_text | chinese, max_size=8), length=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_chunks_are_windows_of_each_document_and_packing_loses_no_token(small, texts, length):
    data, chunks = documents(texts), []
    for text in texts:
        ids = plain(small, text)
        chunks += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    assert chunk_documents(data, small, length)["input_ids"][:] == chunks

    joined = [id_ for text in texts for id_ in [*plain(small, text), small.eos_token_id]]
    blocks = pack_documents(data, small, length)
    assert all(len(block) == length for block in blocks["input_ids"][:])
    kept = [id_ for block in blocks["input_ids"][:] for id_ in block]
    assert kept == joined[: len(kept)]
    assert len(joined) - len(kept) < length


def test_no_typed_text_becomes_a_control_token(small, tmp_path):
    from tokenizers import AddedToken

    signs = ["<|endoftext|>", "</s>", "[PAD]"]
    tokenizer = copy.deepcopy(small)
    tokenizer.add_special_tokens({"additional_special_tokens": signs[1:]})
    # Added tokens that are no text, and two that are.
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), "大熊猫", "    "])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    words = tokenizer.convert_tokens_to_ids(["大熊猫", "    "])
    for sign in [*signs, "<tool_call>"]:
        id_ = tokenizer.convert_tokens_to_ids(sign)
        for text in (sign, f"北{sign}京", sign * 2, f"大熊猫{sign}    大熊猫"):
            [ids] = encode_text(tokenizer, [text])
            assert id_ in tokenizer(text)["input_ids"] and id_ not in ids
            assert [i for i in ids if i in words] == [words[0], words[1], words[0]] * ("大" in text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_only_packing_places_the_end_of_text(small):
    texts = ["北京<|endoftext|>", "<|endoftext|>", "", "上海"]
    blocks = pack_documents(documents(texts), small, 1)["input_ids"][:]
    ids = [block[0] for block in blocks]
    ends = [i for i, id_ in enumerate(ids) if id_ == small.eos_token_id]
    starts = [0, *(end + 1 for end in ends)]
    assert [small.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)] == texts
    assert ends[-1] == len(ids) - 1


@EACH_CUT
def test_blocks_are_int32_and_the_same_in_memory_and_in_a_folder(small, cut, tmp_path):
    # More documents than one batch, in an order other than that of the table, and a second column.
    texts = [SENTENCES[i % 5] * (i % 7) + str(i) for i in range(501)]
    shuffled = documents(texts).add_column("source", texts).shuffle(seed=1)
    expected = cut(documents(shuffled["text"]), small, 16)["input_ids"][:]
    assert len(expected) > 500
    for _ in range(2):  # the second call replaces the files of the first
        blocks = cut(shuffled, small, 16, folder=tmp_path / "new")
        assert blocks["input_ids"][:] == expected
        assert {Path(file["filename"]).parent for file in blocks.cache_files} == {tmp_path / "new"}
        del blocks
    for texts, folder in itertools.product(([], ["短"], SENTENCES), (None, tmp_path / "few")):
        blocks = cut(documents(texts), small, 8, folder=folder)
        assert blocks.column_names == ["input_ids"] and bool(len(blocks)) == (texts == SENTENCES)
        assert blocks.features["input_ids"].feature.dtype == "int32"
        assert blocks.features["input_ids"].length == 8


@given(st.text("北a1。，！ \n\r\t\u0301\u3000é'<|", max_size=400))
@settings(deadline=None, max_examples=200)
def test_a_long_text_has_the_tokens_of_its_parts(small, text):
    whole = text_encoder(small).encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_PART", 20)
        parts = [part for part, _ in cut_text(text)]
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 40
        patch.setattr(common, "_CALL", 50)
        if all(text_can_be_cut(a, b) for a, b in itertools.pairwise(parts)):
            assert encode_text(small, ["", text, "x"]) == [[], whole, plain(small, "x")]


def text_can_be_cut(before, after):
    return before[-1] in "北a" and after[0] in "。，！ \n"


def test_memory_does_not_grow_with_the_length_of_a_document(small, tmp_path):
    program = (
        "import resource, sys; from datasets import Dataset, disable_progress_bars;"
        "from tinytrain import tokenization as t; disable_progress_bars();"
        "tokenizer = t.load_tokenizer(sys.argv[1]);"
        "documents = Dataset.from_dict({'text': ['北京是中国的首都，' * int(sys.argv[2])]});"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "t.pack_documents(documents, tokenizer, 64);"
        "t.chunk_documents(documents, tokenizer, 64);"
        "t.tokens_per_character(tokenizer, documents['text']);"
        "print(peak() - before)"
    )
    small.save_pretrained(tmp_path)
    command = [sys.executable, "-c", program, str(tmp_path), "100000"]
    kilobytes = int(subprocess.check_output(command, text=True, cwd=Path(__file__).parents[1]))
    assert kilobytes < 100_000  # 900,000 characters in one call took 300 MB


@EACH_CUT
def test_wrong_arguments_are_named(small, cut):
    with pytest.raises(ValueError, match=r"(?s)\['text'\].*\['completion'\]"):
        cut(Dataset.from_dict({"completion": SENTENCES}), small, 8)


# Measures


def test_a_larger_vocabulary_costs_fewer_tokens_per_character(small):
    bytes_and_little = train_tokenizer(SENTENCES * 3, vocab_size=260)
    few = tokenization.tokens_per_character(small, SENTENCES)
    assert few < tokenization.tokens_per_character(bytes_and_little, SENTENCES)
    assert few == len(plain(small, "".join(SENTENCES))) / len("".join(SENTENCES))
    with pytest.raises(ValueError, match="no characters"):
        tokenization.tokens_per_character(small, [""])


# Views


def test_tokens_are_counted_and_shown_as_text_and_lone_bytes_as_numbers(small):
    text = "是中国 the<|endoftext|>"
    shown = show_tokens(small, text)
    assert "".join(piece for piece, _ in shown) == text
    assert [id_ for _, id_ in shown] == plain(small, text)
    assert (" the", small(" the")["input_ids"][0]) in shown and shown[-1][0] != "<|endoftext|>"
    pieces = [piece for piece, _ in show_tokens(small, "𠀿")]
    assert pieces == ["<0xF0>", "<0xA0>", "<0x80>", "<0xBF>"]


def test_coloured_tokens_show_what_is_there_and_let_no_html_through():
    text = '北京<b onclick="x">&amp;\'\n\n \t\u200b𠀿'
    tokenizer = train_tokenizer([text] * 2, 300)
    shown = tokenization.colour_tokens(tokenizer, text)
    spans = re.findall(r"<span [^>]*background:(#\w+)[^>]*>([^<]*)<small[^>]*>(\d+)</small>", shown)
    assert [int(id_) for _, _, id_ in spans] == tokenizer(text)["input_ids"]
    written = html.unescape("".join(piece for _, piece, _ in spans))
    for sign, visible in {"\n": "\\n", " ": "·", "\t": "\\t", "\u200b": "\\u200b"}.items():
        text = text.replace(sign, visible)
    assert written == text
    assert set(re.findall(r"<(\w+)", shown)) == {"div", "span", "small"}
    colors = [color for color, _, _ in spans]
    assert all(left != right for left, right in itertools.pairwise(colors))
