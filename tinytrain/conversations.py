"""Conversations to tune a model on: written from a table of facts, or your own.

The written ones tell the facts of half of the subjects: questions about the other half show what a
model knows from its text. Some ask about invented names, and the answer is "I do not know": without
them it would answer anything with confidence. The wordings are in ``data/conversations.json``.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

UNKNOWN = "我不知道"  # in every answer to a question about an invented name

_Table = dict[str, list[dict[str, Any]]]
_Turns = list[tuple[str, str]]  # questions and answers


class ChatQuestion(NamedTuple):
    """A question, and what a right answer contains: one of ``answers``.

    The ``group`` says what the conversations have of it: ``"tuned"`` the question, word for word;
    ``"reworded"`` the fact, but nothing in this wording; ``"untaught"`` the wording, but nothing
    about this subject; ``"invented"`` the wording, but not this name, nor its first half.
    """

    question: str
    answers: tuple[str, ...]
    domain: str
    group: str

    def is_right(self, reply: str) -> bool:
        """Return whether a reply contains an answer: no 第十 in 第十一, and no 1 in 11."""
        number = "[0-9一二三四五六七八九十]"
        answers = "|".join(map(re.escape, self.answers))
        return re.search(f"(?<!{number})({answers})(?!{number})", reply) is not None


class _Fact(NamedTuple):
    """One kind of fact about one subject; about an invented one there is none."""

    domain: str
    key: str
    subject: dict[str, Any]
    how: dict[str, Any]  # the phrases of the domain

    @property
    def wordings(self) -> dict[str, Any]:
        return self.how["fields"][self.key]

    @property
    def is_known(self) -> bool:
        return self.key in self.subject

    def say(self, text: str, it: str | None = None) -> str:
        it = it or self.how["called"].format(**self.subject)
        text = text.replace("{topic}", "{it}" + self.wordings["topic"])
        return text.format(**self.subject | {"it": it})

    def questions(self, kind: str = "asks") -> list[str]:
        """Return the question in all wordings; which comes first differs between subjects.

        Wordings of the kind "held_out" are in no conversation.
        """
        texts = _phrases()["frames"][kind] + self.wordings[kind]
        first = _hash(self.domain, self.key, self.subject["name"])
        return [self.say(texts[(first + step) % len(texts)]) for step in range(len(texts))]

    def answer(self, rnd: random.Random) -> str:
        if self.is_known:
            return self.say(self.wordings["says"])
        return self.say(_pick(rnd, _phrases()["unknown"]))

    def right_answers(self) -> tuple[str, ...]:
        if not self.is_known:
            return (UNKNOWN,)
        value = self.say(self.wordings.get("answer", f"{{{self.key}}}"))
        return tuple(re.split("(?<=”)或", value))  # of “川”或“蜀” one is enough


@cache
def _phrases() -> dict[str, Any]:
    path = resources.files("tinytrain") / "data" / "conversations.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _hash(*texts: str) -> int:
    return zlib.crc32("|".join(texts).encode())


def _pick(rnd: random.Random, items: Sequence[Any]) -> Any:
    # random.random() is the one method whose sequence Python promises never to change.
    return items[int(rnd.random() * len(items))]


def _split_facts(table: _Table) -> tuple[list[_Fact], list[_Fact]]:
    """Return the facts that conversations tell, and those that none tells."""
    halves: tuple[list[_Fact], list[_Fact]] = [], []
    for domain, how in _phrases()["domains"].items():
        subjects = sorted(table[domain], key=lambda subject: _hash(domain, subject["name"]))
        for number, subject in enumerate(subjects):
            facts = (_Fact(domain, key, subject, how) for key in how["fields"] if key in subject)
            halves[number % 2].extend(facts)
    taught, untaught = halves
    # Nor may an answer name an untaught subject: "富士山位于日本" says something about 日本.
    names = {fact.subject["name"] for fact in untaught if len(fact.subject["name"]) > 1}
    taught = [f for f in taught if not any(name in f.subject[f.key] for name in names)]
    return taught, untaught


def _invented(which: str) -> list[_Fact]:
    """Return questions about invented names, with the beginnings "starts" or "new"."""
    facts = []
    for domain, how in _phrases()["domains"].items():
        if parts := how.get("invented"):
            keys, ends = list(how["fields"]), parts["ends"]
            for number, (start, end) in enumerate(product(parts[which], ends)):
                key = keys[(number + number // len(ends)) % len(keys)]  # each with each end
                subject = {"name": start + end} | parts.get("with", {})
                facts.append(_Fact(domain, key, subject, how))
    return facts


def write_conversations(facts: _Table, seed: int = 2222) -> list[dict[str, Any]]:
    """Write conversations that tell the facts of half of the subjects, each in four wordings.

    The facts are those of `tinytrain.encyclopedia.read_facts`. The seed chooses what goes on for
    several turns and the order, the same on every platform, not which facts are told.

    Returns
    -------
    list of dict
        Shuffled, each with ``messages`` (see `load_conversations`) and ``kind``: ``"fact"``,
        ``"invented"``, ``"turns"`` (several questions) or ``"small talk"``.
    """
    rnd, (taught, _), invented = random.Random(seed), _split_facts(facts), _invented("starts")
    told: list[tuple[str, _Turns]] = []  # kind, and questions with their answers
    for fact in taught + invented:
        kind, wordings = ("fact", 4) if fact.is_known else ("invented", 2)
        told += [(kind, [(text, fact.answer(rnd))]) for text in fact.questions()[:wordings]]
        if rnd.random() < 0.4:
            told.append(("turns", _several_turns(rnd, fact, taught, invented)))
    for talk in (talk for talks in _phrases()["small_talk"].values() for talk in talks):
        told += [("small talk", [turn]) for turn in product(talk["asks"], talk["says"])]
    told.sort(key=lambda _: rnd.random())
    return [{"messages": _messages(turns), "kind": kind} for kind, turns in told]


def _messages(turns: _Turns) -> list[dict[str, str]]:
    roles = "user", "assistant"
    pairs = (pair for turn in turns for pair in zip(roles, turn, strict=True))
    return [{"role": role, "content": text} for role, text in pairs]


def _several_turns(
    rnd: random.Random, fact: _Fact, taught: list[_Fact], invented: list[_Fact]
) -> _Turns:
    """Ask about a fact, then about others of the same subject, or the same about other subjects."""
    more, asked = _phrases()["more"], [fact]
    turns = [(_pick(rnd, fact.questions()), fact.answer(rnd))]
    for _ in range(_pick(rnd, (1, 1, 2))):
        same = [f for f in taught if f.subject is fact.subject and f not in asked]
        others = [f for f in taught if f[:2] == fact[:2] and f not in asked]
        if same and rnd.random() < 0.5:
            fact = _pick(rnd, same)
            text = _pick(rnd, [*more["same"], fact.wordings["asks"][0]])
            turns.append((fact.say(text, it=fact.how["pronoun"]), fact.answer(rnd)))
        elif others:
            # After an invented name always a real one: not knowing one is no reason to give up.
            names = [f._replace(key=fact.key) for f in invented if f.domain == fact.domain]
            unknown = names and fact.is_known and rnd.random() < 0.3
            fact = _pick(rnd, names if unknown else others)
            turns.append((fact.say(_pick(rnd, more["another"])), fact.answer(rnd)))
        asked.append(fact)
    for kind, place in (("opening", 0), ("closing", len(turns) + 1)):
        if rnd.random() < 0.2:
            talk = _pick(rnd, _phrases()["small_talk"][kind])
            turns.insert(place, (_pick(rnd, talk["asks"]), _pick(rnd, talk["says"])))
    return turns


def chat_questions(facts: _Table, limit: int | None = None) -> list[ChatQuestion]:
    """Return questions to ask a model before and after it is tuned on `write_conversations`.

    They come group by group; with a limit, so many of each, a mixture of its domains. Only about
    ``"invented"`` names is `UNKNOWN` right.
    """
    taught, untaught = _split_facts(facts)
    groups = {
        "tuned": [(fact, fact.questions()[0]) for fact in taught],
        "reworded": [(fact, fact.questions("held_out")[0]) for fact in taught],
        "untaught": [(fact, fact.questions()[0]) for fact in untaught],
        "invented": [(fact, fact.questions()[0]) for fact in _invented("new")],
    }
    questions = []
    for group, pairs in groups.items():
        pairs.sort(key=lambda pair: _hash(pair[1]))
        asked = (ChatQuestion(text, f.right_answers(), f.domain, group) for f, text in pairs)
        # Without those that give the answer away: 科隆大教堂在哪座城市？
        questions += islice((q for q in asked if not q.is_right(q.question)), limit)
    return questions


_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"human": "user", "gpt": "assistant"}  # of ShareGPT


def load_conversations(path: str | Path) -> Dataset:
    """Load conversations of your own from a file of JSON lines, a JSON array, or parquet.

    Its name ends in ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet``, perhaps followed by ``.gz``
    or ``.xz``. A conversation has a field ``messages`` (a list of ``role`` and ``content``),
    ``conversations`` (the same, or ShareGPT's ``from`` and ``value``), or Alpaca's ``instruction``,
    ``input`` and ``output`` (and ``history``); a ``system`` beside them comes first. What you get
    has one column ``messages``, in which user and assistant take turns, perhaps after a system.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a file or a conversation is not what it should be; the message names the place.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of one")
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    schema = pa.schema({"messages": pa.list_(turn)})
    found = ({"messages": _read_turns(row, place)} for place, row in _read_rows(path))
    parts = iter(lambda: list(islice(found, 1000)), [])
    table = pa.Table.from_batches((pa.RecordBatch.from_pylist(p, schema) for p in parts), schema)
    if not table.num_rows:
        raise ValueError(f"{path} holds no conversations")
    return Dataset(InMemoryTable(table))


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each after its place."""
    import pyarrow.parquet as pq

    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    kind = (path if opener is open else path.with_suffix("")).suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json", ".parquet"):
        raise ValueError(
            f"{path}: cannot tell the format by the name; it has to end in .jsonl, .ndjson, .json "
            "or .parquet, perhaps followed by .gz or .xz"
        )
    place, rows = str(path), []
    try:
        with opener(path, "rb") as file:
            if kind == ".parquet":
                batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
                rows = (row for batch in batches for row in batch.to_pylist())
            elif file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                rows = json.loads(file.read())
            else:
                for number, line in enumerate(file, 1):
                    place = f"{path}, line {number}"
                    if line.strip():
                        yield place, json.loads(line)
            for number, row in enumerate(rows, 1):
                yield f"{path}, conversation {number}", row
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ValueError(
            f"{place}: cannot read it ({error}); the file is damaged or cut off, or not what its "
            "name says. JSON is one array of conversations, or has one on each line, in UTF-8"
        ) from None


def _read_turns(row: Any, place: str) -> list[dict[str, str]]:
    """Find the turns of a conversation, and say what is wrong with them."""
    fields = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
    turns = fields.get("messages", fields.get("conversations"))
    if turns is None and {"instruction", "output"} <= set(fields):
        asked = "\n".join(str(fields[k]) for k in ("instruction", "input") if fields.get(k))
        turns = _messages([*fields.get("history", []), (asked, fields["output"])])
    if not isinstance(turns, list):
        raise ValueError(
            f"{place}: has no list 'messages' or 'conversations', nor 'instruction' and 'output'; "
            f"it has {', '.join(map(repr, fields)) or 'no fields'}"
        )
    if fields.get("system"):
        turns = [{"role": "system", "content": fields["system"]}, *turns]
    checked = [_read_turn(turn, f"{place}, turn {n}") for n, turn in enumerate(turns, 1)]
    roles = [turn["role"] for turn in checked]
    right = re.match("s?(ua)*u?", "".join(role[0] for role in roles)).end()
    if right < len(roles):
        raise ValueError(
            f"{place}, turn {right + 1}: {' after '.join(roles[right::-1][:2])}; after at most one "
            "system turn, user and assistant have to take turns, the user first"
        )
    if "assistant" not in roles:
        raise ValueError(f"{place}: has no assistant turn, so there is nothing to learn from it")
    return checked


def _read_turn(turn: Any, place: str) -> dict[str, str]:
    fields = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    name = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if str(name) not in _ROLES:
        raise ValueError(f"{place}: unknown role {name!r}; use one of {', '.join(_ROLES)}")
    is_text = isinstance(content, str) and content.strip()
    if not is_text or re.search("[\ud800-\udfff]", content):  # half an emoji
        raise ValueError(f"{place} ({name}): empty content, or no text: {content!r:.60}")
    return {"role": _ROLES[name], "content": content}
