"""Executes notebooks and stores their outputs: ``python docs/execute.py docs/notebooks/toy.ipynb``.

It needs the extra ``docs``. The cells run in the current folder, where a notebook finds its data and writes its runs.
Warnings, progress bars and times are not stored. Images of a data set must not be in the outputs.
"""

import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def execute(path: Path) -> None:
    """Runs all cells of a notebook with its own sizes, and writes their outputs into its file."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": "."}}).execute()
    notebook.metadata.pop("language_info", None)  # the version of Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output["data"] for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = _compressed(data["image/png"])
    nbformat.write(notebook, path)


def _compressed(picture: str) -> str:
    """The same picture as a smaller file."""
    image = Image.open(BytesIO(b64decode(picture)))
    if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
        image = image.convert("RGB")
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
