"""The notebook, run from top to bottom without a network, as a person would with fewer steps; and the pictures stored in it."""

import base64
import io
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

import quick_compile

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "sample_colab.ipynb"


def pictures(notebook, kind: str) -> dict[str, list[Image.Image]]:
    """The pictures of that kind, "png" or "gif", by the first line of their cell."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if f"image/{kind}" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output["data"][f"image/{kind}"])))
                found.setdefault(cell.source.splitlines()[0], []).append(picture)
    return found


def check_pictures(notebook) -> None:
    grids, animations = pictures(notebook, "png"), pictures(notebook, "gif")
    assert {cell: len(shown) for cell, shown in grids.items()} == {
        "# @title Draw four classes": 1,
        "# @title Sliders": 1,
        "# @title Complete a picture": 1,
        "# @title Keep the best": 1,
    }
    for (picture,) in grids.values():
        assert len(picture.convert("RGB").getcolors(2**24)) > 50  # more than a blank grid with names
    assert list(animations) == ["# @title Watch the decoding"]
    assert animations["# @title Watch the decoding"][0].n_frames == 32


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    environment = os.environ | {
        "VGPT_JAX_NOTEBOOK_STEPS": "20",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        **quick_compile.ENVIRONMENT,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))  # no kernels of the user's, but this interpreter
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute(env=environment)
    return notebook, folder


def test_it_runs_from_top_to_bottom_and_shows_pictures(executed):
    notebook, folder = executed
    check_pictures(notebook)
    assert (folder / "runs" / "notebook_emoji_20" / "classifier" / "model" / "metadata.json").is_file()


def test_it_has_sliders(executed):
    (sliders,) = (cell for cell in executed[0].cells if cell.source.startswith("# @title Sliders"))
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in sliders.outputs)


def test_what_is_stored_is_a_whole_run_with_its_pictures():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_pictures(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 2_000_000
