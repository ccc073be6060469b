"""The notebook: the pair of its script, and run from top to bottom against a Hub of this test."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from support.hub_server import serving, settings_for

RECIPES = Path(__file__).parents[1] / "recipes"
NOTEBOOK = RECIPES / "vit_finetune.ipynb"


def test_notebook_is_the_pair_of_its_script():
    notebook, script = nbformat.read(NOTEBOOK, as_version=4), jupytext.read(NOTEBOOK.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_notebook_runs_from_images_to_a_pushed_head(tmp_path, monkeypatch):
    with serving() as hub:
        settings = {**settings_for(hub, tmp_path / "home"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        settings |= {
            "PUSH_TO": "ann/digits-head",
            "OUTPUT": str(tmp_path / "out"),
            "PYTHONPATH": str(RECIPES.parent),
        }
        for name, value in settings.items():
            monkeypatch.setitem(os.environ, name, value)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(RECIPES)}}).execute()
        pushed = hub.paths("ann/digits-head")
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "the same logits, bit for bit: True" in printed
    assert {"head.safetensors", "head_config.json", "README.md"} <= set(pushed)
    assert not any(path.endswith(".arrow") for path in pushed)
    assert (tmp_path / "out" / "run" / "freeze_cache_report.html").exists()
