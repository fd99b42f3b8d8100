import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from pathfm import workers
from pathfm.errors import MissingMppError, PathfmError
from pathfm.workers import InternalError, ProcessName, WorkerCrash, map_isolated, usable_cores


def misbehave(item):
    """What the items of these tests do to their worker."""
    if item == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(7)
    if item == "hang":
        time.sleep(600)
    if item == "bug":
        return {}["nothing here"]
    if item == "refused":
        raise MissingMppError("no mpp", where="slide.svs", fix="set tile.assume_mpp")
    if item == "not picklable":
        return lambda: None
    return os.getpid() if item == "pid" else f"done {item}"


def test_one_item_that_breaks_its_worker_breaks_nothing_else():
    items = ["a", "segfault", "b", "killed", "exit", "hang", "bug", "refused", "not picklable", "c"]
    outcomes = dict(map_isolated(misbehave, items, workers=2, timeout_s=1.0))
    assert set(outcomes) == set(items)
    assert [outcomes[item] for item in "abc"] == ["done a", "done b", "done c"]
    for item, words in {
        "segfault": "SIGSEGV",
        "killed": "SIGKILL",
        "exit": "exit code 7",
        "hang": "no result after 1 s",
    }.items():
        assert isinstance(outcomes[item], WorkerCrash)
        assert words in str(outcomes[item])
    assert isinstance(outcomes["refused"], MissingMppError)
    assert str(outcomes["refused"]) == "slide.svs: no mpp (set tile.assume_mpp)"
    assert isinstance(outcomes["bug"], InternalError)
    assert "KeyError: 'nothing here'" in str(outcomes["bug"])
    assert "test_workers.py" in outcomes["bug"].where
    assert "in misbehave" in outcomes["bug"].traceback
    assert isinstance(outcomes["not picklable"], InternalError)
    assert not any("\n" in str(outcome) for outcome in outcomes.values())


def test_a_single_worker_is_another_process_and_serves_all_items():
    outcomes = list(map_isolated(misbehave, ["pid"] * 5, workers=1))
    pids = {pid for _, pid in outcomes}
    assert len(outcomes) == 5
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_a_worker_killed_between_items_is_replaced():
    running = map_isolated(misbehave, ["pid", "pid", "hang"], workers=1)
    first = next(running)[1]
    # The second item is with the worker by now or soon: either it answers, or its crash is told; the third is still begun.
    os.kill(first, signal.SIGKILL)
    second = next(running)[1]
    assert isinstance(second, (int, WorkerCrash))
    running.close()


def test_closing_the_iterator_ends_the_workers():
    running = map_isolated(misbehave, ["pid", "hang"], workers=1)
    pid = next(running)[1]
    running.close()
    assert _gone(pid, within_s=5)


def test_no_items_start_no_workers():
    assert list(map_isolated(misbehave, [], workers=4)) == []


def test_items_are_drawn_only_when_a_worker_is_free():
    drawn, handled = [], []

    def source():
        for number in range(7):
            drawn.append(number)
            yield number

    for number, _ in map_isolated(misbehave, source(), workers=2):
        assert len(drawn) - len(handled) <= 2
        handled.append(number)
        assert len(drawn) - len(handled) <= 1, "the next one is drawn after this one was handled"
    assert sorted(handled) == drawn == list(range(7))


def test_waiting_for_an_item_holds_up_no_result():
    handled = threading.Event()

    def source():
        yield "a"
        yield "segfault"
        assert handled.wait(30), "the results of earlier items come while this one is waited for"
        yield "b"

    outcomes = {}
    for item, outcome in map_isolated(misbehave, source(), workers=3):
        outcomes[item] = outcome
        if len(outcomes) == 2:
            handled.set()
    assert (outcomes["a"], outcomes["b"]) == ("done a", "done b")
    assert isinstance(outcomes["segfault"], WorkerCrash)


def test_an_item_times_out_while_the_next_is_waited_for():
    handled = threading.Event()

    def source():
        yield "hang"
        handled.wait(30)

    ((_, outcome),) = (
        (item, handled.set() or outcome) for item, outcome in map_isolated(misbehave, source(), 2, timeout_s=0.5)
    )
    assert "no result after 0.5 s" in str(outcome)


def test_what_the_source_raises_is_raised_and_ends_the_workers():
    def source():
        yield "pid"
        raise MissingMppError("no mpp")

    running = map_isolated(misbehave, source(), workers=1)
    _, pid = next(running)
    with pytest.raises(MissingMppError, match="no mpp"):
        next(running)
    assert _gone(pid, within_s=5)


