"""The built-in encyclopedia: same bytes everywhere, true facts, questions it can answer."""

import calendar
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from importlib import resources

import pytest
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from tinytrain import encyclopedia
from tinytrain.encyclopedia import build_encyclopedia, cloze_questions

# Changes with every edit of facts or phrases, and must change with nothing else.
SHA256 = "7ba09b4643dc05eeea2ba37277636affe91548d05f3e6ff687400f30b817f411"


@pytest.fixture(scope="module")
def articles():
    return build_encyclopedia()


@pytest.fixture(scope="module")
def text(articles):
    return "\n\n".join(article["completion"] for article in articles)


@pytest.fixture(scope="module")
def texts(articles):
    """Give the text of each domain."""
    found = {}
    for article in articles:
        domain = article["source"].removeprefix("tinytrain:")
        found[domain] = found.get(domain, "") + article["completion"] + "\n"
    return found


@pytest.fixture(scope="module")
def facts():
    table = resources.files("tinytrain") / "data" / "encyclopedia.json"
    return json.loads(table.read_text(encoding="utf-8"))


def test_the_written_file_has_the_pinned_bytes_whatever_the_hash_seed(tmp_path, articles):
    code = "import sys; from tinytrain.encyclopedia import *; write_encyclopedia(sys.argv[1])"
    path = tmp_path / "new" / "folder" / "text.json"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256 and json.loads(data) == articles
    # The guide's format, one article a line.
    assert data.count(b"\n") == len(articles) + 2 and b"\r" not in data and b"\\u" not in data
    assert [p.name for p in path.parent.iterdir()] == ["text.json"]


def test_size_and_domains_and_another_seed_gives_another_text(articles):
    texts = [article["completion"] for article in articles]
    assert len(set(texts)) == len(texts) >= 5200
    assert 1_250_000 <= sum(map(len, texts)) <= 1_600_000
    characters = Counter()
    for article in articles:
        characters[article["source"]] += len(article["completion"])
    assert all(re.fullmatch(r"tinytrain:[a-z_]+", source) for source in characters)
    assert len(characters) >= 12
    assert characters["tinytrain:arithmetic"] < 0.1 * characters.total()
    other = build_encyclopedia(seed=1)
    assert other != articles and abs(len(other) - len(articles)) < 50


def test_every_article_is_clean_prose_and_one_says_that_it_is_generated(articles):
    for body in (article["completion"] for article in articles):
        assert body == body.strip() and body[-1] in "。？", body
        assert 80 < len(body) < 600, body
        assert not re.search(r"[{}]|None|  |。。|，。|，，|[A-Za-z]{4,}", body), body
    (about,) = [a["completion"] for a in articles if a["source"] == "tinytrain:about"]
    assert "程序生成" in about and "事实表" in about


def writers(facts):
    domains = encyclopedia._domains(encyclopedia._load("phrases.json"))
    return {
        name: encyclopedia._Writer(random.Random(0), domain, facts[name], {})
        for name, domain in domains.items()
    }


def every_sentence(writer):
    """Yield all that can be said of single facts, and of several facts and subjects together."""
    domain, named = writer.domain, {e["name"]: e for e in writer.entities}
    for (name, _, use), texts in writer.texts.items():
        entity = named[name]
        pronouns = [pronoun.format(**entity) for pronoun in domain.pronouns]
        for text in texts:
            assert use == "brief" or text.endswith("。") or use == "ask"
            if use == "brief":
                yield domain.called.format(**entity) + text.format(**entity) + "。"
                yield from (pronoun + text.format(**entity) + "。" for pronoun in pronouns)
            else:
                yield text.format(**entity)
                if use == "say" and text.startswith("{name}"):
                    rest = text.removeprefix("{name}").format(**entity)
                    yield from (subject + rest for subject in pronouns)
                    yield domain.called.format(**entity) + rest
    for entity in writer.entities:
        called = domain.called.format(**entity)
        keys = [key for key in domain.fields if key in entity]
        labels = [domain.fields[key].label for key in keys]
        yield from (f"{called}的{label}。" for label in labels if label)
        for key, other in itertools.combinations(keys, 2):
            briefs = [writer.texts[entity["name"], k, "brief"] for k in (key, other)]
            for pair in itertools.product(*briefs):
                first, second = sorted(pair, key=lambda text: text.startswith("的"))
                yield f"{called}{first}，{second.removeprefix('的')}。".format(**entity)
    for key, field in domain.fields.items():
        some = [e for e in writer.entities if key in e]
        for a, b in itertools.permutations(some, 2):
            if a[key] == b[key]:
                mark = "" if b["name"][0] in "《“" else "、"
                names = f"{a['name']}{mark}{b['name']}和{b['name']}"
                yield from (text.format(**a | {"names": names}) for text in field.same)


