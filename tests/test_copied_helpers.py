"""The helpers that README promises to take along, taken along.

Each one's file, and ``common.py``, are copied into an empty folder, their imports changed as a
reader would change them, and used there with a plain ``transformers.Trainer`` or without one, in a
process that cannot import tinytrain.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinytrain

PACKAGE = Path(tinytrain.__file__).parent

SETTING = """
import json, os, signal, sys, traceback
from pathlib import Path

sys.modules["tinytrain"] = None  # importing it fails from here on
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Trainer, TrainingArguments
from transformers.convert_slow_tokenizer import bytes_to_unicode

def model(**changes):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 256,
        "bos_token_id": 256, "tie_word_embeddings": True, **changes}))

def tokenizer():
    letters = bytes_to_unicode().values()
    vocab = {letter: number for number, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    return Qwen2Tokenizer(vocab=vocab, merges=[])

def train(*callbacks, fails=False, **arguments):
    ids = torch.arange(8 * 12).reshape(8, 12) % 250
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
                 "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True,
                 **arguments}
    trainer = Trainer(model(), TrainingArguments("out", **arguments), train_dataset=rows,
                      eval_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return trainer
"""

HELPERS = {
    "VerboseTrainingCallback": (
        "callbacks/history.py",
        """
        from history import VerboseTrainingCallback
        talk = VerboseTrainingCallback(tokens_per_step=24)
        train(talk)
        assert len(talk.train_loss) == 4
        """,
    ),
    "LivePlotCallback": (
        "callbacks/plot.py",
        """
        from plot import LivePlotCallback
        train(LivePlotCallback("loss.png", vocab_size=300, tokens_per_step=24))
        assert Path("loss.png").read_bytes().startswith(b"\\x89PNG")
        """,
    ),
    "StopCallback": (
        "callbacks/stop.py",
        """
        from stop import StopCallback
        from transformers import TrainerCallback
        class Interrupts(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                self.on_step_begin(args, state, control)
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    signal.raise_signal(signal.SIGINT)
        class Fails(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                raise ValueError("a bug of the user's")
        stopped = train(StopCallback("STOP"), Interrupts(), max_steps=9)
        assert 1 <= stopped.state.global_step < 9
        try:
            train(StopCallback("STOP"), Fails())
        except ValueError:
            pass
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("Ctrl-C is swallowed after the run")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "SIGTERM is swallowed"
        """,
    ),
    "LossGuard": (
        "callbacks/guard.py",
        """
        from guard import LossError, LossGuard
        train(LossGuard(), gradient_accumulation_steps=2)
        try:
            train(LossGuard(spike=None), learning_rate=1e38, max_steps=9)
        except LossError as error:
            assert 1 < error.step < 9
        else:
            raise AssertionError("a loss that is NaN is not stopped")
        """,
    ),
    "pack_documents": (
        "tokenization.py",
        """
        from tokenization import pack_documents
        documents = Dataset.from_dict({"text": ["abcdefgh", "ijkl"] * 5})
        blocks = pack_documents(documents, tokenizer(), 16)
        assert len(blocks) == (5 * 12 + 10) // 16
        """,
    ),
    "linear_cross_entropy": (
        "loss.py",
        """
        from loss import linear_cross_entropy
        hidden, weight = torch.randn(8, 16), torch.randn(300, 16)
        labels = torch.arange(8)
        expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
        loss = linear_cross_entropy(hidden, weight, labels, rows=4)
        assert torch.allclose(loss, expected, atol=1e-5)
        """,
    ),
    "muon_adamw": (
        "optimizer.py",
        """
        from optimizer import muon_adamw
        net = model()
        optimizer = muon_adamw(net, lr=1e-2)
        ids = torch.arange(24).reshape(2, 12)
        losses = []
        for _ in range(5):
            loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        """,
    ),
    "document_losses": (
        "evaluation.py",
        """
        from evaluation import document_losses, summarize
        measures = summarize(document_losses(model(), tokenizer(), ["abc", "defgh"], 8))
        assert measures.characters == 8 and measures.bits_per_character.value > 0
        """,
    ),
    "export_model": (
        "export.py",
        """
        from export import export_model
        folder = export_model(model(), tokenizer(), "exported")
        again = Qwen2ForCausalLM.from_pretrained(folder)
        assert again.num_parameters() == model().num_parameters()
        """,
    ),
    "reduce_tokenizer": (
        "qwen.py",
        """
        from qwen import qwen_tokenizer, reduce_tokenizer
        reduced = reduce_tokenizer(qwen_tokenizer(), ["北京是中国的首都。"] * 3, 400)
        assert reduced.decode(reduced("北京")["input_ids"]) == "北京"
        """,
    ),
    "compile_layers": (
        "modeling.py",
        """
        from modeling import compile_layers
        net = model()
        compile_layers(net)
        ids = torch.arange(24).reshape(2, 12)
        net.train()
        assert torch.allclose(net(ids).logits, model().train()(ids).logits, atol=1e-5)
        """,
    ),
}

CHILD = """
import contextlib, io, textwrap
results, home = {}, Path.cwd()
for name, (file, code) in json.loads(Path("helpers.json").read_text(encoding="utf-8")).items():
    folder = home / name
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        exec(compile(textwrap.dedent(code), name, "exec"), dict(globals()))
        results[name] = ""
    except BaseException:
        results[name] = traceback.format_exc()
    sys.path.remove(str(folder))
    for module, value in list(sys.modules.items()):
        if str(folder) in str(getattr(value, "__file__", None)):
            del sys.modules[module]
(home / "results.json").write_text(json.dumps(results), encoding="utf-8")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    home = tmp_path_factory.mktemp("copied")
    for name, (file, _) in HELPERS.items():
        (home / name).mkdir()
        for source in (PACKAGE / file, PACKAGE / "common.py"):
            text = source.read_text(encoding="utf-8")
            text = text.replace("from tinytrain.common import", "from common import")
            (home / name / source.name).write_text(text, encoding="utf-8")
    (home / "helpers.json").write_text(json.dumps(HELPERS), encoding="utf-8")
    command = [sys.executable, "-c", SETTING + CHILD]
    child = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert (home / "results.json").is_file(), child.stderr[-3000:]
    return json.loads((home / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_works_where_tinytrain_is_not(results, name):
    assert results[name] == "", results[name]


def test_all_that_the_readme_promises_are_here():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    promised = re.search(r"a test does just that: (.*?)\.\n", readme, flags=re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", promised)) - {"summarize"} <= set(HELPERS)
