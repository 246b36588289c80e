"""The two editions: the same code and outputs, and text that says the same in two languages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
ENGLISH = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in ENGLISH]
PAGES = [("README.md", "README.zh-CN.md"), ("docs/questions.md", "docs/questions.zh-CN.md")]
PAGES.append(("docs/answers.md", "docs/answers.zh-CN.md"))
HAN = r"\u4e00-\u9fff"


def edition(name, language):
    path = ROOT / "notebooks" / ("zh" if language == "zh" else "") / name
    return nbformat.read(path, as_version=4).cells


def pairs(name):
    """Yield the pairs of text cells."""
    for english, chinese in zip(edition(name, "en"), edition(name, "zh"), strict=True):
        if english.cell_type == "markdown":
            yield english, chinese


def written(text):
    """Return a text without blocks of code and the table that a program writes in English."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"<!-- benchmarks: begin -->.*?<!-- benchmarks: end -->", "", text, flags=re.S)


def prose(text):
    """Return a text without code, links' targets and what is quoted of HTML."""
    text = re.sub(r"<[^>]*>", "", written(text))
    text = re.sub(r"`[^`]*`", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def numbers(text):
    return set(re.findall(r"\d[\d,.]*\d|\d", text))


def links(text, folder):
    """Return where links lead: in the repository as paths, in one language for both."""
    found = set()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            target = str((folder / target).resolve().relative_to(ROOT))
        found.add(target.replace("notebooks/zh/", "notebooks/").replace(".zh-CN.md", ".md"))
    return found


def glossary():
    """Yield the English names, the Chinese name and rejected Chinese names of each term."""
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] not in ("English", "---"):
            names = [part.strip() for part in re.sub(r"\(.*\)", "", cells[0]).split(",")]
            chinese = cells[4].split("；")[0].split("、")
            yield names, re.sub(r"（.*）", "", cells[1]), chinese


TERMS = list(glossary())


