"""Executes a notebook without Jupyter, and writes the outputs of its cells into the file.

    python experiments/examples/run_notebook.py experiments/examples/tour.ipynb

Cells with the tag "install" are not executed. Outputs are what a cell prints, and its figures as
PNG. Prints the number of cells.
"""

import argparse
import base64
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import matplotlib
from PIL import Image

from moss_tok.audio import files

INSTALL = "install"  # tag of cells that only prepare the environment


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs the code cells of a notebook in one namespace; returns the namespace.

    The outputs and the execution counts in `notebook` are replaced.
    """
    matplotlib.use("Agg")  # no display
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or INSTALL in cell["metadata"].get("tags", []):
            continue
        count += 1
        printed = io.StringIO()
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"cell {count}", "exec"), namespace)
        cell["execution_count"] = count
        cell["outputs"] = _text(printed.getvalue()) + _figures()
    return namespace


def _text(printed: str) -> list[dict[str, Any]]:
    if not printed:
        return []
    lines = printed.splitlines(keepends=True)
    return [{"output_type": "stream", "name": "stdout", "text": lines}]


def _figures() -> list[dict[str, Any]]:
    """The open figures as outputs; closes them."""
    import matplotlib.pyplot as plt

    outputs = []
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", dpi=70, bbox_inches="tight")
        buffer = _fewer_colours(buffer)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def _fewer_colours(png: io.BytesIO) -> io.BytesIO:
    """The picture in 64 colours, about a third of the size."""
    small = io.BytesIO()
    Image.open(png).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small


def main(argv: Sequence[str] | None = None) -> None:
    """Executes a notebook."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path)
    args = parser.parse_args(argv)
    notebook = json.loads(args.notebook.read_text())
    execute(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    files.write_text(args.notebook, text)
    print(f"{args.notebook}: {len(notebook['cells'])} cells")


if __name__ == "__main__":
    command.run(main)
