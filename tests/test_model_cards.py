"""The template of model cards: what it shows of what was measured, and what it says of the rest."""

import re
from pathlib import Path

import jinja2
import jinja2.meta
import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "model_cards"
TEMPLATE = (FOLDER / "head_card.md.jinja").read_text()
VALUES = dict(
    model_name="vit-caltech",
    base_model="google/vit-base-patch16-224-in21k",
    dataset="Caltech 101",
    license="apache-2.0",
    policy="manual",
    freeze_points="1:4,3:9",
    cut=9,
    blocks=13,
    frozen_blocks=["vit.embeddings", "vit.layers.0"],
    codec="int4",
    augmentation="crop and flip",
    views=1,
    epochs=10,
    seeds=[0, 1],
    hardware="one CPU",
    command="python recipes/train.py --policy manual",
    results=[
        dict(name="plain", accuracy=0.9512, train_seconds=1234.4, train_flops=2.345e15),
        dict(name="cached"),
    ],
    limits=["Other sizes of images were not tried."],
)
REQUIRED = dict(model_name="vit-caltech", policy="linear", cut=9, codec="int4")


def render(**values) -> str:
    """As the README of the folder says."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(**values)


def head_of(card: str) -> dict:
    """The YAML between the dashes at the card's beginning."""
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def table_of(card: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's table: first cell -> the others."""
    text = card.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if not row[0].startswith("---")}


def limits_of(card: str) -> list[str]:
    return re.findall(r"^- (.+)$", card.split("## Limits\n")[1], re.M)


def test_card_shows_every_value():
    card = render(**VALUES)
    assert head_of(card) == {
        "library_name": "transformers",
        "base_model": VALUES["base_model"],
        "license": "apache-2.0",
        "tags": ["hf_freezecache"],
    }
    assert "\n# vit-caltech\n" in card
    assert "Fine-tuned from `google/vit-base-patch16-224-in21k` on Caltech 101 with" in card
    assert table_of(card, "How it was trained") == {
        "": [""],
        "policy": ['manual, `freeze_points="1:4,3:9"`'],
        "final cut": ["9 of 13 blocks, stem included"],
        "frozen": ["vit.embeddings, vit.layers.0"],
        "codec": ["int4"],
        "random augmentation": ["crop and flip"],
        "epochs": ["10"],
        "seeds": ["0, 1"],
    }
    assert "```bash\npython recipes/train.py --policy manual\n```" in card
    assert "on one CPU." in card
    assert card.rstrip().endswith("- Other sizes of images were not tried.")


def test_results_are_in_percent_seconds_and_teraflop_and_gaps_say_so():
    table = table_of(render(**VALUES), "Measured")
    assert table["plain"] == ["95.1", "1234", "2345.00"]
    assert table["cached"] == ["not measured"] * 3


def test_card_without_measurements_says_so():
    card = render(**REQUIRED)
    assert "Nothing was measured for this card." in card
    assert "accuracy" not in card and "Training seconds" not in card


def test_card_leaves_out_what_it_does_not_know():
    card = render(**REQUIRED)
    assert head_of(card) == {"library_name": "transformers", "tags": ["hf_freezecache"]}
    assert table_of(card, "How it was trained") == {
        "": [""],
        "policy": ["linear"],
        "final cut": ["9"],
        "codec": ["int4"],
        "random augmentation": ["not stated"],
    }
    assert "Trained from scratch with" in card and "Fine-tuned" not in card
    assert "```" not in card and "None" not in card


@pytest.mark.parametrize(
    "views, sentence",
    [
        (0, "Random augmentation, if any, ended at the first freeze: one view of each image was stored."),
        (1, "From the first freeze on, training repeated at most 2 stored views of each image."),
        (3, "From the first freeze on, training repeated at most 4 stored views of each image."),
    ],
)
def test_limits_say_how_many_views_were_stored(views, sentence):
    assert limits_of(render(**{**VALUES, "views": views}))[0] == sentence


def test_limits_without_the_number_of_views_say_so():
    assert limits_of(render(**REQUIRED))[0].endswith("their number was not stated.")


@pytest.mark.parametrize("codec, approximate", [("int4", True), ("fp32", False)])
def test_limits_call_features_approximate_unless_they_are_exact(codec, approximate):
    limits = limits_of(render(**{**VALUES, "codec": codec}))
    assert (f"The stored outputs were approximated by codec `{codec}`." in limits) is approximate


@pytest.mark.parametrize("values", [VALUES, REQUIRED], ids=["all", "required"])
def test_tables_have_no_gaps_and_as_many_cells_as_their_head(values):
    """A blank line inside a table ends it; a row of another length breaks it."""
    tables = re.findall(r"(?:^\|.*\n)+", render(**values), re.M)
    assert len(tables) == (2 if "results" in values else 1)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_readme_lists_the_values_of_the_template():
    readme = (FOLDER / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(TEMPLATE)))


def test_code_of_the_readme_renders_a_card(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    [code] = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    names = {}
    exec(code, names)
    assert head_of(names["card"])["base_model"] == "..."
    assert table_of(names["card"], "How it was trained")["final cut"] == ["9"]
