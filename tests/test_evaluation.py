import html
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from tinytrain.common import encode_text
from tinytrain.evaluation import (
    DocumentLoss,
    Interval,
    bits_per_character,
    by_kind,
    colour_losses,
    compare,
    count_losses,
    document_losses,
    plot_comparison,
    share,
    split_losses,
    summarize,
    token_losses,
    xz_bits_per_character,
)
from tinytrain.modeling import build_model
from tinytrain.tokenization import pack_documents, tokens_per_character


@torch.no_grad()
def test_a_documents_loss_is_that_of_its_tokens_after_an_end_of_text(taught, smoke):
    texts = ["法国的首都是巴黎。", "日", "", "日本的 首都是大阪，\n不是东京😀é。"]
    for text, found in zip(texts, document_losses(taught, smoke.tokenizer, texts), strict=True):
        ids = [smoke.tokenizer.eos_token_id, *smoke.tokenizer(text)["input_ids"]]
        expected = 0.0
        for here in range(1, len(ids)):  # one forward pass a token: slow, and nothing to get wrong
            logits = taught(torch.tensor([ids[:here]])).logits[0, -1]
            expected -= logits.log_softmax(-1)[ids[here]].item()
        assert found.characters == len(text) and found.tokens == len(ids) - 1
        assert found.nats == pytest.approx(expected, rel=1e-4)
        pieces = token_losses(taught, smoke.tokenizer, text)
        assert "".join(piece for piece, _ in pieces) == text and all(piece for piece, _ in pieces)
        assert sum(nats for _, nats in pieces) == pytest.approx(expected, rel=1e-4)
    assert document_losses(taught, smoke.tokenizer, []) == []
    known, unknown = document_losses(taught, smoke.tokenizer, [texts[0], "游泳之后要喝水。"])
    # It was taught without the token at the start, and the other sentence could begin as well.
    assert known.right > known.tokens / 2 > unknown.right


@torch.no_grad()
@pytest.mark.parametrize("context", [8, 9, 64])
def test_a_long_document_is_read_in_windows_that_see_half_a_window_at_least(taught, smoke, context):
    text = smoke.split["test"][0]["text"]
    [found] = document_losses(taught, smoke.tokenizer, [text], context)
    pieces = token_losses(taught, smoke.tokenizer, text, context)
    assert sum(nats for _, nats in pieces) == pytest.approx(found.nats, rel=1e-4)
    # The first window sees all that there is; later ones see between half and all of a window.
    ids = [smoke.tokenizer.eos_token_id, *smoke.tokenizer(text)["input_ids"]]
    assert found.tokens == len(ids) - 1 > 64
    expected, begin, known = 0.0, 0, 1
    while known < len(ids):
        window = torch.tensor([ids[begin : begin + context]])
        log_probabilities = taught(window).logits[0].log_softmax(-1)
        for here in range(known - begin, window.shape[1]):
            expected -= log_probabilities[here - 1, window[0, here]].item()
        known, begin = begin + window.shape[1], begin + context // 2
    assert found.nats == pytest.approx(expected, rel=1e-4)


