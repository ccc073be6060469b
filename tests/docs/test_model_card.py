"""The template of the model card renders with the fewest values and with all of them."""

import re
from pathlib import Path

import jinja2
import pytest

FOLDER = Path(__file__).parents[2] / "model_cards"
FEWEST = {"model_name": "tiny", "policy": "manual", "cut": 9, "codec": "int4"}
ALL = {
    **FEWEST,
    "base_model": "facebook/deit-tiny-patch16-224",
    "dataset": "Caltech-101",
    "license": "apache-2.0",
    "freeze_points": "2:10",
    "blocks": 13,
    "frozen_blocks": ["embeddings", "layers.0"],
    "augmentation": "crop and flip",
    "views": 1,
    "epochs": 12,
    "seeds": [0, 1],
    "hardware": "one CPU thread",
    "command": "python recipes/image_classification.py",
    "results": [{"name": "cached", "accuracy": 0.801, "train_seconds": 181.2}],
    "limits": ["Not for birds."],
}


def render(**values):
    settings = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.ChainableUndefined}
    return jinja2.Environment(**settings).from_string((FOLDER / "head_card.md.jinja").read_text()).render(**values)


def limits(card):
    return re.findall(r"^- (.+)$", card.split("## Limits")[1], re.MULTILINE)


def test_card_with_all_values_shows_each_of_them():
    card = render(**ALL)
    for text in (
        "Caltech-101",
        "cut | 9 of 13",
        "embeddings, layers.0",
        "0, 1",
        "| cached | 80.1 | 181 | not measured |",
    ):
        assert text in card
    assert limits(card)[-1] == "Not for birds."


def test_card_with_the_fewest_values_says_what_was_not_measured():
    card = render(**FEWEST)
    assert "Nothing was measured for this card." in card
    assert "| random augmentation | not stated |" in card
    assert "Undefined" not in card and "None" not in card


@pytest.mark.parametrize(
    "views, sentence",
    [
        (0, "Random augmentation, if any, ended at the first freeze"),
        (1, "at most 2 stored views of each image"),
        (3, "at most 4 stored views of each image"),
    ],
)
def test_limits_of_card_say_how_many_views_were_stored(views, sentence):
    assert sentence in limits(render(**{**ALL, "views": views}))[0]


def test_card_of_exact_features_does_not_call_them_approximate():
    approximate = "The stored outputs were approximated by codec"
    assert not any(approximate in limit for limit in limits(render(**{**ALL, "codec": "fp32"})))
    assert any(approximate in limit for limit in limits(render(**ALL)))


def test_values_in_the_readme_are_those_of_the_template():
    documented = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)))
    )
    assert documented - {"value"} == set(ALL)
