"""Tests of loading, checking and splitting text."""

import gzip
import json
import logging
import lzma
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytrain import corpus, steps
from tinytrain.__main__ import _parse_change
from tinytrain.corpus import document_lengths, load_documents, plot_lengths, split_documents
from tinytrain.recipes import RECIPES

# With all that Python, but not JSON, takes for the end of a line.
TEXTS = ["春眠不觉晓，处处闻啼鸟。", 'one\n"two" \\', "\0夜来\v\f\x1c\x85风雨声\u2028花落知多少 😀"]


def write(path, content):
    """Write text or bytes, compressed as the suffix says."""
    content = content.encode() if isinstance(content, str) else content
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content)
    return path


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("name", ["a.json", "lines.json", "a.jsonl", "a.ndjson", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name, compression):
    rows = [{"completion": text, "source": f"s{i}"} for i, text in enumerate(TEXTS)]
    content = {
        "a.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "a.parquet": as_parquet({"completion": TEXTS, "source": ["s0", "s1", "s2"], "n": [1] * 3}),
    }.get(name, as_lines(rows))
    documents = load_documents(write(tmp_path / (name + compression), content))
    assert documents.to_dict() == {"text": TEXTS, "source": ["s0", "s1", "s2"]}


@pytest.mark.parametrize(
    "content, texts",
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n \r\n\r\nthree", ["one\ntwo", "three"]),
        ("one\ntwo\nthree\n\n", ["one", "two", "three"]),
        ("\ufeffone", ["one"]),
        ("一\n二\n\n\u3000三\r\n四\n \n五", ["一\n二", "\u3000三\n四", "五"]),
        ("一\r\n二\n三\n\u3000\n", ["一", "二", "三"]),
    ],
)
def test_plain_text_is_cut_at_blank_lines_or_else_at_every_line(tmp_path, content, texts):
    documents = load_documents(write(tmp_path / "a.TXT.gz", content))
    assert documents["text"][:] == texts
    assert set(documents["source"]) == {"a.TXT.gz"}


def test_the_fields_of_a_document(tmp_path):
    rows = [{"content": "c", "text": "a", "source": None}, {"text": "b", "source": 7}]
    path = write(tmp_path / "a.jsonl", "\ufeff" + as_lines(rows))  # a byte order mark is no text
    assert load_documents(path).to_dict() == {"text": ["a", "b"], "source": ["a.jsonl", "7"]}
    with pytest.raises(ValueError, match="line 2: has no field 'content'"):
        load_documents(path, text_field="content")