NEVER = {
    "persons have a gender": r"(?<!其)[他她]",
    "a word twice": r"的的|是是|于于|都都|在在|为为|叫叫|被被|和和|，，",
    "noble gases have no compounds here": r"[氦氖氩氙]的化合物|或者它的化合物",
    "metal, or gold?": r"金属于",
    "a pronoun needs no second name": r"它这",
    "a class is not a kind": r"一种[鸟鱼]类",
    "a pronoun for a part of a name": r"(它|该国|这\w{1,3})(的时候|年|时)",
    "municipalities have no seat": r"(北京|天津|上海|重庆)市的(省会|首府)",
    "the seat of a province, of a region": r"自治区的省会|省的首府|省的行政公署",
    "who is asked for persons only": r"(位|颗|个|第\w+)是谁",
    "it may change": r"目前|现任|迄今|今年|人口|总统是|世界上最[高长大]的(建筑|桥|城市)",
    "its capital, or its name, is in question": r"(印度尼西亚|哈萨克斯坦|南非)的首都|墨西哥湾",
    "the same verb twice": r"(位于|属于|地处|建立)[^。\n]*，\1|，(是一\w)[^。\n]*，\2",
    "quoted names need no comma": r"[》”]、[《“]",
    "not everybody does that": r"家家户户|许多人都读过|抬头看星空",
    "ash does not flood": r"淹没",
    "no traits by title": r"特点，|被称为[东西南北中]岳",
    "no author writes that": r"流通的钱币|书里常讲|放在一起读|人们知道，",
    "cannot be said of a single day": r"一年的最后一天|这一天是",
}


def test_all_that_can_be_said_is_true_to_its_fact(facts):
    said = set(itertools.chain.from_iterable(map(every_sentence, writers(facts).values())))
    assert len(said) > 15_000
    lines = "\n".join(sorted(said))
    for why, pattern in NEVER.items():
        found = re.search(rf"^.*?(?:{pattern}).*$", lines, re.MULTILINE)
        assert not found, (found[0], why)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("人们常利用氖或者它的化合物来制作霓虹灯。", "noble gases have no compounds here"),
        ("屠呦呦来自中国，他发现了青蒿素。", "persons have a gender"),
        ("问：元素周期表的第7位是谁？答：氮。", "who is asked for persons only"),
        ("维苏威火山曾经淹没了庞贝古城。", "ash does not flood"),
        ("它这部小说的作者是吴承恩。", "a pronoun needs no second name"),
        ("企鹅是一种鸟类。", "a class is not a kind"),
        ("说起特点，嵩山被称为中岳。", "no traits by title"),
    ],
)
def test_the_rules_find_what_was_wrong(bad, why):
    assert re.search(NEVER[why], bad)


def test_templates_name_what_there_is_and_every_fact_can_be_told(facts):
    for writer in writers(facts).values():
        for (name, key, use), texts in writer.texts.items():
            assert texts or use in ("pair", "brief"), (name, key, use)
        for key, field in writer.domain.fields.items():
            templates = field.says + field.brief + field.rotated + field.back + field.reversed
            for template in templates + field.asks + field.back_asks:
                some = [e for e in writer.entities if key in e]
                fitting = [e for e in some if encyclopedia._fitting([template], e)]
                assert fitting, template  # a slip of the pen would leave a template unused
                text = template if isinstance(template, str) else template["say"]
                for rule in ({} if isinstance(template, str) else template["except"]).items():
                    assert all(any(e.get(rule[0]) == v for e in some) for v in rule[1]), rule
                assert "{" + key + "}" in text or "{place}" in text or "{hour}" in text, text


