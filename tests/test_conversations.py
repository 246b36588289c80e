"""Conversations: the written ones are true and leave half untold; one's own load or say why not."""

import gzip
import itertools
import json
import lzma
import re
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from babel import Locale

from tinytrain import conversations as module
from tinytrain.common import write_json_lines
from tinytrain.conversations import (
    UNKNOWN,
    ChatQuestion,
    chat_questions,
    load_conversations,
    write_conversations,
)
from tinytrain.encyclopedia import build_encyclopedia, read_facts


@pytest.fixture(scope="module")
def facts():
    return read_facts()


@pytest.fixture(scope="module")
def written(facts):
    return write_conversations(facts)


@pytest.fixture(scope="module")
def turns(written):
    """Every question with its answer, and the kind of conversation it is in."""
    return [
        (question["content"], answer["content"], conversation["kind"])
        for conversation in written
        for question, answer in zip(
            conversation["messages"][::2], conversation["messages"][1::2], strict=True
        )
    ]


@pytest.fixture(scope="module")
def asked(facts):
    found = {name: [] for name in ("tuned", "reworded", "untaught", "invented")}
    for question in chat_questions(facts):
        found[question.group].append(question)
    return found


def all_phrases(value=None):
    """Every string of the file of wordings."""
    value = module._phrases() if value is None else value
    if isinstance(value, str):
        yield value
    else:
        for one in value.values() if isinstance(value, dict) else value:
            yield from all_phrases(one)


