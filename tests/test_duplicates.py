"""Tests of finding held-out documents in the training set."""

import re
from itertools import product

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from tinytrain import duplicates
from tinytrain.duplicates import drop_duplicates, find_duplicates, find_seen_sentences


def split_of(train, test):
    sets = {"train": train, "test": test}
    return DatasetDict({name: Dataset.from_dict({"text": sets[name]}) for name in sets})


def random_text(rng, length):
    return "".join(map(chr, rng.integers(0x4E00, 0x4E00 + 3000, length)))


def ngrams(text):
    letters = "".join(filter(str.isalnum, text))
    return {letters[i : i + 5] for i in range(len(letters) - 4)}


def test_duplicates_are_the_ones_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    train = [random_text(rng, 300) for _ in range(120)]
    test = [random_text(rng, 300) for _ in range(20)]
    for row in range(100):  # more and more characters changed, so that some pairs fall below
        text = list(train[row])
        for place in rng.integers(0, 300, row // 5):
            text[place] = "，" if place % 2 else "换"
        test.append("".join(text))

    found = {(d.test, d.train): d.similarity for d in find_duplicates(split_of(train, test))}
    all_pairs = product(enumerate(map(ngrams, test)), enumerate(map(ngrams, train)))
    similarities = {(i, j): len(a & b) / len(a | b) for (i, a), (j, b) in all_pairs}
    expected = {pair: value for pair, value in similarities.items() if value >= 0.8}
    assert 25 < len(expected) < 100
    assert found.items() <= expected.items()
    assert len(found) >= 0.9 * len(expected)
    clear = {pair for pair, similarity in expected.items() if similarity >= 0.9}
    assert clear <= found.keys()


def test_exact_duplicates_win_over_near_ones():
    poem = "白日依山尽黄河入海流欲穷千里目更上一层楼" * 3
    other = "红豆生南国春来发几枝愿君多采撷此物最相思" * 3
    train = [other, poem + "。", poem, poem]
    test = ["举头望明月", poem, poem.replace("楼", "楼，"), "。！", "a", poem]
    found = find_duplicates(split_of(train, test))
    expected = [(1, 2, 1.0, "exact"), (2, 1, 1.0, "near"), (5, 2, 1.0, "exact")]
    assert [tuple(d) for d in found] == expected


def test_short_and_unmarked_texts_are_compared_too():
    found = find_duplicates(split_of(["？", "短 文", "ABC"], ["短文", "abc", "？", "！", "短"]))
    expected = [(0, 1, "near"), (1, 2, "near"), (2, 0, "exact")]
    assert [(d.test, d.train, d.kind) for d in found] == expected


@pytest.mark.parametrize(("changed", "near"), [(3, 20), (12, 0)])
def test_texts_from_one_template_are_not_all_compared(monkeypatch, changed, near):
    rng = np.random.default_rng(0)
    template, texts = random_text(rng, 300), []
    for _ in range(220):
        text = list(template)
        for place in rng.integers(0, 300, changed):
            text[place] = random_text(rng, 1)
        texts.append("".join(text))
    comparisons, jaccard = [], duplicates._jaccard
    monkeypatch.setattr(duplicates, "_jaccard", lambda *a: comparisons.append(1) or jaccard(*a))
    monkeypatch.setattr(duplicates, "_COMPARISONS", 40)
    monkeypatch.setattr(duplicates, "_MORE_COMPARISONS", 10)
    train, test = texts[20:] + texts[:2] * 3, texts[:20]
    found = find_duplicates(split_of(train, test))
    assert len(comparisons) <= 20 * (40 if near == 0 else 15)
    assert [tuple(d) for d in found[:2]] == [(0, 200, 1.0, "exact"), (1, 201, 1.0, "exact")]
    assert len(found) == max(near, 2)


def test_only_held_out_copies_are_dropped():
    split = split_of(["甲", "乙", "丙"], ["乙", "丁", "丙"])
    clean = drop_duplicates(split, find_duplicates(split))
    assert clean["train"]["text"][:] == ["甲", "乙", "丙"]
    assert clean["test"]["text"][:] == ["丁"]
    assert find_duplicates(clean) == []
    assert drop_duplicates(clean, [])["test"]["text"][:] == ["丁"]


def test_what_makes_no_sense_is_refused():
    split = split_of(["甲", "乙"], ["乙", "甲"])
    for threshold in (0, -1, 1.5):
        with pytest.raises(ValueError, match="threshold"):
            find_duplicates(split, threshold=threshold)
    with pytest.raises(ValueError, match="all 2 held-out .*test_size.*drop_duplicates=false"):
        drop_duplicates(split, find_duplicates(split))


def test_seen_sentences_are_the_ones_that_a_plain_search_finds(caplog):
    rng = np.random.default_rng(1)
    known = ["".join(rng.choice(list("天地人你我他"), 3)) + mark for mark in "。！？；\n" * 30]
    train, test = (["".join(rng.choice(known, 8)) + "没有句号" for _ in range(n)] for n in (12, 60))
    found = find_seen_sentences(split_of(train, test))
    told = {}
    for row, text in enumerate(train):
        for sentence in filter(None, re.split(r"(?<=[。！？；])|\n", text)):
            told.setdefault(sentence, row)
    expected = []
    for row, text in enumerate(test):
        start = 0
        for sentence in re.split(r"(?<=[。！？；])|(?<=\n)", text):
            bare = sentence.rstrip("\n")
            if bare:
                expected.append((row, start, start + len(bare), told.get(bare, -1)))
            start += len(sentence)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
    seen = [row for row in expected if row[3] >= 0]
    lengths = [sum(end - start for _, start, end, _ in rows) for rows in (seen, expected)]
    assert 0.2 < found.shares()[0] == len(seen) / len(expected) < 0.9
    assert found.shares()[1] == lengths[0] / lengths[1]
    for row in range(60):
        assert found.spans(row) == [(start, end) for r, start, end, _ in seen if r == row]


def test_white_space_and_closing_quotes_and_empty_texts_of_sentences():
    train = ["他说：“走吧。”\u3000然后 走了。\n\n题目", ""]
    test = ["", "然后  走了。 他说：“走吧。”", " \n 题目 \n", "题目。", "说：“走吧。”"]
    found = find_seen_sentences(split_of(train, test))
    assert [test[row][a:b] for row in range(5) for a, b in found.spans(row)] == [
        "然后  走了。",
        "他说：“走吧。”",
        "题目",
    ]
    assert found.train.tolist() == [0, 0, 0, -1, -1]
    nothing = find_seen_sentences(split_of(["天。"], [""]))
    assert nothing.spans(0) == [] and np.isnan(nothing.shares()).all()
