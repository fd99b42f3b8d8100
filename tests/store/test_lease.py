"""One slide, one machine: whatever dies, sleeps or comes at the same time, and whatever the clocks say."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pathfm.errors import StoreError
from pathfm.store import lease as lease_module
from pathfm.store.commit import commit_dir, partial, sweep
from pathfm.store.lease import LeaseLostError, Leases, holder
from pathfm.workers import ProcessName

ELSEWHERE = ProcessName.here()._replace(host="far", machine="farfar", boot="farfar", pid=77)

PROGRAM = """
import sys, time
from pathlib import Path
from pathfm.store.commit import commit_dir
from pathfm.store.lease import Leases
target, ttl_s = Path(sys.argv[1]), float(sys.argv[2])
with Leases(ttl_s) as leases, leases.take(target) as lease:
    try:
        with commit_dir(target, lease.check) as folder:
            (folder / "content").write_text("by the child")
            print("working", flush=True)
            sys.stdin.readline()
        print("committed", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


class Clock:
    """Seconds that only pass when told so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def child(target, ttl_s=60.0, crash_at="", program=PROGRAM):
    environment = {**os.environ, "PATHFM_CRASH_AT": crash_at}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, str(target), str(ttl_s)], env=environment, **pipes)


def foreign(target, age_s=0.0, token="f" * 32, ttl_s=120.0):
    """A lease that a process of another machine holds, last heard of ``age_s`` ago by the drive's clock."""
    path = lease_module.beside(target, ".lease")
    path.write_text(json.dumps({"token": token, "process": str(ELSEWHERE), "ttl_s": ttl_s}) + "\n")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lease_is_had_by_one_and_leaves_nothing(tmp_path):
    target = tmp_path / "a.zarr"
    with Leases(60) as one, Leases(60) as other:
        with one.take(target) as lease:
            assert lease.still_mine()
            assert other.take(target) is None
            assert one.take(target) is None
            assert holder(target) == f"host {ProcessName.here().host}, pid {os.getpid()}"
            assert pickle.loads(pickle.dumps(lease)).still_mine()
        assert holder(target) == ""
        assert not lease.still_mine()
        assert other.take(target) is not None
    assert names(tmp_path) == []


def test_a_beat_shows_in_the_file(tmp_path):
    with Leases(0.3) as leases:
        lease = leases.take(tmp_path / "a")
        before = lease.path.stat()
        time.sleep(0.4)
        after = lease.path.stat()
        assert after.st_size > before.st_size
        assert after.st_mtime_ns > before.st_mtime_ns


def test_closing_gives_back_what_is_left_and_takes_no_more(tmp_path):
    leases = Leases(60)
    assert leases.take(tmp_path / "a") and leases.take(tmp_path / "b")
    leases.close()
    assert leases.take(tmp_path / "a") is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("offset_s", [0.0, 3600.0, -3600.0])
def test_the_drives_own_clock_counts(tmp_path, monkeypatch, offset_s):
    clock, target = Clock(), tmp_path / "a"
    foreign(target, age_s=130 - offset_s)
    real = lease_module._drive_time
    monkeypatch.setattr(lease_module, "_drive_time", lambda path: real(path) + offset_s)
    leases = Leases(120, clock)
    assert leases.take(target) is None, "silence must be seen, not only dated"
    clock.now += 39
    assert leases.take(target) is None
    clock.now += 2
    assert leases.take(target).still_mine()
    leases.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("offset_s", [0.0, 3600.0, -3600.0])
def test_a_holder_that_beats_is_never_robbed(tmp_path, monkeypatch, offset_s):
    """Also when the drive's clock is set an hour forward or back while it works."""
    clock, target = Clock(), tmp_path / "a"
    path = foreign(target)
    real = lease_module._drive_time
    monkeypatch.setattr(lease_module, "_drive_time", lambda path: real(path) + offset_s)
    leases = Leases(120, clock)
    for _ in range(100):
        assert leases.take(target) is None
        clock.now += 20
        stamp = path.stat().st_mtime
        with path.open("ab") as file:
            file.write(b".")
        os.utime(path, (stamp, stamp))  # as if the time did not even move
    assert names(tmp_path) == [".a.lease"]


def test_a_clock_that_was_set_back_does_not_keep_a_dead_lease(tmp_path):
    clock, target = Clock(), tmp_path / "a"
    foreign(target, age_s=-3600)
    leases = Leases(120, clock)
    assert leases.take(target) is None
    clock.now += 239
    assert leases.take(target) is None
    clock.now += 2
    assert leases.take(target) is not None
    leases.close()


def test_the_holders_own_term_counts(tmp_path):
    clock, target = Clock(), tmp_path / "a"
    foreign(target, age_s=500, ttl_s=1000)
    leases = Leases(10, clock)
    assert leases.take(target) is None
    clock.now += 900
    assert leases.take(target) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}\n', "\0" * 50])