@pytest.fixture(scope="module")
def asked(facts, text):
    """Give every question with its subject, its kind of fact, and the wording it is asked in."""
    found = []
    questions = iter(cloze_questions())
    for name, writer in writers(facts).items():
        for key, field in writer.domain.fields.items():
            for entity in (e for e in facts[name] if key in e and field.rotated):
                wordings = {"told": field.says[0], "reworded": writer.kept_back(entity, key)}
                if writer.one_way(entity, key):
                    wordings["reversed"] = field.reversed[0]
                for kind, wording in wordings.items():
                    value = "name" if kind == "reversed" else key
                    prompt = wording.partition("{" + value + "}")[0]
                    if entity[value] in prompt.format(**entity):
                        continue  # it would give the answer away
                    found.append((next(questions), writer, entity, key, prompt))
                    expected = (prompt.format(**entity), entity[value], name, kind)
                    assert found[-1][0] == expected
    assert next(questions, None) is None
    return found


def test_questions_are_many_and_unique_and_have_one_answer(facts, asked):
    questions = [question for question, *_ in asked]
    assert len({q.prompt for q in questions}) == len(questions)
    kinds = Counter(q.kind for q in questions)
    assert kinds["told"] == kinds["reworded"] >= 480 and kinds["reversed"] >= 90
    for kind, least in (("told", 12), ("reworded", 12), ("reversed", 6)):
        assert len({q.domain for q in questions if q.kind == kind}) >= least
    for q, _writer, _entity, key, prompt in asked:
        assert q.answer and q.answer not in q.prompt and q.domain != "arithmetic"
        # A token may not grow over the end of the prompt: no quote, digit or space in two.
        assert q.prompt[-1] not in "“《：，" and q.answer[0] not in "”》，。"
        value = "name" if q.kind == "reversed" else key
        right = {e[value] for e in facts[q.domain] if key in e and prompt.format(**e) == q.prompt}
        assert right == {q.answer}, q


def test_a_told_question_stands_in_the_text_and_goes_on_in_one_way_only(text, asked):
    for q in (q for q, *_ in asked if q.kind == "told"):
        answered = text.count(q.prompt + q.answer)
        assert answered >= 6, q
        assert text.count(q.prompt) == answered, f"something else follows {q.prompt!r}"


def test_a_reworded_question_is_told_in_every_other_way(text, texts, asked):
    sentences = {domain: re.split("[。\n]", text) for domain, text in texts.items()}
    kept, used = Counter(), {}
    for q, writer, entity, key, prompt in asked:
        if q.kind != "reworded":
            continue
        assert q.prompt not in text, q
        # Nor with a pronoun, nor as one clause of several.
        wording = writer.kept_back(entity, key)
        own = [
            texts
            for (name, k, _), texts in writer.texts.items()
            if (name, k) == (entity["name"], key)
        ]
        tail = prompt.partition("{name}")[2].removeprefix("的")
        assert all(wording not in texts for texts in own)
        assert all(not text.removeprefix("的").startswith(tail) for text in own[3]), q
        # The fact is told, and so is the wording, of others.
        told = [s for s in sentences[q.domain] if entity["name"] in s and q.answer in s]
        assert len(told) >= 25, q
        others = [e for e in writer.entities if key in e and e is not entity]
        for sentence in (prompt.format(**e) + e[key] for e in others):
            if sentence not in used:
                used[sentence] = texts[q.domain].count(sentence)
        assert sum(used[prompt.format(**e) + e[key]] for e in others) >= 10, q
        kept[q.domain, key, wording] += 1
    for (domain, key, _), number in kept.items():
        total = sum(n for (d, k, _), n in kept.items() if (d, k) == (domain, key))
        assert number <= 0.45 * total  # in rotation


def test_a_reversed_question_is_told_in_one_direction_only(text, texts, asked):
    for q, writer, entity, key, prompt in asked:
        if q.kind != "reversed":
            continue
        field = writer.domain.fields[key]
        back = encyclopedia._fitting(field.back + field.reversed, entity)
        back += [t.partition("答：")[0] for t in encyclopedia._fitting(field.back_asks, entity)]
        assert back and not any(sentence.format(**entity).rstrip("。") in text for sentence in back)
        assert q.prompt not in text and entity[key] in q.prompt
        forth = writer.texts[entity["name"], key, "say"]
        assert all(t.index("{name}") < t.index("{" + key + "}") for t in forth)
        told = sum(texts[q.domain].count(t.format(**entity).rstrip("。")) for t in set(forth))
        assert told >= 15, q
        if q.domain not in ("elements", "solar_terms"):  # short names, chains
            assert not re.search(rf"{entity[key]}[^。，？\n]*{entity['name']}", text), q
        others = [e for e in writer.entities if key in e and not writer.one_way(e, key)]
        assert sum(texts[q.domain].count(prompt.format(**e) + e["name"]) for e in others) >= 8, q