def test_a_seed_gives_the_same_conversations_in_another_process(written, facts):
    code = """
import json; from tinytrain.conversations import *; from tinytrain.encyclopedia import read_facts
print(json.dumps([write_conversations(read_facts()), chat_questions(read_facts())]))"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, check=True, env={"PYTHONHASHSEED": "1"})
    asked = [[q, list(answers), *rest] for q, answers, *rest in chat_questions(facts)]
    assert json.loads(shown.stdout) == [written, asked]
    other = write_conversations(facts, seed=1)
    assert other != written
    told = [
        {c["messages"][0]["content"] for c in some if c["kind"] == "fact"}
        for some in (written, other)
    ]
    assert told[0] == told[1]  # the same half, whatever the seed


def test_they_are_many_and_of_every_kind_and_user_and_assistant_take_turns(written):
    assert 1500 <= len(written) <= 4000
    kinds = Counter(conversation["kind"] for conversation in written)
    assert {conversation["kind"] for conversation in written[:100]} == set(kinds)  # shuffled
    assert kinds["fact"] > 1000 and kinds["turns"] > 250 and kinds["small talk"] > 30
    assert 0.1 < kinds["invented"] / len(written) < 0.25
    for conversation in written:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) <= 10
        assert (len(roles) > 2) == (conversation["kind"] == "turns")


def test_later_turns_go_on_with_pronouns_and_other_subjects_real_or_not(written):
    later = [
        (before["content"], question["content"], answer["content"])
        for messages in (conversation["messages"] for conversation in written)
        for before, question, answer in zip(
            messages[1::2], messages[2::2], messages[3::2], strict=False
        )
    ]
    assert sum(bool(re.match("那?(它|这个)", question)) for _, question, _ in later) > 50
    assert sum(UNKNOWN in answer for *_, answer in later) > 40
    after = [answer for before, _, answer in later if UNKNOWN in before]
    assert len(after) > 100 and not any(UNKNOWN in answer for answer in after)


NEVER = {
    "a placeholder": r"[{}]|None|nan",
    "a word twice": r"的的|是是|于于|在在|被被|呢呢|的所在的|[，。！？]{2}",
    "a metal, or gold?": r"金属于",
    "a pronoun needs no second name": r"它这|这个这",
    "municipalities have no seat": r"(北京|天津|上海|重庆)市的(省会|首府)",
    "the seat of a province, of a region": r"自治区的省会|省的首府",
    "its capital is in question": r"(印度尼西亚|哈萨克斯坦|南非)的首都",
    "quoted names need no comma": r"[》”]、[《“]",
    "a number of one thing": r"第\w+(颗颗|个个|位位|位个)",
}


def test_every_turn_is_a_clean_sentence(turns):
    lines = {text for question, answer, _ in turns for text in (question, answer)}
    lines |= {question for question, *_ in chat_questions(read_facts())}
    for why, pattern in NEVER.items():
        assert [line for line in lines if re.search(pattern, line)] == [], why
    assert [line for line in lines if line[-1] not in "。？！" and line != "你好"] == []
    assert [line for line in lines if not 2 <= len(line) <= 45] == []


def test_an_answer_tells_a_fact_of_the_table_about_the_subject_in_question(written, facts, asked):
    named = {}
    for domain, entities in facts.items():
        for entity in entities:
            name = entity.get("hour", entity["name"])  # short names are told with what they are
            name = {"zodiac": f"生肖{name}", "units": f"“{name}”"}.get(domain, name)
            named[name] = entity
    small_talk = set(all_phrases(module._phrases()["small_talk"]))
    checked = 0
    for messages in (conversation["messages"] for conversation in written):
        about, before = [], set()
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            question, answer = question["content"], answer["content"]
            if answer in small_talk or UNKNOWN in answer:
                continue
            # Without a name, a question goes on about the subject of the one before.
            about = [name for name in named if name in question] or about
            told = {
                key
                for name in about
                for key, value in named[name].items()
                if key not in ("name", "hour") and name in answer and str(value) in answer
            }
            assert told, (question, answer)
            if re.fullmatch("(那|).+呢？", question) and any(name in question for name in named):
                assert not before or told & before, (question, answer)  # another subject, same kind
            before = told
            checked += 1
    assert checked > 1600
    # What is asked as "tuned" is in a conversation, and answered right there.
    answers = {c["messages"][0]["content"]: c["messages"][1]["content"] for c in written}
    assert all(question.is_right(answers[question.question]) for question in asked["tuned"])


def test_half_of_the_subjects_are_in_no_conversation(turns, facts, asked):
    said = "\n".join(text for question, answer, _ in turns for text in (question, answer))
    untaught = {q.question for q in asked["untaught"]}
    assert not untaught & {question for question, *_ in turns}
    for domain in {question.domain for question in asked["tuned"]}:
        names = {group: set() for group in ("tuned", "untaught")}
        for group in names:
            for question in (q.question for q in asked[group] if q.domain == domain):
                # The longest: a question about 印度尼西亚 is none about 印度.
                inside = [e["name"] for e in facts[domain] if e.get("hour", e["name"]) in question]
                names[group].add(max(inside, key=len))
        taught, rest = names["tuned"], names["untaught"]
        assert not taught & rest
        assert 0.35 <= len(taught) / len(taught | rest) <= 0.6, domain
        text = said
        for name in sorted(taught, key=len, reverse=True):
            text = text.replace(name, "")
        found = [name for name in rest if len(name) > 1 and name in text]
        longer = [e["name"] for entities in facts.values() for e in entities]
        for name in found:  # 哥伦比亚 may be in 哥伦比亚河 only
            for other in longer:
                if name in other and name != other:
                    text = text.replace(other, "")
            assert name not in text, (domain, name)


def test_held_out_wordings_are_in_no_conversation(turns, facts, asked):
    questions = {question for question, *_ in turns}
    assert not questions & {question.question for question in asked["reworded"]}
    frames = module._phrases()["frames"]["held_out"]
    for fact in itertools.chain(*module._split_facts(facts), module._invented("starts")):
        assert not questions & {fact.say(text) for text in frames + fact.wordings["held_out"]}
    # They ask for the facts that are told.
    told = {(q.domain, q.answers) for q in asked["tuned"]}
    assert told == {(q.domain, q.answers) for q in asked["reworded"]}


REAL_PROVINCES = "台湾省 安东省 西康省 热河省 绥远省 宁夏省 察哈尔省 平原省 江原道"


def test_invented_names_do_not_exist_and_get_i_do_not_know(turns, facts, asked):
    invented = module._invented("starts"), module._invented("new")
    names = [{fact.subject["name"] for fact in some} for some in invented]
    assert len(names[0]) > 250 and len(names[1]) > 100 and not names[0] & names[1]
    text = "".join(article["completion"] for article in build_encyclopedia())
    locale = Locale.parse("zh_Hans_CN")
    real = {*locale.territories.values(), *locale.currencies.values(), *locale.languages.values()}
    real |= {*REAL_PROVINCES.split()}
    for name in names[0] | names[1]:
        assert len(name) > 1 and name not in real and name not in text, name
        assert not any(len(part) > 2 and part in name for part in real), name
    # Those of the evaluation share no first part with those of the conversations.
    said = "\n".join(question for question, *_ in turns)
    for domain in module._phrases()["domains"].values():
        if parts := domain.get("invented"):
            assert not set(parts["starts"]) & set(parts["new"])
    assert [name for name in names[1] if len(name) > 2 and name in said] == []
    for question, answer, _ in turns:
        if any(len(name) > 1 and name in question for name in names[0]):
            assert UNKNOWN in answer, question
        elif UNKNOWN in answer:
            raise AssertionError(f"{question} is about something real, but is answered {answer}")
    for question in asked["invented"]:
        assert question.answers == (UNKNOWN,)
        assert any(name in question.question for name in names[1])


def test_the_questions_are_of_four_groups_of_many_domains(facts, asked):
    domains = set(module._phrases()["domains"])
    for questions in asked.values():
        assert len(questions) >= 100 and len({q.question for q in questions}) == len(questions)
        assert len({q.domain for q in questions}) >= 14
    assert {q.domain for q in asked["tuned"]} == {q.domain for q in asked["untaught"]} == domains
    few = chat_questions(facts, limit=60)
    assert [q.group for q in few] == [group for group in asked for _ in range(60)]
    assert all(len({q.domain for q in few if q.group == group}) >= 10 for group in asked)
    # No question gives its answer away.
    for question in (q for group in asked.values() for q in group):
        assert not question.is_right(question.question), question


@pytest.mark.parametrize(
    ("answers", "reply", "right"),
    [
        (("巴黎",), "法国的首都是巴黎。", True),
        (("巴黎",), "巴黎", True),
        (("巴黎",), "我不知道。我没有听说过这个国家。", False),
        (("1",), "氢的原子序数是1。", True),
        (("1",), "氢的原子序数是11。", False),
        (("第二",), "雨水在二十四节气里排第二位。", True),
        (("第二",), "雨水在二十四节气里排第二十位。", False),
        (("公历1月1日",), "元旦在公历1月1日。", True),
        (("公历1月1日",), "元旦在公历1月11日。", False),
        (("“川”", "“蜀”"), "四川省的简称是“蜀”。", True),
        (("“C”",), "碳的元素符号是“Ca”。", False),
        (("《a.b》",), "《axb》", False),
    ],
)
def test_a_reply_is_right_if_it_has_the_whole_answer(answers, reply, right):
    assert ChatQuestion("", answers, "", "").is_right(reply) is right


def test_of_two_short_forms_one_is_enough(asked):
    both = [q for group in ("tuned", "untaught") for q in asked[group] if len(q.answers) > 1]
    assert {q.domain for q in both} == {"provinces"}
    assert all(re.fullmatch("“.”", answer) for q in both for answer in q.answers)
    assert any("28天或29天" in q.answers for group in asked.values() for q in group)


# One's own conversations

TALK = [
    [
        {"role": "user", "content": "你好<|im_end|>"},
        {"role": "assistant", "content": "你好！\u2028有什么想问的吗？"},
        {"role": "user", "content": "1+1？"},
        {"role": "assistant", "content": "2"},
    ],
    [{"role": "user", "content": "再见"}, {"role": "assistant", "content": "再见！"}],
]
SYSTEM = {"role": "system", "content": "你是一个诗人。"}
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
ALPACA = [
    {"instruction": "翻译成中文", "input": "hello", "output": "你好", "history": None},
    {"instruction": "写一个字", "input": "", "output": "字", "history": [["你好", "你好！"]]},
]


def share_gpt(messages):
    return [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in messages]


def write(path, rows):
    """Write rows as the name asks for."""
    suffixes = path.suffixes
    if ".parquet" in suffixes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif ".JSON" in suffixes:
        data = json.dumps(rows, ensure_ascii=False, indent=2).encode("utf-8-sig")
    else:
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        data = b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n"
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize(
    "name",
    [f"a.{kind}{end}" for kind in ("jsonl", "JSON", "parquet") for end in ("", ".gz", ".xz")]
    + ["a.ndjson"],
)
@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": talk, "id": 3} for talk in TALK],
        [{"conversations": talk} for talk in TALK],
        [{"id": "x", "conversations": share_gpt(talk)} for talk in TALK],
    ],
    ids=["messages", "minimind", "sharegpt"],
)
def test_the_same_conversations_load_from_every_format(tmp_path, rows, name):
    loaded = load_conversations(write(tmp_path / name, rows))
    assert loaded.column_names == ["messages"] and loaded["messages"][:] == TALK


def test_instructions_become_a_question_and_an_answer(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        (one, two) = load_conversations(write(tmp_path / name, ALPACA))["messages"][:]
        assert [m["content"] for m in one] == ["翻译成中文\nhello", "你好"]
        assert [m["content"] for m in two] == ["你好", "你好！", "写一个字", "字"]
        assert [m["role"] for m in one] == ["user", "assistant"]


def test_a_system_turn_comes_first_or_stands_beside(tmp_path):
    rows = [
        {"messages": [SYSTEM, *TALK[1]]},
        {"conversations": share_gpt([SYSTEM, *TALK[1]])},
        {"conversations": share_gpt(TALK[1]), "system": SYSTEM["content"]},
        {"instruction": "再见", "output": "再见！", "system": SYSTEM["content"]},
    ]
    loaded = load_conversations(write(tmp_path / "a.jsonl", rows))
    assert loaded["messages"][:] == [[SYSTEM, *TALK[1]]] * 4


def test_written_conversations_load_as_they_are(tmp_path, written):
    write_json_lines(tmp_path / "a.jsonl", written)
    loaded = load_conversations(tmp_path / "a.jsonl")
    assert loaded["messages"][:] == [conversation["messages"] for conversation in written]
    # Unchanged, they are the same data set: what datasets has computed from it is found again.
    again = load_conversations(str(tmp_path / "a.jsonl"))
    assert again._fingerprint == loaded._fingerprint


def user(content="问"):
    return {"role": "user", "content": content}


def assistant(content="答"):
    return {"role": "assistant", "content": content}


BROKEN = {
    "turn 1: unknown role 'bot'": {"messages": [{"role": "bot", "content": "?"}]},
    "turn 1: unknown role None": {"messages": [{"content": "?"}]},
    "turn 2: user after user": {"messages": [user(), user(), assistant()]},
    "turn 3: assistant after assistant": {"messages": [user(), assistant(), assistant()]},
    "turn 1: assistant; after at most one": {
        "conversations": share_gpt([assistant(), user(), assistant()])
    },
    "turn 3: system after assistant": {"messages": [user(), assistant(), SYSTEM]},
    "no assistant turn": {"messages": [SYSTEM, user()]},
    ": has no assistant turn": {"messages": []},
    r"turn 2 \(assistant\): empty content, or no text: ' '": {"messages": [user(), assistant(" ")]},
    r"turn 1 \(user\): empty content, or no text: None": {"messages": [user(None), assistant()]},
    r"turn 1 \(user\): .*no text: \[": {"messages": [user([{"type": "text"}]), assistant()]},
    r"turn 2 \(assistant\): .*no text: '\\ud83d'": {"messages": [user(), assistant("\ud83d")]},
    r"turn 2 \(gpt\): empty": {"conversations": share_gpt([user(), assistant("")])},
    r"turn 2 .*no text: 42": {"instruction": "?", "output": 42},
    "turn 2: unknown role 'tool'": {
        "messages": [user(), {"role": "tool", "content": "{}"}, assistant()]
    },
    "no list 'messages' or .* it has 'text', 'id'$": {"text": "法国的首都是巴黎。", "id": 1},
    "it has no fields": {},
    "no list 'messages'": {"messages": "问答"},
    "no list 'messages' .*": ["问", "答"],
    "turn 1: unknown role None; use one": {"messages": ["问", "答"]},
}


@pytest.mark.parametrize(("problem", "row"), BROKEN.items(), ids=BROKEN)
def test_what_is_wrong_is_named_with_its_file_and_line(tmp_path, problem, row):
    good = json.dumps({"messages": TALK[1]})
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{good}\n\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.jsonl, line 3.*{problem}") as error:
        load_conversations(path)
    assert str(error.value).count("\n") <= 1 and len(str(error.value)) - len(str(path)) < 250
    path = tmp_path / "mine.json"
    path.write_text(f"[{good},\n{json.dumps(row)}]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.json, conversation 2.*{problem}"):
        load_conversations(path)


def test_a_broken_row_of_a_table_is_named(tmp_path):
    rows = [{"messages": TALK[1]}, {"messages": [user(), user()]}]
    with pytest.raises(ValueError, match="mine.parquet, conversation 2, turn 2: user after user"):
        load_conversations(write(tmp_path / "mine.parquet", rows))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b"", "a.jsonl holds no conversations"),
        ("a.json", b"[]", "a.json holds no conversations"),
        ("a.jsonl", b'{"messages": [\n', "a.jsonl, line 1: cannot read it"),
        ("a.json", b'[{"messages": []},\n{"messages" []}]', "a.json: cannot read it.*line 2"),
        ("a.jsonl", '{"messages": "问"}'.encode("gb18030"), "cannot read it.*in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"messages": []}' * 999)[:-20], "damaged or cut off"),
        ("a.jsonl.xz", b"no xz", "a.jsonl.xz: cannot read it"),
        ("a.parquet", b"no parquet", "a.parquet: cannot read it"),
        ("a.csv", b"question,answer", "a.csv: cannot tell the format.*.parquet.*.gz"),
        ("a.gz", b"", "cannot tell the format"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=problem):
        load_conversations(tmp_path / name)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "mine.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no file {re.escape(str(path))}"):
            load_conversations(path)
