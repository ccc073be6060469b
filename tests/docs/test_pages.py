"""Links of the documents lead somewhere, and the numbers that the README begins with are those of the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import DeiTConfig, DeiTForImageClassification

import hf_freezecache
from benchmarks.faults.run import make_table
from hf_freezecache.units import show_bytes

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
README = (ROOT / "README.md").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_to_files_and_headings_that_exist(page):
    assert broken_links(page) == []


def test_a_link_to_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[here](#a-title) [there](#no-title) [file](none.md) [web](https://example.org)\n")
    assert broken_links(page) == ["#no-title", "none.md"]


def test_every_page_of_docs_is_in_the_table_of_contents():
    contents = (ROOT / "docs/index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation
        assert page.name == "index.md" or f"({page.name})" in contents


def test_readme_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_headline_of_readme_is_the_committed_result():
    arms = json.loads((ROOT / "benchmarks/finetune_caltech/result.json").read_text())["results"]["arms"]
    for schedule in ("5:8", "2:10"):
        cached, frozen = arms[f"cached {schedule}"], arms[f"freeze-only {schedule}"]
        accuracy = {name: arm["accuracy_percent"]["mean"] for name, arm in (("cached", cached), ("frozen", frozen))}
        lost = accuracy["cached"] - arms["plain"]["accuracy_percent"]["mean"]
        assert f"{cached['speedup_over_plain']['median']:.2f}x faster at {lost:.1f} points" in README
        assert f"{accuracy['frozen']:.1f} % instead of {accuracy['cached']:.1f} %" in README


def test_table_of_readme_is_the_committed_result():
    arms = json.loads((ROOT / "benchmarks/headline/gpu/caltech-224.json").read_text())["results"]["arms"]
    for start, names in (
        ("| `Trainer`, 3; 4; 6; 12 epochs |", ["plain 3", "plain 4", "plain 6", "plain 12"]),
        ("| the same with a head start, 4; 6 epochs |", ["plain 4, head start", "plain 6, head start"]),
        ("| the defaults, 4 epochs |", ["linear of 4, head start"]),
        ("| 6 of 13 blocks frozen from the start, head start, 4 epochs |", ["half from 0 of 4, head start"]),
    ):
        columns = (
            [f"{arms[name]['accuracy']['mean']:.1f}" for name in names],
            [f"{arms[name]['flops'] / 1e12:.0f}" for name in names],
            [f"{arms[name]['seconds']['median']:.1f}" for name in names],
        )
        assert " | ".join([start.removesuffix(" |"), *map("; ".join, columns)]) + " |" in README


def test_table_of_faults_is_the_committed_result():
    folder = ROOT / "benchmarks/faults"
    table = make_table(json.loads((folder / "result.json").read_text())["results"])
    assert (folder / "table.md").read_text() == table and table in (ROOT / "docs/reliability.md").read_text()


def test_api_page_shows_every_public_name():
    shown = set(re.findall(r"^::: hf_freezecache\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert set(hf_freezecache.__all__) <= shown


def test_sizes_of_heads_in_the_documents_are_those_of_deit_tiny(tmp_path):
    """Sizes do not depend on the weights."""
    config = DeiTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=101
    )
    DeiTForImageClassification(config).save_pretrained(tmp_path / "base")
    model = DeiTForImageClassification.from_pretrained(tmp_path / "base")
    sizes = [show_bytes((tmp_path / "base/model.safetensors").stat().st_size)]
    for cut in (9, 13):
        folder = hf_freezecache.save_head(model, tmp_path / f"head-{cut}", cut=cut)
        sizes.append(show_bytes((folder / "head.safetensors").stat().st_size))
    page = (ROOT / "docs/hub.md").read_text()
    whole, head, last = sizes
    assert f"has {whole}; its head behind 9 of 13 blocks has {head}, the one behind all blocks {last}" in page
    assert f"A DeiT-Tiny has {whole}, its head behind 9 of 13 blocks {head}" in README
