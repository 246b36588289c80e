"""A text that does not fit in memory goes through the whole chain.

The chain runs in a process of its own that the system lets have only so much memory that can be
written to; files that are mapped into memory do not count. Reading a text whole fails there, which
shows that the limit is real.

This file is also the program that runs in that process.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tinytrain.recipes import RECIPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

MB = 10**6
# Qwen2.5's tokenizer takes the same memory for every text.
FIXED = replace(RECIPES["smoke"], max_documents=None, tokenizer="qwen2.5", vocab_size=None)
# A tokenizer of the text's own is trained on its first two million characters.
OWN = replace(FIXED, tokenizer="own", vocab_size=4096, context_length=512)


def documents(size):
    """Yield documents of so many bytes in all; every thousandth stands there twice."""
    from tinytrain.encyclopedia import build_encyclopedia

    whole = "".join(article["completion"] for article in build_encyclopedia())
    # In random order, pieces of a real text look like one and are never alike.
    pieces = list(dict.fromkeys(whole[i : i + 3] for i in range(0, len(whole), 3)))
    shuffled, number = random.Random(1), 0
    while size > 0:
        if number % 1000 != 1:
            text = "".join(shuffled.choices(pieces, k=260))
        yield text
        number += 1
        size -= len(text.encode())


def write_array(path, texts):
    """Write a JSON array as the guide's file is one."""
    with path.open("w", encoding="utf-8") as file:
        start = "["
        for text in texts:
            row = {"completion": text, "source": "wikipedia.zh2307"}
            file.write(start + json.dumps(row, ensure_ascii=False))
            start = ",\n"
        file.write("]")


def write_shards(path, texts):
    """Write a folder of three compressed files."""
    path.mkdir()
    shards = [gzip.open(path / f"part-{i}.jsonl.gz", "wt", compresslevel=1) for i in range(3)]
    for number, text in enumerate(texts):
        shards[number % 3].write(json.dumps({"text": text}) + "\n")
    for shard in shards:
        shard.close()


def write_plain(path, texts):
    path.write_text("\n\n".join(texts), encoding="utf-8")


def write_parquet(path, texts):
    """Write one row group, as most programs do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": list(texts)}), path, row_group_size=10**6)


WRITERS = {
    "text.json": write_array,
    "shards": write_shards,
    "text.txt": write_plain,
    "text.parquet": write_parquet,
}


# --- in the process with little memory ------------------------------------------------------------


def memory(name="VmData"):
    """Return so many bytes of this process: VmData is what can be written to and is no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def limit_memory(size):
    """Let this process have no more, and show that it cannot have it."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    try:
        bytearray(size - memory() + MB)
    except MemoryError:
        return
    raise AssertionError("the limit does not hold")


@contextmanager
def measured(name, characters=None):
    """Print how long it took and the most memory in use meanwhile."""
    peak, done, start = [memory()], threading.Event(), time.perf_counter()

    def watch():
        while not done.wait(0.05):
            peak.append(max(peak.pop(), memory()))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
    seconds = time.perf_counter() - start
    speed = f"{characters / seconds:12,.0f} characters/s" if characters else ""
    print(f"{name:28}{seconds:8.1f} s{peak[0] / MB:9,.0f} MB{speed}", flush=True)


def load(folder, small, large, margin):
    """Load texts that are larger than the margin, after small ones of the same kind."""
    from tinytrain.corpus import load_documents, split_documents

    for name in WRITERS:
        load_documents(Path(small, name), folder=folder)
    limit_memory(memory() + margin)
    for name in WRITERS:
        with measured(name):
            rows = split_documents(load_documents(Path(large, name), folder=folder))["train"]
            assert len(rows.shuffle(seed=1)[:100]["text"]) == 100


def chain(recipe):
    """Go from the text to three steps of training."""
    from tinytrain import steps, tokenization
    from tinytrain.corpus import describe

    with measured("text to split"):
        split = steps.get_split(recipe)
    characters = sum(describe(half)["characters"] for half in split.values())
    with measured("tokenizer"):
        tokenizer = steps.get_tokenizer(recipe)
    with measured("split to blocks", characters):
        blocks = steps.get_blocks(recipe)
    with measured("tokens a character"):
        rate = tokenization.tokens_per_character(tokenizer, split["test"]["text"])
    with measured("three steps of training"):
        steps.probe(recipe, "float32", steps=3)
    twins = len(steps.get_duplicates(recipe))
    tokens = len(blocks["train"]) * recipe.context_length
    return {"characters": characters, "twins": twins, "tokens": tokens, "rate": rate}


def chain_with_margin(small, large, margin):
    """Take a small text first: what that takes, every text does."""
    chain(replace(FIXED, corpus=small))
    limit_memory(memory() + margin)
    try:
        json.loads(Path(large).read_text(encoding="utf-8"))
    except MemoryError:
        return chain(replace(FIXED, corpus=large))
    raise AssertionError("the text fits in memory")


def chain_in(size, large):
    """Take no more than so much from the start, Python and its libraries included."""
    import datasets  # noqa: F401
    import torch  # noqa: F401

    limit_memory(size)
    try:
        Path(large).read_bytes()
    except MemoryError:
        return chain(replace(OWN, corpus=large))
    raise AssertionError("the text fits in memory")


if __name__ == "__main__":
    from datasets import disable_progress_bars

    disable_progress_bars()
    task, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"load": load, "margin": chain_with_margin, "in": chain_in}[task](*arguments)))


# --- the tests ------------------------------------------------------------------------------------


def run(tmp_path, *task):
    """Run a task in a process of its own and return what it returns."""
    environment = os.environ | {
        "TINYTRAIN_RUNS": str(tmp_path / "runs"),
        # Arrow's own way to get memory takes a gigabyte at once, used or not.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, __file__, json.dumps(task)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(shown.stdout, shown.stderr[-3000:], sep="\n")
    assert shown.returncode == 0, shown.stderr[-1000:]
    return json.loads(shown.stdout.splitlines()[-1])


def test_a_text_in_any_format_is_loaded_in_a_part_of_its_memory(tmp_path):
    texts = list(documents(2 * MB))
    for folder, count in (("small", 1), ("large", 100)):
        (tmp_path / folder).mkdir()
        for name, write in WRITERS.items():
            write(tmp_path / folder / name, texts * count)
    assert (tmp_path / "large" / "text.txt").stat().st_size > 190 * MB
    run(tmp_path, "load", *(str(tmp_path / name) for name in ("out", "small", "large")), 60 * MB)


def test_the_whole_chain_works_in_a_part_of_the_texts_memory(tmp_path):
    for name, size in (("small", 1), ("large", 90)):
        write_array(tmp_path / f"{name}.json", documents(size * MB))
    texts = [str(tmp_path / f"{name}.json") for name in ("small", "large")]
    found = run(tmp_path, "margin", *texts, 60 * MB)
    assert 29 * MB < found["characters"] < 32 * MB
    assert found["twins"] >= 5
    assert found["tokens"] == pytest.approx(0.9 * found["rate"] * found["characters"], rel=0.02)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_gigabytes_go_through_one(tmp_path):
    write_array(tmp_path / "large.json", documents(2000 * MB))
    found = run(tmp_path, "in", 2**30, str(tmp_path / "large.json"))
    assert found["characters"] > 650 * MB
    assert found["tokens"] == pytest.approx(0.9 * found["rate"] * found["characters"], rel=0.02)
