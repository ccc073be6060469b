"""Estimates of generators in hardware: what they count is what a training draws."""

from __future__ import annotations

import json

import pytest
from support.zero_order import train

from hf_freezecache.cli.main import main
from hf_freezecache.zeroth_order.hardware import estimate_costs


def by_name(costs):
    return {cost.name: cost for cost in costs.costs}


@pytest.mark.parametrize("settings", [{}, {"estimates": 2}, {"estimator": "one_sided", "estimates": 3}])
def test_numbers_of_a_step_are_those_that_a_training_draws(settings, tmp_path):
    trainer = train(tmp_path, zero_order=settings, max_steps=2)
    perturbation = trainer.optimizer.perturbation if hasattr(trainer.optimizer, "perturbation") else None
    perturbation = perturbation or trainer.optimizer.optimizer.perturbation
    costs = by_name(estimate_costs(perturbation.length, **settings))
    assert 2 * costs["Gaussian, Box-Muller (Lee 2006)"].numbers == perturbation.numbers.drawn


def test_sizes_follow_from_the_building_blocks():
    costs = by_name(estimate_costs(1000, lanes=8, bits=8, pool_size=4095))
    lee, small = costs["Gaussian, Box-Muller (Lee 2006)"], costs["Gaussian, Box-Muller (Alimohammad 2008)"]
    assert (lee.look_up_tables, lee.block_rams, lee.multipliers) == (4 * 2 * 1452, 4 * 3, 4 * 12)
    assert (small.look_up_tables, small.flip_flops) == (4 * 2 * 534, 4 * 2 * 534)
    rotated, alone = costs["PeZO on the fly, rotated registers"], costs["uniform, a long register a lane"]
    shift = 8 * 8 * 3
    assert (rotated.look_up_tables, rotated.flip_flops) == (8 + shift, 64)
    assert (alone.look_up_tables, alone.flip_flops) == (8 + shift, 8 * 31)
    pool = costs["PeZO pool"]
    assert (pool.numbers, pool.block_rams, pool.flip_flops) == (0, 1, 9)
    wide = by_name(estimate_costs(1000, lanes=64, bits=16, pool_size=4095))["PeZO pool"]
    assert wide.block_rams == 15  # for 1,024 bits a clock cycle; the pool fits into two
    assert pool.cycles == rotated.cycles == lee.cycles == 125 * 4
    assert rotated.drawn_bits == 4 * 1000 * 8


def test_exact_scaling_takes_multipliers_in_place_of_shifts():
    costs = by_name(estimate_costs(1000, exact_scaling=True))
    rotated = costs["PeZO on the fly, rotated registers"]
    assert (rotated.look_up_tables, rotated.multipliers) == (8, 8)


@pytest.mark.parametrize(("lanes", "size"), [(1, 1), (1, 2), (3, 255), (64, 65535)])
def test_all_sizes_are_possible(lanes, size):
    for cost in estimate_costs(10, lanes=lanes, pool_size=size).costs:
        assert cost.cycles >= 1 and cost.look_up_tables > 0


@pytest.mark.parametrize("name", ["parameters", "lanes", "bits", "pool_size", "estimates"])
def test_impossible_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0: give 1 at least"):
        estimate_costs(**{"parameters": 10, name: 0})


def test_command_prints_a_table_or_json(capsys):
    assert main(["zo-cost", "1354469", "--pool-size", "1023"]) == 0
    table = capsys.readouterr().out
    assert "not syntheses" in table and "PeZO pool" in table and "LUTs -48.6%" in table
    assert main(["zo-cost", "1354469", "--json", "--estimator", "one_sided", "--estimates", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["are_estimates"] is True and found["uses"] == 9
    assert found["designs"][0]["numbers"] == 9 * 1354469
    assert found["published_by_pezo"]["look_up_tables"] == -0.486
    assert main(["zo-cost", "0"]) == 1
    assert "parameters=0" in capsys.readouterr().err
