"""A small Chinese encyclopedia, written by a program from a table of facts.

A model of a few million parameters cannot learn the world from the few minutes of training that a
laptop affords, but it can learn a small world that is told often enough. So this text trades
breadth for repetition: some 1,700 true facts, each stated dozens of times in varying terms and
order. The price: it is a generated text, with the sameness of one, and losses on it say nothing
about losses on real prose.

What was learned, `cloze_questions` can ask in three ways, because the writer holds some things
back: of every asked fact one wording, and of some facts the way from the answer to the subject.

The facts are in ``data/encyclopedia.json``, the phrasings in ``data/phrases.json``. Names of
territories, currencies and languages come from the Unicode CLDR; they are frozen in the table
because CLDR releases differ.
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

_FACT_ARTICLES = 5000
_ARITHMETIC_ARTICLES = 350

_Entity = dict[str, Any]
_Template = str | dict[str, Any]  # a bare text, or {"say": text, "only": ..., "except": ...}


class Question(NamedTuple):
    """One cloze question: a prompt that is continued with the answer.

    The ``kind`` says what the text tells of it:

    - ``"told"``: the prompt with its answer, word for word;
    - ``"reworded"``: the same fact, but never in this wording, which it uses for other subjects;
    - ``"reversed"``: the fact, but only in the other direction, from the answer to what the prompt
      names; the wording again for other subjects.
    """

    prompt: str
    answer: str
    domain: str
    kind: str


class _Field(NamedTuple):
    """How to talk about one kind of fact.

    The first sentence of ``says`` is the plain one. Where there are ``rotated`` ones, the plain one
    is the question "told", and each subject does without one of them, in turn: its question
    "reworded". ``back`` and ``back_asks`` go from the value to the subject. Where there is a
    ``reversed`` sentence, half of the subjects do without all of these: their question "reversed".
    """

    label: str  # "the <label> of <subject>"
    topic: str  # what an article about this kind of fact is about
    says: list[_Template]
    brief: list[_Template] = []  # a clause after the subject; one with "的" may follow the others
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
    called: str  # a subject that was not mentioned before
    pronouns: list[str]
    fields: dict[str, _Field]


def _load(name: str) -> dict[str, Any]:
    """Read a table of the package."""
    return json.loads((resources.files("tinytrain") / "data" / name).read_text(encoding="utf-8"))


def _domains(phrases: dict[str, Any]) -> dict[str, _Domain]:
    domains = {}
    for name, domain in phrases["domains"].items():
        fields = {key: _Field(**field) for key, field in domain["fields"].items()}
        domains[name] = _Domain(**{**domain, "fields": fields})
    return domains


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
    """Return the templates that are true and natural for an entity.

    It has to have all that they name. Besides, ``"only": {"kind": ["省"]}`` demands one of these
    values, and ``"except"`` rules them out.
    """
    texts = []
    for template in templates:
        rule = {"say": template} if isinstance(template, str) else template
        names = {name for _, name, _, _ in Formatter().parse(rule["say"]) if name}
        if (
            names <= entity.keys()
            and all(entity.get(key) in some for key, some in rule.get("only", {}).items())
            and all(entity.get(key) not in some for key, some in rule.get("except", {}).items())
        ):
            texts.append(rule["say"])
    return texts


class _Writer:
    """The decks of one domain; each kind of article draws about `target` characters from them."""

    def __init__(
        self, rnd: random.Random, domain: _Domain, entities: list[_Entity], shared: dict[str, Any]
    ) -> None:
        self.rnd, self.domain, self.entities, self.shared = rnd, domain, entities, shared
        self.leads, self.others = _deck(rnd, entities), _deck(rnd, entities)
        self.turn, weighted = {}, []
        for key, field in domain.fields.items():
            for number, entity in enumerate(e for e in entities if key in e):
                self.turn[entity["name"], key] = number
                weighted += [(entity, key)] * field.weight
        self.size, self.facts = len(weighted), _deck(rnd, weighted)
        kinds = {"portrait": 4, "quiz": 2, "compare": 3, "listing": 2, "notes": 1}
        self.kinds = _deck(rnd, [kind for kind, number in kinds.items() for _ in range(number)])
        self.dealt: dict[tuple[str, str, str], tuple[list[str], Iterator[str]]] = {}

    def kept_back(self, entity: _Entity, key: str) -> str | None:
        """Return the wording in which this fact is never told."""
        rotated = _fitting(self.domain.fields[key].rotated, entity)
        return rotated[self.turn[entity["name"], key] % len(rotated)] if rotated else None

    def one_way(self, entity: _Entity, key: str) -> bool:
        """Return whether this fact is never told from the value to the subject."""
        field = self.domain.fields[key]
        # In step with the rotation, some wordings would be kept back from these subjects only.
        return bool(field.reversed) and self.turn[entity["name"], key] // len(field.rotated) % 2 > 0

    def phrasings(self, entity: _Entity, key: str, use: str) -> tuple[list[str], Iterator[str]]:
        """Return what may be said of a fact, and a deck of it: to say, pair, ask or be brief."""
        if (entity["name"], key, use) not in self.dealt:
            field = self.domain.fields[key]
            often = 2 if field.rotated else 1  # the plain one once more, or twice if asked for
            templates = [*field.says[:1] * often, *field.says, *field.rotated]
            templates = {"ask": field.asks, "brief": field.brief}.get(use, templates)
            if not self.one_way(entity, key):
                back = {"say": [*field.back, *field.reversed], "ask": field.back_asks}
                templates = [*templates, *back.get(use, [])]
            kept = self.kept_back(entity, key)
            found = [text for text in _fitting(templates, entity) if text != kept]
            if use == "pair":  # "On a map, A is here, and on a map, B is there" is no good style
                found = [text for text in found if "，" not in text]
            self.dealt[entity["name"], key, use] = found, _deck(self.rnd, found)
        return self.dealt[entity["name"], key, use]

    def called(self, entity: _Entity, again: bool = False) -> str:
        """Name a subject; one that was mentioned before, sometimes with a pronoun."""
        pronoun = again and self.rnd.random() < 0.4
        names = self.domain.pronouns if pronoun else [self.domain.called]
        return _pick(self.rnd, names).format(**entity)

    def shared_phrase(self, kind: str, /, **values: str) -> str:
        return _pick(self.rnd, self.shared[kind]).format(noun=self.domain.noun, **values)

    def keys(self, entity: _Entity, *first: str) -> list[str]:
        return [
            *first,
            *_shuffled(self.rnd, [k for k in self.domain.fields if k in entity and k not in first]),
        ]

    def another(self, *taken: _Entity) -> _Entity:
        return next(e for e in self.others if all(e is not t for t in taken))

    def say(self, entity: _Entity, key: str, again: bool = False) -> str:
        text = next(self.phrasings(entity, key, "say")[1])
        if again and text.startswith("{name}"):
            text = self.called(entity, again) + text.removeprefix("{name}")
        return (self.shared_phrase("links") if again else "") + text.format(**entity)

    def clauses(self, entity: _Entity, keys: Sequence[str]) -> list[tuple[str, str]]:
        """Return the facts that can be told in a clause, those with a subject of their own last."""
        decks = [(key, self.phrasings(entity, key, "brief")) for key in keys]
        clauses = [(next(deck).format(**entity), key) for key, (some, deck) in decks if some]
        return sorted(clauses, key=lambda clause: clause[0].startswith("的"))

    def tell(self, entity: _Entity, keys: Sequence[str]) -> list[str]:
        """Tell facts of one subject, up to three in a sentence."""
        sentences: list[str] = []
        while keys:
            size = _pick(self.rnd, (1, 2, 2, 3))
            some, keys = keys[:size], keys[size:]
            clauses = self.clauses(entity, some) if size > 1 else []
            if len(clauses) > 1:
                texts = [clauses[0][0], *(text.removeprefix("的") for text, _ in clauses[1:])]
                sentences.append(self.called(entity, bool(sentences)) + "，".join(texts) + "。")
                told = {key for _, key in clauses}
                some = [key for key in some if key not in told]
            for key in some:
                sentences.append(self.say(entity, key, bool(sentences)))
        return sentences

    def pair(self, entities: Sequence[_Entity], key: str) -> str:
        """Say the same of several subjects in one sentence, if there is a sentence for it."""
        values = {entity[key] for entity in entities}
        *names, last = (entity["name"] for entity in entities)
        if names and len(values) == 1 and self.domain.fields[key].same:
            text = _pick(self.rnd, self.domain.fields[key].same)
            return text.format(**entities[0] | {"names": "、".join(names) + "和" + last})
        first, *rest = (self.phrasings(entity, key, "pair")[0] for entity in entities)
        shared = [text for text in first if all(text in some for some in rest)]
        if not shared or len(values) < len(entities):
            return "".join(self.say(entity, key) for entity in entities)
        text = _pick(self.rnd, shared)
        join = _pick(self.rnd, ("，而", "，", "；") if len(entities) == 2 else ("，", "；"))
        return join.join(text.format(**entity)[:-1] for entity in entities) + "。"

    def article(self) -> str:
        parts = getattr(self, next(self.kinds))(165 + _below(self.rnd, 150))
        return "".join(parts).strip()

    def portrait(self, target: int) -> list[str]:
        taken = [next(self.leads)]
        parts = [self.shared_phrase("opens", name=self.called(taken[0]))]
        while True:
            parts += self.tell(taken[-1], self.keys(taken[-1]))
            if sum(map(len, parts)) >= target:
                return [*parts, self.shared_phrase("closes")]
            taken.append(self.another(*taken[-6:]))
            before, name = map(self.called, taken[-2:])
            parts.append(self.shared_phrase("turns", before=before, name=name))

    def notes(self, target: int) -> list[str]:
        parts = [self.shared_phrase("note_opens")]
        while sum(map(len, parts)) < target:
            entity, key = next(self.facts)
            keys = self.keys(entity, key)[: 1 + _below(self.rnd, 3)]
            parts += [text for text in self.tell(entity, keys) if text not in parts]
        return [*parts, self.shared_phrase("closes")]

    def quiz(self, target: int) -> list[str]:
        parts = [self.shared_phrase("quiz_opens")]
        while sum(map(len, parts)) < target:
            entity, key = next(self.facts)
            labels = {k: self.domain.fields[k].label for k in self.keys(entity, key)}
            clauses = self.clauses(entity, [k for k, label in labels.items() if label][:2])
            if len(clauses) == 2 and self.rnd.random() < 0.4:
                values = {x: labels[k] for x, (_, k) in zip("ab", clauses, strict=True)}
                values["answer"] = "，".join(text.removeprefix("的") for text, _ in clauses)
                text = self.shared_phrase("double_asks", name=self.called(entity), **values)
            else:
                text = next(self.phrasings(entity, key, "ask")[1]).format(**entity)
            if "\n" + text not in parts:
                parts.append("\n" + text)
        return parts

    def listing(self, target: int) -> list[str]:
        """Tell one kind of fact of many subjects, together of those that have it in common."""
        _, key = next(self.facts)
        parts = [self.shared_phrase("list_opens", topic=self.domain.fields[key].topic)]
        rest = _shuffled(self.rnd, [e for e in self.entities if key in e])
        while rest and sum(map(len, parts)) < target:
            alike = [e for e in rest if e[key] == rest[0][key]]
            if len(alike) == 1 or not self.domain.fields[key].same:
                alike = rest
            some = alike[: 1 + _below(self.rnd, 4)]
            rest = [e for e in rest if e not in some]
            parts.append(self.pair(some, key))
        return parts

    def compare(self, target: int) -> list[str]:
        a, parts, kind = next(self.leads), [], "compare_opens"
        while sum(map(len, parts)) < target:
            b = self.another(a)
            parts.append(self.shared_phrase(kind, a=self.called(a), b=self.called(b)))
            parts += [self.pair([a, b], key) for key in self.keys(a) if key in b]
            a, kind = b, "compare_turns"
        return parts


def _arithmetic_article(rnd: random.Random, phrases: dict[str, Any]) -> str:
    target = 165 + _below(rnd, 150)
    parts = [_pick(rnd, phrases["opens"])]
    while sum(map(len, parts)) < target:
        kind = _pick(rnd, list(phrases["sentences"]))
        a, b = 1 + _below(rnd, 60), 1 + _below(rnd, 39)
        c, d = 1 + _below(rnd, 9), 1 + _below(rnd, 9)
        if kind == "division":
            d = max(d, 2)
        values = {"a": a, "b": b, "sum": a + b, "c": c, "d": d, "product": c * d}
        if kind == "conversion":
            units = _pick(rnd, phrases["conversions"])
            values |= units | {"converted": c * units["factor"]}
        parts.append(_pick(rnd, phrases["sentences"][kind]).format(**values))
    return "".join(parts)


def build_encyclopedia(seed: int = 2222) -> list[dict[str, str]]:
    """Write the articles of the encyclopedia.

    Parameters
    ----------
    seed : int
        Chooses the wording and the order; the same seed gives the same articles on every platform.

    Returns
    -------
    list of dict
        Articles as ``{"completion": text, "source": "tinytrain:<domain>"}``, shuffled.
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
        articles += [(name, writer.article()) for _ in range(count)]
    for _ in range(_ARITHMETIC_ARTICLES):
        articles.append(("arithmetic", _arithmetic_article(rnd, phrases["arithmetic"])))
    unique = dict.fromkeys(_shuffled(rnd, articles))
    return [{"completion": text, "source": f"tinytrain:{name}"} for name, text in unique]


