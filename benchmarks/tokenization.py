"""From text to packed blocks, beside the guide's ``map`` and the bare tokenizer.

``python -m benchmarks.tokenization --text my.jsonl`` cuts seven million characters into blocks with
the Qwen2.5 tokenizer, in turns, and compares characters a second. Without ``--text`` the built-in
text is repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time

from datasets import Dataset, disable_caching, disable_progress_bars

from benchmarks import save
from tinytrain import corpus, encyclopedia
from tinytrain.qwen import qwen_tokenizer
from tinytrain.tokenization import pack_documents, tokenize

CHARACTERS, ROUNDS, CONTEXT = 7_000_000, 3, 512


def some_text(path: str | None, characters: int) -> list[str]:
    """Return documents of so many characters in all."""
    texts = corpus.load_documents(path)["text"] if path else None
    if texts is None:
        texts = [article["completion"] for article in encyclopedia.build_encyclopedia()]
    chosen, total = [], 0
    while total < characters:
        for text in texts:
            chosen.append(text[: characters - total])
            total += len(chosen[-1])
            if total == characters:
                break
    return chosen


def guide(documents: Dataset, tokenizer) -> None:
    """Tokenize by ``map`` with its defaults, as the guide does, and keep the full chunks."""
    arguments = {"tokenizer": tokenizer, "context_length": CONTEXT}
    documents.map(tokenize, batched=True, remove_columns=["text"], fn_kwargs=arguments)


def ours(documents: Dataset, tokenizer) -> None:
    """Tokenize and pack."""
    pack_documents(documents, tokenizer, CONTEXT)


def raw(documents: Dataset, tokenizer) -> None:
    """Let the tokenizer's own batch call make ids, and do nothing with them."""
    texts = documents["text"][:]
    for start in range(0, len(texts), 100):
        tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 100])


def main() -> None:
    """Measure in turns, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 characters, once")
    parser.add_argument("--text", help="a file with Chinese text; see TINYTRAIN_CORPUS")
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    characters = 100_000 if options.quick else CHARACTERS
    documents = Dataset.from_dict({"text": some_text(options.text, characters)})
    tokenizer = qwen_tokenizer()
    ways = {"ours": ours, "guide": guide, "raw": raw}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if options.quick else ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way(documents, tokenizer)
            speeds[name].append(characters / (time.perf_counter() - start))
    median = {name: statistics.median(found) for name, found in speeds.items()}
    rows = [
        {
            "measure": f"text to packed blocks, {characters:,} characters: characters/s",
            "ours": round(median["ours"]),
            "peer": round(median[name]),
            "peer_name": label,
            "ratio": round(median["ours"] / median[name], 3),
            "goal": goal,
            "met": median["ours"] / median[name] >= goal,
        }
        for name, label, goal in (
            ("guide", "the guide's map, full chunks kept", 1.7),
            ("raw", "encode_batch_fast of the tokenizer, whose ids are thrown away", 0.85),
        )
    ]
    save("tokenization", rows, options.quick)


if __name__ == "__main__":
    main()