def test_closing_does_not_wait_for_an_item_that_never_comes():
    never, began = threading.Event(), threading.Event()

    def source():
        yield "a"
        began.set()
        never.wait()
        yield "b"

    running = map_isolated(misbehave, source(), workers=2)
    assert next(running) == ("a", "done a")
    assert began.wait(5)
    running.close()
    never.set()


def test_many_items_in_few_workers_are_all_done_once():
    items = [f"item {number}" for number in range(300)]
    outcomes = list(map_isolated(misbehave, iter(items), workers=3))
    assert sorted(item for item, _ in outcomes) == sorted(items)
    assert all(outcome == f"done {item}" for item, outcome in outcomes)


def test_the_name_of_a_process():
    here = ProcessName.here()
    assert ProcessName.parse(str(here)) == here
    assert "." not in str(here) and len(str(here)) < 80
    assert not here.has_ended
    assert not here.of_earlier_boot
    assert here._replace(pid=2**30).has_ended
    assert here._replace(start=here.start + 1).has_ended
    assert not here._replace(start=0).has_ended
    assert not here._replace(boot="0", pid=2**30).has_ended
    assert not here._replace(space="0", pid=2**30).has_ended
    assert here._replace(boot="0").of_earlier_boot
    assert not here._replace(boot="0", machine="0").of_earlier_boot
    for text in ("", "123", "a-b-c-d-1", "a-b-c-d-1-2-3", "a-b-c-d-1-x", "a.b-b-c-d-1-2"):
        assert ProcessName.parse(text) is None


def test_a_killed_process_has_ended_before_anyone_collects_it():
    code = "from pathfm.workers import ProcessName; print(ProcessName.here(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        name = ProcessName.parse(process.stdout.readline().strip())
        assert name.pid == process.pid
        assert not name.has_ended
        process.kill()
        assert _gone(process.pid, within_s=5)
        assert name.has_ended


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_script_without_a_main_guard_may_use_functions_of_the_package(tmp_path, how):
    code = "from pathfm.workers import map_isolated\nimport posixpath\nprint(*map_isolated(posixpath.basename, ['/a/b'], 1))"
    (tmp_path / "script.py").write_text(code)
    arguments = [str(tmp_path / "script.py")] if how == "file" else ["-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    output = subprocess.run([sys.executable, *arguments], input=code, capture_output=True, text=True, env=environment)
    assert (output.stdout, output.stderr) == ("('/a/b', 'b')\n", "")


def test_ctrl_c_ends_parent_and_workers_quietly(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import signal
            import time
            from pathfm.workers import map_isolated

            def work(item):
                print("working", flush=True)
                time.sleep(600)

            if __name__ == "__main__":
                # Whoever started the tests in the background may have had Ctrl-C ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    list(map_isolated(work, [1], workers=1))
                except KeyboardInterrupt:
                    print("interrupted")
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True, **pipes) as parent:
        assert parent.stdout.readline() == "working\n"
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=20) == ("interrupted\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys, time
            from pathfm.workers import map_isolated

            def work(item):
                print(os.getpid(), flush=True)
                time.sleep(600)

            if __name__ == "__main__":
                list(map_isolated(work, [1, 2], workers=2))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    assert all(_gone(pid, within_s=10) for pid in pids)


def test_internal_errors_keep_their_traceback_when_they_travel():
    error = pickle.loads(pickle.dumps(InternalError("what", where="where", fix="fix", traceback="lines")))
    assert (str(error), error.traceback) == ("where: what (fix)", "lines")
    assert isinstance(error, PathfmError)


def test_usable_cores_are_at_least_one_and_at_most_what_there_is():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_cpu_quotas_of_nested_groups_and_of_version_1(tmp_path):
    (tmp_path / "membership").write_text("1:cpu:/\n0::/outer/inner\n")
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/cpu.max").write_text("250000 100000\n")
    (tmp_path / "outer/inner/cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert list(workers._cpu_quotas(tmp_path, tmp_path / "membership")) == [float("inf"), 2.5, 1.5]
    assert list(workers._cpu_quotas(tmp_path / "absent", Path("absent"))) == []


def _gone(pid, within_s):
    """Whether a process ends in time (a zombie that nobody has collected yet has ended)."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False