def test_no_pronoun_could_stand_for_two_neighbours(texts, facts):
    for domain in ("solar_terms", "calendar", "zodiac"):
        names = "|".join(entity["name"] for entity in facts[domain])
        assert not re.search(rf"({names})。(它|这个)", texts[domain]), domain


WELL_KNOWN_FACTS = """
法国的首都是巴黎 日本的货币是日元 加拿大的首都是渥太华 澳大利亚的首都是堪培拉
巴西的首都是巴西利亚 巴西的官方语言是葡萄牙语 埃及位于非洲 蒙古是一个内陆国家
广东省的省会是广州 新疆维吾尔自治区的首府是乌鲁木齐 山东省的简称是“鲁”
铁的元素符号是“Fe” 金的原子序数是79 汞的单质在常温下呈液态
木星是太阳系中最大的行星 唐朝的建立者是李渊 明朝建立于公元1368年
冬至的下一个节气是小寒 中秋节的农历日期是八月十五 公历四月有30天
力的国际单位是牛顿 地支午对应的生肖是马 尼罗河注入的水域是地中海 泰山位于山东省
莫高窟位于甘肃敦煌 《红楼梦》的作者是曹雪芹 发现青蒿素的人是屠呦呦
成语“卧薪尝胆”的主人公是勾践 鲸属于哺乳动物
"""
POPULAR_ERRORS = """
澳大利亚的首都是悉尼 巴西的官方语言是西班牙语 土耳其的首都是伊斯坦布尔 英国的货币是欧元
瑞士的货币是欧元 汞的单质是固态 鲸属于鱼类 蝙蝠属于鸟类 公历二月有30天
"""


def test_well_known_facts_are_told_and_popular_errors_are_not(text):
    assert [fact for fact in WELL_KNOWN_FACTS.split() if fact not in text] == []
    assert [error for error in POPULAR_ERRORS.split() if error in text] == []


def test_no_sentence_names_another_capital_than_the_table(text, facts):
    capital = {e["name"]: e["capital"] for e in facts["countries"] if "capital" in e}
    names = "|".join(map(re.escape, sorted(capital, key=len, reverse=True)))
    told = set(re.findall(rf"({names})的首都是(\w+)", text))
    assert {(name, city) for name, city in told if not city.startswith("哪")} == set(
        capital.items()
    )
    cities = "|".join(map(re.escape, capital.values()))
    told = set(re.findall(rf"({cities})\w*是(\w+)的首都。", text))
    assert {(name, city) for city, name in told} <= set(capital.items())


def test_arithmetic_is_right(text):
    sums = re.findall(r"(\d+)(加|减|乘|除以)(\d+)等于(\d+)。", text)
    assert len(sums) > 1000
    for a, op, b, result in sums:
        a, b, result = int(a), int(b), int(result)
        assert result == {"加": a + b, "减": a - b, "乘": a * b, "除以": a / b}[op]


def test_names_equal_those_of_cldr(facts):
    locale = Locale.parse("zh_Hans_CN")
    for country in facts["countries"]:
        code = country["code"]
        assert country["name"] == locale.territories[code]
        assert country["currency"] == locale.currencies[country["currency_code"]]
        assert country["currency_code"] in get_territory_currencies(code)
        languages = country.get("language_codes", [])
        assert set(languages) <= set(get_official_languages(code))
        if languages:
            names = [locale.languages[language] for language in languages]
            assert re.split("[、和]", country["language"]) == names


def test_table_is_consistent(facts):
    for domain, entities in facts.items():
        names = [e["name"] for e in entities]
        assert len(set(names)) == len(names), domain
        assert all("" not in e.values() for e in entities)
    for domain in ("solar_terms", "zodiac", "calendar"):
        cycle = facts[domain]
        assert [e["after"] for e in cycle] == [e["name"] for e in cycle[1:] + cycle[:1]]
    for month, entity in enumerate(facts["calendar"], start=1):
        days = {calendar.monthrange(year, month)[1] for year in (2023, 2024)}
        assert {int(d) for d in re.findall(r"\d+", entity["days"])} == days
    numbers = [int(e["number"]) for e in facts["elements"]]
    assert numbers == sorted(set(numbers))
    assert all(re.fullmatch("“[A-Z][a-z]?”", e["symbol"]) for e in facts["elements"])
    assert len(facts["provinces"]) == 31
