"""Work in a thread, one round behind the loop that prepares it."""

import threading

import pytest
import torch

from hf_freezecache.build.one_behind import OneBehind


def test_functions_run_in_their_order_beside_the_caller():
    done, threads, together = [], set(), threading.Barrier(2, timeout=30)

    def note(number):
        threads.add(threading.get_ident())
        together.wait()  # the caller is past `run` by now
        done.append(number)

    with OneBehind() as behind:
        for number in range(4):
            behind.run(note, number)
            assert done == [*range(number)]
            together.wait()
    assert done == [0, 1, 2, 3]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_one_is_under_way_at_most():
    free, under_way = threading.Event(), []

    def hold(number):
        under_way.append(number)
        assert len(under_way) == 1
        free.wait(30)
        under_way.remove(number)

    with OneBehind() as behind:
        behind.run(hold, 0)
        threading.Timer(0.1, free.set).start()
        behind.run(hold, 1)
        assert 0 not in under_way


def fail(error):
    raise error


def test_error_is_raised_at_the_next_call():
    behind, later = OneBehind(), []
    with pytest.raises(OSError, match="disk is full"), behind:
        behind.run(fail, OSError("disk is full"))
        behind.run(later.append, 1)
    assert not later


def test_error_of_the_last_one_is_raised_on_leaving():
    with pytest.raises(OSError, match="disk is full"):
        with OneBehind() as behind:
            behind.run(fail, OSError("disk is full"))


def test_error_of_the_caller_goes_before_one_of_the_thread(caplog):
    caplog.set_level("INFO", "hf_freezecache")
    with pytest.raises(KeyError, match="sample"):
        with OneBehind() as behind:
            behind.run(fail, OSError("disk is full"))
            raise KeyError("sample")
    assert "What was being written has failed, too: disk is full (OSError)" in caplog.text


def test_nothing_records_gradients():
    modes = []
    with OneBehind() as behind:
        behind.run(lambda: modes.append(torch.is_grad_enabled()))
    assert modes == [False] and torch.is_grad_enabled()


def test_without_a_thread_the_caller_waits():
    threads = []
    with OneBehind(is_beside=False) as behind:
        behind.run(lambda: threads.append(threading.get_ident()))
        assert threads == [threading.get_ident()]
