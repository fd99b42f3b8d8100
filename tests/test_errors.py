import inspect
import pickle

import pytest

from pathfm import errors
from pathfm.errors import ExitCode, MissingExtraError, PathfmError, SlideError, UsageError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PathfmError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_where_and_what_to_do(kind):
    assert str(kind("it is broken", where="a.svs", fix="mend it")) == "a.svs: it is broken (mend it)"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_crosses_process_borders_unchanged(kind):
    error = kind("it is broken", where="a.svs", fix="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.what, copy.where, copy.fix, copy.exit_code) == (error.what, error.where, error.fix, error.exit_code)


def test_what_alone_is_a_whole_message():
    assert str(PathfmError("it is broken")) == "it is broken"


def test_a_missing_extra_carries_its_install_line_also_across_processes():
    error = MissingExtraError("reports need matplotlib", extra="report")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "reports need matplotlib (pip install 'pathfm[report]')"


def test_exit_codes_are_the_documented_ones():
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "SOME_FAILED": 3,
        "PREEMPTED": 75,
        "INTERRUPTED": 130,
    }
    assert UsageError.exit_code == ExitCode.USAGE
    assert all(kind.exit_code == ExitCode.SOME_FAILED for kind in KINDS if issubclass(kind, SlideError))
