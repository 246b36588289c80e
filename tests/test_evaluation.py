import math

import pytest
import torch

from tinytrain.evaluation import Answer, accuracy, answer_questions, bits_per_character, complete
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
