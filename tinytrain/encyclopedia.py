"""A small Chinese encyclopedia, written by a program from a table of facts.

A model of a few million parameters cannot learn the world from the few minutes of training that a
laptop affords, but it can learn a small world that is told often enough. So this text trades
breadth for repetition: some 1,700 true facts, each stated dozens of times in varying terms and
order. A held-out article then tells known facts in sentences not seen together before, and
`cloze_questions` can ask what was learned. The price: it is a generated text, with the sameness of
one, and losses on it say nothing about losses on real prose.

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
from typing import Any, NamedTuple

from tinytrain.common import atomic_write

logger = logging.getLogger(__name__)

_FACT_ARTICLES = 5000
_ARITHMETIC_ARTICLES = 350

_Entity = dict[str, Any]


class Question(NamedTuple):
    """One cloze question: a prompt that the encyclopedia continues with the answer."""

    prompt: str
    answer: str
    domain: str


class _Field(NamedTuple):
    """How to talk about one kind of fact.

    The first sentence of ``says`` is the plain one. Where ``cloze`` is true it is also a question:
    everything before the value is the prompt, so no other sentence may continue that prompt.
    ``brief`` is the fact as one clause of an entry that names its subject once, at the start.
    """

    label: str
    brief: str
    says: list[str]
    asks: list[str]
    cloze: bool = False
    weight: int = 1


class _Domain(NamedTuple):
    """How to talk about one kind of thing, and the kinds of facts told about it."""

    noun: str
    pronouns: list[str]
    opens: list[str]
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


class _Writer:
    """The decks of one domain; each kind of article draws about `target` characters from them."""

    def __init__(
        self,
        rnd: random.Random,
        domain: _Domain,
        entities: list[_Entity],
        shared: dict[str, list[str]],
    ) -> None:
        self.rnd, self.domain, self.entities, self.shared = rnd, domain, entities, shared
        self.leads = _deck(rnd, entities)
        self.others = _deck(rnd, entities)
        facts = [
            (e, key)
            for e in entities
            for key, field in domain.fields.items()
            if key in e
            for _ in range(field.weight)
        ]
        self.size = len(facts)
        self.facts = _deck(rnd, facts)
        self.kinds = _deck(
            rnd, ["portrait"] * 4 + ["quiz"] * 2 + ["compare"] * 2 + ["listing", "notes"]
        )
        self.phrasings: dict[tuple[str, str, bool], Iterator[str]] = {}

    def phrasing(self, entity: _Entity, key: str, ask: bool) -> str:
        """Deal the phrasings of each single fact evenly, the plain one twice as often."""
        deck = self.phrasings.get((entity["name"], key, ask))
        if deck is None:
            field = self.domain.fields[key]
            deck = _deck(self.rnd, field.asks if ask else (field.says[0], *field.says))
            self.phrasings[entity["name"], key, ask] = deck
        return next(deck)

    def say(self, entity: _Entity, key: str, pronoun: bool = False, link: bool = False) -> str:
        template = self.phrasing(entity, key, ask=False)
        plain = template == self.domain.fields[key].says[0]
        subject_first = template.startswith("{name}")
        if pronoun and subject_first and not plain and self.rnd.random() < 0.5:
            template = _pick(self.rnd, self.domain.pronouns) + template.removeprefix("{name}")
        if link and subject_first and self.rnd.random() < 0.25:
            template = self.shared_phrase("links") + template
        return template.format(**entity)

    def ask(self, entity: _Entity, key: str) -> str:
        return self.phrasing(entity, key, ask=True).format(**entity)

    def shared_phrase(self, kind: str, /, **values: str) -> str:
        """Pick a phrase that all domains share."""
        return _pick(self.rnd, self.shared[kind]).format(**values)

    def keys(self, entity: _Entity) -> list[str]:
        return _shuffled(self.rnd, [k for k in self.domain.fields if k in entity])

    def another(self, *taken: _Entity) -> _Entity:
        return next(e for e in self.others if all(e is not t for t in taken))

    def article(self) -> str:
        target = 165 + _below(self.rnd, 150)
        parts = getattr(self, next(self.kinds))(target)
        if self.rnd.random() < 0.25:
            parts.append(self.shared_phrase("closes"))
        return "".join(parts).rstrip()

    def tell(self, entity: _Entity) -> list[str]:
        """Tell all facts of one entity, as sentences or as one dictionary entry."""
        keys = self.keys(entity)
        if self.rnd.random() < 0.3:
            clauses = [self.domain.fields[key].brief.format(**entity) for key in keys]
            return ["，".join([entity["name"], *clauses]) + "。"]
        return [self.say(entity, key, pronoun=i > 0, link=i > 0) for i, key in enumerate(keys)]

    def portrait(self, target: int) -> list[str]:
        taken = [next(self.leads)]
        title = f"{taken[0]['name']}\n" if self.rnd.random() < 0.3 else ""
        parts = [title + _pick(self.rnd, self.domain.opens).format(**taken[0])]
        parts += self.tell(taken[0])
        while sum(map(len, parts)) < target:
            taken.append(self.another(*taken[-6:]))
            if self.rnd.random() < 0.6:
                parts.append(self.shared_phrase("turns", **taken[-1]))
            parts += self.tell(taken[-1])
        return parts

    def quiz(self, target: int) -> list[str]:
        parts = [self.shared_phrase("quiz_opens", noun=self.domain.noun)]
        while sum(map(len, parts)) < target:
            question = "\n" + self.ask(*next(self.facts))
            if question not in parts:
                parts.append(question)
        return [*parts, "\n"]

    def notes(self, target: int) -> list[str]:
        parts = [self.shared_phrase("note_opens", noun=self.domain.noun)]
        while sum(map(len, parts)) < target:
            sentence = self.say(*next(self.facts), link=len(parts) > 1)
            if sentence not in parts:
                parts.append(sentence)
        return parts

    def listing(self, target: int) -> list[str]:
        _, key = next(self.facts)
        label = self.domain.fields[key].label
        parts = [self.shared_phrase("list_opens", noun=self.domain.noun, label=label)]
        for other in _shuffled(self.rnd, [e for e in self.entities if key in e]):
            if sum(map(len, parts)) >= target:
                break
            parts.append(self.say(other, key))
        return parts

    def compare(self, target: int) -> list[str]:
        a = next(self.leads)
        b = self.another(a)
        parts = [self.shared_phrase("compare_opens", a=a["name"], b=b["name"])]
        while True:
            for key in self.keys(a):
                if key in b:
                    plain = self.domain.fields[key].says[0]
                    joins = ("，同样，",) if a[key] == b[key] else ("，而", "；", "，")
                    join = _pick(self.rnd, joins)
                    parts.append(plain.format(**a)[:-1] + join + plain.format(**b))
            if sum(map(len, parts)) >= target:
                return parts
            a, b = b, self.another(a, b)
            parts.append(self.shared_phrase("compare_turns", a=a["name"], b=b["name"]))


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
        In the order of the table. The prompt ends right before the answer, does not contain it, and
        is continued by nothing else anywhere in the text. No question is on arithmetic.

    Examples
    --------
    >>> cloze_questions()[0]
    Question(prompt='中国的首都是', answer='北京', domain='countries')
    """
    questions, facts = [], _load("encyclopedia.json")
    for name, domain in _domains(_load("phrases.json")).items():
        for key, field in domain.fields.items():
            if not field.cloze:
                continue
            before = field.says[0].partition("{" + key + "}")[0]
            for entity in facts[name]:
                prompt, answer = before.format(**entity), entity.get(key, "")
                if len(answer) > 1 and answer not in prompt:
                    questions.append(Question(prompt, answer, name))
    return questions
