"""A text that does not fit in memory goes through the whole chain.

The chain runs in a process of its own that the system lets have only so much memory that can be
written to; files that are mapped into memory do not count. Reading the text whole fails there,
which shows that the limit is real.

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
# What is not of the text takes the same memory for every text: Qwen2.5's tokenizer, a small model.
SIZES = {"tokenizer": "qwen2.5", "vocab_size": None, "batch_size": 1, "loss_rows": None}
FIXED = replace(RECIPES["smoke"], max_documents=None, optimizer="adamw", **SIZES)
# A tokenizer of the text's own is trained on its first two million characters.
OWN = replace(RECIPES["smoke"], max_documents=None, vocab_size=4096, context_length=512)


def documents(size):
    """Yield documents of so many bytes in all; every two hundredth is there twice."""
    from tinytrain.encyclopedia import build_encyclopedia

    whole = "".join(article["completion"] for article in build_encyclopedia())
    # In random order, pieces of a real text look like one and are never alike.
    pieces = list(dict.fromkeys(whole[i : i + 3] for i in range(0, len(whole), 3)))
    shuffled, number = random.Random(1), 0
    while size > 0:
        if number % 200 != 1:
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


WRITERS = {"text.json": write_array, "shards": write_shards}
WRITERS |= {"text.txt": write_plain, "text.parquet": write_parquet}


# --- in the process with little memory ------------------------------------------------------------


def memory():
    """Return the bytes of this process that can be written to and are no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmData:")[1].split()[0]) * 1024


def limit_memory(size):
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


def cannot_read_whole(text):
    """Show that the limit holds."""
    with pytest.raises(MemoryError):
        Path(text).read_text(encoding="utf-8")


@contextmanager
def measured(name, limits):
    """Print how long it took and the most memory in use meanwhile, and allow no more than that."""
    if limits:
        limit_memory(limits[name] if isinstance(limits, dict) else limits)
    done, start = threading.Event(), time.perf_counter()
    PEAKS[name] = memory()

    def watch():
        while not done.wait(0.002):
            PEAKS[name] = max(PEAKS[name], memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
        seconds = time.perf_counter() - start
        print(f"{name:28}{seconds:8.1f} s{PEAKS[name] / MB:9,.0f} MB", file=sys.stderr)


PEAKS = {}


def load(small, large, margin, folder):
    """Load texts that are larger than the margin, after small ones of the same kind."""
    from tinytrain.corpus import load_documents, split_documents

    for name in WRITERS:
        load_documents(Path(small, name), folder=folder)
    limit = memory() + margin
    limit_memory(limit)
    cannot_read_whole(Path(large, "text.txt"))
    for name in WRITERS:
        with measured(name, limit):
            rows = split_documents(load_documents(Path(large, name), folder=folder))["train"]
            assert len(rows.shuffle(seed=1)[:100]["text"]) == 100


def chain(text, limits=None, own_tokenizer=False):
    """Go from the text to three steps of training; return the memory, and what was found.

    A limit for each step counts what it takes; one for all, Python and its libraries too.
    """
    # What is imported counts from the start.
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from tinytrain import runs, steps, tokenization
    from tinytrain.corpus import document_lengths

    recipe = replace(OWN if own_tokenizer else FIXED, corpus=text)
    with measured("text to split", limits):
        split = steps.get_split(recipe)
    if limits:
        cannot_read_whole(text)
    characters = int(sum(document_lengths(part).sum() for part in split.values()))
    with measured("tokenizer", limits):
        tokenizer = steps.get_tokenizer(recipe)
    with measured("split to blocks", limits):
        blocks = steps.get_blocks(recipe)
    with measured("tokens a character", limits):
        rate = tokenization.tokens_per_character(tokenizer, split["test"]["text"])
    with measured("three steps of training", limits):
        runs.probe(recipe, "float32", number=3)
    duplicates = len(steps.get_duplicates(recipe))
    tokens = len(blocks["train"]) * recipe.context_length
    found = {"characters": characters, "duplicates": duplicates, "tokens": tokens, "rate": rate}
    return PEAKS, found


if __name__ == "__main__":
    from datasets import disable_progress_bars

    disable_progress_bars()
    task, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"load": load, "chain": chain}[task](*arguments)))


# --- the tests ------------------------------------------------------------------------------------


def run(tmp_path, *task):
    """Run a task in a process of its own and return what it returns."""
    environment = os.environ | {
        "TINYTRAIN_RUNS": str(tmp_path / "runs"),
        # Arrow's own way to get memory takes a gigabyte at once, used or not.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        # What is free again goes back at once.
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, __file__, json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout)


def test_a_text_in_any_format_is_loaded_in_a_part_of_its_memory(tmp_path):
    texts = list(documents(MB))
    for folder, count in (("small", 1), ("large", 64)):
        (tmp_path / folder).mkdir()
        for name, write in WRITERS.items():
            write(tmp_path / folder / name, texts * count)
    run(tmp_path, "load", str(tmp_path / "small"), str(tmp_path / "large"), 40 * MB, str(tmp_path))


def test_a_large_text_takes_little_more_memory_than_a_small_one(tmp_path):
    for name, size in (("small", 1), ("large", 48)):
        write_array(tmp_path / f"{name}.json", documents(size * MB))
    peaks, _ = run(tmp_path, "chain", str(tmp_path / "small.json"))
    # Some room, less than the text takes: a peak of less than two milliseconds may be missed.
    limits = {name: peak + 44 * MB for name, peak in peaks.items()}
    _, found = run(tmp_path, "chain", str(tmp_path / "large.json"), limits)
    assert 15 * MB < found["characters"] < 17.5 * MB
    assert found["duplicates"] >= 3
    assert found["tokens"] == pytest.approx(0.9 * found["rate"] * found["characters"], rel=0.02)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_gigabytes_go_through_one(tmp_path):
    write_array(tmp_path / "large.json", documents(2000 * MB))
    _, found = run(tmp_path, "chain", str(tmp_path / "large.json"), 2**30, True)
    assert found["characters"] > 650 * MB
    assert found["tokens"] == pytest.approx(0.9 * found["rate"] * found["characters"], rel=0.02)
