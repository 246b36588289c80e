import itertools
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from tinytrain.evaluation import (
    Answer,
    DocumentLoss,
    Interval,
    accuracy,
    answer_questions,
    bits_per_character,
    by_domain,
    by_length,
    colour_losses,
    complete,
    count_losses,
    document_losses,
    generate,
    next_tokens,
    plot_comparison,
    share,
    summarize,
    token_losses,
    xz_bits_per_character,
)
from tinytrain.modeling import build_model


@pytest.fixture(scope="module")
def taught(smoke):
    """A model that has learned two sentences by heart, and to stop after them."""
    torch.manual_seed(0)
    model = build_model(smoke.config, seed=0)
    eos = smoke.tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = ("法国的首都是巴黎。", "日本的首都是东京。")
    rows = [torch.tensor([smoke.tokenizer(text)["input_ids"] + [eos]]) for text in texts]
    for _ in range(60):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_completions_come_in_the_order_of_the_prompts_and_stop_at_the_end(taught, smoke):
    prompts = ["日本的首都是", "法国", "法国的首都是"]
    texts = complete(taught, smoke.tokenizer, prompts, max_new_tokens=30)
    assert texts == ["东京。", "的首都是巴黎。", "巴黎。"]


def test_padding_in_a_batch_changes_nothing(taught, smoke):
    prompts = ["日本的首都是", "法国", "法国的首都是"]
    assert len({len(smoke.tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 1
    one_by_one = complete(taught, smoke.tokenizer, prompts, batch_size=1)
    assert complete(taught, smoke.tokenizer, prompts, batch_size=3) == one_by_one


def test_the_models_mode_is_kept(taught, smoke):
    taught.train()
    complete(taught, smoke.tokenizer, ["法国"], max_new_tokens=1)
    assert taught.training


def test_an_empty_prompt_is_refused(taught, smoke):
    with pytest.raises(ValueError, match="prompt is empty"):
        complete(taught, smoke.tokenizer, ["法国", ""])


def test_right_and_wrong_answers_are_counted(taught, smoke):
    questions = [("法国的首都是", "巴黎", "countries"), ("日本的首都是", "大阪", "countries")]
    answers = answer_questions(taught, smoke.tokenizer, questions)
    assert [answer.right for answer in answers] == [True, False]
    assert answers[1].written.startswith("东京")
    assert accuracy(answers) == 0.5


def test_an_answer_is_right_only_from_its_first_character():
    assert Answer("a", "巴黎", "巴黎。").right
    assert not Answer("a", "巴黎", "是巴黎").right
    assert math.isnan(accuracy([]))


def test_bits_per_character_do_not_depend_on_how_text_is_cut():
    # Two tokens of 3 nats or six of 1 nat, over four characters, say the same.
    assert bits_per_character(3.0, 2 / 4) == pytest.approx(bits_per_character(1.0, 6 / 4))
    assert bits_per_character(math.log(2), 1.0) == pytest.approx(1.0)


# --- measuring ------------------------------------------------------------------------------------


def plain_nats(model, tokenizer, text, context=10**6):
    """The loss of each token, one forward pass a token: slow, and nothing to get wrong."""
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    nats = []
    for here in range(1, len(ids)):
        logits = model(torch.tensor([ids[max(0, here - context) : here]])).logits[0, -1]
        nats.append(-logits.log_softmax(-1)[ids[here]].item())
    return nats


@torch.no_grad()
def test_a_documents_loss_is_that_of_its_tokens_after_an_end_of_text(taught, smoke):
    texts = ["法国的首都是巴黎。", "日", "", "日本的首都是大阪，不是东京。"]
    for text, found in zip(texts, document_losses(taught, smoke.tokenizer, texts), strict=True):
        expected = plain_nats(taught, smoke.tokenizer, text)
        assert found.characters == len(text) and found.tokens == len(expected)
        assert found.nats == pytest.approx(sum(expected), rel=1e-4)
    assert document_losses(taught, smoke.tokenizer, []) == []


def test_what_was_learned_by_heart_is_guessed_first(taught, smoke):
    [known] = document_losses(taught, smoke.tokenizer, ["法国的首都是巴黎。"])
    # All but the first token, where the other sentence could begin as well.
    assert known.right >= known.tokens - 1
    [unknown] = document_losses(taught, smoke.tokenizer, ["游泳之后要喝水。"])
    assert unknown.right < unknown.tokens / 2


@torch.no_grad()
@pytest.mark.parametrize("context", [8, 9, 64])
def test_a_long_document_is_read_in_windows_that_see_half_a_window_at_least(taught, smoke, context):
    text = smoke.split["test"][0]["text"]
    [found] = document_losses(taught, smoke.tokenizer, [text], context)
    whole = plain_nats(taught, smoke.tokenizer, text)
    assert found.tokens == len(whole) > 64
    pieces = token_losses(taught, smoke.tokenizer, text, context)
    assert sum(nats for _, nats in pieces) == pytest.approx(found.nats, rel=1e-4)
    # The first window sees all that there is; later ones see between half and all of a window.
    ids = [smoke.tokenizer.eos_token_id, *smoke.tokenizer(text)["input_ids"]]
    expected, begin, known = 0.0, 0, 1
    while known < len(ids):
        window = torch.tensor([ids[begin : begin + context]])
        scores = taught(window).logits[0].log_softmax(-1)
        for here in range(known - begin, window.shape[1]):
            expected -= scores[here - 1, window[0, here]].item()
        known, begin = begin + window.shape[1], begin + context // 2
    assert found.nats == pytest.approx(expected, rel=1e-4)


def test_documents_measured_together_or_alone_cost_the_same(taught, smoke):
    texts = smoke.split["test"]["text"][:12]
    together = document_losses(taught, smoke.tokenizer, texts, 64)
    alone = [document_losses(taught, smoke.tokenizer, [text], 64)[0] for text in texts]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    nats = [row.nats for row in together]
    assert nats == pytest.approx([row.nats for row in alone], rel=1e-4)


def test_an_untrained_model_is_as_unsure_as_its_vocabulary_is_large(smoke):
    model = build_model(smoke.config, seed=1)
    measures = summarize(document_losses(model, smoke.tokenizer, smoke.split["test"]["text"], 64))
    assert measures.perplexity.value == pytest.approx(smoke.config.vocab_size, rel=0.1)
    assert measures.accuracy.value < 0.02


def test_the_measures_are_ratios_of_sums_and_do_not_depend_on_the_tokenizer():
    two_words = [DocumentLoss(characters=4, tokens=2, nats=6.0, right=1)]
    six_pieces = [DocumentLoss(characters=4, tokens=6, nats=6.0, right=3)]
    coarse, fine = summarize(two_words), summarize(six_pieces)
    assert coarse.bits_per_character == fine.bits_per_character
    assert coarse.bits_per_character.value == pytest.approx(6 / 4 / math.log(2))
    assert coarse.perplexity.value == pytest.approx(math.exp(3))
    assert fine.perplexity.value == pytest.approx(math.e)
    assert coarse.accuracy.value == fine.accuracy.value == 0.5
    # A long document counts for more than a short one: per character, not per document.
    uneven = summarize([DocumentLoss(1, 1, 4.0, 0), DocumentLoss(99, 99, 99.0, 0)])
    assert uneven.bits_per_character.value == pytest.approx(103 / 100 / math.log(2))


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        lengths = generator.integers(20, 200, size=60)
        # Documents differ in how hard they are, so that their tokens are not independent.
        nats = lengths * generator.gamma(8, 1 / 8, size=60)
        rows = [DocumentLoss(n, n, float(x), 0) for n, x in zip(lengths, nats, strict=True)]
        interval = summarize(rows, resamples=200).bits_per_character
        held += interval.low < 1 / math.log(2) < interval.high
    assert 0.89 < held / 200 <= 0.99  # fewer than 0.95 is usual for sixty documents


def test_the_same_documents_give_the_same_interval():
    rows = [DocumentLoss(n, n, n * 1.5 + n % 3, 1) for n in range(1, 40)]
    assert summarize(rows) == summarize(rows)
    assert summarize(rows) != summarize(rows, seed=1)
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", str(summarize(rows).accuracy))


@pytest.mark.parametrize("rows", [[], [DocumentLoss(0, 0, 0.0, 0)]])
def test_nothing_to_measure_is_said(rows):
    with pytest.raises(ValueError, match="nothing to measure"):
        summarize(rows)


def test_short_and_long_documents_apart():
    rows = [DocumentLoss(n, n, float(n > 50) * n, 0) for n in range(1, 101)]
    groups = by_length(rows)
    assert list(groups)[0] == "1 to 25 characters" and list(groups)[-1] == "76 to 100 characters"
    assert sum(measures.documents for measures in groups.values()) == 100
    values = [measures.bits_per_character.value for measures in groups.values()]
    assert values == pytest.approx([0, 0, 1 / math.log(2), 1 / math.log(2)])
    same = [DocumentLoss(7, 7, 1.0, 0)] * 5
    assert [measures.documents for measures in by_length(same).values()] == [5]


# --- what a reader can relate to ------------------------------------------------------------------


def test_pairs_by_hand(smoke):
    tokenizer, train = smoke.tokenizer, ["法国法国法国的", "法国人"]
    follows, single = Counter(), Counter()
    for text in train:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        follows.update(itertools.pairwise(ids))
        single.update(ids[1:])
    text = "法国的人"
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    nats = 0.0
    for a, b in itertools.pairwise(ids):
        alone = (single[b] + 1) / (sum(single.values()) + len(tokenizer))
        after = {second: n for (first, second), n in follows.items() if first == a}
        n, kinds = sum(after.values()), len(after)
        nats -= math.log((after.get(b, 0) + kinds * alone) / (n + kinds) if n else alone)
    [found] = count_losses(tokenizer, train, [text])
    assert found.nats == pytest.approx(nats)
    [found] = count_losses(tokenizer, train, [text], order=1)
    total = sum(single.values()) + len(tokenizer)
    assert found.nats == pytest.approx(-sum(math.log((single[b] + 1) / total) for b in ids[1:]))


def test_pairs_guess_what_followed_most_often(smoke):
    tokenizer = smoke.tokenizer
    train = ["法国的首都是巴黎。"] * 3
    [known] = count_losses(tokenizer, train, ["法国的首都是巴黎。"])
    assert known.right == known.tokens
    [alone] = count_losses(tokenizer, train, ["法国的首都是巴黎。"], order=1)
    assert alone.right <= 1 and alone.nats > known.nats
    [nothing] = count_losses(tokenizer, [], ["法国"])
    assert nothing.nats == pytest.approx(nothing.tokens * math.log(len(tokenizer)))
    with pytest.raises(ValueError, match="order 3"):
        count_losses(tokenizer, train, train, order=3)


def test_xz_spends_little_on_what_it_has_seen(smoke):
    train, test = smoke.split["train"]["text"], smoke.split["test"]["text"]
    alone = xz_bits_per_character(test)
    assert 0 < xz_bits_per_character(test, train) < alone < 8
    assert xz_bits_per_character(test, test) < 0.2
    assert xz_bits_per_character(["a" * 100], max_characters=10) > 8  # ten characters, not hundred
    with pytest.raises(ValueError, match="nothing to compress"):
        xz_bits_per_character([])


def test_the_share_of_right_answers_has_wilsons_interval():
    # The values of statsmodels.stats.proportion.proportion_confint(9, 10, method="wilson").
    assert share(9, 10) == pytest.approx((0.9, 0.5958, 0.9821), abs=2e-4)
    assert share(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=2e-4)
    assert math.isnan(share(0, 0).value)
    for total in range(1, 60):  # whatever the rounding
        assert share(total, total).high == 1 and share(0, total).low == 0


def test_an_interval_is_written_without_exponents():
    assert str(Interval(0.70249, 0.6615, 0.7444)) == "0.702 (0.661 to 0.744)"
    assert str(Interval(4290.4, 999.6, 12_345.6)) == "4,290 (1,000 to 12,346)"


def test_answers_by_domain():
    questions = [("a", "x", "rivers"), ("b", "y", "rivers"), ("c", "z", "works")]
    answers = [Answer("a", "x", "x。"), Answer("b", "y", "no"), Answer("c", "z", "z")]
    found = by_domain(questions, answers)
    assert list(found) == ["works", "rivers"]
    assert found["rivers"] == share(1, 2)


def test_bars_are_as_long_as_the_numbers():
    measures = summarize([DocumentLoss(n, n, float(n % 5), 0) for n in range(1, 30)])
    ours = measures.bits_per_character
    figure = plot_comparison({"ours": ours, "xz": 2.0, "all right": share(21, 21)})
    [axes] = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([ours.value, 2.0, 1.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "xz", "all right"]
    ends = [
        segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()
    ]
    assert ends == [pytest.approx([ours.low, ours.high]), pytest.approx(share(21, 21)[1:])]


def test_pieces_make_up_the_text_and_its_loss(taught, smoke):
    text = "法国 的首都是\n巴黎😀é。"
    pieces = token_losses(taught, smoke.tokenizer, text)
    assert "".join(piece for piece, _ in pieces) == text
    [document] = document_losses(taught, smoke.tokenizer, [text])
    assert sum(nats for _, nats in pieces) == pytest.approx(document.nats, rel=1e-4)
    assert all(piece for piece, _ in pieces)
    assert token_losses(taught, smoke.tokenizer, "") == []


class Text(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.styles = "", set(), []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.styles.append(dict(attrs)["style"])

    def handle_data(self, data):
        self.text += data


def test_coloured_text_is_escaped_and_redder_where_it_surprised():
    hostile = "<script>alert('1')</script>&amp;\"<img onerror=x>"
    shown = Text(colour_losses([(hostile, 0.0), ("巴黎", 4.0), ("东京", 100.0), ("x", -1e-6)]))
    assert shown.text == hostile + "巴黎东京x" and shown.tags == {"div", "span"}
    reds = [int(re.search(r"rgb\(255,(\d+),", style)[1]) for style in shown.styles[1:]]
    assert reds[0] == reds[3] == 255 > reds[1] > reds[2] > 0


# --- writing --------------------------------------------------------------------------------------


def test_greedy_is_what_complete_writes(taught, smoke):
    text = generate(taught, smoke.tokenizer, "法国的首都是", temperature=0)
    assert text == "巴黎。" == complete(taught, smoke.tokenizer, ["法国的首都是"])[0]


def test_it_stops_at_the_end_of_text_that_the_tokenizer_names(taught, smoke, monkeypatch):
    other = smoke.tokenizer.eos_token_id + 5
    monkeypatch.setattr(taught.generation_config, "eos_token_id", other)
    steps = []
    hook = taught.register_forward_hook(lambda *_: steps.append(1))
    assert generate(taught, smoke.tokenizer, "法国的首都是", temperature=0) == "巴黎。"
    hook.remove()
    assert len(steps) == len(smoke.tokenizer("巴黎。")["input_ids"]) + 1


@pytest.mark.parametrize("knobs", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_knobs_turned_all_the_way_are_greedy(taught, smoke, knobs):
    greedy = generate(taught, smoke.tokenizer, "游泳", 20, temperature=0)
    assert generate(taught, smoke.tokenizer, "游泳", 20, seed=3, **knobs) == greedy


def test_a_seed_repeats_itself_and_leaves_the_random_numbers_alone(taught, smoke):
    def write(seed):
        return generate(taught, smoke.tokenizer, "游泳", 20, temperature=2.0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert write(1) == write(1) != write(2)
    assert torch.equal(torch.rand(3), expected)
    assert write(None) != write(None)


def test_text_comes_as_it_is_written_and_whole_characters_only(taught, smoke):
    for seed in range(3):
        pieces = []
        text = generate(
            taught, smoke.tokenizer, "法国", 30, temperature=2.0, seed=seed, on_text=pieces.append
        )
        assert "".join(pieces) == text and len(pieces) > 3
    heard = []
    text = generate(taught, smoke.tokenizer, "法国", temperature=0, on_text=heard.append)
    assert "".join(heard) == text == "的首都是巴黎。"


def test_the_penalty_keeps_it_from_repeating(smoke):
    model = build_model(smoke.config, seed=0)
    ids = smoke.tokenizer(generate(model, smoke.tokenizer, "日本", 30, temperature=0))["input_ids"]
    punished = generate(model, smoke.tokenizer, "日本", 30, temperature=0, repetition_penalty=5.0)
    assert len(set(ids)) < len(set(smoke.tokenizer(punished)["input_ids"]))


def test_the_context_is_not_left(smoke, caplog):
    model = build_model(smoke.config, seed=0)
    context = smoke.config.max_position_embeddings
    prompt = "法国的首都是巴黎。" * context
    text = generate(model, smoke.tokenizer, prompt, temperature=0)
    assert 0 < len(smoke.tokenizer(text)["input_ids"]) <= 2
    long = generate(model, smoke.tokenizer, "日", 10 * context, temperature=0)
    assert 0 < len(long) and not caplog.records


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"temperature": -1}, "temperature -1 is below 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
    ],
)
def test_knobs_out_of_range_are_refused(taught, smoke, knobs, words):
    with pytest.raises(ValueError, match=words):
        generate(taught, smoke.tokenizer, **({"prompt": "法国"} | knobs))


def test_next_tokens_are_what_is_drawn(taught, smoke):
    knobs = {"temperature": 3.0, "top_k": 4}
    expected = dict(next_tokens(taught, smoke.tokenizer, "法国的首都是", **knobs))
    assert len(expected) == 4 and sum(expected.values()) == pytest.approx(1)
    assert "巴黎".startswith(list(expected)[0])
    drawn = Counter(
        generate(taught, smoke.tokenizer, "法国的首都是", 1, seed=seed, **knobs)
        for seed in range(300)
    )
    for text, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / 300)
        assert abs(drawn[text] / 300 - chance) < 4 * deviation
    narrow = next_tokens(taught, smoke.tokenizer, "法国的首都是", top_p=0.5)
    assert len(narrow) == 1 and narrow[0][1] == pytest.approx(1)
    with pytest.raises(ValueError, match="temperature 0"):
        next_tokens(taught, smoke.tokenizer, "法国", temperature=0)
