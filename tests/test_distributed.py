"""Processes that train together: one error for all, as an error, and one voice."""

import logging
import pickle
import pkgutil
from importlib import import_module

import pytest
from support.builds import on_every_process

import hf_freezecache
from hf_freezecache.build.errors import GeometryMisfit, OverLimit
from hf_freezecache.distributed import Announcer, Group


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("cannot travel")
        self.lock = logging.getLogger().handlers

    def __reduce__(self):
        raise TypeError("no")


def failing_on(ranks, error):
    def work(group):
        def step():
            if group.rank in ranks:
                raise error(group.rank)
            return group.rank

        return group.on_all(step)

    return work


def test_results_stay_with_their_process_and_can_be_gathered():
    assert on_every_process(3, lambda group: group.on_all(lambda: group.rank)) == [0, 1, 2]
    gathered = on_every_process(3, lambda group: group.gather(group.on_all(lambda: group.rank)))
    assert gathered == [[0, 1, 2]] * 3


def test_failure_of_one_process_is_everybodys_with_its_type_and_rank():
    own, other = on_every_process(2, failing_on({0}, lambda rank: GeometryMisfit("sample 3 is erased", True)))
    assert type(own) is type(other) is GeometryMisfit
    assert (str(own), str(other)) == ("sample 3 is erased", "process 0: sample 3 is erased")
    assert own.for_all_kinds and other.for_all_kinds


def test_several_failures_are_one_for_all_processes():
    """Else some would handle a misfit and go on, and wait for ever for those that handle a full disk."""
    kinds = {1: GeometryMisfit("sample 3 is erased"), 2: OSError(28, "No space left on device")}
    errors = on_every_process(3, failing_on({1, 2}, kinds.get))
    assert [type(error) for error in errors] == [GeometryMisfit] * 3


def test_errors_of_the_system_keep_their_number():
    _, other = on_every_process(2, failing_on({0}, lambda rank: OSError(28, "No space left on device", "store")))
    assert other.errno == 28 and "process 0: No space left on device" in str(other)


def test_limit_that_was_passed_keeps_its_numbers():
    _, other = on_every_process(2, failing_on({0}, lambda rank: OverLimit(1234, 5)))
    assert (other.needed, other.limit) == (1234, 5) and str(other).startswith("process 0: the store would take 1,234")


def test_error_that_cannot_travel_comes_as_its_name_and_message():
    own, other = on_every_process(2, failing_on({0}, lambda rank: Unpicklable()))
    assert type(own) is Unpicklable
    assert type(other) is RuntimeError and "cannot travel (Unpicklable)" in str(other)


@pytest.mark.parametrize(("kind", "sent"), [(OSError, OSError), (ValueError, ValueError), (KeyError, RuntimeError)])
def test_error_that_cannot_travel_is_handled_alike_everywhere(kind, sent):
    """Else the process that has it would handle it, and wait for the others that do not."""

    class TwoArguments(kind):
        def __init__(self, reason, place):
            super().__init__(f"{reason} at {place}")

    own, other = on_every_process(2, failing_on({0}, lambda rank: TwoArguments("damaged", 3)))
    assert type(own) is TwoArguments and type(other) is sent and "damaged at 3" in str(other)
    if sent is not RuntimeError:
        assert isinstance(own, sent)


def test_failure_on_the_main_process_is_everybodys():
    def work(group):
        return group.on_main(lambda: [][0])

    assert [type(error) for error in on_every_process(2, work)] == [IndexError, IndexError]


def errors_of_package() -> list[type[Exception]]:
    for module in pkgutil.walk_packages(hf_freezecache.__path__, "hf_freezecache."):
        import_module(module.name)

    def below(cls):
        return {cls, *(further for sub in cls.__subclasses__() for further in below(sub))}

    return sorted(
        (cls for cls in below(Exception) if cls.__module__.startswith("hf_freezecache.")), key=lambda cls: cls.__name__
    )


