"""Run the notebooks in order, tell what is going on, and keep what comes of it.

``make tutorial`` calls this; the executed notebooks and one HTML report go to the run's folder.
``make notebooks`` calls it with ``--in-place``: the outputs are kept in the notebooks themselves,
for the repository, and both editions get the project's address from ``pyproject.toml``. (Of
the Chinese outputs, ``sync.py`` then keeps only the pictures.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
LOG_LINE = re.compile(r"^[\d-]+ [\d:]+ - (?:INFO|WARNING): (.*)")

WIDGET = "application/vnd.jupyter.widget-view+json"

# Run first in each kernel, to save two seconds: the garbage collector would search all that is
# imported again and again, and at the end ipykernel's threads may wait for each other.
KERNEL_SETUP = (
    "import atexit, gc, os; gc.set_threshold(100_000); atexit.register(os._exit, 0); "
    "del atexit, gc, os"  # or a notebook could use them without importing them
)


def clock(start: float) -> str:
    """Return the time since start as minutes and seconds."""
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes:2d}:{seconds:02d}"


class TalkingClient(NotebookClient):
    """Runs a notebook and passes on, while a cell runs, what one would see in it."""

    begun = 0.0
    told = 0.0

    def say(self, text: str) -> None:
        """Print a line with the time."""
        self.told = time.monotonic()
        print(f"  {clock(self.begun)}      {text}", flush=True)

    def process_message(self, msg, cell, cell_index):
        """Take up a message as usual, and print log messages and the words under a moving plot."""
        content = msg["content"]
        if msg["msg_type"] == "stream":
            for line in content["text"].splitlines():
                if match := LOG_LINE.match(line):
                    self.say(match[1])
        elif msg["msg_type"] == "update_display_data" and "image/png" in content["data"]:
            text = content["data"]["text/plain"]
            if time.monotonic() - self.told >= 10 or ", done" in text:
                self.say(text)
        return super().process_message(msg, cell, cell_index)

    def pass_on_interrupts(self) -> None:
        """Let Ctrl-C do what the notebook's ■ does: the training ends in good order."""
        if sys.platform != "win32":
            loop = asyncio.get_running_loop()
            kernel = self.km.provisioner.pid
            loop.add_signal_handler(signal.SIGINT, os.kill, kernel, signal.SIGINT)


def run_notebook(path: Path, begun: float) -> nbformat.NotebookNode:
    """Execute one notebook, printing a line a cell; stop at the first error."""
    notebook = nbformat.read(path, as_version=4)
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def announce(cell, cell_index):
        client.pass_on_interrupts()
        if cell.cell_type == "code":
            passed_over = ("#", "from ", "import ", " ", "%", "if ", "elif ", ")")
            lines = [line for line in cell.source.splitlines() if line.strip()]
            telling = [line for line in lines if not line.startswith(passed_over)]
            number, line = code.index(cell_index) + 1, (telling or lines)[0]
            print(f"  {clock(begun)} cell {number:2}/{len(code)}  {line:.70}", flush=True)

    client = TalkingClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=announce,
        record_timing=False,
        coalesce_streams=True,
        # The kernel's own warnings are not for the reader.
        extra_arguments=["--log-level=40", f"--IPKernelApp.exec_lines={KERNEL_SETUP}"],
    )
    client.begun = begun
    # The kernel is this very Python, whatever kernels are installed for the user.
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, *client.km.kernel_spec.argv[1:]]
    client.execute()
    for cell in notebook.cells:
        # A progress bar that has run is a widget without its state: nothing to look at.
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    notebook.metadata.pop("widgets", None)
    return notebook


def set_address() -> None:
    """Write the project's address into all set-up cells and links to Colab, the README's too."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    name = address.removeprefix("https://github.com/")
    notebooks = [*HERE.glob("*.ipynb"), *HERE.glob("zh/*.ipynb")]
    for path in (*notebooks, *HERE.parent.glob("README*.md")):
        text = path.read_bytes().decode()
        text = re.sub(r"(?<=tinytrain @ git\+)[^\\\"]+", lambda _: address, text)
        text = re.sub(r"(?<=research\.google\.com/github/).+?(?=/blob/)", lambda _: name, text)
        path.write_bytes(text.encode())


def write_report(notebooks: list[nbformat.NotebookNode], path: Path) -> None:
    """Write all notebooks as one HTML page."""
    from nbconvert import HTMLExporter

    report = nbformat.v4.new_notebook()
    report.metadata.title = "tinytrain"
    report.cells = [cell for notebook in notebooks for cell in notebook.cells]
    html, _ = HTMLExporter().from_notebook_node(report)
    path.write_text(html, encoding="utf-8")


def tell_results(folder: Path, seconds: float) -> None:
    """Print what the run has come to and where everything is."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    print(f"\nDone in {int(seconds) // 60} min {int(seconds) % 60:02d} s.\n")
    print(f"  train loss     {summary['train_loss']:.3f}")
    print(f"  held-out loss  {summary['held_out_loss']:.3f}")
    for kind, after in summary.get("cloze_after", {}).items():
        before = summary["cloze_before"][kind]
        print(f"  {kind} questions: {before:.0%} right before training, {after:.0%} after")
    print("\nThe trained model completes:")
    for prompt, text in summary["completions"]:
        print(f"  {prompt} → {' '.join(text.split())}")
    print("\nLook at:")
    for name, what in (
        ("report.html", "all notebooks as one page"),
        ("notebooks", "the executed notebooks"),
        ("loss.png", "the loss plot"),
        ("model", "the model and its tokenizer"),
    ):
        shown = folder / name
        if shown.is_relative_to(Path.cwd()):
            shown = shown.relative_to(Path.cwd())
        print(f"  {shown}  ({what})")


def prepare() -> Path:
    """Make the run's folder; say in the environment where it and the text are, and return it."""
    import torch

    from tinytrain import steps
    from tinytrain.recipes import get_recipe

    has_gpu = torch.cuda.is_available()
    recipe = get_recipe(has_gpu=has_gpu)
    # Whole paths: the kernels work in another folder.
    os.environ["TINYTRAIN_RUNS"] = str(steps.runs_folder())
    if recipe.corpus not in ("encyclopedia", "wikipedia"):
        os.environ["TINYTRAIN_CORPUS"] = str(steps.get_text(recipe))
    other = os.path.expanduser(os.environ.get("TINYTRAIN_COMPARE", ""))
    if os.path.exists(other):
        os.environ["TINYTRAIN_COMPARE"] = os.path.abspath(other)
    folder = steps.run_folder(get_recipe(has_gpu=has_gpu))
    (folder / "notebooks").mkdir(exist_ok=True)
    return folder


def main() -> int:
    """Run from the command line; returns the exit status."""
    from tinytrain.common import print_any_character

    print_any_character()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-place", action="store_true", help="keep the outputs in notebooks/")
    parser.add_argument("--edition", choices=("en", "zh"), default="en", help="English, Chinese")
    options = parser.parse_args()
    source = HERE / "zh" if options.edition == "zh" else HERE

    begun = time.monotonic()
    try:
        folder = prepare()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    paths, done = sorted(source.glob("[0-9]*.ipynb")), []
    for number, path in enumerate(paths, 1):
        print(f"{clock(begun)} notebook {number} of {len(paths)}: {path.stem}", flush=True)
        try:
            notebook = run_notebook(path, begun)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"\n{path.name} stopped here:\n{error}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path if options.in_place else folder / "notebooks" / path.name)
        done.append(notebook)
    if options.in_place:
        set_address()
    write_report(done, folder / "report.html")
    tell_results(folder, time.monotonic() - begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
