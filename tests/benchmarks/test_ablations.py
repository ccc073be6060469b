"""What a predictor needs, measured by leaving parts of it out."""

import pytest
from support.recorded_runs import made_up_run, made_up_runs

from benchmarks.predictor import ablations


def test_every_network_is_scored_by_a_predictor_that_was_made_without_it():
    tests = [made_up_run("new", "other", 99)]
    found = ablations.measure(made_up_runs(runs=2), tests, ablations.VARIANTS["window 4"], 0, epochs=1)
    assert set(found) == {"net0", "net1", "net2", "other (test)"}
    for scores in found.values():
        assert scores["skill"] == pytest.approx(1 - scores["brier"] / scores["brier_of_the_share"])


def test_table_tells_networks_left_out_from_test_networks():
    def scores(skill):
        return {"skill": skill, "precision": 0.5, "recall": None}

    by_seed = {"0": {"a": scores(0.2), "b (test)": scores(-1.0)}, "1": {"a": scores(0.4), "b (test)": scores(0.0)}}
    line = ablations.table({"whole": by_seed})[-1]
    assert line == "| whole | 0.30 (0.20 to 0.40) | 0.50 | nan | -0.50 (-1.00 to 0.00) | 0.50 | nan |"


def test_every_variant_is_a_predictor():
    for settings in ablations.VARIANTS.values():
        ablations.FreezePredictor(**settings)
