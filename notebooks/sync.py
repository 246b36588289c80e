"""Carry code and outputs from the English notebooks over to the Chinese ones in ``zh/``.

``make sync`` calls this, and ``make notebooks`` after it has run the English ones. Both editions
have the same cells, told apart by their ids: code is copied with its outputs, Chinese text stays,
and so do pictures, whose labels are Chinese (``run_all.py --edition zh --in-place`` draws them).
What has no Chinese yet comes over in English, where a test will find the text.
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
    earlier = {cell.id: cell for cell in chinese.cells}
    result = nbformat.from_dict(english)
    missing = []
    for place, cell in enumerate(result.cells):
        known = earlier.get(cell.id)
        if cell.cell_type == "markdown":
            result.cells[place] = known or cell
            missing += [] if known else [cell.id]
        elif known and known.source == cell.source:
            for ours, drawn in zip(pictures(cell), pictures(known), strict=False):
                ours["image/png"] = drawn["image/png"]
    return result, missing


def pictures(cell: nbformat.NotebookNode) -> list[dict]:
    """Return the outputs of a cell of code that are pictures."""
    outputs = [output.get("data", {}) for output in cell.outputs]
    return [data for data in outputs if "image/png" in data]


def main() -> int:
    """Write all Chinese notebooks; returns 1 if some text has to be translated."""
    untranslated = 0
    for path in sorted(HERE.glob("*.ipynb")):
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