def test_a_text_full_of_special_strings_is_measured_as_it_was_learned(smoke):
    row = "<|endoftext|>{}的首都是哪里？<|endoftext|>"
    texts = [row.format("法国日本中国"[n % 3 * 2 :][:2]) for n in range(300)]
    blocks = pack_documents(Dataset.from_dict({"text": texts}), smoke.tokenizer, 64)
    ids = blocks.with_format("torch")["input_ids"][:].long()
    model = build_model(smoke.config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in ids[: len(ids) // 8 * 8].reshape(-1, 8, 64):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    learned = bits_per_character(loss, blocks.num_rows * 64 / sum(map(len, texts)))
    found = summarize(document_losses(model, smoke.tokenizer, texts, 64))
    assert found.bits_per_character.value == pytest.approx(learned, rel=0.1)
    assert found.tokens == tokens_per_character(smoke.tokenizer, texts) * found.characters
    counted = count_losses(smoke.tokenizer, texts, texts)
    assert sum(row.tokens for row in counted) == found.tokens


def test_what_stands_before_a_text_is_read_and_not_counted(taught, smoke):
    text, other = "法国的首都是<|endoftext|>巴黎。", "日本的首都是东京。"
    after = token_losses(taught, smoke.tokenizer, text, 64, before=other)
    alone = token_losses(taught, smoke.tokenizer, text, 64)
    assert [piece for piece, _ in after] == [piece for piece, _ in alone]
    eos, rows = smoke.tokenizer.eos_token_id, encode_text(smoke.tokenizer, [other, text])
    ids = torch.tensor([[eos, *rows[0], eos, *rows[1]]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            taught(ids).logits[0, :-1], ids[0, 1:], reduction="none"
        )
    assert sum(loss for _, loss in after) == pytest.approx(
        nats[-len(rows[1]) :].sum().item(), rel=1e-4
    )


def test_documents_measured_together_or_alone_cost_the_same(taught, smoke):
    texts = smoke.split["test"]["text"][:12]
    together = document_losses(taught, smoke.tokenizer, texts, 64)
    alone = [document_losses(taught, smoke.tokenizer, [text], 64)[0] for text in texts]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.tokens == theirs.tokens and ours.nats == pytest.approx(theirs.nats, rel=1e-4)


def test_spans_and_the_rest_cost_what_the_whole_costs_and_a_token_counts_where_it_ends(
    taught, smoke
):
    texts = ["法国的首都是巴黎。日本的首都是<|im_end|>。", "", "😀"]
    texts += smoke.split["test"]["text"][:5]
    spans = [[(9, 18)], [], [(0, 1)], *([(0, 10), (50, 70)] for _ in range(5))]
    inside, outside = split_losses(taught, smoke.tokenizer, texts, spans, 64)
    for text, some, a, b, whole in zip(
        texts, spans, inside, outside, document_losses(taught, smoke.tokenizer, texts, 64),
        strict=True,
    ):  # fmt: skip
        assert a.characters == sum(end - start for start, end in some)
        sums = [x + y for x, y in zip(a, b, strict=True)]
        assert sums == [len(text), whole.tokens, pytest.approx(whole.nats, rel=1e-4), whole.right]
        place, tokens, nats = 0, 0, 0.0
        for piece, loss in token_losses(taught, smoke.tokenizer, text, 64):
            place += len(piece)
            if any(start < place <= end for start, end in some):
                tokens, nats = tokens + 1, nats + loss
        assert a.nats == pytest.approx(nats, rel=1e-4) and a.tokens >= tokens  # bytes
    assert split_losses(taught, smoke.tokenizer, [], []) == ([], [])


def test_an_untrained_model_is_as_unsure_as_its_vocabulary_is_large(smoke):
    model = build_model(smoke.config, seed=1)
    measures = summarize(
        document_losses(model, smoke.tokenizer, smoke.split["test"]["text"][:20], 64)
    )
    assert measures.perplexity.value == pytest.approx(smoke.config.vocab_size, rel=0.1)
    assert measures.accuracy.value < 0.02


def test_the_measures_are_ratios_of_sums_and_do_not_depend_on_the_tokenizer():
    two_tokens = [DocumentLoss(characters=4, tokens=2, nats=6.0, right=1)]
    six_tokens = [DocumentLoss(characters=4, tokens=6, nats=6.0, right=3)]
    coarse, fine = summarize(two_tokens), summarize(six_tokens)
    assert coarse.bits_per_character == fine.bits_per_character
    assert coarse.bits_per_character.value == pytest.approx(6 / 4 / math.log(2))
    assert coarse.perplexity.value == pytest.approx(math.exp(3))
    assert fine.perplexity.value == pytest.approx(math.e)
    assert coarse.accuracy.value == fine.accuracy.value == 0.5
    assert bits_per_character(3.0, 2 / 4) == pytest.approx(coarse.bits_per_character.value)
    # A long document counts for more than a short one: per character, not per document.
    uneven = summarize([DocumentLoss(1, 1, 4.0, 0), DocumentLoss(99, 99, 99.0, 0)])
    assert uneven.bits_per_character.value == pytest.approx(103 / 100 / math.log(2))


def test_the_interval_is_as_wide_as_documents_of_different_difficulty_make_it():
    generator = np.random.default_rng(7)
    lengths = generator.integers(20, 200, size=400)
    nats = lengths * generator.gamma(8, 1 / 8, size=400)
    rows = [DocumentLoss(int(n), int(n), float(x), 0) for n, x in zip(lengths, nats, strict=True)]
    ratio = nats.sum() / lengths.sum()
    # The standard error of a ratio of sums, by the usual first-order formula.
    error = np.sqrt(((nats - ratio * lengths) ** 2).sum()) / lengths.sum()
    found = np.array(summarize(rows).bits_per_character) * math.log(2)
    expected = [ratio, ratio - 1.96 * error, ratio + 1.96 * error]
    assert found == pytest.approx(expected, abs=0.2 * error)


def test_models_with_overlapping_intervals_are_told_apart_on_the_same_documents():
    generator = np.random.default_rng(3)
    lengths = generator.integers(20, 200, size=300)
    hard = lengths * generator.gamma(4, 1 / 4, size=300)  # some documents are, for any model
    worse = hard + lengths * generator.normal(0.02, 0.05, size=300)
    better, worse = (
        [DocumentLoss(int(n), int(n), float(x), 0) for n, x in zip(lengths, nats, strict=True)]
        for nats in (hard, worse)
    )
    a, b = (summarize(rows).bits_per_character for rows in (worse, better))
    assert a.low < b.value < a.value < b.high  # overlapping, and widely
    difference = compare(worse, better)
    assert difference.value == pytest.approx(a.value - b.value)
    assert 0 < difference.low < difference.value < difference.high < b.high - b.low
    assert compare(better, worse).high < 0
    assert compare(worse, worse) == (0, 0, 0)
    empty = DocumentLoss(0, 0, 0.0, 0)
    assert compare([empty, *worse], [empty, *better]) == difference
    with pytest.raises(ValueError, match="not of the same documents"):
        compare(worse, better[1:])
    with pytest.raises(ValueError, match="nothing to measure"):
        compare([empty], [empty])


def test_the_same_documents_give_the_same_interval():
    rows = [DocumentLoss(n, n, n * 1.5 + n % 3, 1) for n in range(1, 40)]
    assert summarize(rows) == summarize(rows)
    # Empty documents say nothing, and a single one has nothing to vary.
    empty = [DocumentLoss(0, 0, 0.0, 0)] * 10
    assert summarize(rows[:2] + empty)[:3] == summarize(rows[:2])[:3]
    alone = summarize(rows[:1] + empty)
    assert alone.documents == 11 and len(set(alone.bits_per_character)) == 1
    for nothing in ([], empty):
        with pytest.raises(ValueError, match="nothing to measure"):
            summarize(nothing)


# --- what a reader can relate to ------------------------------------------------------------------


def test_pairs_by_hand(smoke):
    tokenizer, train = smoke.tokenizer, ["法国法国法国的", "法国人"]
    follows, single = Counter(), Counter()
    for text in train:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        follows.update(itertools.pairwise(ids))
        single.update(ids[1:])
    text, nats = "法国的人", 0.0
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    total = sum(single.values()) + len(tokenizer)
    for a, b in itertools.pairwise(ids):
        alone = (single[b] + 1) / total
        after = {second: n for (first, second), n in follows.items() if first == a}
        n, kinds = sum(after.values()), len(after)
        nats -= math.log((after.get(b, 0) + kinds * alone) / (n + kinds) if n else alone)
    [found] = count_losses(tokenizer, train, [text])
    assert found.nats == pytest.approx(nats)
    [found] = count_losses(tokenizer, train, [text], order=1)
    assert found.nats == pytest.approx(-sum(math.log((single[b] + 1) / total) for b in ids[1:]))


def test_pairs_guess_what_followed_most_often(smoke):
    tokenizer, train = smoke.tokenizer, ["法国的首都是巴黎。"]
    [known] = count_losses(tokenizer, train * 3, train)
    assert known.right == known.tokens
    [alone] = count_losses(tokenizer, train * 3, train, order=1)
    assert alone.right <= 1 and alone.nats > known.nats
    [nothing] = count_losses(tokenizer, [], ["法国"])
    assert nothing.nats == pytest.approx(nothing.tokens * math.log(len(tokenizer)))


def test_xz_spends_little_on_what_it_has_seen(smoke, monkeypatch):
    train, test = smoke.split["train"]["text"], smoke.split["test"]["text"]
    alone = xz_bits_per_character(test)
    assert 0 < xz_bits_per_character(test, train) < alone < 8
    assert xz_bits_per_character(test, test) < 0.2
    monkeypatch.setattr("tinytrain.evaluation._MOST_COMPRESSED_CHARACTERS", 10)
    assert xz_bits_per_character(["a" * 100]) > 8  # ten characters, not a hundred
    with pytest.raises(ValueError, match="nothing to compress"):
        xz_bits_per_character([])


def test_the_share_of_right_answers_has_wilsons_interval():
    assert share(9, 10) == pytest.approx((0.9, 0.5958, 0.9821), abs=2e-4)
    assert share(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=2e-4)
    assert math.isnan(share(0, 0).value)
    assert str(Interval(0.70249, 0.6615, 0.7444)) == "0.702 (0.661 to 0.744)"
    assert str(Interval(4290.4, 999.6, 12_345.6)) == "4,290 (1,000 to 12,346)"
    assert all(share(n, n).high == 1 and share(0, n).low == 0 for n in (1, 7, 60))
    asked = [("a", "x", "rivers", "b"), ("b", "y", "rivers", "a"), ("c", "z", "works", "b")]
    assert by_kind(asked, [True, False, True]) == {"b": share(2, 2), "a": share(0, 1)}


def test_bars_are_as_long_as_the_numbers():
    measures = summarize([DocumentLoss(n, n, float(n % 5), 0) for n in range(1, 30)])
    ours = measures.bits_per_character
    figure = plot_comparison({"ours": ours, "xz": 2.0, "all right": share(21, 21)})
    [axes] = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([ours.value, 2.0, 1.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "xz", "all right"]
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    ends = [segment[:, 0].tolist() for segment in segments]
    assert ends == [pytest.approx([ours.low, ours.high]), pytest.approx(share(21, 21)[1:])]

    assert len({bar.get_facecolor() for bar in axes.patches}) == 1
    [axes] = plot_comparison({"ours": ours, "xz": 2.0, "zip": 3.0}, highlight="ours").axes
    first, *others = (bar.get_facecolor() for bar in axes.patches)
    assert first not in others and len(set(others)) == 1
    assert "less is better" in axes.get_xlabel()


def test_coloured_text_is_escaped_and_redder_where_it_surprised():
    hostile = "<script>alert('1')</script>&amp;\"<img onerror=x>"
    shown = colour_losses([(hostile, 0.0), ("巴黎", 4.0), ("东京", 100.0), ("x", -1e-6)])
    assert set(re.findall(r"<(\w+)", shown)) == {"div", "span"}
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == hostile + "巴黎东京x"
    reds = [int(number) for number in re.findall(r"rgb\(255,(\d+),", shown)]
    assert reds[0] == reds[3] == 255 > reds[1] > reds[2] > 0
