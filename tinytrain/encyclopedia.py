"""A small Chinese encyclopedia, written by a program from a table of facts.

A model of a few million parameters cannot learn the world from the few minutes of training that a
laptop affords, but it can learn a small world that is told often enough. So this text trades
breadth for repetition: some 1,700 true facts, each stated dozens of times in varying words and
varying company. A held-out article then holds known facts in sentences not seen together
before, and `cloze_questions` can ask what was learned. The price: it is a generated text, with
the sameness of one, and losses on it say nothing about losses on real prose.

Facts live in ``data/encyclopedia.json``, phrasings live here. Names of territories, currencies and
languages come from the Unicode CLDR; they are frozen in the table because CLDR releases differ.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

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
    says: tuple[str, ...]
    asks: tuple[str, ...]
    cloze: bool = False
    weight: int = 1


class _Domain(NamedTuple):
    """How to talk about one kind of thing, and the kinds of facts told about it."""

    noun: str
    pronouns: tuple[str, ...]
    opens: tuple[str, ...]
    fields: dict[str, _Field]


_DOMAINS: dict[str, _Domain] = {
    "countries": _Domain(
        "国家",
        ("这个国家", "该国", "它"),
        (
            "{name}是世界上的一个国家。",
            "这一篇介绍的国家是{name}。",
            "让我们一起认识{name}这个国家。",
        ),
        {
            "capital": _Field(
                "首都",
                "首都是{capital}",
                (
                    "{name}的首都是{capital}。",
                    "{capital}是{name}的首都。",
                    "{name}的首都叫做{capital}。",
                    "{name}把首都设在{capital}。",
                    "要问{name}的首都在哪儿，那就是{capital}。",
                ),
                (
                    "问：{name}的首都叫什么名字？答：{capital}。",
                    "问：哪座城市是{name}的首都？答：{name}的首都是{capital}。",
                    "问：{capital}是哪个国家的首都？答：{name}。",
                ),
                True,
                3,
            ),
            "currency": _Field(
                "货币",
                "货币是{currency}",
                (
                    "{name}的货币是{currency}。",
                    "{name}使用的货币叫做{currency}。",
                    "在{name}买东西要用{currency}。",
                    "人们在{name}付钱时使用{currency}。",
                    "{name}流通的钱币是{currency}。",
                ),
                (
                    "问：{name}使用什么货币？答：{currency}。",
                    "问：去{name}旅行要换哪种钱？答：{name}的货币是{currency}。",
                ),
                True,
                2,
            ),
            "continent": _Field(
                "所在的大洲",
                "位于{continent}",
                (
                    "{name}位于{continent}。",
                    "{name}是{continent}的一个国家。",
                    "从地图上看，{name}在{continent}。",
                    "{continent}有许多国家，{name}是其中之一。",
                ),
                (
                    "问：{name}在哪个大洲？答：{continent}。",
                    "问：{name}属于哪个大洲？答：{name}位于{continent}。",
                ),
            ),
            "region": _Field(
                "所在的地区",
                "地处{region}",
                (
                    "{name}地处{region}。",
                    "说得更细一些，{name}在{region}。",
                    "{name}属于{region}国家。",
                ),
                ("问：{name}地处哪个地区？答：{region}。",),
            ),
            "coast": _Field(
                "地理类型",
                "是一个{coast}",
                (
                    "{name}是一个{coast}。",
                    "从地理上说，{name}属于{coast}。",
                    "在地理书上，{name}被归为{coast}。",
                ),
                ("问：{name}是内陆国家、沿海国家还是岛屿国家？答：{coast}。",),
            ),
            "language": _Field(
                "官方语言",
                "官方语言是{language}",
                (
                    "{name}的官方语言是{language}。",
                    "{name}以{language}为官方语言。",
                    "在{name}，官方使用的语言是{language}。",
                    "{language}在{name}是官方语言。",
                ),
                (
                    "问：{name}的官方语言有哪些？答：{language}。",
                    "问：在{name}办事用什么语言？答：{name}的官方语言是{language}。",
                ),
                False,
                2,
            ),
        },
    ),
    "provinces": _Domain(
        "省级行政区",
        ("这里", "它", "这个地方"),
        ("{name}是中国的一个省级行政区。", "这一篇介绍{name}。", "在中国地图上可以找到{name}。"),
        {
            "capital": _Field(
                "行政中心",
                "{seat_word}是{capital}",
                (
                    "{name}的{seat_word}是{capital}。",
                    "{capital}是{name}的{seat_word}。",
                    "{name}的行政中心在{capital}市。",
                    "作为{seat_word}，{capital}是{name}的重要城市。",
                ),
                (
                    "问：{name}的{seat_word}在哪里？答：{capital}。",
                    "问：哪座城市是{name}的{seat_word}？答：{name}的{seat_word}是{capital}。",
                    "问：{capital}是哪里的{seat_word}？答：{name}。",
                ),
                True,
                3,
            ),
            "short": _Field(
                "简称",
                "简称“{short}”",
                (
                    "{name}的简称是“{short}”。",
                    "“{short}”是{name}的简称。",
                    "“{short}”可以代表{name}。",
                ),
                (
                    "问：{name}简称什么？答：{short}。",
                    "问：“{short}”指的是哪里？答：{name}。",
                ),
                False,
                2,
            ),
            "region": _Field(
                "所在的地区",
                "位于{region}地区",
                (
                    "{name}位于中国的{region}地区。",
                    "{name}属于{region}地区。",
                    "{region}地区包括{name}。",
                ),
                ("问：{name}在哪个地区？答：{region}地区。",),
            ),
            "kind": _Field(
                "类型",
                "是一个{kind}",
                ("{name}是一个{kind}。", "从行政区划上说，{name}属于{kind}这一类。"),
                ("问：{name}是哪一类行政区？答：{kind}。",),
            ),
        },
    ),
    "elements": _Domain(
        "化学元素",
        ("它", "这种元素"),
        ("{name}是一种化学元素。", "这一篇介绍化学元素{name}。", "在元素周期表里可以找到{name}。"),
        {
            "symbol": _Field(
                "元素符号",
                "元素符号是{symbol}",
                (
                    "{name}的元素符号是{symbol}。",
                    "{name}用符号{symbol}表示。",
                    "在化学式里，{symbol}代表{name}。",
                    "{symbol}是{name}的元素符号。",
                ),
                (
                    "问：{name}用什么符号表示？答：{symbol}。",
                    "问：符号{symbol}代表哪种元素？答：{name}。",
                    "问：化学家怎样写{name}？答：{name}的元素符号是{symbol}。",
                ),
                True,
                3,
            ),
            "number": _Field(
                "原子序数",
                "原子序数是{number}",
                (
                    "{name}的原子序数是{number}。",
                    "{name}排在元素周期表的第{number}位。",
                    "{name}是元素周期表里的{number}号元素。",
                    "{name}的原子核里有{number}个质子。",
                ),
                (
                    "问：{name}是几号元素？答：{number}号。",
                    "问：元素周期表的第{number}位是谁？答：{name}。",
                ),
                False,
                2,
            ),
            "kind": _Field(
                "类别",
                "属于{kind}元素",
                (
                    "{name}属于{kind}元素。",
                    "从分类上看，{name}是{kind}元素。",
                    "{name}是{kind}元素里的一员。",
                ),
                ("问：{name}属于哪一类元素？答：{kind}元素。",),
            ),
            "state": _Field(
                "常温下的状态",
                "单质在常温下呈{state}",
                (
                    "常温常压下，{name}的单质是{state}的。",
                    "{name}的单质通常呈{state}。",
                    "在普通的室温下，{name}单质呈{state}。",
                ),
                ("问：{name}单质在常温下是什么状态？答：{state}。",),
            ),
            "use": _Field(
                "用途",
                "可以用来{use}",
                (
                    "{name}可以用来{use}。",
                    "{name}的用途之一是{use}。",
                    "人们常利用{name}或者它的化合物来{use}。",
                ),
                ("问：{name}有什么用处？答：可以用来{use}。",),
            ),
        },
    ),
    "planets": _Domain(
        "行星",
        ("它", "这颗行星"),
        ("{name}是太阳系的一颗行星。", "抬头看星空，我们来认识{name}。", "这一篇介绍{name}。"),
        {
            "order": _Field(
                "离太阳的远近次序",
                "从太阳向外数是{order}颗",
                (
                    "从太阳向外数，{name}是{order}颗行星。",
                    "按照离太阳由近到远的顺序，{name}排在{order}位。",
                    "从里往外排，{name}是八大行星里的{order}颗。",
                ),
                ("问：从太阳向外数，{name}排第几？答：{order}。",),
            ),
            "kind": _Field(
                "类型",
                "属于{kind}",
                ("{name}属于{kind}。", "{name}是一颗{kind}。", "按照类型来分，{name}是{kind}。"),
                ("问：{name}是哪种行星？答：{kind}。",),
            ),
            "period": _Field(
                "公转周期",
                "公转周期是{period}",
                (
                    "{name}绕太阳转一圈需要{period}。",
                    "{name}的公转周期是{period}。",
                    "{name}公转一周要花{period}。",
                ),
                ("问：{name}多久绕太阳一圈？答：{period}。",),
            ),
            "trait": _Field(
                "特点",
                "{trait}",
                ("{name}{trait}。", "人们知道，{name}{trait}。", "说起特点，{name}{trait}。"),
                ("问：{name}有什么特点？答：它{trait}。",),
            ),
        },
    ),
    "dynasties": _Domain(
        "朝代",
        ("这个朝代", "它"),
        (
            "{name}是中国历史上的一个政权。",
            "这一篇讲{name}的历史。",
            "翻开中国历史，可以读到{name}。",
        ),
        {
            "founder": _Field(
                "建立者",
                "建立者是{founder}",
                (
                    "{name}的建立者是{founder}。",
                    "{founder}建立了{name}。",
                    "{name}由{founder}建立。",
                    "开创{name}的人是{founder}。",
                ),
                (
                    "问：谁建立了{name}？答：{founder}。",
                    "问：{founder}建立了哪个朝代？答：{name}。",
                    "问：{name}是谁开创的？答：{name}的建立者是{founder}。",
                ),
                True,
                2,
            ),
            "capital": _Field(
                "都城",
                "定都{capital}",
                (
                    "{name}的都城是{capital}。",
                    "{name}定都{capital}。",
                    "{capital}是{name}的都城。",
                    "{name}把都城设在{capital}。",
                ),
                (
                    "问：{name}定都在哪里？答：{capital}。",
                    "问：{name}的都城叫什么？答：{name}的都城是{capital}。",
                ),
                True,
                2,
            ),
            "start": _Field(
                "开始的年份",
                "建立于{start}",
                (
                    "{name}建立于{start}。",
                    "{start}，{name}建立。",
                    "{name}的历史从{start}开始。",
                ),
                ("问：{name}是哪一年建立的？答：{start}。",),
            ),
            "end": _Field(
                "结束的年份",
                "结束于{end}",
                (
                    "{name}结束于{end}。",
                    "{end}，{name}灭亡。",
                    "{name}的统治到{end}为止。",
                ),
                ("问：{name}是哪一年灭亡的？答：{end}。",),
            ),
        },
    ),
    "solar_terms": _Domain(
        "节气",
        ("它", "这个节气"),
        ("{name}是二十四节气之一。", "这一篇介绍节气{name}。", "农历里有一个节气叫{name}。"),
        {
            "order": _Field(
                "次序",
                "从立春数起是{order}个节气",
                (
                    "从立春数起，{name}是{order}个节气。",
                    "{name}在二十四节气里排{order}位。",
                ),
                ("问：{name}在二十四节气里排第几？答：{order}。",),
            ),
            "date": _Field(
                "日期",
                "在每年公历的{date}",
                (
                    "{name}在每年公历的{date}。",
                    "每年{date}是{name}。",
                    "到了{date}，{name}就来了。",
                ),
                ("问：{name}大约在哪一天？答：{date}。",),
            ),
            "season": _Field(
                "季节",
                "属于{season}",
                (
                    "{name}是{season}的节气。",
                    "{name}属于{season}。",
                    "{season}有六个节气，{name}是其中之一。",
                ),
                ("问：{name}属于哪个季节？答：{season}。",),
            ),
            "meaning": _Field(
                "含义",
                "表示{meaning}",
                (
                    "{name}表示{meaning}。",
                    "{name}的意思是{meaning}。",
                    "古人用{name}来说明{meaning}。",
                ),
                ("问：{name}表示什么？答：{meaning}。",),
            ),
            "after": _Field(
                "后面的节气",
                "下一个节气是{after}",
                (
                    "{name}的下一个节气是{after}。",
                    "{name}过后就是{after}。",
                    "{after}紧跟在{name}的后面。",
                ),
                ("问：{name}之后是什么节气？答：{after}。",),
                True,
                2,
            ),
        },
    ),
    "festivals": _Domain(
        "节日",
        ("它", "这个节日"),
        ("{name}是一个重要的日子。", "这一篇介绍{name}。", "说起节日，我们会想到{name}。"),
        {
            "date": _Field(
                "日期",
                "日期是{date}",
                (
                    "{name}的日期是{date}。",
                    "{name}在{date}。",
                    "{date}是{name}。",
                    "每到{date}，人们就迎来{name}。",
                ),
                (
                    "问：{name}在哪一天？答：{date}。",
                    "问：{date}是什么日子？答：{name}。",
                ),
                True,
                2,
            ),
            "custom": _Field(
                "习俗和意义",
                "人们会{custom}",
                (
                    "{name}的时候，人们会{custom}。",
                    "在{name}，大家常常{custom}。",
                    "到了{name}，不少人会{custom}。",
                ),
                ("问：{name}的时候人们做什么？答：{custom}。",),
                False,
                2,
            ),
        },
    ),
    "calendar": _Domain(
        "月份",
        ("它", "这个月"),
        (
            "公历的一年有十二个月，{name}是其中之一。",
            "这一篇介绍{name}。",
            "翻开日历，我们来看{name}。",
        ),
        {
            "days": _Field(
                "天数",
                "有{days}",
                ("公历{name}有{days}。", "公历的{name}一共{days}。", "{name}的天数是{days}。"),
                ("问：公历{name}有几天？答：{days}。",),
            ),
            "quarter": _Field(
                "季度",
                "属于{quarter}",
                ("{name}属于一年的{quarter}。", "{name}在{quarter}里。"),
                ("问：{name}属于哪个季度？答：{quarter}。",),
            ),
            "size": _Field(
                "大小月",
                "是{size}",
                ("按照天数，{name}是{size}。", "{name}被称为{size}。"),
                ("问：{name}是大月还是小月？答：{size}。",),
            ),
            "after": _Field(
                "后面的月份",
                "后面是{after}",
                ("{name}的后面是{after}。", "{name}过完就到{after}。", "{after}排在{name}之后。"),
                ("问：{name}之后是几月？答：{after}。",),
            ),
        },
    ),
    "units": _Domain(
        "单位",
        ("它", "这个单位"),
        (
            "{name}是国际上通用的一个单位。",
            "这一篇介绍单位{name}。",
            "在科学课上会学到{name}这个单位。",
        ),
        {
            "symbol": _Field(
                "符号",
                "符号是{symbol}",
                (
                    "单位{name}的符号是{symbol}。",
                    "单位{name}用{symbol}表示。",
                    "符号{symbol}表示单位{name}。",
                ),
                ("问：单位{name}怎样写成符号？答：{symbol}。",),
            ),
            "quantity": _Field(
                "所量的量",
                "是{quantity}的国际单位",
                (
                    "{quantity}的国际单位是{name}。",
                    "{name}是{quantity}的国际单位。",
                    "测量{quantity}时使用的国际单位是{name}。",
                ),
                (
                    "问：{name}是什么的单位？答：{quantity}。",
                    "问：{quantity}用什么国际单位？答：{name}。",
                ),
                False,
                2,
            ),
            "honours": _Field(
                "名称的来历",
                "名称用来纪念{honours}",
                (
                    "单位{name}的名称用来纪念{honours}。",
                    "为了纪念{honours}，人们把这个单位命名为{name}。",
                ),
                ("问：单位{name}纪念谁？答：{honours}。",),
            ),
        },
    ),
    "zodiac": _Domain(
        "生肖",
        ("它", "这个生肖"),
        ("{name}是十二生肖之一。", "十二生肖里有{name}。", "这一篇介绍生肖{name}。"),
        {
            "order": _Field(
                "次序",
                "排在{order}位",
                ("生肖{name}排在{order}位。", "在十二生肖里，{name}是{order}个。"),
                ("问：生肖{name}排第几？答：{order}。",),
            ),
            "branch": _Field(
                "地支",
                "对应的地支是{branch}",
                ("生肖{name}对应的地支是{branch}。", "地支{branch}和生肖{name}相配。"),
                ("问：生肖{name}配哪个地支？答：{branch}。",),
            ),
            "after": _Field(
                "后面的生肖",
                "后面是{after}",
                ("{name}年的下一年是{after}年。", "过了{name}年就是{after}年。"),
                ("问：{name}年之后是什么年？答：{after}年。",),
            ),
        },
    ),
    "branches": _Domain(
        "地支",
        ("它", "这个地支"),
        ("{name}是十二地支之一。", "古人用十二地支计时，{name}是其中之一。"),
        {
            "order": _Field(
                "次序",
                "排在{order}位",
                ("地支{name}排在{order}位。", "在十二地支里，{name}是{order}个。"),
                ("问：地支{name}排第几？答：{order}。",),
            ),
            "hours": _Field(
                "时辰",
                "{hour}相当于{hours}",
                (
                    "古代的{hour}相当于现在的{hours}。",
                    "{hour}指的是{hours}这两个小时。",
                    "{hours}在古代叫做{hour}。",
                ),
                ("问：{hour}是几点到几点？答：{hours}。",),
                False,
                2,
            ),
            "animal": _Field(
                "生肖",
                "对应的生肖是{animal}",
                ("地支{name}对应的生肖是{animal}。", "生在{name}年的人属{animal}。"),
                ("问：{name}年出生的人属什么？答：属{animal}。",),
            ),
        },
    ),
    "rivers": _Domain(
        "河流",
        ("它", "这条河"),
        ("{name}是一条著名的河流。", "这一篇介绍{name}。", "跟着流水，我们来认识{name}。"),
        {
            "continent": _Field(
                "所在的大洲",
                "在{continent}",
                (
                    "{name}在{continent}。",
                    "{name}是{continent}的河流。",
                    "{continent}有许多大河，比如{name}。",
                ),
                ("问：{name}在哪个大洲？答：{continent}。",),
            ),
            "mouth": _Field(
                "注入的水域",
                "最后流入{mouth}",
                (
                    "{name}最后流入{mouth}。",
                    "{name}的河水注入{mouth}。",
                    "{mouth}接纳了{name}的河水。",
                ),
                (
                    "问：{name}流到哪里去？答：{name}最后流入{mouth}。",
                    "问：{name}注入哪片水域？答：{mouth}。",
                ),
                True,
                2,
            ),
            "trait": _Field(
                "特点",
                "{trait}",
                ("{name}{trait}。", "人们知道，{name}{trait}。"),
                ("问：{name}有什么特点？答：它{trait}。",),
            ),
        },
    ),
    "mountains": _Domain(
        "名山",
        ("它", "这座山"),
        ("{name}是一座有名的山。", "这一篇介绍{name}。", "很多人都听说过{name}。"),
        {
            "place": _Field(
                "所在地",
                "位于{place}",
                ("{name}位于{place}。", "{name}在{place}境内。", "想看{name}，可以到{place}去。"),
                (
                    "问：{name}在哪里？答：{place}。",
                    "问：到哪里可以看到{name}？答：{name}位于{place}。",
                ),
                True,
                2,
            ),
            "trait": _Field(
                "特点",
                "{trait}",
                ("{name}{trait}。", "人们知道，{name}{trait}。", "说起特点，{name}{trait}。"),
                ("问：{name}有什么特点？答：它{trait}。",),
            ),
        },
    ),
    "landmarks": _Domain(
        "名胜",
        ("它", "这处名胜"),
        ("{name}是一个有名的地方。", "这一篇介绍{name}。", "每年都有很多人去参观{name}。"),
        {
            "place": _Field(
                "所在地",
                "位于{place}",
                (
                    "{name}位于{place}。",
                    "{name}就在{place}。",
                    "到{place}旅行可以参观{name}。",
                    "{place}有一处名胜叫{name}。",
                ),
                (
                    "问：{name}在哪里？答：{place}。",
                    "问：到哪里可以参观{name}？答：{name}位于{place}。",
                ),
                True,
                2,
            ),
            "trait": _Field(
                "特点",
                "{trait}",
                ("{name}{trait}。", "人们知道，{name}{trait}。", "说起特点，{name}{trait}。"),
                ("问：{name}有什么特点？答：它{trait}。",),
            ),
        },
    ),
    "works": _Domain(
        "作品",
        ("这部作品", "它"),
        ("{name}是一部有名的作品。", "这一篇介绍{name}。", "许多人都读过{name}。"),
        {
            "author": _Field(
                "作者",
                "作者是{author}",
                (
                    "{name}的作者是{author}。",
                    "{author}写了{name}。",
                    "{name}出自{author}之手。",
                    "写下{name}的人是{author}。",
                ),
                (
                    "问：谁写了{name}？答：{author}。",
                    "问：{author}写过什么作品？答：{name}。",
                    "问：{name}是谁的作品？答：{name}的作者是{author}。",
                ),
                True,
                3,
            ),
            "era": _Field(
                "时代",
                "写于{era}",
                (
                    "{name}是{era}的作品。",
                    "{name}写于{era}。",
                    "{era}的{author}写下了{name}。",
                ),
                ("问：{name}写于什么时代？答：{era}。",),
            ),
        },
    ),
    "discoveries": _Domain(
        "发现和发明",
        ("这项成果",),
        ("{name}在科学技术史上很有名。", "这一篇介绍{name}。", "科学书上常常讲到{name}。"),
        {
            "person": _Field(
                "人物",
                "由{person}{verb}",
                (
                    "{verb}{name}的人是{person}。",
                    "{person}{verb}了{name}。",
                    "{name}由{person}{verb}。",
                    "说到{name}，人们会想起{person}。",
                ),
                (
                    "问：谁{verb}了{name}？答：{person}。",
                    "问：{person}有什么成就？答：{verb}了{name}。",
                    "问：{name}和谁有关？答：{verb}{name}的人是{person}。",
                ),
                True,
                3,
            ),
            "origin": _Field(
                "人物的国籍",
                "{person}来自{origin}",
                (
                    "{verb}{name}的{person}来自{origin}。",
                    "{person}来自{origin}，他{verb}了{name}。",
                ),
                ("问：{verb}{name}的{person}来自哪里？答：{origin}。",),
            ),
        },
    ),
    "idioms": _Domain(
        "成语故事",
        ("这个成语",),
        ("{name}是一个有故事的成语。", "这一篇讲成语{name}。", "我们来学习成语{name}。"),
        {
            "person": _Field(
                "主人公",
                "主人公是{person}",
                (
                    "成语{name}的主人公是{person}。",
                    "{name}讲的是{person}的故事。",
                    "{person}的故事留下了成语{name}。",
                    "和成语{name}有关的人物是{person}。",
                ),
                (
                    "问：成语{name}和谁有关？答：{person}。",
                    "问：{name}讲谁的故事？答：成语{name}的主人公是{person}。",
                ),
                True,
                3,
            ),
            "era": _Field(
                "时代",
                "故事发生在{era}",
                ("{name}的故事发生在{era}。", "成语{name}出自{era}的故事。"),
                ("问：{name}的故事发生在什么时候？答：{era}。",),
            ),
            "meaning": _Field(
                "意思",
                "形容{meaning}",
                ("{name}形容{meaning}。", "人们用{name}来形容{meaning}。"),
                ("问：{name}形容什么？答：{meaning}。",),
            ),
        },
    ),
    "animals": _Domain(
        "动物",
        ("它", "这种动物"),
        ("{name}是一种有趣的动物。", "这一篇介绍{name}。", "在动物世界里，我们来认识{name}。"),
        {
            "group": _Field(
                "类别",
                "属于{group}",
                ("{name}属于{group}。", "按照分类，{name}是{group}。", "{group}里有{name}。"),
                ("问：{name}是哪一类动物？答：{group}。",),
            ),
            "food": _Field(
                "食物",
                "主要吃{food}",
                (
                    "{name}主要吃{food}。",
                    "{name}喜欢的食物是{food}。",
                    "{food}是{name}的主要食物。",
                ),
                ("问：{name}吃什么？答：{food}。",),
            ),
            "trait": _Field(
                "特点",
                "{trait}",
                ("{name}{trait}。", "人们知道，{name}{trait}。", "说起特点，{name}{trait}。"),
                ("问：{name}有什么特点？答：它{trait}。",),
            ),
        },
    ),
}

_LINKS = ("另外，", "同时，", "此外，", "我们还知道，", "请记住，", "值得一提的是，")
_TURNS = (
    "再来看看{name}。",
    "接着说说{name}。",
    "同样可以了解一下{name}。",
    "和它放在一起读的还有{name}。",
    "下面再说{name}。",
)
_QUIZ_OPENS = (
    "关于{noun}的小问答。",
    "下面是几个和{noun}有关的问题。",
    "老师在课上问了一些关于{noun}的问题。",
    "我们用一问一答来复习{noun}。",
    "想一想，你能答出这些关于{noun}的问题吗？",
)
_COMPARE_OPENS = (
    "我们来比较{a}和{b}。",
    "{a}和{b}有什么不同？",
    "把{a}和{b}放在一起看，会更容易记住。",
    "{a}与{b}都是书里常讲的内容。",
)
_LIST_OPENS = (
    "这一段专门说{noun}的{label}。",
    "怎样记住{noun}的{label}？先看下面的例子。",
    "说到{noun}的{label}，可以举出很多例子。",
    "我们按{label}来认识一些{noun}。",
)
_NOTE_OPENS = (
    "这里有一些关于{noun}的小知识。",
    "今天的小知识和{noun}有关。",
    "读书笔记：{noun}。",
    "下面几句话介绍了一些{noun}。",
    "小明把学到的{noun}知识记在了本子上。",
)
_CLOSES = (
    "这些知识很有用。",
    "多读几遍就能记住。",
    "你记住了吗？",
    "以上就是这一篇的内容。",
    "有兴趣的话，可以继续读别的文章。",
)


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


def _load_facts() -> dict[str, list[_Entity]]:
    table = resources.files("tinytrain") / "data" / "encyclopedia.json"
    return json.loads(table.read_text(encoding="utf-8"))


class _Writer:
    """The decks of one domain, and the kinds of article that draw from them.

    Each kind returns the parts of an article of about `target` characters.
    """

    def __init__(self, rnd: random.Random, domain: _Domain, entities: list[_Entity]) -> None:
        self.rnd, self.domain, self.entities = rnd, domain, entities
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
        self.phrases: dict[tuple[str, str, bool], Iterator[str]] = {}

    def _phrase(self, entity: _Entity, key: str, ask: bool) -> str:
        """Deal the phrasings of each single fact evenly, the plain one twice as often."""
        deck = self.phrases.get((entity["name"], key, ask))
        if deck is None:
            field = self.domain.fields[key]
            deck = _deck(self.rnd, field.asks if ask else (field.says[0], *field.says))
            self.phrases[entity["name"], key, ask] = deck
        return next(deck)

    def say(self, entity: _Entity, key: str, pronoun: bool = False, link: bool = False) -> str:
        template = self._phrase(entity, key, ask=False)
        plain = template == self.domain.fields[key].says[0]
        subject_first = template.startswith("{name}")
        if pronoun and subject_first and not plain and self.rnd.random() < 0.5:
            template = _pick(self.rnd, self.domain.pronouns) + template.removeprefix("{name}")
        if link and subject_first and self.rnd.random() < 0.25:
            template = _pick(self.rnd, _LINKS) + template
        return template.format(**entity)

    def ask(self, entity: _Entity, key: str) -> str:
        return self._phrase(entity, key, ask=True).format(**entity)

    def keys(self, entity: _Entity) -> list[str]:
        return _shuffled(self.rnd, [k for k in self.domain.fields if k in entity])

    def another(self, *taken: _Entity) -> _Entity:
        return next(e for e in self.others if all(e is not t for t in taken))

    def article(self) -> str:
        target = 165 + _below(self.rnd, 150)
        parts = getattr(self, next(self.kinds))(target)
        if self.rnd.random() < 0.25:
            parts.append(_pick(self.rnd, _CLOSES))
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
                parts.append(_pick(self.rnd, _TURNS).format(**taken[-1]))
            parts += self.tell(taken[-1])
        return parts

    def quiz(self, target: int) -> list[str]:
        parts = [_pick(self.rnd, _QUIZ_OPENS).format(noun=self.domain.noun)]
        while sum(map(len, parts)) < target:
            question = "\n" + self.ask(*next(self.facts))
            if question not in parts:
                parts.append(question)
        return [*parts, "\n"]

    def notes(self, target: int) -> list[str]:
        parts = [_pick(self.rnd, _NOTE_OPENS).format(noun=self.domain.noun)]
        while sum(map(len, parts)) < target:
            sentence = self.say(*next(self.facts), link=len(parts) > 1)
            if sentence not in parts:
                parts.append(sentence)
        return parts

    def listing(self, target: int) -> list[str]:
        _, key = next(self.facts)
        label = self.domain.fields[key].label
        parts = [_pick(self.rnd, _LIST_OPENS).format(noun=self.domain.noun, label=label)]
        for other in _shuffled(self.rnd, [e for e in self.entities if key in e]):
            if sum(map(len, parts)) >= target:
                break
            parts.append(self.say(other, key))
        return parts

    def compare(self, target: int) -> list[str]:
        a = next(self.leads)
        b = self.another(a)
        parts = [_pick(self.rnd, _COMPARE_OPENS).format(a=a["name"], b=b["name"])]
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
            parts.append(
                _pick(self.rnd, ("再比较{a}和{b}。", "{a}和{b}又怎么样呢？")).format(
                    a=a["name"], b=b["name"]
                )
            )


_CONVERSIONS = (
    ("米", "厘米", 100),
    ("千米", "米", 1000),
    ("千克", "克", 1000),
    ("吨", "千克", 1000),
    ("小时", "分钟", 60),
    ("分钟", "秒", 60),
    ("天", "小时", 24),
    ("个星期", "天", 7),
    ("元", "角", 10),
    ("升", "毫升", 1000),
)


def _arithmetic_article(rnd: random.Random) -> str:
    target = 165 + _below(rnd, 150)
    parts = [
        _pick(
            rnd,
            (
                "一起来做算术题。",
                "这一段练习口算。",
                "小明在算术本上写了这些算式。",
                "数学小练习。",
            ),
        )
    ]
    while sum(map(len, parts)) < target:
        kind = _below(rnd, 5)
        a, b = 1 + _below(rnd, 60), 1 + _below(rnd, 39)
        c, d = 1 + _below(rnd, 9), 1 + _below(rnd, 9)
        if kind == 0:
            s = (
                f"{a}加{b}等于{a + b}。",
                f"{a}和{b}的和是{a + b}。",
                f"问：{a}加{b}是多少？答：{a + b}。",
            )
        elif kind == 1:
            s = (
                f"{a + b}减{b}等于{a}。",
                f"{a + b}比{b}大{a}。",
                f"问：{a + b}减去{b}还剩多少？答：{a}。",
            )
        elif kind == 2:
            s = (
                f"{c}乘{d}等于{c * d}。",
                f"{c}个{d}是{c * d}。",
                f"问：{c}乘以{d}得多少？答：{c * d}。",
            )
        elif kind == 3:
            d = max(d, 2)
            s = (f"{c * d}除以{d}等于{c}。", f"把{c * d}平均分成{d}份，每份是{c}。")
        else:
            big, small, k = _pick(rnd, _CONVERSIONS)
            s = (f"{c}{big}等于{c * k}{small}。", f"{c * k}{small}就是{c}{big}。")
        parts.append(_pick(rnd, s))
    return "".join(parts)


_ABOUT = (
    "关于这部百科\n这部小百科不是由人一篇一篇写成的，而是由一个程序生成的。程序有一张事实表，"
    "表里记着国家的首都、元素的符号、朝代的建立者等等；它还有许多句式，把同一个事实用不同的话说出来，"
    "再把这些句子排成文章。所以书里的内容是真实的，写法却有些重复。"
    "它的用处是让一个很小的语言模型在几分钟里学会一点东西，并不能代替真正的百科全书。"
)


def build_encyclopedia(seed: int = 2222) -> list[dict[str, str]]:
    """Write the articles of the encyclopedia.

    Parameters
    ----------
    seed : int
        Chooses the words and the order. The same seed gives the same articles on every platform.

    Returns
    -------
    list of dict
        Articles as ``{"completion": text, "source": "tinytrain:<domain>"}``, shuffled.

    Examples
    --------
    >>> articles = build_encyclopedia()
    >>> sorted(articles[0])
    ['completion', 'source']
    """
    rnd = random.Random(seed)
    writers = {n: _Writer(rnd, _DOMAINS[n], entities) for n, entities in _load_facts().items()}
    total = sum(writer.size for writer in writers.values())
    articles = [("about", _ABOUT)]
    for name, writer in writers.items():
        # As many articles as a domain has facts to tell, so that all facts are told equally often.
        count = round(_FACT_ARTICLES * writer.size / total)
        articles += [(name, writer.article()) for _ in range(count)]
    articles += [("arithmetic", _arithmetic_article(rnd)) for _ in range(_ARITHMETIC_ARTICLES)]
    unique = dict.fromkeys(_shuffled(rnd, articles))
    return [{"completion": text, "source": f"tinytrain:{name}"} for name, text in unique]


def write_encyclopedia(path: str | os.PathLike[str], seed: int = 2222) -> Path:
    """Write the encyclopedia as a JSON array, one article a line.

    Parameters
    ----------
    path : path-like
        File to write; missing parent folders are made.
    seed : int
        As in `build_encyclopedia`.

    Returns
    -------
    pathlib.Path
        The file, UTF-8 with line feeds as line ends: the same bytes everywhere for the same seed.

    Raises
    ------
    IsADirectoryError
        If `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write.")
    lines = [json.dumps(a, ensure_ascii=False) for a in build_encyclopedia(seed)]
    data = ("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("Wrote %d articles to %s", len(lines), path)
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
    questions = []
    for name, entities in _load_facts().items():
        for key, field in _DOMAINS[name].fields.items():
            if not field.cloze:
                continue
            before = field.says[0].partition("{" + key + "}")[0]
            for entity in entities:
                prompt, answer = before.format(**entity), entity.get(key, "")
                if len(answer) > 1 and answer not in prompt:
                    questions.append(Question(prompt, answer, name))
    return questions