def test_every_error_of_the_package_travels():
    errors = errors_of_package()
    assert len(errors) > 6
    for cls in errors:
        error = OverLimit(1, 2) if cls is OverLimit else cls("why")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is cls and str(again) == str(error) and vars(again) == vars(error), cls


def test_ranges_are_dealt_in_contiguous_parts():
    for size in (1, 2, 3, 5):
        parts = [Group(rank, size).my_ranges(7) for rank in range(size)]
        assert [number for part in parts for number in part] == list(range(7))


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 0)])
def test_main_process_alone_logs_and_what_is_repeated_once(rank, count, caplog):
    logger = logging.getLogger("hf_freezecache.tests")
    announcer = Announcer(Group(rank, 2), logger)
    for _ in range(2):
        announcer.warning_once("the data set is random")
    assert len(caplog.records) == count


def test_failure_that_is_survived_names_its_type_and_keeps_its_traceback_for_debugging(caplog):
    caplog.set_level(logging.DEBUG, logger="hf_freezecache")
    announcer = Announcer(Group(), logging.getLogger("hf_freezecache.tests"))
    try:
        raise OSError("the disk is full")
    except OSError as error:
        announcer.failure("There is no store", error)
    traced, warning = caplog.records
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "There is no store: the disk is full (OSError)")
    assert traced.levelname == "DEBUG" and traced.exc_info[1].__traceback__ is not None


def test_error_for_which_another_way_is_tried_is_told_with_its_type_and_traceback(caplog):
    caplog.set_level("DEBUG", logger="hf_freezecache")
    try:
        raise KeyError("column")
    except KeyError as error:
        Announcer.survived(logging.getLogger("hf_freezecache.tests"), "Rows cannot be read", error)
    told, traced = caplog.records
    assert told.levelname == "INFO" and told.getMessage().startswith("Rows cannot be read: ")
    assert "KeyError" in told.getMessage() and traced.levelname == "DEBUG" and traced.exc_info[0] is KeyError


def test_process_that_waits_in_a_step_for_one_that_failed_there_is_told():
    """Else it would wait for a value, and the other one for the end of the step."""

    def work(group):
        def step():
            if group.rank == 0:
                raise GeometryMisfit("sample 3 is erased")
            return group.broadcast("value") if group.rank == 1 else group.gather("value")

        return group.on_all(step)

    errors = on_every_process(3, work)
    assert [type(error) for error in errors] == [GeometryMisfit] * 3
    assert str(errors[1]) == str(errors[2]) == "process 0: sample 3 is erased"


@pytest.mark.parametrize("deep_rank", [0, 1])
def test_failure_of_an_outer_step_is_not_handled_in_an_inner_one(deep_rank):
    """All go on from the outer one's end: what an inner one would do after an error happens nowhere or everywhere."""
    went_on = []

    def work(group):
        def outer():
            if group.rank != deep_rank:
                raise ValueError("the outer step has failed")
            try:
                group.on_all(lambda: group.gather("value"))
            except Exception:
                went_on.append(group.rank)

        with pytest.raises(ValueError, match="the outer step has failed"):
            group.on_all(outer)
        return group.gather(group.rank)

    assert on_every_process(2, work) == [[0, 1]] * 2 and not went_on


def test_several_failures_in_steps_of_several_depths_are_one():
    def work(group):
        def outer():
            if group.rank == 2:
                raise ValueError("the outer step has failed")
            group.on_all(lambda: [][0] if group.rank == 0 else group.gather("value"))

        try:
            group.on_all(outer)
        except ValueError as error:
            return str(error), group.gather(group.rank)

    found = on_every_process(3, work)
    told = "process 2: the outer step has failed"
    assert found == [(told, [0, 1, 2]), (told, [0, 1, 2]), ("the outer step has failed", [0, 1, 2])]


def test_steps_within_steps_go_on_where_none_fails():
    assert on_every_process(2, lambda group: group.on_all(lambda: group.on_main(lambda: group.rank))) == [0, 0]
