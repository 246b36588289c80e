"""A small Chinese encyclopedia, written by a program from a table of facts.

A model of a few million parameters can learn a small world that is told often enough: some 1,800
true facts, each dozens of times in varying terms and order. The price: losses on a generated text
say nothing about losses on real prose. The writer keeps some wordings and directions back, so that
`cloze_questions` can ask for more than memory. The facts are in ``data/encyclopedia.json`` (names
of territories, currencies and languages come from CLDR), the phrasings in ``data/phrases.json``.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from tinytrain.common import atomic_write

logger = logging.getLogger(__name__)

_FACT_ARTICLES, _ARITHMETIC_ARTICLES = 5000, 350

_Entity = dict[str, Any]
_Template = str | dict[str, Any]  # or {"say": text, "except": {"name": ["金"]}}


class Question(NamedTuple):
    """One cloze question: a prompt, and the answer that continues it.

    The ``kind`` says how the text tells it: ``"told"`` word for word; ``"reworded"`` never in this
    wording, which it uses for other subjects; ``"reversed"`` only from the answer to what the
    prompt names, while it tells of other subjects both ways.
    """

    prompt: str
    answer: str
    domain: str
    kind: str


class _Field(NamedTuple):
    """How to talk about one kind of fact.

    With ``rotated`` sentences it is asked for: "told" is the first of ``says``, "reworded" one of
    the rotated, kept back from the subject. ``back`` and ``back_asks`` go from the value to the
    subject; if there is a ``reversed`` sentence, half of the subjects do without all of these.
    """

    label: str  # of a question for two kinds of facts, which leaves out those without
    topic: str  # of an article
    says: list[_Template]
    brief: list[_Template] = []  # clauses after the subject; those with "的" can stand alone
    rotated: list[_Template] = []
    back: list[_Template] = []
    reversed: list[_Template] = []
    asks: list[_Template] = []
    back_asks: list[_Template] = []
    same: list[str] = []  # of several subjects with the same value
    weight: int = 1


class _Domain(NamedTuple):
    """How to talk about one kind of thing, and the kinds of facts told about it."""

    noun: str
    called: str  # its name at first
    pronouns: list[str]
    fields: dict[str, _Field]  # in the order of a good sentence


def _load(name: str) -> dict[str, Any]:
    return json.loads((resources.files("tinytrain") / "data" / name).read_text(encoding="utf-8"))


def _domains(phrases: dict[str, Any]) -> dict[str, _Domain]:
    for domain in phrases["domains"].values():
        domain["fields"] = {key: _Field(**field) for key, field in domain["fields"].items()}
    return {name: _Domain(**domain) for name, domain in phrases["domains"].items()}


def _below(rnd: random.Random, n: int) -> int:
    # random.random() is the one method whose sequence Python promises never to change.
    return int(rnd.random() * n)


def _pick(rnd: random.Random, items: Sequence[Any]) -> Any:
    return items[_below(rnd, len(items))]


def _shuffled(rnd: random.Random, items: Sequence[Any]) -> list[Any]:
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = _below(rnd, i + 1)
        out[i], out[j] = out[j], out[i]
    return out


def _deck(rnd: random.Random, items: Sequence[Any]) -> Iterator[Any]:
    """Deal the items in random order, again and again: even exposure, unlike free choice."""
    while True:
        yield from _shuffled(rnd, items)


def _fitting(templates: Sequence[_Template], entity: _Entity) -> list[str]:
    """Return the sentences for an entity: it has all that they name, and is no exception."""
    texts = []
    for template in templates:
        rule = {"say": template} if isinstance(template, str) else template
        named = (name for _, name, _, _ in Formatter().parse(rule["say"]) if name)
        excepted = (entity.get(key) in values for key, values in rule.get("except", {}).items())
        if all(name in entity for name in named) and not any(excepted):
            texts.append(rule["say"])
    return texts


class _Writer:
    """The decks of one domain; each kind of article draws about `target` characters from them."""

    def __init__(
        self, rnd: random.Random, domain: _Domain, entities: list[_Entity], shared: dict[str, Any]
    ) -> None:
        self.rnd, self.domain, self.entities, self.shared = rnd, domain, entities, shared
        self.leads, self.others = _deck(rnd, entities), _deck(rnd, entities)
        self.turn, self.texts, weighted = {}, {}, []
        for key, field in domain.fields.items():
            for number, entity in enumerate(e for e in entities if key in e):
                self.turn[entity["name"], key] = number
                weighted += [(entity, key)] * field.weight
                for use in ("say", "ask", "pair", "brief"):
                    self.texts[entity["name"], key, use] = self.templates(entity, key, use)
        self.decks = {key: _deck(rnd, texts) for key, texts in self.texts.items()}
        self.size, self.facts = len(weighted), _deck(rnd, weighted)
        kinds = "portrait compare " * 3 + "portrait listing listing quiz quiz notes"
        self.kinds = _deck(rnd, kinds.split())

    def kept_back(self, entity: _Entity, key: str) -> str | None:
        """Return the wording in which this fact is never told."""
        rotated = _fitting(self.domain.fields[key].rotated, entity)
        return rotated[self.turn[entity["name"], key] % len(rotated)] if rotated else None

    def one_way(self, entity: _Entity, key: str) -> bool:
        """Return whether this fact is never told from the value to the subject."""
        field = self.domain.fields[key]
        # In step with the rotation, some wordings would be kept back from these subjects only.
        return bool(field.reversed) and self.turn[entity["name"], key] // len(field.rotated) % 2 > 0

    def templates(self, entity: _Entity, key: str, use: str) -> list[str]:
        """Return what can be said of a fact: to "say", "ask", "pair" with others or be "brief"."""
        field, back = self.domain.fields[key], not self.one_way(entity, key)
        if use == "brief":
            return _fitting(field.brief, entity)
        if use == "ask":
            return _fitting(field.asks + field.back_asks * back, entity)
        plain = field.says[:1] * 2 if field.rotated else []  # it is asked for
        found = [*plain, *field.says, *field.rotated * 2, *field.reversed * (2 * back)]
        found = _fitting(found + field.back * (back and use == "say"), entity)
        if use == "pair":  # "On a map, A is here, and on a map, B is there" is no good style
            found = [text for text in found if "，" not in text]
        return [text for text in found if text != self.kept_back(entity, key)]

    def called(self, entity: _Entity, again: bool = False) -> str:
        """Name a subject; one that the last sentence was about, sometimes with a pronoun."""
        pronoun = again and self.rnd.random() < 0.4
        names = self.domain.pronouns if pronoun else [self.domain.called]
        return _pick(self.rnd, names).format(**entity)

    def shared_phrase(self, kind: str, /, **values: str) -> str:
        return _pick(self.rnd, self.shared[kind]).format(noun=self.domain.noun, **values)

    def keys(self, entity: _Entity, *first: str) -> list[str]:
        rest = [key for key in self.domain.fields if key in entity and key not in first]
        return [*first, *_shuffled(self.rnd, rest)]

    def another(self, taken: list[_Entity]) -> _Entity:
        return next(e for e in self.others if e not in self.lately(taken))

    def lately(self, taken: list[_Entity]) -> list[_Entity]:
        """Return the last subjects of an article, which leave at least two to go on with."""
        return taken[2 - len(self.entities) :]

    def joined(self, entity: _Entity, keys: Sequence[str], again: bool = False) -> str:
        """Tell several facts of one subject as one sentence, if they can all be told briefly."""
        names = [(entity["name"], key, "brief") for key in self.domain.fields if key in keys]
        if len(names) < 2 or not all(self.texts[name] for name in names):
            return ""
        clauses = [next(self.decks[name]).format(**entity) for name in names]
        clauses.sort(key=lambda clause: clause.startswith("的"))
        more = ["，" + clause.removeprefix("的") for clause in clauses[1:]]
        return self.called(entity, again) + clauses[0] + "".join(more)

    def single(self, entities: Sequence[_Entity], key: str, again: bool = False) -> str:
        """Tell one kind of fact: of one subject, or of several in one sentence if there is one."""
        values, same = {entity[key] for entity in entities}, self.domain.fields[key].same
        first, *rest = (self.texts[entity["name"], key, "pair"] for entity in entities)
        shared = [text for text in first if all(text in some for some in rest)]
        if len(entities) > 1 and len(values) == 1 and same:
            *names, last = (entity["name"] for entity in entities)
            mark = "" if last[0] in "《“" else "、"  # quoted names are separated enough
            names = mark.join(names) + "和" + last
            return _pick(self.rnd, same).format(**entities[0] | {"names": names})
        if 1 < len(entities) == len(values) and shared:
            text = _pick(self.rnd, shared)
            join = "，而" if len(entities) == 2 and self.rnd.random() < 0.5 else "，"
            return join.join(text.format(**entity)[:-1] for entity in entities) + "。"
        texts = [next(self.decks[entity["name"], key, "say"]) for entity in entities]
        if again and texts[0].startswith("{name}"):
            texts[0] = self.called(entities[0], again) + texts[0].removeprefix("{name}")
        return "".join(text.format(**e) for text, e in zip(texts, entities, strict=True))

    def tell(self, keys: list[str], *entities: _Entity) -> list[str]:
        """Tell facts of one subject, or the same facts of two, up to three in a sentence."""
        sentences: list[str] = []
        named = (entities[0]["name"], self.called(entities[0]), "它", "这", "该")
        # A pronoun after "A comes before B." could stand for B.
        others = tuple(e["name"] + "。" for e in self.entities if e not in entities)
        while keys:
            again = bool(sentences) and len(entities) == 1 and sentences[-1].startswith(named)
            again = again and not sentences[-1].endswith(others)
            some = keys[: _pick(self.rnd, (1, 2, 2, 3, 3, 3) if len(entities) == 1 else (1, 1, 2))]
            texts = [self.joined(entity, some, again) for entity in entities]
            alike = any(entity[key] == entities[0][key] for entity in entities[1:] for key in some)
            if alike or not all(texts):
                some, texts = some[:1], [self.single(entities, some[0], again)[:-1]]
            sentences.append("；".join(texts) + "。")
            keys = keys[len(some) :]
        return sentences

    def portrait(self, target: int) -> list[str]:
        taken, parts = [next(self.leads)], []
        parts.append(self.shared_phrase("opens", name=self.called(taken[0])))
        while True:
            parts += self.tell(self.keys(taken[-1]), taken[-1])
            if sum(map(len, parts)) >= target:
                return [*parts, self.shared_phrase("closes")]
            taken.append(self.another(taken))
            before, name = map(self.called, taken[-2:])
            parts.append(self.shared_phrase("turns", before=before, name=name))

    def notes(self, target: int) -> list[str]:
        parts, taken = [self.shared_phrase("note_opens")], []
        while sum(map(len, parts)) < target:
            entity, key = next(f for f in self.facts if f[0] not in self.lately(taken))
            parts += self.tell(self.keys(entity, key)[: 1 + _below(self.rnd, 3)], entity)
            taken.append(entity)
        return [*parts, self.shared_phrase("closes")]

    def quiz(self, target: int) -> list[str]:
        parts = [self.shared_phrase("quiz_opens")]
        while sum(map(len, parts)) < target:
            entity, key = next(self.facts)
            keys = self.keys(entity, key)[:2]
            a, b = self.domain.fields[keys[0]].label, self.domain.fields[keys[-1]].label
            answer = self.joined(entity, keys) if a and b and a != b else ""
            if answer and self.rnd.random() < 0.6:
                text = self.shared_phrase("two", name=self.called(entity), a=a, b=b, answer=answer)
            else:
                text = next(self.decks[entity["name"], key, "ask"]).format(**entity)
            if "\n" + text not in parts:
                parts.append("\n" + text)
        return parts

    def listing(self, target: int) -> list[str]:
        """Tell one kind of fact of many subjects, and if there are few of them, another one."""
        parts: list[str] = []
        for key in self.keys(*next(self.facts)):
            if sum(map(len, parts)) > target - 60:
                break
            field = self.domain.fields[key]
            rest = _shuffled(self.rnd, [e for e in self.entities if key in e])
            parts.append("\n" + self.shared_phrase("list_opens", topic=field.topic))
            while rest and sum(map(len, parts)) < target:
                alike = [e for e in rest if e[key] == rest[0][key]]
                together = field.same and alike[1:] and self.rnd.random() < 0.6
                some = (alike if together else rest)[: 2 + _below(self.rnd, 3)]
                rest = [e for e in rest if e not in some]
                parts.append(self.single(some, key))
        return parts

    def compare(self, target: int) -> list[str]:
        taken, parts, kind = [next(self.leads)], [], "compare_opens"
        while sum(map(len, parts)) < target:
            a, b = taken[-1], self.another(taken)
            parts.append(self.shared_phrase(kind, a=self.called(a), b=self.called(b)))
            parts += self.tell([key for key in self.keys(a) if key in b], a, b)
            taken.append(b)
            kind = "compare_turns"
        return parts


def _arithmetic_article(rnd: random.Random, phrases: dict[str, Any]) -> str:
    target = 165 + _below(rnd, 150)
    parts = [_pick(rnd, phrases["opens"])]
    while sum(map(len, parts)) < target:
        kind = _pick(rnd, list(phrases["sentences"]))
        a, b = 1 + _below(rnd, 60), 1 + _below(rnd, 39)
        c, d = 2 + _below(rnd, 24), 2 + _below(rnd, 8)
        values = {"a": a, "b": b, "sum": a + b, "c": c, "d": d, "product": c * d}
        if kind == "conversion":
            units = _pick(rnd, phrases["conversions"])
            values |= units | {"converted": c * units["factor"]}
        text = _pick(rnd, phrases["sentences"][kind]).format(**values)
        parts += [text] if text not in parts else []
    return "".join(parts)


def read_facts() -> dict[str, list[_Entity]]:
    """Return the table of facts: the subjects of each domain, each with a ``name``."""
    return _load("encyclopedia.json")


def build_encyclopedia(seed: int = 2222) -> list[dict[str, str]]:
    """Write the articles, shuffled, as ``{"completion": text, "source": "tinytrain:<domain>"}``.

    The seed chooses the wording and the order; it gives the same articles on every platform.
    """
    rnd, facts, phrases = random.Random(seed), _load("encyclopedia.json"), _load("phrases.json")
    writers = {
        name: _Writer(rnd, domain, facts[name], phrases["shared"])
        for name, domain in _domains(phrases).items()
    }
    total = sum(writer.size for writer in writers.values())
    articles = [("about", "".join(phrases["about"]))]
    for name, writer in writers.items():
        # As many articles as a domain has facts to tell, so that all facts are told equally often.
        count = round(_FACT_ARTICLES * writer.size / total)
        for _ in range(count):
            parts = getattr(writer, next(writer.kinds))(165 + _below(rnd, 150))
            articles.append((name, "".join(parts).strip()))
    for _ in range(_ARITHMETIC_ARTICLES):
        articles.append(("arithmetic", _arithmetic_article(rnd, phrases["arithmetic"])))
    unique = dict.fromkeys(_shuffled(rnd, articles))
    return [{"completion": text, "source": f"tinytrain:{name}"} for name, text in unique]


def write_encyclopedia(path: str | Path, seed: int = 2222) -> Path:
    """Write the encyclopedia as a JSON array, one article a line; return the path."""
    lines = [json.dumps(a, ensure_ascii=False) for a in build_encyclopedia(seed)]
    atomic_write(path, "[\n" + ",\n".join(lines) + "\n]\n")
    logger.info("Wrote %d articles to %s", len(lines), Path(path).name)
    return Path(path)


def cloze_questions() -> list[Question]:
    """Ask for facts of the encyclopedia by the beginning of a sentence.

    The prompt ends right before the answer, does not contain it, and is continued by nothing else
    anywhere in the text. No question is on arithmetic.
    """
    questions, facts = [], _load("encyclopedia.json")
    for name, domain in _domains(_load("phrases.json")).items():
        writer = _Writer(random.Random(0), domain, facts[name], {})
        for key, field in domain.fields.items():
            for entity in (e for e in facts[name] if key in e and field.rotated):
                asked = [("told", key, field.says[0])]
                asked.append(("reworded", key, writer.kept_back(entity, key)))
                if writer.one_way(entity, key):
                    asked.append(("reversed", "name", field.reversed[0]))
                for kind, value, text in asked:
                    prompt = text.partition("{" + value + "}")[0].format(**entity)
                    if entity[value] not in prompt:
                        questions.append(Question(prompt, entity[value], name, kind))
    return questions