def without_pictures(cell):
    """Return a cell as text, with a word in place of each picture: their labels may be Chinese."""
    return re.sub(r"(\"image/png\": \")[^\"]*", r"\1a picture", json.dumps(cell, sort_keys=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_cells_in_the_same_order(name):
    english, chinese = edition(name, "en"), edition(name, "zh")
    assert [(c.id, c.cell_type) for c in english] == [(c.id, c.cell_type) for c in chinese]
    for one, other in zip(english, chinese, strict=True):
        if one.cell_type == "code":
            assert without_pictures(one) == without_pictures(other), one.id  # outputs and all


@pytest.mark.parametrize("name", NAMES)
def test_every_text_is_chinese(name):
    for english, chinese in pairs(name):
        text = prose(chinese.source)
        assert chinese.source != english.source, chinese.id
        # Not a sentence left: no more than a few Latin words in a row.
        assert len(re.findall(f"[{HAN}]", text)) > len(re.findall("[A-Za-z]", text)) / 2, chinese.id
        assert not re.search(r"(?:\b[a-z]{2,}\b[ ,]+){5}", text), chinese.id


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_links_are_the_same(name):
    folder = ROOT / "notebooks"
    for english, chinese in pairs(name):
        assert numbers(english.source) == numbers(chinese.source), chinese.id
        here, there = links(english.source, folder), links(chinese.source, folder / "zh")
        assert here == there, chinese.id


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cells_lead_to_each_other(name):
    assert f"[中文](zh/{name})" in edition(name, "en")[0].source
    assert f"[English](../{name})" in edition(name, "zh")[0].source


@pytest.mark.parametrize("english, chinese", PAGES)
def test_pages_have_editions_as_full_as_they_are(english, chinese):
    one, other = ((ROOT / name).read_text(encoding="utf-8") for name in (english, chinese))
    assert f"]({Path(chinese).name})" in one and f"]({Path(english).name})" in other
    assert one.count("\n#") == other.count("\n#") and one.count("\n|") == other.count("\n|")
    assert numbers(prose(one)) == numbers(prose(other))
    folder = (ROOT / english).parent
    assert links(one, folder) == links(other, folder)
    assert len(re.findall(f"[{HAN}]", prose(other))) > len(re.findall("[A-Za-z]", prose(other))) / 2


def chinese_texts():
    for name in NAMES:
        for _, cell in pairs(name):
            yield f"{name} {cell.id}", cell.source
    for _, name in PAGES:
        yield name, (ROOT / name).read_text(encoding="utf-8")


def test_terms_have_one_chinese_name():
    for where, text in chinese_texts():
        for _, chinese, others in TERMS:
            for other in others:
                assert other not in prose(text), f"{where}: {other} instead of {chinese}"


@pytest.mark.parametrize("name", NAMES)
def test_where_a_term_stands_in_english_its_name_stands_in_chinese(name):
    for english, chinese in pairs(name):
        for names, term, _ in TERMS:
            pattern = "|".join(rf"\b{re.escape(word)}s?\b" for word in names)
            if re.search(pattern, prose(english.source), re.IGNORECASE):
                assert term in chinese.source, f"{chinese.id}: {names[0]}"


def linked_terms(text):
    """Return the terms that link to the glossary, all of which it has, by their first names."""
    rows = {name.lower(): names[0] for names, chinese, _ in TERMS for name in (*names, chinese)}
    rows["注意力头"] = "head"  # by its full name
    links = re.findall(r"\[\**([^]*]+)\**\]\([./]*docs/glossary\.md[^)]*\)", text)
    terms = {term if term in rows else term.removesuffix("s") for term in map(str.lower, links)}
    terms -= {"glossary", "术语表"}
    assert terms <= set(rows), f"not in the glossary: {terms - set(rows)}"
    return {rows[term] for term in terms}


@pytest.mark.parametrize("name", NAMES)
def test_terms_that_link_to_the_glossary_are_in_it_and_the_same_in_both_editions(name):
    for english, chinese in pairs(name):
        assert linked_terms(english.source) == linked_terms(chinese.source), english.id


def test_rejected_english_names_are_not_used():
    """In code, notebooks and pages; "word" is right where no token is meant."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rejected = re.findall(r"；([^|]+?) *\|$", text, flags=re.MULTILINE)
    names = [name for found in rejected for name in found.split(", ")]
    assert {"word", "twin", "leap", "training half"} <= set(names)
    pattern = re.compile(rf"\b({'|'.join(names)})s?\b", re.IGNORECASE)
    paths = [*(ROOT / "tinytrain").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    paths += [*ENGLISH, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/questions.md"]
    paths.append(ROOT / "docs/answers.md")
    for path in paths:
        cells = edition(path.name, "en") if path.suffix == ".ipynb" else []
        text = "\n".join(cell.source for cell in cells) or path.read_text(encoding="utf-8")
        text = re.sub(r"common words|Rare Words|word for word|not words", "", text)
        if path.name.startswith("03_"):  # cuts words into tokens, and means both
            text = re.sub(r"(?i)\bwords?\b", "", text)
        assert not pattern.search(text), f"{path.name}: {pattern.search(text)[0]}"


def test_every_term_of_the_glossary_is_used():
    texts = "".join(text for _, text in chinese_texts())
    assert not [term for _, term, _ in TERMS if term not in texts]


def test_chinese_punctuation_and_spaces():
    """Full-width punctuation, a space between Chinese and Latin, and bold that does get bold."""
    for where, text in chinese_texts():
        words = prose(text)
        for wrong in (rf"[{HAN}][,;:?!]", rf"[{HAN}]\.(\s|$)", rf"[,;:?!(][{HAN}]", rf"[{HAN}]\("):
            assert not re.search(wrong, words), f"{where}: {re.search(wrong, words)}"
        tight = rf"[{HAN}][A-Za-z0-9`]|[A-Za-z0-9%`][{HAN}]"
        for line in written(text).splitlines():
            # A code span counts as Latin text; within it nothing is looked at.
            plain = re.sub(r"`[^`]*`", "`x`", re.sub(r"\]\([^)]*\)", "]", line))
            found = re.search(tight, plain)
            assert not found, f"{where}: {found[0]!r} in {line}"


def test_bold_is_closed_where_a_reader_sees_it():
    from markdown_it import MarkdownIt

    for where, text in chinese_texts():
        html = MarkdownIt().enable("table").render(text)
        html = re.sub(r"<(pre|code)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
        assert "**" not in html, f"{where}: {html[html.index('**') - 40 : html.index('**') + 40]}"


def test_sync_carries_code_and_outputs_and_keeps_the_chinese(tmp_path):
    """On a copy: a changed cell, an output, a new text cell, one that is gone, and a picture."""
    folder = tmp_path / "notebooks"
    (folder / "zh").mkdir(parents=True)
    source = ROOT / "notebooks"
    for name in ("sync.py", NAMES[0], f"zh/{NAMES[0]}"):
        (folder / name).write_bytes((source / name).read_bytes())
    english = nbformat.read(folder / NAMES[0], as_version=4)
    before = nbformat.read(folder / "zh" / NAMES[0], as_version=4)
    for notebook, picture in ((english, "ours"), (before, "drawn")):
        data = {"image/png": picture, "text/plain": picture}
        notebook.cells[4].outputs = [nbformat.v4.new_output("display_data", data)]
    nbformat.write(before, folder / "zh" / NAMES[0])
    english.cells[2].source += "  # changed"
    english.cells[2].outputs = []
    new = nbformat.v4.new_markdown_cell("Something new.")
    english.cells[5] = new
    nbformat.write(english, folder / NAMES[0])

    command = [sys.executable, str(folder / "sync.py")]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1 and f"cell {new.id} is still in English" in shown.stdout
    after = nbformat.read(folder / "zh" / NAMES[0], as_version=4).cells
    assert after[2] == english.cells[2]
    assert after[4].outputs[0].data == {"image/png": "drawn", "text/plain": "ours"}
    assert after[5].source == "Something new."
    assert [c.source for c in after[6:]] == [c.source for c in before.cells[6:]]
    assert after[0].source == before.cells[0].source


@pytest.mark.parametrize("page", ["docs/questions.md", "docs/questions.zh-CN.md"])
def test_the_lines_that_are_explained_are_those_that_are_printed(page):
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tinytrain").rglob("*.py"))
    code = re.sub(r"%s|%d|%\.\w+|\{[^{}]*\}", "…", code)
    table = (ROOT / page).read_text(encoding="utf-8").split("\n## ")[-1]
    lines = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(lines) == 11
    for line in lines:
        for part in re.split(r"…(?:/…)?", line.replace("checkpoint-", "")):
            assert part.strip(" ;:") in code, part
