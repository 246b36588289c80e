"""The built-in encyclopedia: same bytes everywhere, true facts, questions it can answer."""

import calendar
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import resources

import pytest
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from tinytrain.encyclopedia import build_encyclopedia, cloze_questions, write_encyclopedia

# Changes with every edit of facts or phrases, and must change with nothing else.
SHA256 = "234961b54fc181b52195bc9425b167ca48cf5bce38d692251cd893b5147a1014"


@pytest.fixture(scope="module")
def articles():
    return build_encyclopedia()


@pytest.fixture(scope="module")
def text(articles):
    return "\n\n".join(article["completion"] for article in articles)


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
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        write_encyclopedia(tmp_path)


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


def test_questions_are_many_unique_and_answered_by_the_text_alone(text):
    questions = cloze_questions()
    assert questions == cloze_questions()
    assert len({q.prompt for q in questions}) == len(questions) >= 240
    assert len({q.domain for q in questions}) >= 6
    for q in questions:
        assert len(q.answer) >= 2 and q.answer not in q.prompt and q.domain != "arithmetic"
        # Answered often, and only in one way.
        asked, answered = text.count(q.prompt), text.count(q.prompt + q.answer)
        assert answered >= 3, q
        assert asked == answered, f"something else follows {q.prompt!r}"


def test_questions_facts_stand_in_other_words_too(articles, facts):
    sentences = {}
    for article in articles:
        domain = article["source"].removeprefix("tinytrain:")
        sentences.setdefault(domain, []).extend(re.split("[。\n]", article["completion"]))
    for q in cloze_questions():
        # The entity a question is about: it stands at the start of the prompt, or after a cue.
        (entity,) = [
            e["name"]
            for e in facts[q.domain]
            if q.answer in e.values()
            and re.search(rf"(^|发现|发明|提出|创立|成语){e['name']}", q.prompt)
        ]
        other = [s for s in sentences[q.domain] if entity in s and q.answer in s]
        assert len(other) >= 12, q
        assert sum(q.prompt not in s for s in other) >= 5, q


WELL_KNOWN_FACTS = """
法国的首都是巴黎。 日本的货币是日元。 加拿大的首都是渥太华。 澳大利亚的首都是堪培拉。
巴西的首都是巴西利亚。 巴西的官方语言是葡萄牙语。 埃及位于非洲。 蒙古是一个内陆国家。
广东省的省会是广州。 新疆维吾尔自治区的首府是乌鲁木齐。 山东省的简称是“鲁”。
铁的元素符号是Fe。 金的原子序数是79。 常温常压下，汞的单质是液态的。
木星是太阳系中最大的行星。 唐朝的建立者是李渊。 明朝建立于公元1368年。
冬至的下一个节气是小寒。 中秋节的日期是农历八月十五。 公历四月有30天。
力的国际单位是牛顿。 地支午对应的生肖是马。 尼罗河最后流入地中海。 泰山位于山东省。
莫高窟位于甘肃敦煌。 《红楼梦》的作者是曹雪芹。 发现青蒿素的人是屠呦呦。
成语“卧薪尝胆”的主人公是勾践。 鲸属于哺乳动物。
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
    told = set(re.findall(r"\b而?(\w+)的首都是(\w+)", text)) | {
        (country, city) for city, country in re.findall(r"(\w+)是(\w+)的首都。", text)
    }
    assert told == set(capital.items())


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
    assert all(re.fullmatch("[A-Z][a-z]?", e["symbol"]) for e in facts["elements"])
    assert len(facts["provinces"]) == 31
