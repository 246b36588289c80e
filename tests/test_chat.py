import copy
import html
import itertools
import logging
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinytrain.chat import (
    CHAT_TEMPLATE,
    Chat,
    add_chat_template,
    answer_each,
    chat_rows,
    colour_conversation,
    encode_conversation,
    pack_conversations,
)
from tinytrain.checkpoints import train
from tinytrain.loss import linear_cross_entropy, save_loss_memory
from tinytrain.qwen import qwen_tokenizer
from tinytrain.recipes import RECIPES
from tinytrain.tokenization import load_tokenizer, train_tokenizer
from tinytrain.training import build_trainer, training_arguments

FRANCE, HELLO = ("法国的首都是哪里？", "巴黎。"), ("你好", "你好！")
SPECIAL = "<|im_end|><|im_start|>assistant\n<|endoftext|><tool_call><|fim_prefix|>"


def conversation(*said, system=None):
    """Return messages in which user and assistant take turns, the user first."""
    roles = ["user", "assistant"] * len(said)
    turns = [("system", system)] if system else []
    turns += zip(roles, said, strict=False)
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*FRANCE, *HELLO, "user\n", "assistant\n", "system\n"]
    return add_chat_template(train_tokenizer(texts * 3, 330))


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are the bytes: what it does can be written by hand."""
    vocab = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    vocab |= {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    added = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return add_chat_template(Qwen2Tokenizer(vocab=vocab, merges=[], **added))


def small_model(tokenizer, context=96):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), max_position_embeddings=context, **sizes, **heads, **ends
        )
    )


def packed(rows, tokenizer, length=96):
    """Return packed rows as a batch."""
    columns = pack_conversations(rows, length, tokenizer.pad_token_id).to_dict()
    return {name: torch.tensor(column) for name, column in columns.items()}


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that has learned two answers by heart, in any order."""
    model = small_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs = [FRANCE, HELLO, FRANCE + HELLO, HELLO + FRANCE, HELLO + HELLO, FRANCE + FRANCE]
    rows = chat_rows([conversation(*pair) for pair in pairs], tokenizer, 96)
    batch = packed(rows, tokenizer)
    for _ in range(60):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# [ and ] are the two special tokens, / is a line end, ~ a byte of a Chinese character.
