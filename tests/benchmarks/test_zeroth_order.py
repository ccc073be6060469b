"""The plan of the zeroth-order benchmark: which training comes next, given the results that are there."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from datasets import Dataset

from benchmarks._images import Pixels
from benchmarks.headline.tasks import Task
from benchmarks.zeroth_order import tasks
from benchmarks.zeroth_order.jobs import Series, make_series, neighbour, next_jobs, preparation
from benchmarks.zeroth_order.methods import EPS, METHODS, OF_BOTH_STARTS, OTHER_EPS, RATES
from benchmarks.zeroth_order.tasks import HEAD_START, NEW_HEAD, TASKS, Learned

SEEDS = [0, 1, 2]


def learned(name, start=HEAD_START, half_decades=0):
    return Learned(name, start, half_decades, passes=100, load=None)


def run_all(series, points, tasks=("task",)):
    """Runs what is asked for until nothing is; returns the jobs in their order and the results."""
    done, order = {}, []
    while jobs := next_jobs(series, done, SEEDS, lambda job: False):
        order.append(jobs[0])
        done[jobs[0]] = {"accuracy": points(jobs[0])}
    return order, done


def peak(best):
    """Accuracies that fall with the distance of the learning rate from the best one, and a little with eps."""
    return lambda job: 0.0 if not job.rate else 0.9 - 0.1 * abs(math.log10(job.rate / best)) - job.eps


@pytest.mark.parametrize(
    ("rate", "up", "down"), [(1e-4, 3e-4, 3e-5), (3e-5, 1e-4, 1e-5), (1.0, 3.0, 0.3), (3.0, 10.0, 1.0)]
)
def test_learning_rates_are_half_a_decade_apart(rate, up, down):
    assert (neighbour(rate, 1), neighbour(rate, -1)) == (up, down)


@pytest.mark.parametrize("best", [1e-6, 1e-5, 3e-5, 3e-4, 1e-3])
def test_best_learning_rate_is_inside_of_those_that_were_tried(best):
    series = [Series("task", "head start", METHODS["MeZO"])]
    order, done = run_all(series, peak(best))
    [own] = series
    tried = sorted(rate for rate, eps in own.trials(done) if eps == EPS)
    assert tried[0] < best < tried[-1]
    assert own.chosen(done) == (best, EPS)
    assert {job.eps for job in order if job.rate == best and job.is_tuning} == {EPS, OTHER_EPS}


def test_range_is_widened_so_many_times_and_no_more():
    [own] = series = [Series("task", "head start", METHODS["MeZO"])]
    _, done = run_all(series, lambda job: job.rate)
    assert len({rate for rate, _ in own.trials(done)}) == len(RATES) + 4


def test_stores_and_heads_come_first_and_test_samples_last():
    [own] = series = [Series("task", "new head", METHODS["MeZO"])]
    order, done = run_all(series, peak(3e-5))
    place = order.index
    assert all(place(preparation("task", job.seed, job.is_tuning)) < place(job) for job in order if job.method)
    finals = [job for job in order if job.method and not job.is_tuning]
    assert [job.seed for job in finals] == SEEDS and len(own.finals(done, SEEDS)) == 3
    assert max(place(job) for job in order if job.is_tuning and job.method) < min(map(place, finals))


def test_method_that_is_not_tuned_has_the_settings_of_another():
    series = make_series([learned("task")], [], ["naive uniform, not tuned"])
    order, _ = run_all(series, peak(1e-4))
    trained = [job for job in order if job.method]
    assert {job.method for job in trained if job.is_tuning} == {"MeZO"}
    assert {(job.method, job.rate) for job in trained if not job.is_tuning} == {("naive uniform, not tuned", 1e-4)}


def test_all_methods_are_tried_alike():
    both = [learned("a"), learned("b")]
    order, done = run_all(make_series(both, OF_BOTH_STARTS), lambda job: 0.5 if job.rate == 3e-5 else 0.4)
    series = make_series(both, OF_BOTH_STARTS)
    counts = {
        each: len(each.trials(done)) for each in series if each.method.rates == RATES and not each.method.tuned_as
    }
    assert set(counts.values()) == {4} and len(counts) > 30
    assert [job.method for job in order if job.method][:6] == ["MeZO"] * 6
    assert len(order) == len(set(order))


def test_every_method_begins_as_its_task_does_and_some_the_other_way():
    series = make_series([learned("a", NEW_HEAD), learned("b", HEAD_START)], ["MeZO"])
    methods = {
        (each.task, each.start): {
            own.method.name for own in series if (own.task, own.start) == (each.task, each.start)
        }
        for each in series
    }
    assert methods == {
        ("a", NEW_HEAD): set(METHODS),
        ("b", HEAD_START): set(METHODS),
        ("a", HEAD_START): {"MeZO"},
        ("b", NEW_HEAD): {"MeZO"},
    }


def test_first_learning_rates_are_a_tasks_own_where_steps_follow_the_slope():
    rates = {each.method.name: each.rates for each in make_series([learned("a", half_decades=3)], [])}
    assert rates["MeZO"] == rates["pool 4095"] == [1e-3, 3e-4, 3e-3]
    assert rates["exact gradient"] == list(METHODS["exact gradient"].rates)
    assert rates["FZOO-like"] == list(METHODS["FZOO-like"].rates)


def test_small_tasks_have_ten_classes_and_one_live_block_or_none(monkeypatch):
    images = Pixels(torch.zeros(30, 3, 8, 8), torch.arange(30) % 15)
    questions = Dataset.from_dict({"input_ids": [[1]] * 30, "label": [row % 15 for row in range(30)]})
    cases = [("caltech-112-ten", images, 6), ("banking77-ten", questions, 6), ("banking77-ten-head", questions, 7)]
    for name, rows, cut in cases:
        whole = Task("whole", rows, rows, None, None, 16, 7, 4, 5)
        monkeypatch.setattr(tasks, "load_task", lambda name, options, whole=whole: whole)
        task = TASKS[name].load(argparse.Namespace(rows=None))
        found = [int(task.train[row].get("labels", task.train[row].get("label"))) for row in range(len(task.train))]
        assert sorted(found) == sorted(2 * list(range(10))) and len(task.test) == 20 and task.deep == cut
