"""Trainings in processes of their own, as the benchmark of faults runs them."""

import pytest
from support.processes import warm_context

from benchmarks._common import quiet


@pytest.fixture(scope="module")
def processes():
    """Starts the interpreter that they are forked from."""
    warm_context()
    quiet()