def test_a_lease_that_says_nothing_expires_soon(tmp_path, content):
    """Its holder died between creating and naming it: no term of days, which only living holders know, may hold it."""
    clock, target = Clock(), tmp_path / "a"
    path = foreign(target)
    path.write_text(content)
    os.utime(path, (1, 1))
    leases = Leases(86400, clock)
    assert holder(target) == "an unknown process"
    assert leases.take(target) is None
    clock.now += 3
    assert leases.take(target) is None
    clock.now += 1
    assert leases.take(target) is not None
    leases.close()


@pytest.mark.parametrize("collected", [True, False])
def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path, collected):
    target = tmp_path / "a"
    process = child(target)
    assert process.stdout.readline() == "working\n"
    with Leases(60) as leases:
        assert leases.take(target) is None
        process.kill()
        if collected:
            process.wait()
        while leases.take(target) is None:  # the kill takes a moment
            time.sleep(0.01)
        assert names(tmp_path) == [".a.lease"], "what it left half-written is gone"
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert names(tmp_path) == []


def test_a_number_that_was_given_again_fools_nobody(tmp_path):
    target = tmp_path / "a"
    path = foreign(target)
    here = ProcessName.here()
    reused = here._replace(start=here.start + 1)
    path.write_text(json.dumps({"token": "t", "process": str(reused), "ttl_s": 60}) + "\n")
    with Leases(60) as leases:
        assert leases.take(target) is not None


@pytest.mark.parametrize("point", ["lease.taken", "lease.before_release"])
def test_a_kill_at_a_crash_point_leaves_a_lease_that_is_followed(tmp_path, point):
    target = tmp_path / "a"
    process = child(target, crash_at=point)
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    assert ".a.lease" in names(tmp_path), "the kill landed inside"
    with Leases(60) as leases:
        leases.sweep(tmp_path)
        assert names(tmp_path) == ([] if point == "lease.taken" else ["a"])
        assert leases.take(target) is not None


def test_a_kill_before_the_lease_has_a_name_is_followed(tmp_path):
    clock, target = Clock(), tmp_path / "a"
    process = child(target, crash_at="lease.created")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (lease,) = tmp_path.iterdir()
    assert (lease.name, lease.read_bytes()) == (".a.lease", b"")
    os.utime(lease, (1, 1))
    with Leases(86400, clock) as leases:
        assert leases.take(target) is None
        clock.now += 4
        assert leases.take(target) is not None


def test_a_kill_while_taking_over_is_followed_too(tmp_path):
    target = tmp_path / "a"
    for point in ("lease.taken", "lease.before_takeover"):
        process = child(target, crash_at=point)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert names(tmp_path) == [".a.lease"]
    with Leases(60) as leases:
        assert leases.take(target) is not None