def write_encyclopedia(path: str | Path, seed: int = 2222) -> Path:
    """Write the encyclopedia as a JSON array, one article a line.

    Parameters
    ----------
    path : str or Path
        File to write; missing parent folders are made.
    seed : int
        As in `build_encyclopedia`.

    Returns
    -------
    Path
        The file, UTF-8 with line feeds as line ends: the same bytes everywhere for the same seed.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write.")
    lines = [json.dumps(a, ensure_ascii=False) for a in build_encyclopedia(seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "[\n" + ",\n".join(lines) + "\n]\n")
    logger.info("Wrote %d articles to %s", len(lines), path.name)
    return path


def cloze_questions() -> list[Question]:
    """Ask for facts of the encyclopedia by the beginning of a sentence.

    Returns
    -------
    list of Question
        In the order of the table: told, reworded and, of half of the facts that could be told
        either way, reversed. The prompt ends right before the answer, does not contain it, and is
        continued by nothing else anywhere in the text. No question is on arithmetic.

    Examples
    --------
    >>> cloze_questions()[0]
    Question(prompt='中国的首都是', answer='北京', domain='countries', kind='told')
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
                    before, _, after = text.format(**entity | {value: "\0"}).partition("\0")
                    if entity[value] not in before:
                        questions.append(Question(before, entity[value], name, kind))
    return questions
