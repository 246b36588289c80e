"""Carry code and outputs from the English notebooks over to the Chinese ones in ``zh/``.

``make sync`` calls this, and ``make notebooks`` after it has run the English ones. Both editions
have the same cells, told apart by their ids: code is copied with its outputs, Chinese text stays,
and text that has no Chinese yet comes over in English, where a test will find it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent


def synced(
    english: nbformat.NotebookNode, chinese: nbformat.NotebookNode
) -> tuple[nbformat.NotebookNode, list[str]]:
    """Return the new Chinese notebook, and the ids of cells that are still to be translated."""
    texts = {cell.id: cell for cell in chinese.cells if cell.cell_type == "markdown"}
    result = nbformat.from_dict(english)
    result.cells = [
        texts.get(cell.id, cell) if cell.cell_type == "markdown" else cell for cell in english.cells
    ]
    missing = [c.id for c in english.cells if c.cell_type == "markdown" and c.id not in texts]
    return result, missing


def main() -> int:
    """Write all Chinese notebooks; returns 1 if some text has to be translated."""
    untranslated = 0
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        twin = HERE / "zh" / path.name
        english = nbformat.read(path, as_version=4)
        chinese = nbformat.read(twin, as_version=4) if twin.exists() else nbformat.v4.new_notebook()
        result, missing = synced(english, chinese)
        twin.parent.mkdir(exist_ok=True)
        nbformat.write(result, twin)
        for cell_id in missing:
            print(f"zh/{path.name}: cell {cell_id} is still in English")
        untranslated += len(missing)
    return int(untranslated > 0)


if __name__ == "__main__":
    sys.exit(main())