BY_HAND = {
    "one answer": (
        conversation("hi", "yo!"),
        "[user/hi]/[assistant/yo!]/",
        "                     ^^^^ ",
    ),
    "two answers after a system turn": (
        conversation("hi", "yo", "1", "2", system="Be."),
        "[system/Be.]/[user/hi]/[assistant/yo]/[user/1]/[assistant/2]/",
        "                                  ^^^                     ^^ ",
    ),
    "Chinese": (
        conversation("水", "冰"),
        "[user/~~~]/[assistant/~~~]/",
        "                      ^^^^ ",
    ),
    "the assistant begins, the last question is open": (
        [{"role": "assistant", "content": "hi"}, *conversation("a", "b", "c")],
        "[assistant/hi]/[user/a]/[assistant/b]/[user/c]/",
        "           ^^^                     ^^          ",
    ),
    "special strings and line ends": (
        conversation("<|im_end|>\n", "\n<|im_end|>"),
        "[user/<|im_end|>/]/[assistant//<|im_end|>]/",
        "                              ^^^^^^^^^^^^ ",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_learned_from_is_what_one_would_mark_by_hand(bytewise, name):
    messages, picture, marks = BY_HAND[name]
    ids, labels = encode_conversation(bytewise, messages)
    byte_of = {number: byte for number, byte in enumerate(bytes_to_unicode())}
    signs = {257: "[", 258: "]"} | {
        number: "/" if byte == 10 else chr(byte) if byte < 128 else "~"
        for number, byte in byte_of.items()
    }
    assert "".join(signs[id_] for id_ in ids) == picture
    assert "".join(" " if label == -100 else "^" for label in labels) == marks
    assert all(label in (id_, -100) for id_, label in zip(ids, labels, strict=True))


ORDINARY = [case[0] for name, case in BY_HAND.items() if "special" not in name] + [
    conversation(*FRANCE, *HELLO, system="你是一个助手。"),
    conversation("  两个空格 \t和 tab\n\n第二段\n", "def f():\n    return '1'\n\n"),
    conversation("e\u0301 𠮷 🎉 1234567", "Ünï, I'm 3.5!", "", "\u3000好"),
]


@pytest.fixture(scope="module")
def qwen():
    return add_chat_template(qwen_tokenizer())


@pytest.fixture(params=["tokenizer", "qwen"])
def chosen(request):
    return request.getfixturevalue(request.param)


def test_ids_and_mask_are_those_of_the_template(chosen):
    """TRL trains on just these: its SFTTrainer takes both from `apply_chat_template`."""
    for messages in ORDINARY:
        expected = chosen.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, labels = encode_conversation(chosen, messages)
        assert ids == expected["input_ids"]
        assert [int(label != -100) for label in labels] == expected["assistant_masks"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_strings_stay_text(chosen, role):
    messages = [{"role": role, "content": SPECIAL}, *conversation("a" + SPECIAL, SPECIAL)]
    ids, labels = encode_conversation(chosen, messages)
    assert chosen.decode(ids) == chosen.apply_chat_template(messages, tokenize=False)
    start, end = chosen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [ids.count(start), ids.count(end)] == [3, 3]
    assert set(ids) & set(chosen.added_tokens_decoder) == {start, end}
    assert labels.count(end) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("answer", ["巴黎。", "\n\n巴黎", " \n巴", ""])
def test_what_is_trained_begins_as_the_prompt_does(tokenizer, answer):
    question = conversation("哪里？")
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    ids, labels = encode_conversation(tokenizer, [*question, *conversation("", answer)[1:]])
    assert ids[: len(prompt)] == prompt
    assert {*labels[: len(prompt)]} == {-100} and labels[len(prompt)] == ids[len(prompt)]


def test_the_template_is_set_on_a_copy_and_saved(tokenizer, tmp_path):
    plain = train_tokenizer(["你好。你好！"] * 2, 270)
    plain.pad_token = "<|im_end|>"
    changed = add_chat_template(plain)
    assert (plain.chat_template, plain.pad_token) == (None, "<|im_end|>")
    assert (changed.chat_template, changed.pad_token) == (CHAT_TEMPLATE, "<|endoftext|>")
    changed.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"no token <\|im_start\|> and no <\|im_end\|>"):
        add_chat_template(Qwen2Tokenizer())


@pytest.mark.parametrize("system", [None, "短"])
def test_a_long_conversation_loses_whole_turns_from_the_front(tokenizer, caplog, system):
    exchanges = [("一", "甲"), ("二" * 5, "乙"), ("三", "丙")]
    whole = conversation(*[text for pair in exchanges for text in pair], system=system)
    lengths = []
    for number in range(3):
        rest = [text for pair in exchanges[number:] for text in pair]
        expected = encode_conversation(tokenizer, conversation(*rest, system=system))
        lengths.append(len(expected[0]))
        assert encode_conversation(tokenizer, whole, lengths[-1]) == expected
        if number:
            assert encode_conversation(tokenizer, whole, lengths[-2] - 1) == expected
    assert encode_conversation(tokenizer, whole, lengths[-1] - 1) == ([], [])
    # The assistant's turn alone is not what begins a conversation.
    begins = [{"role": "assistant", "content": "您好"}, *whole[bool(system) :]]
    expected = encode_conversation(tokenizer, conversation(*exchanges[2]))
    assert encode_conversation(tokenizer, begins, len(expected[0])) == expected
    # One is cut, one is left out, one has no answer, one fits.
    short, long = conversation("一", "甲"), conversation("一" * 200, "甲")
    with caplog.at_level(logging.WARNING, "tinytrain"):
        rows = chat_rows([whole, long, short[:1], short], tokenizer, lengths[1])
    assert "Of 4 conversations, 1 lose" in caplog.text and "2 are left out" in caplog.text
    found = [(row["input_ids"], row["labels"]) for row in rows]
    expected = [encode_conversation(tokenizer, each, lengths[1]) for each in (whole, short)]
    assert found == expected


def test_every_answer_ends_with_its_token_and_padding_is_never_learned(tokenizer):
    conversations = [conversation(*FRANCE, *HELLO), conversation(*HELLO), conversation("a", "")]
    rows = chat_rows(conversations, tokenizer, 96)
    batch = {name: tensor.flatten() for name, tensor in packed(rows, tokenizer).items()}
    stop, padding = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.pad_token_id == padding != stop
    assert batch["labels"].tolist().count(stop) == 4
    assert padding not in batch["labels"]
    ids, labels, positions = (each.tolist() for each in batch.values())
    assert [n for n, position in enumerate(positions) if position == 0] == [
        *itertools.accumulate([0, *map(len, rows["input_ids"])])
    ]
    used = sum(map(len, rows["input_ids"]))
    assert ids[:used] == sum(rows["input_ids"], []) and set(ids[used:]) == {padding}
    assert labels[:used] == sum(rows["labels"], []) and set(labels[used:]) == {-100}


def test_a_row_holds_what_fits_and_each_conversation_whole(tokenizer):
    rows = chat_rows([conversation(*FRANCE)] * 5, tokenizer, 96)
    length = 2 * len(rows[0]["input_ids"]) + 1
    batch = packed(rows, tokenizer, length)
    assert batch["input_ids"].shape == (3, length)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [(row == stop).sum().item() for row in batch["labels"]] == [2, 2, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("change", [lambda model: None, save_loss_memory], ids=["plain", "slice"])
def test_packed_conversations_are_learned_as_if_each_were_alone(tokenizer, attention, change):
    model = small_model(tokenizer)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(20)  # or attention hardly matters
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as the Trainer does
    change(model)
    said = [FRANCE, HELLO, FRANCE + HELLO]
    rows = chat_rows([conversation(*each) for each in said], tokenizer, 96)
    batch = packed(rows, tokenizer, 128)
    assert len(batch["input_ids"]) == 1
    together = model(**batch, num_items_in_batch=1).loss.item()
    alone = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        alone += model(input_ids=ids, labels=labels, num_items_in_batch=1).loss.item()
    assert together == pytest.approx(alone, rel=1e-5)


def tuning(model, rows, folder, precision, **overrides):
    """Return our Trainer for rows of conversations."""
    chosen = {"use_cpu": True, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    chosen |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    chosen |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    arguments = training_arguments(RECIPES["smoke"], folder, precision, **chosen | overrides)
    trainer = build_trainer(
        model, arguments, rows, rows, make_optimizer=lambda m, _: torch.optim.SGD(m.parameters(), 1)
    )
    return trainer


precisions = pytest.mark.parametrize("precision", ["float32", "bf16"])
losses = pytest.mark.parametrize(
    "change", [lambda model: None, lambda model: save_loss_memory(model, 7)], ids=["plain", "slice"]
)


@precisions
@losses
def test_a_row_without_labels_gives_no_loss_and_no_nan(tokenizer, tmp_path, precision, change):
    length = len(encode_conversation(tokenizer, conversation(*FRANCE))[0])
    rows = chat_rows([conversation(*FRANCE)] * 2, tokenizer, 96)
    rows = list(pack_conversations(rows, length + 1, tokenizer.pad_token_id))
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    model = small_model(tokenizer)
    change(model)
    chosen = {"max_steps": 2, "gradient_accumulation_steps": 1}
    trainer = tuning(model, Dataset.from_list(rows), tmp_path, precision, **chosen)
    train(trainer)
    found = sorted(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert found[0] == 0 and found[1] > 1
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_slice_of_the_loss_without_labels_is_0_with_gradients_of_0():
    hidden, weight = torch.randn(5, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    for total in (None, 0, torch.tensor(0)):
        loss = linear_cross_entropy(hidden, weight, torch.full((5,), -100), total)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and not any(gradient.any() for gradient in gradients)


@precisions
@losses
def test_accumulated_losses_are_a_mean_over_all_labels(tokenizer, tmp_path, precision, change):
    """Not over micro-batches, where a short answer would count as much as a long one."""
    said = [("说", "巴黎"), ("长", "法国的首都是巴黎。" * 3), ("好", "你好！")]
    rows = chat_rows([conversation(*pair) for pair in said], tokenizer, 96)
    model = small_model(tokenizer)
    expected = copy.deepcopy(model)
    sums = []
    for row in rows:
        logits = expected(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    loss = sum(sums) / sum(label != -100 for row in rows for label in row["labels"])
    longest = max(map(len, rows["input_ids"]))
    packed_rows = pack_conversations(rows, longest, tokenizer.pad_token_id)
    assert len(packed_rows) == 3
    loss.backward()
    change(model)
    chosen = {"max_steps": 1, "gradient_accumulation_steps": 3}
    trainer = tuning(model, packed_rows, tmp_path, precision, **chosen)
    before = [weight.detach().clone() for weight in model.parameters()]
    train(trainer)
    relative = 1e-4 if precision == "float32" else 2e-2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=relative)
    for old, new, weight in zip(before, model.parameters(), expected.parameters(), strict=True):
        step = new.detach() - old
        assert (step + weight.grad).norm() <= 3 * relative * weight.grad.norm()


@pytest.fixture
def chat(taught, tokenizer):
    return Chat(taught, tokenizer)


@pytest.fixture
def seen(taught):
    """The token ids that each forward pass gets."""
    ids = []

    def note(module, args, kwargs):
        ids.append(kwargs["input_ids"][0].tolist())

    hook = taught.register_forward_pre_hook(note, with_kwargs=True)
    yield ids
    hook.remove()


def test_many_questions_are_answered_as_one_at_a_time(taught, tokenizer):
    questions = [FRANCE[0], HELLO[0], "好", FRANCE[0]]
    alone = [Chat(taught, tokenizer).reply(question, max_new_tokens=40) for question in questions]
    assert answer_each(taught, tokenizer, questions) == alone
    assert alone[:2] == [FRANCE[1], HELLO[1]]


def test_it_answers_and_stops_at_the_end_of_its_turn(chat, tokenizer, seen):
    pieces = []
    assert chat.reply(FRANCE[0], on_text=pieces.append) == FRANCE[1] == "".join(pieces)
    prompt = tokenizer.apply_chat_template(conversation(FRANCE[0]), add_generation_prompt=True)
    assert seen[0] == prompt["input_ids"]
    assert len(seen) == len(tokenizer(FRANCE[1])["input_ids"]) + 1
    assert chat.reply(HELLO[0], temperature=1.0, top_k=1, seed=3) == HELLO[1]
    assert chat.messages == conversation(*FRANCE, *HELLO) and chat.dropped == 0
    chat.reset()
    assert chat.messages == []
    assert chat.reply(HELLO[0], max_new_tokens=1) == "你好！"[: len(chat.messages[-1]["content"])]


def test_it_stops_at_the_end_of_a_text_too(chat, taught, tokenizer, seen):
    def end_the_text(module, args, logits):
        logits[..., tokenizer.eos_token_id] = 1e4

    hook = taught.lm_head.register_forward_hook(end_the_text)
    assert chat.reply("你好") == "" and len(seen) == 1
    hook.remove()
    assert chat.messages == conversation("你好", "")


def test_what_the_user_types_is_text(chat, tokenizer, seen):
    chat.reply("<|im_end|>", max_new_tokens=2)
    chat.reply("<|endoftext|><|im_start|>", max_new_tokens=2)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    prompt = max(seen, key=len)
    assert [prompt.count(start), prompt.count(end)] == [4, 3]
    assert tokenizer.eos_token_id not in prompt


def test_the_oldest_turns_are_dropped_and_it_says_so(taught, tokenizer, caplog, seen):
    chat = Chat(taught, tokenizer, system="你好")
    dropped = 0
    for _ in range(9):
        with caplog.at_level(logging.WARNING, "tinytrain"):
            chat.reply(FRANCE[0], max_new_tokens=8)
        dropped += chat.dropped
        assert [m["role"] for m in chat.messages[:3]] == ["system", "user", "assistant"]
    assert dropped and dropped == sum(map(int, re.findall(r"its (\d+) oldest", caplog.text)))
    assert len(chat.messages) == 1 + 9 * 2 - dropped
    assert 40 < max(map(len, seen)) <= 96 - 8
    before = list(chat.messages)
    for text, message in (("长" * 99, "too long"), (" \n", "empty")):
        with pytest.raises(ValueError, match=message):
            chat.reply(text)
    with pytest.raises(ValueError, match="top_p"):
        chat.reply("你好", top_p=0)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "你好"}]


def test_an_interrupt_ends_the_answer_and_not_the_conversation(chat, taught, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    chat.reply(HELLO[0])
    before = list(chat.messages)
    answer = chat.reply(FRANCE[0], on_text=stop)
    assert answer and FRANCE[1].startswith(answer) and answer != FRANCE[1]
    assert chat.messages == [*before, *conversation(FRANCE[0], answer)]
    before = list(chat.messages)
    with monkeypatch.context() as patch:  # before anything is written
        patch.setattr(taught.model, "forward", stop)
        assert chat.reply(HELLO[0]) == ""
    assert chat.messages == before
    assert chat.reply(HELLO[0])


def test_a_conversation_in_colour(tokenizer, hostile):
    page = colour_conversation(tokenizer, conversation(hostile, hostile + "\u202e", "ok?", "ok"))
    spans = re.findall(r'<span style="([^"]+)">(.*?)</span>', page, flags=re.DOTALL)
    learned = [html.unescape(text) for style, text in spans if "background" in style]
    assert learned == [f"{hostile}\\u202e<|im_end|>", "ok<|im_end|>"]
    read = [html.unescape(text) for style, text in spans if "background" not in style]
    assert read[0] == f"<|im_start|>user\n{hostile}<|im_end|>\n<|im_start|>assistant\n"
    assert re.sub("</?(div|span)[^>]*>", "", page).count("<") == 0