def test_a_sleeper_that_wakes_up_commits_nothing(tmp_path):
    target = tmp_path / "a"
    process = child(target, ttl_s=1.0)
    assert process.stdout.readline() == "working\n"
    half_written = next(tmp_path.glob("*.partial"))
    with Leases(1.0) as leases:
        time.sleep(1.5)
        assert leases.take(target) is None, "it beats"
        process.send_signal(signal.SIGSTOP)
        while not (lease := leases.take(target)):
            time.sleep(0.05)
        assert not half_written.exists()
        half_written.mkdir()  # even if its half-written work were still there
        process.send_signal(signal.SIGCONT)
        assert process.communicate("\n")[0] == "LeaseLostError\n"
        assert lease.still_mine(), "its waking heartbeat and its release concern its own lease only"
        assert not target.exists()
        with commit_dir(target, lease.check) as folder:
            (folder / "content").write_text("by the heir")
    assert (target / "content").read_text() == "by the heir"
    assert names(tmp_path) == ["a"]


RACE = """
import sys, time
from pathlib import Path
from pathfm.store.lease import Leases
folder, leases = Path(sys.argv[1]), Leases(60)
print("ready", flush=True)
sys.stdin.readline()
had = [leases.take(folder / str(number)) for number in range(200)]
print("raced", flush=True)
sys.stdin.readline()
print(*(int(lease is not None) for lease in had))
print(*(int(lease is not None and lease.still_mine()) for lease in had))
leases.close()
"""


@pytest.mark.parametrize("stale", [False, True])
def test_two_processes_race_200_times(tmp_path, stale):
    if stale:  # all see each lease expired at the same time
        here = ProcessName.here()
        for number in range(200):
            content = {"token": "t", "process": str(here._replace(pid=2**30, start=1)), "ttl_s": 60}
            (tmp_path / f".{number}.lease").write_text(json.dumps(content) + "\n")
    racers = [child(tmp_path, program=RACE) for _ in range(2)]
    for word in ("ready\n", "raced\n"):
        assert [racer.stdout.readline() for racer in racers] == [word] * 2
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
    lines = [racer.communicate()[0].splitlines() for racer in racers]
    holding = [list(map(int, mine.split())) for _, mine in lines]
    assert [a + b for a, b in zip(*holding, strict=True)] == [1] * 200
    assert names(tmp_path) == []


