import math
from collections import Counter

import pytest
import torch

from tinytrain.common import encode_text
from tinytrain.generation import (
    Answer,
    answer_questions,
    complete,
    generate,
    next_tokens,
    plot_next_tokens,
)
from tinytrain.modeling import build_model


@pytest.fixture(scope="module")
def untaught(smoke):
    return build_model(smoke.config, seed=0)


def test_completions_come_in_the_order_of_the_prompts_and_stop_at_the_end(taught, smoke):
    prompts = ["日本的首都是", "法国", "法国的首都是", "法国"]
    texts = complete(taught, smoke.tokenizer, prompts, max_new_tokens=30)
    assert texts == ["东京。", "的首都是巴黎。", "巴黎。", "的首都是巴黎。"]
    with pytest.raises(ValueError, match="prompt is empty"):
        complete(taught, smoke.tokenizer, ["法国", ""])


def test_padding_in_a_batch_changes_nothing_nor_does_writing_the_models_mode(
    untaught, smoke, monkeypatch
):
    prompts = ["日本的首都是", "法国", "法国的首都是", "水"]
    assert len({len(smoke.tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 1
    untaught.train()
    together = complete(untaught, smoke.tokenizer, prompts, 10)
    assert untaught.training
    untaught.eval()
    assert together == [complete(untaught, smoke.tokenizer, [each], 10)[0] for each in prompts]
    monkeypatch.setattr("tinytrain.common._BATCH_SIZE", 3)
    assert complete(untaught, smoke.tokenizer, prompts, 10) == together
    assert not untaught.training


def test_right_and_wrong_answers_are_counted(taught, smoke):
    questions = [("法国的首都是", "巴黎", "countries"), ("日本的首都是", "大阪", "countries")]
    answers = answer_questions(taught, smoke.tokenizer, questions)
    assert [answer.right for answer in answers] == [True, False]
    assert answers[1].written.startswith("东京")
    assert not Answer("a", "巴黎", "是巴黎").right  # not from the first character


def test_greedy_stops_at_the_end_of_text_that_the_tokenizer_names(taught, smoke, monkeypatch):
    other = smoke.tokenizer.eos_token_id + 5
    monkeypatch.setattr(taught.generation_config, "eos_token_id", other)
    steps = []
    hook = taught.register_forward_hook(lambda *_: steps.append(1))
    assert generate(taught, smoke.tokenizer, "法国的首都是", temperature=0) == "巴黎。"
    hook.remove()
    assert len(steps) == len(smoke.tokenizer("巴黎。")["input_ids"]) + 1


def test_a_special_token_in_a_prompt_is_text(taught, smoke):
    """It is what the model knows from packing, and it is shown as it was typed."""
    prompt = "法国<|endoftext|>"
    expected = complete(taught, smoke.tokenizer, [prompt])
    assert generate(taught, smoke.tokenizer, prompt, 40, temperature=0) == expected[0]
    [ids] = encode_text(smoke.tokenizer, [prompt])
    with torch.no_grad():
        logits = taught(torch.tensor([ids])).logits[0, -1]
    [(first, _)] = next_tokens(taught, smoke.tokenizer, prompt, number=1)
    assert first == smoke.tokenizer.decode([logits.argmax()])
    eos = smoke.tokenizer.eos_token_id
    assert eos in smoke.tokenizer(prompt).input_ids and eos not in ids


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_at_its_narrowest_is_greedy(taught, smoke, sampling):
    greedy = generate(taught, smoke.tokenizer, "游泳", 20, temperature=0)
    assert generate(taught, smoke.tokenizer, "游泳", 20, seed=3, **sampling) == greedy


def test_a_seed_repeats_itself_and_leaves_the_random_state_alone(taught, smoke):
    def write(seed):
        return generate(taught, smoke.tokenizer, "游泳", 20, temperature=2.0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert write(1) == write(1) != write(2)
    assert torch.equal(torch.rand(3), expected)
    assert write(None) != write(None)


def test_text_comes_as_it_is_written_and_whole_characters_only(taught, smoke):
    for sampling in ({"seed": 0}, {"seed": 1, "temperature": 2.0}, {"temperature": 0}):
        pieces = []
        text = generate(taught, smoke.tokenizer, "法国", 30, on_text=pieces.append, **sampling)
        assert "".join(pieces) == text and len(pieces) > 2
    assert text == "的首都是巴黎。"


def test_the_penalty_keeps_it_from_repeating(untaught, smoke):
    def kinds(**sampling):
        text = generate(untaught, smoke.tokenizer, "日本", 30, temperature=0, **sampling)
        return len(set(smoke.tokenizer(text)["input_ids"]))

    assert kinds() < kinds(repetition_penalty=5.0)


def test_the_context_is_not_left(untaught, smoke, caplog):
    context = smoke.config.max_position_embeddings
    prompt = "法国的首都是巴黎。" * context
    text = generate(untaught, smoke.tokenizer, prompt, temperature=0)
    assert 0 < len(smoke.tokenizer(text)["input_ids"]) <= 2
    long = generate(untaught, smoke.tokenizer, "日", 10 * context, temperature=0)
    assert 0 < len(long) and not caplog.records


@pytest.mark.parametrize(
    ("changed", "message"),
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
def test_parameters_out_of_range_are_refused(taught, smoke, changed, message):
    with pytest.raises(ValueError, match=message):
        generate(taught, smoke.tokenizer, **({"prompt": "法国"} | changed))


def test_next_tokens_are_what_is_sampled(taught, smoke):
    sampling = {"temperature": 3.0, "top_k": 4}
    expected = dict(next_tokens(taught, smoke.tokenizer, "法国的首都是", **sampling))
    assert len(expected) == 4 and sum(expected.values()) == pytest.approx(1)
    assert "巴黎".startswith(list(expected)[0])
    seeds = range(100)
    sampled = Counter(
        generate(taught, smoke.tokenizer, "法国的首都是", 1, seed=seed, **sampling)
        for seed in seeds
    )
    for text, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / len(seeds))
        assert abs(sampled[text] / len(seeds) - chance) < 4 * deviation
    narrow = next_tokens(taught, smoke.tokenizer, "法国的首都是", top_p=0.5)
    assert len(narrow) == 1 and narrow[0][1] == pytest.approx(1)
    with pytest.raises(ValueError, match="temperature 0"):
        next_tokens(taught, smoke.tokenizer, "法国", temperature=0)


def test_the_next_tokens_are_drawn_by_rank(taught, smoke):
    settings = {"as it is": {}, "top-k 2": {"top_k": 2}}
    shown = {
        name: next_tokens(taught, smoke.tokenizer, "法国", **chosen)
        for name, chosen in settings.items()
    }
    [axes] = plot_next_tokens(shown).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(settings)
    for line, pairs in zip(axes.lines, shown.values(), strict=True):
        assert list(line.get_ydata()) == [probability for _, probability in pairs]
        assert list(line.get_xdata()) == list(range(1, len(pairs) + 1))
    assert len(axes.lines[1].get_xdata()) == 2