def test_texts_that_are_no_text_are_skipped_and_counted_once(tmp_path, caplog):
    texts = ["a", "", None, " \n\u3000", 5, ["x"], "\ud83d", "b", None, "\0\0"]
    path = write(tmp_path / "a.json", json.dumps([{"text": text} for text in texts]))
    with caplog.at_level(logging.WARNING):
        assert load_documents(path)["text"][:] == ["a", "b"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "left out 8 of 10 documents" in message
    for part in ("3 empty", "2 null", "2 not a string", "1 with half a character"):
        assert part in message


def test_a_single_50_mb_document_loads(tmp_path):
    text = "天地玄黄宇宙洪荒" * 2_100_000
    path = write(tmp_path / "a.jsonl", as_lines([{"text": text}]))
    assert path.stat().st_size > 50_000_000
    assert load_documents(path)["text"][0] == text


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def fingerprint(name, texts):
        rows = [{"text": text, "source": "s"} for text in texts]
        return load_documents(write(tmp_path / name, as_lines(rows)))._fingerprint

    first = fingerprint("a.jsonl", ["ab", "c"])
    assert fingerprint("b.jsonl.gz", ["ab", "c"]) == first
    for other in (["a", "bc"], ["c", "ab"], ["absc"]):
        assert fingerprint("c.jsonl", other) != first


# --- bad input ------------------------------------------------------------------------------------

NOT_UTF8 = pa.array([b"\xff"]).view(pa.string())
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
CHINESE = json.dumps([{"text": "春眠不觉晓，处处闻啼鸟。夜来风雨声。"}] * 20, ensure_ascii=False)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("cut.json", '[\n{"text": "a"},\n{"text": "b', ["line 3", "document 2", "cut off"]),
        ("cut.json", '[{"text": "a"},', ["line 1", "cut off"]),
        ("comma.json", '[\n{"text": "a"}\n{"text": "b"}]', ["line 3", "Correct"]),
        ("two.json", '[{"text": "a"}]\n[]', ["goes on after the ]"]),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": b}\n', ["line 3", "not valid JSON"]),
        ("pretty.json", '{\n"text": "a"\n}', ["line 1", "whole object"]),
        ("html.json", "<html>", ["'<'", '[{"text": "..."}']),
        ("strings.json", '["a", "b"]', ["document 1", "str", "object"]),
        ("f.json", '[{"title": "a", "id": 1}]', ["document 1", "'completion'", "'title', 'id'"]),
        ("f.json", '[{"text": "a"}, {"body": "b"}]', ["document 2", "'text'", "'body'"]),
        ("f.jsonl", '{"text": "a"}\n\n{"body": "b"}', ["line 3", "'text'", "text_field="]),
        ("empty.json", "", ["no documents"]),
        ("empty.json", "[]", ["no documents"]),
        ("empty.txt", "\n\n", ["no documents"]),
        ("empty.parquet", as_parquet({"text": pa.array([], pa.string())}), ["no documents"]),
        ("nulls.json", '[{"text": null}, {"text": ""}]', ["no documents", "1 null", "1 empty"]),
        ("numbers.parquet", as_parquet({"text": [1, 2]}), ["no documents", "2 not a string"]),
        ("f.parquet", as_parquet({"body": ["a"]}), ["'body'", "text_field="]),
        ("no.parquet", b"no parquet at all", ["cannot read it", "again"]),
        ("cut.parquet", as_parquet({"text": ["a" * 99]})[:-20], ["cannot read it", "again"]),
        ("bytes.parquet", as_parquet({"text": NOT_UTF8}), ["cannot read it"]),
        ("latin.txt", "1\nnaïve, übel".encode("latin-1"), ["line 2", "not UTF-8", "again"]),
        ("nul.txt", bytes(5000), ["no documents", "1 empty"]),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(range(256)), ["is a PDF", "as .txt"]),
        ("a.jsonl", gzip.compress(b'{"text": "a"}'), ["is a gzip file", "end in .gz"]),
        ("a.json", lzma.compress(b'{"text": "a"}'), ["is an xz file", "end in .xz"]),
        ("a.txt", b"PK\3\4" + bytes(99), ["is a zip or .docx file", "unpack"]),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        ("bad.json", CHINESE.encode()[:200] + b"\xff" + CHINESE.encode()[200:], ["is not UTF-8"]),
        ("name.csv", "text\na", [".json", ".parquet", ".xz"]),
        ("noname", "a", [".json", ".txt"]),
    ],
)
def test_bad_input_names_the_place_and_what_to_do(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        load_documents(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_compressed_file(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", as_lines([{"text": str(i)} for i in range(999)]))
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b'{"text": "no compression"}'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot decompress .*again") as caught:
            load_documents(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "suffix"), [("gb18030", ""), ("utf-16", ".gz"), ("gb18030", ".xz")]
)
def test_the_given_lines_convert_another_encoding(tmp_path, encoding, suffix):
    content = "\n" * 9 + json.dumps([{"text": POEM}] * 20, ensure_ascii=False)
    path = write(tmp_path / f"古'诗.json{suffix}", content.encode(encoding))
    with pytest.raises(ValueError, match=f"another encoding than {encoding}") as caught:
        load_documents(path)
    code = str(caught.value).split("\n", 1)[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert POEM in shown.stdout.decode()
    assert load_documents(tmp_path / "古'诗-utf8.json")["text"][:] == [POEM] * 20


def test_marks_of_joined_files_are_no_text(tmp_path):
    lines = as_lines([{"text": "a"}])
    joined = {"a.jsonl": "\ufeff" + lines + "\ufeff" + lines, "a.txt": "\ufeffa\n\n\ufeffa\n"}
    for name, content in joined.items():
        assert load_documents(write(tmp_path / name, content))["text"][:] == ["a", "a"]


def test_a_missing_path_names_what_could_be_meant(tmp_path):
    for i in range(7):
        write(tmp_path / f"part{i}.jsonl.gz", "")
    write(tmp_path / "notes.md", "")
    for missing in ("no.json", "no*.json", "*.md"):
        with pytest.raises(FileNotFoundError, match=r"part0.jsonl.gz, .* and 2 more") as caught:
            load_documents(tmp_path / missing)
        assert str(tmp_path / missing) in str(caught.value)
        assert "notes.md," not in str(caught.value)
    write(tmp_path / "LICENSE.txt", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="empty is a folder without a text.* there are none"
    ):
        load_documents(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        load_documents(tmp_path / "no" / "where" / "a.json")


# --- large texts and shards -----------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "my texts"
    folder.mkdir()
    write(folder / "part-1.jsonl.gz", as_lines([{"text": "b"}, {"text": "c", "source": "s"}]))
    write(folder / "part-0.json", json.dumps([{"completion": "a"}]))
    write(folder / "part-2.txt.xz", "d\n\ne\nf")
    write(folder / "part-3.parquet", as_parquet({"content": ["g"]}))
    write(folder / "README.md", "no text")
    write(folder / "._part-0.json", "left there by another system")
    (folder / "deeper.json").mkdir()
    return folder


def test_a_folder_is_read_in_the_order_of_its_names_and_a_pattern_chooses(shards):
    documents = load_documents(shards)
    assert documents["text"][:] == ["a", "b", "c", "d", "e\nf", "g"]
    names = ["part-0.json", "part-1.jsonl.gz", "s", *["part-2.txt.xz"] * 2, "part-3.parquet"]
    assert documents["source"][:] == names
    assert load_documents(shards / "part-[12]*")["text"][:] == ["b", "c", "d", "e\nf"]
    assert load_documents(shards.parent / "**" / "*.txt.xz")["text"][:] == ["d", "e\nf"]
    odd = shards.rename(shards.with_name("[1]"))  # a name, and not the pattern of "1"
    assert len(load_documents(odd)) == 6


def test_folders_as_people_have_them(tmp_path, caplog):
    def read(name):
        return load_documents(tmp_path / name)["text"][:]

    folder = tmp_path / "[书]" / "clone"
    for name in (".git/a.txt", "README.txt", "LICENSE-MIT.TXT", "requirements_dev.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "no text")
    for name in ("configuration.json", "dataset_infos.json", ".hidden.jsonl"):
        write(folder / name, "{}")
    (folder / "data").mkdir()
    write(folder / "data" / "train-0.jsonl", as_lines([{"text": "a"}]))
    write(folder / "data" / "train-0.jsonl.gz", as_lines([{"text": "a"}]))
    assert read("[书]/clone") == read("[书]/clone/**") == read("[书]/*/data/*.jsonl*") == ["a"]
    assert read("[书]/clone/README.txt") == ["no text"]
    for left_out in ("train-0.jsonl.gz", "LICENSE-MIT.TXT, README.txt", "configuration.json"):
        assert left_out in caplog.text
    (folder / "more").mkdir()
    write(folder / "more" / "train-1.txt", "b")
    with pytest.raises(FileNotFoundError, match=r"several folders: .*data, .*more; .*\*\*"):
        read("[书]/clone")
    assert read("[书]/clone/**") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_too_little_memory_names_the_file(tmp_path, monkeypatch, name):
    def fail(*_):
        raise MemoryError

    for reader in ("_read_text", "_json_lines", "_read_parquet"):
        monkeypatch.setattr(corpus, reader, fail)
    path = write(tmp_path / name, "{}")
    with pytest.raises(ValueError, match="does not fit in memory") as caught:
        load_documents(path)
    assert str(path) in str(caught.value)


def test_a_bad_shard_is_named_and_nothing_is_left_of_it(shards, tmp_path):
    load_documents(shards / "part-0.json", folder=tmp_path / "out")
    for content, words in [(b"\xff", "is not UTF-8"), (b'{"text"', ", line 1: not valid JSON")]:
        path = write(shards / "part-5.jsonl", content)
        with pytest.raises(ValueError, match=words) as caught:
            load_documents(shards, folder=tmp_path / "out")
        assert str(path) in str(caught.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["documents.arrow"]


def test_documents_are_mapped_from_the_folder_that_is_named_or_one_that_goes(shards, tmp_path):
    documents = load_documents(shards, folder=tmp_path / "out")
    (file,) = documents.cache_files
    assert file["filename"] == str(tmp_path / "out" / "documents.arrow")
    other = load_documents(shards / "part-0.json", folder=tmp_path / "out")
    assert (len(documents), len(other)) == (6, 1)
    assert documents["text"][5] == "g"  # still that of the file it was made of

    code = (
        "import sys; from tinytrain.corpus import *; documents = load_documents(sys.argv[1]);"
        "print(documents.cache_files[0]['filename'])"
    )
    command = [sys.executable, "-c", code, str(shards)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(shown.stdout.strip())
    assert path.name == "documents.arrow" and not path.parent.exists()


def test_a_full_disk_and_one_that_fails_are_told_apart(shards, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(corpus.secrets, "token_hex", lambda length: "random")
    (folder / "documents.arrow.random.building").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write to .*temporary .*No space left"):
        load_documents(shards, folder=folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match="cannot write to .*none .*choose another folder"):
        load_documents(shards)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(corpus, "_open", fail)
    with pytest.raises(OSError, match=r"part-0.json: cannot read it \(Input/output error\)"):
        load_documents(shards, folder=folder)


json_text = st.text(st.characters(exclude_categories=["Cs"]))
broken_json = st.text(st.sampled_from('{}[]",:\\u0001e+-. truefalsn\n\t文😀"'), max_size=12)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["text", "é", "文"]), st.integers() | st.floats() | json_text
        )
    ),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    broken=broken_json,
    place=st.floats(0, 1),
    cut=st.integers(0, 5),
)
def test_pieces_of_an_array_read_like_the_whole(
    tmp_path, monkeypatch, rows, indent, ascii, broken, place, cut
):
    monkeypatch.setattr(corpus, "_PIECE", 3)  # so that every place is the border of a piece
    content = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    place = round(place * len(content))
    content = "[" + content[1:place] + broken + content[max(place + cut, 1) :]
    path = write(tmp_path / "a.json", content)
    try:
        expected = json.loads(content)
        assert all(isinstance(row, dict) for row in expected)
    except (ValueError, AssertionError):
        with pytest.raises(ValueError):
            list(corpus._read_json(path, None))
    else:
        assert repr([row for _, row in corpus._json_array(path)]) == repr(expected)


def test_a_damaged_place_in_a_long_array_is_named_without_reading_on(tmp_path):
    rows = [{"text": "天地玄黄" * 50} for _ in range(40_000)]
    content = json.dumps(rows, ensure_ascii=False, indent=0)
    path = write(tmp_path / "a.json", content.replace('"text"', "text", 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line 3, document 1: not valid JSON"):
        load_documents(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 and peak < 12_000_000


# --- split ----------------------------------------------------------------------------------------


def test_the_split_is_that_of_the_guide(tmp_path):
    rows = [{"completion": f"第{i}篇", "source": "wikipedia.zh2307"} for i in range(237)]
    path = write(tmp_path / "wiki.json", json.dumps(rows, ensure_ascii=False))
    guide = load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    guide = guide["train"].train_test_split(test_size=0.1, seed=2222)
    split = split_documents(load_documents(path))
    assert len(split["test"]) == 24
    for name in ("train", "test"):
        assert split[name]["text"][:] == guide[name]["completion"][:]
    with pytest.raises(ValueError, match="cannot split 1 document"):
        split_documents(split["test"].select([0]))


@pytest.mark.parametrize(
    ("lengths", "warns"), [([30, 90_000, 20], True), ([9] * 10, False), ([9_000] + [9] * 9, True)]
)
def test_a_held_out_set_of_another_size_than_asked_for_is_remarked_on(caplog, lengths, warns):
    documents = Dataset.from_dict({"text": ["字" * n for n in lengths]})
    for seed in range(5):
        caplog.clear()
        split_documents(documents, seed=seed)
        assert ("of the characters" in caplog.text) == warns


# --- through the recipe, and in the notebook ------------------------------------------------------


def test_the_recipe_names_the_field_and_a_pattern_may_pass_an_odd_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))
    (tmp_path / "[书]").mkdir()
    write(tmp_path / "[书]" / "a.jsonl", as_lines([{"body": f"第{i}篇"} for i in range(9)]))
    recipe = replace(RECIPES["smoke"], corpus=str(tmp_path / "[书]" / "*.jsonl"))
    with pytest.raises(ValueError, match=r"it has 'body'\. .*--set text_field="):
        steps.get_split(recipe)
    split = steps.get_split(replace(recipe, **dict([_parse_change("text_field=body")])))
    assert len(split["train"]) == 8


@pytest.mark.parametrize(
    ("count", "source"), [(2, "s"), (10, r"$\foo{$ x $y^$"), (9, "长" * 200_000)]
)
def test_notebook_02_takes_few_documents_and_any_source(
    tmp_path, monkeypatch, capsys, count, source
):
    rows = [{"body": chr(0x4E00 + i) * 30, "source": source} for i in range(count)]
    corpus = str(write(tmp_path / "a.jsonl", as_lines(rows)))
    recipe = replace(RECIPES["smoke"], corpus=corpus, text_field="body")
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path / "runs"))
    names = {"Path": Path, "recipe": recipe}
    notebook = Path(__file__).parent.parent / "notebooks" / "02_data_split.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for source in ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][2:]:
        exec(source, names)
    names["plot_lengths"](names["split"]).savefig(tmp_path / "lengths.png")
    assert f"{count} documents, {30 * count} characters" in capsys.readouterr().out
    assert max(map(len, names["sources"])) <= 40


# --- description and plots ------------------------------------------------------------------------


def test_lengths_are_characters_not_bytes():
    texts = ["春眠", "不觉晓", "处处闻啼鸟"]
    assert document_lengths(Dataset.from_dict({"text": texts})).tolist() == [2, 3, 5]


def test_plots_draw_without_pyplot_and_without_warnings(tmp_path):
    documents = Dataset.from_dict({"text": ["字" * n for n in (1, 10, 100, 1000, 50)]})
    split = DatasetDict(train=documents.select(range(4)), test=documents.select([4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lengths = plot_lengths(split, mark=75, mark_label="one context")
        lengths.savefig(tmp_path / "lengths.png")
    (axes,) = lengths.axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "characters in a document"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend) == ["held out (1)", "one context", "training (4)"]
    assert axes.get_ylim()[1] > 100  # the one held-out document is 100% of its set