class Turns:
    """Runs functions in threads, one file operation at a time, in an order drawn from a seed."""

    def __init__(self, monkeypatch):
        self.actor = threading.local()
        self.blocked: dict[int, threading.Event] = {}
        self.changed = threading.Condition()
        for owner, name in ((Path, "open"), (Path, "rename"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self._in_turn(getattr(owner, name)))

    def _in_turn(self, operation):
        @functools.wraps(operation)
        def wrapped(*args, **kwargs):
            if hasattr(self.actor, "number"):
                go = threading.Event()
                with self.changed:
                    self.blocked[self.actor.number] = go
                    self.changed.notify()
                go.wait()
            return operation(*args, **kwargs)

        return wrapped

    def run(self, functions, seed):
        """What the functions return, in their order."""
        results, draw = {}, random.Random(seed)

        def act(number):
            self.actor.number = number
            result = functions[number]()
            with self.changed:
                results[number] = result
                self.changed.notify()

        threads = [threading.Thread(target=act, args=(number,), daemon=True) for number in range(len(functions))]
        for thread in threads:
            thread.start()
        while len(results) < len(functions):
            with self.changed:
                self.changed.wait_for(lambda: len(results) + len(self.blocked) == len(functions), timeout=10)
                if self.blocked:
                    self.blocked.pop(draw.choice(sorted(self.blocked))).set()
        for thread in threads:
            thread.join()
        return [results[number] for number in range(len(functions))]


def _taker():
    clock = Clock()
    leases = Leases(120, clock)
    leases._keep = lambda lease: lease  # no heartbeat thread: the schedule is all there is
    return leases, clock


@pytest.mark.parametrize("wakes", [False, True], ids=["dead holder", "holder wakes up"])
def test_every_interleaving_of_takeovers_has_at_most_one_holder(tmp_path, monkeypatch, wakes):
    turns = Turns(monkeypatch)
    outcomes = set()
    for seed in range(150):
        target = tmp_path / f"a{seed}"
        path = foreign(target, age_s=1000)
        takers = [_taker() for _ in range(3)]
        for leases, clock in takers:
            assert leases.take(target) is None
            clock.now += 50
        old = lease_module.Lease(path, "f" * 32)

        def wake(late=seed % 15, old=old):
            for _ in range(late):
                Path(os.devnull).open("rb").close()
            return old.still_mine()

        acts = [functools.partial(leases.take, target) for leases, _ in takers]
        *had, woken = turns.run([*acts, wake if wakes else (lambda: False)], seed)
        holding = [lease for lease in [*had, old] if lease and lease.still_mine()]
        assert len(holding) <= 1
        assert [item.name for item in tmp_path.glob(f"*a{seed}*")] == [path.name] * len(holding)
        outcomes.add((sum(lease is not None for lease in had), woken, holding == [old]))
    # All that can happen did: someone inherits, or the holder woke up in time and keeps it.
    assert (1, False, False) in outcomes
    assert not wakes or {(0, True, True), (1, True, False)} <= outcomes


def test_every_interleaving_of_release_and_take(tmp_path, monkeypatch):
    turns = Turns(monkeypatch)
    for seed in range(80):
        target = tmp_path / f"a{seed}"
        (first, _), (second, _), (third, _) = _taker(), _taker(), _taker()
        lease = first.take(target)
        _, *had = turns.run(
            [lease.release, functools.partial(second.take, target), functools.partial(third.take, target)], seed
        )
        assert sum(bool(each and each.still_mine()) for each in had) == sum(each is not None for each in had) <= 1
        assert len(list(tmp_path.glob(f"*a{seed}*"))) == sum(each is not None for each in had)


@pytest.mark.parametrize("what", ["a beat", "another's lease"])
def test_what_happens_between_judging_and_taking_over_counts(tmp_path, monkeypatch, what):
    clock, target = Clock(), tmp_path / "a"
    path = foreign(target, age_s=1000)
    leases = Leases(120, clock)
    assert leases.take(target) is None
    clock.now += 50

    def meanwhile(name):
        assert name == "lease.before_takeover"
        if what == "a beat":
            with path.open("ab") as file:
                file.write(b".")
        else:
            foreign(target, token="e" * 32)

    monkeypatch.setattr(lease_module, "crash_point", meanwhile)
    assert leases.take(target) is None
    assert lease_module.Lease(path, ("f" if what == "a beat" else "e") * 32).still_mine()
    assert names(tmp_path) == [".a.lease"]


def test_putting_back_overwrites_nothing(tmp_path, caplog):
    path = foreign(tmp_path / "a")
    before = path.read_bytes()
    lease_module._put_back(path, b"older")
    assert path.read_bytes() == before
    assert "two machines may work on this one" in caplog.text


def test_a_lease_caught_by_mistake_is_put_back_and_kept_alive(tmp_path):
    with Leases(3.0) as leases:
        lease = leases.take(tmp_path / "a")
        content = lease.path.read_bytes()
        lease.path.unlink()
        assert not lease.still_mine()
        timer = threading.Timer(0.75, lease_module._put_back, (lease.path, content))  # one beat misses it
        timer.start()
        lease.check()
        timer.join()
        size = lease.path.stat().st_size
        time.sleep(0.8)
        assert lease.path.stat().st_size > size


NODE = """
import random, sys, time
from pathlib import Path
from pathfm import workers
from pathfm.store.commit import commit_dir, sweep
from pathfm.store.lease import LeaseLostError, Leases
out, name = Path(sys.argv[1]), sys.argv[2]
workers._machine = lambda: (name, name, name, "0")  # a machine of its own
sweep(out)
with Leases(0.8) as leases, (out.parent / f"made by {name}").open("w") as made:
    for task, lease in leases.each(range(40), lambda task: out / str(task), lambda task: (out / str(task)).exists()):
        with lease:
            try:
                with commit_dir(out / str(task), lease.check) as folder:
                    (folder / "content").write_text(str(task))
                    time.sleep(0.04 * random.random())
            except LeaseLostError:
                continue
        print(task, file=made, flush=True)
    time.sleep(0.4)
    leases.sweep(out)
"""


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_machines_that_die_and_sleep_make_each_slide_once(tmp_path, seed):
    draw, out, machines = random.Random(seed), tmp_path / "out", []
    out.mkdir()

    def start():
        arguments = [sys.executable, "-c", NODE, str(out), f"machine{len(machines)}"]
        machines.append(subprocess.Popen(arguments))

    for _ in range(3):
        start()
    killed = 0
    for act in ["kill", "sleep", "kill", "kill"]:
        time.sleep(0.3 * draw.random())
        machine = draw.choice([each for each in machines if each.poll() is None])
        if act == "kill":
            machine.kill()
            killed += 1
            start()
        else:
            machine.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            machine.send_signal(signal.SIGCONT)
    codes = [machine.wait(30) for machine in machines]
    assert codes.count(-signal.SIGKILL) == killed, "every kill landed in a running machine"
    assert codes.count(0) == len(machines) - killed
    assert names(out) == sorted(str(task) for task in range(40))
    made = [line for file in tmp_path.glob("made by *") for line in file.read_text().split()]
    assert len(made) == len(set(made))


def test_each_gives_all_tasks_and_those_of_others_last(tmp_path):
    done = set()
    with Leases(0.5) as mine, Leases(0.5) as others:
        theirs, finished = others.take(tmp_path / "a"), others.take(tmp_path / "b")
        given = []
        for task, lease in mine.each(["a", "b", "c", "d"], lambda task: tmp_path / task, done.__contains__):
            given.append(task)
            lease.release()
            if task == "d":
                done.add("b")
                finished.release()
                theirs.release()
    assert given == ["c", "d", "a"]
    assert names(tmp_path) == []


def test_closing_ends_the_wait_for_others(tmp_path):
    with Leases(60) as mine, Leases(60) as others:
        assert others.take(tmp_path / "a")
        threading.Timer(0.2, mine.close).start()
        assert list(mine.each(["a"], lambda task: tmp_path / task, lambda task: False)) == []


def test_sweeping_takes_away_what_is_dead_and_nothing_else(tmp_path):
    clock = Clock()
    dead, alive = foreign(tmp_path / "dead", age_s=1000), foreign(tmp_path / "alive")
    half_written = tmp_path / f".dead.{ELSEWHERE}.partial"
    live_partial = tmp_path / f".alive.{ELSEWHERE}.partial"
    half_written.mkdir()
    live_partial.mkdir()
    leases = Leases(120, clock)
    leases.sweep(tmp_path)
    assert dead.exists()
    clock.now += 60
    leases.sweep(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == sorted([alive.name, live_partial.name])


def test_long_and_strange_names(tmp_path):
    for name in ("ß" * 100 + ".zarr", "a [1]*?.zarr", "x" * 250):
        target = tmp_path / name
        with Leases(60) as leases:
            lease = leases.take(target)
            partial(target).mkdir()
            lease.path.write_text(lease.path.read_text().replace(str(ProcessName.here()), str(ELSEWHERE)))
            os.utime(lease.path, (1, 1))
            clock = Clock()
            heir = Leases(60, clock)
            assert heir.take(target) is None
            clock.now += 30
            assert heir.take(target) is not None
            assert names(tmp_path) == [lease_module.beside(target, ".lease").name]
            heir.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "open", refuse)
    with Leases(60) as leases, pytest.raises(StoreError, match=r"cannot be written \(get write permission"):
        leases.take(tmp_path / "a")


def test_a_lost_lease_is_an_error_of_one_line():
    error = LeaseLostError("what", where="a.zarr")
    assert isinstance(pickle.loads(pickle.dumps(error)), LeaseLostError)
    assert isinstance(error, StoreError)
