"""A real SLURM cluster of one node on this machine, for tests and for trying batch scripts; no systemd, nothing shared.

Everything it has (settings, keys, sockets, spool) lies in one folder, so several may run side by side. In Python, what
``with Cluster(folder):`` starts ends with the block, even if the process that runs it is killed. By hand, it stays:

    python -m tests.slurm.cluster start FOLDER     # installs slurm-wlm and munge where they are absent (Debian, root)
    export SLURM_CONF=FOLDER/slurm.conf PATH=FOLDER/bin:$PATH     # sbatch, squeue, srun, scontrol mean this cluster
    python -m tests.slurm.cluster stop FOLDER
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tests.slurm.debian import NoClusterError, install

PATIENCE_S = 60.0
"""Daemons that take longer to start or to end hang."""
NODE = "node1"
SAVED_S = 6.0
"""Until slurmctld has written down what it did; one that is killed sooner forgets jobs, or starts them twice [s]."""
CPUS, GPUS, MEMORY_MB = 2, ("/dev/null", "/dev/zero"), 64_000
"""What the node claims. Nothing is enforced, so scripts that ask for a GPU or much memory can be tried anywhere."""

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its first credential has expired: seconds here, two minutes by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld-own.pid
SlurmdPidFile={folder}/slurmd-own.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=3
# A node that comes back without its jobs is only believed to have lost them after these two [s].
BatchStartTimeout=1
MessageTimeout=5
GresTypes=gpu
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """The cluster in a folder; ``with Cluster(folder):`` starts and ends it. Also tells of one that another process started.

    Attributes:
        folder: all that it has; a new one is made.
        environment: of commands that mean this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts what does not run: all, or the daemons that were killed. Returns when the node takes jobs.

        Raises:
            NoClusterError: SLURM is absent and cannot be installed, or does not start here.
        """
        install()
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_settings()
        files = [f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        # Force: a daemon of root may not otherwise keep its files in a folder below one that others may write (/tmp).
        self._run("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.sock'}", *files)
        self._wait(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._run("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        self._run("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", NODE)
        self._wait(lambda: self._ask("sinfo", "--noheader", "--format=%T").strip() in {"idle", "mixed", "allocated"}, "slurmd")

    def stop(self) -> None:
        """Ends all jobs and daemons; nothing of the cluster is left running."""
        if self._pid("slurmctld") and self._pid("slurmd"):
            self._ask("scancel", "--user", str(os.geteuid()))
            self._ask("scancel", "--user", str(os.geteuid()), "--signal=KILL", "--full")
            with suppress(NoClusterError):
                self._wait(lambda: not self._ask("squeue", "--noheader").strip() and not list(self._jobs()), "a job's end")
        self.kill_jobs()
        for name in ("slurmd", "slurmctld", "munged"):
            self.end(name, signal.SIGTERM)

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        """Ends a daemon (slurmctld, slurmd, munged), by kill -9 unless told otherwise; waits until it has ended."""
        if not (pid := self._pid(name)):
            return
        _signal(pid, number)
        self._wait(lambda: not self._pid(name), f"the end of {name}")
        if name in self._children:
            self._children.pop(name).wait()
        (self.folder / f"{name}.pid").unlink()

    def kill_all(self) -> None:
        """Kills all that jobs and daemons run at once, and every process that uses this cluster."""
        while found := [pid for pid in {*self._users(), *self.left()} if pid != os.getpid()]:
            for pid in found:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.05)

    def kill_jobs(self) -> int:
        """Kills all that jobs run, as when a node goes down; how many processes that were."""
        found = list(self._jobs())
        for pid in found:
            _signal(pid, signal.SIGKILL)
        return len(found)

    def left(self) -> list[int]:
        """Processes of this cluster: its daemons, and what its jobs run."""
        return [*filter(None, map(self._pid, ("munged", "slurmctld", "slurmd"))), *self._jobs()]

    def sbatch(self, *arguments: object, **environment: str) -> str:
        """Submits a job: its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def command(self, *arguments: object) -> str:
        """What a command that must succeed prints."""
        done = subprocess.run([*map(str, arguments)], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self, job: str) -> dict[str, str]:
        """State of a job, or of every task of an array: ``12_1`` -> COMPLETED, FAILED, RUNNING ...; kept for minutes."""
        lines = self._ask("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={job}").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, job: str, patience_s: float = 300.0) -> dict[str, str]:
        """Waits until a job, or all tasks of an array, have ended: their states."""
        unfinished = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        self._wait(
            lambda: (states := self.jobs(job)) and not unfinished & {*states.values()}, f"the end of job {job}", patience_s
        )
        return self.jobs(job)

    def wait_until_saved(self) -> None:
        """Waits until slurmctld has written down that the jobs that run have been started."""
        starts = self._ask("squeue", "--noheader", "--states=running", "--format=%S").split()
        last = max(datetime.fromisoformat(start).timestamp() for start in starts)
        time.sleep(max(0.0, last + SAVED_S - time.time()))

    def _write_settings(self) -> None:
        if (self.folder / "slurm.conf").exists():
            return
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "gres.conf").write_text("".join(f"NodeName={NODE} Name=gpu File={file}\n" for file in GPUS))
        # Snakemake's SLURM executor calls srun without SLURM_CONF, which only finds settings in /etc.
        srun = self.folder / "bin" / "srun"
        srun.write_text(
            f'#!/bin/sh\nSLURM_CONF={self.folder / "slurm.conf"} exec {shutil.which("srun", path=os.defpath)} "$@"\n'
        )
        srun.chmod(0o755)
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout.split()[-1]
        if tuple(map(int, version.split(".")[:2])) >= (24, 5):  # where it may be told that a container has no cgroups to give
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "slurm.conf").write_text(
            SETTINGS.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                ports=_free_ports(2),
                user=os.geteuid(),
                node=NODE,
                cpus=CPUS,
                gpus=len(GPUS),
                memory_mb=MEMORY_MB,
            )
        )

    def _run(self, name: str, *arguments: str) -> None:
        if self._pid(name):
            return
        # Its own session, so that Ctrl-C in a terminal ends the tests and leaves the daemons to `stop`. From its folder, by
        # which `left` knows them and what they start.
        with (self.folder / f"{name}.out").open("ab") as said:
            child = subprocess.Popen(
                [name, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=self.environment,
                start_new_session=True,
            )
        self._children[name] = child
        (self.folder / f"{name}.pid").write_text(str(child.pid))

    def _pid(self, name: str) -> int:
        """Process number of a daemon that runs, else 0."""
        file = self.folder / f"{name}.pid"
        pid = int(file.read_text()) if file.exists() else 0
        return pid if pid and str(self.folder).encode() in _read(pid, "cmdline") else 0

    def _jobs(self) -> Iterator[int]:
        """Steps of jobs, and processes that jobs have started."""
        started = (pid for pid in self._users() if re.search(rb"(^|\0)SLURM_JOB_ID=", _read(pid, "environ")))
        steps = (pid for pid in _processes() if _read(pid, "cmdline").startswith(b"slurmstepd") and _place(pid) == self.folder)
        yield from {*started, *steps}

    def _users(self) -> Iterator[int]:
        """Processes whose environment names this cluster: its daemons, its jobs, and who submits or watches jobs."""
        settings = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        return (pid for pid in _processes() if settings in _read(pid, "environ").split(b"\0"))

    def _ask(self, *arguments: str) -> str:
        return subprocess.run(arguments, env=self.environment, capture_output=True, text=True).stdout

    def _wait(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() >= deadline:
                raise NoClusterError(f"SLURM hangs: no sign of {what}; {self._last_words()}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        logs = (self.folder / f"{name}.log" for name in ("munge", "slurmctld", "slurmd"))
        return " | ".join(log.read_text().strip().rpartition("\n")[2] for log in logs if log.exists())

    def __enter__(self) -> Cluster:
        # Waits in its own session for the end of its standard input, which comes even if this process is killed.
        command = [sys.executable, "-m", "tests.slurm.cluster", "guard", str(self.folder)]
        self._guard = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2], start_new_session=True
        )
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            self._guard.wait()
        for child in self._children.values():
            child.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def _place(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def main(arguments: list[str]) -> str:
    """``start FOLDER`` or ``stop FOLDER``: what to tell the user. ``guard FOLDER`` ends a cluster when standard input ends."""
    if len(arguments) != 2 or arguments[0] not in {"start", "stop", "guard"}:
        return __doc__ or ""
    cluster = Cluster(Path(arguments[1]))
    if arguments[0] == "guard":
        sys.stdin.read()
        cluster.kill_all()
        return ""
    if arguments[0] == "start":
        cluster.start()
        return f"export SLURM_CONF={cluster.folder / 'slurm.conf'} PATH={cluster.folder / 'bin'}:$PATH"
    cluster.stop()
    return f"stopped; processes left: {len(cluster.left())}"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
