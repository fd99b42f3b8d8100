"""Studies through Snakemake: which jobs run, what they leave, and what becomes of runs that end badly.

Jobs are a script that copies a ready receipt, so that a run costs a second; the last tests do a real, tiny study.
"""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from pathfm import snakemake_engine, snakemake_progress
from pathfm.config import load_study
from pathfm.errors import ExitCode, MissingExtraError, UsageError
from pathfm.running import RunOptions, run_study
from pathfm.snakemake_engine import check_engine, pipelines, run_snakemake, unlock
from pathfm.snakemake_progress import Progress, follow
from pathfm.store.lease import Leases
from pathfm.store.receipts import STAGES, Receipt, SlideReceipt, read_receipt, receipt_path, write_receipt
from pathfm.study_plan import Planned, StudyPlan, plan_file, write_plan
from pathfm.workflow import study_to_oneself
from tests.flows.conftest import read_receipts, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None, reason="Snakemake is not installed (pip install 'pathfm[pipelines]')"
)

GROUPS = ("1-of-2", "2-of-2")
JOB = """
echo "$2 $5 ${*:6}" >> calls.txt
if [ -e "slow-$2-$5" ]; then touch "began-$2-$5"; sleep 30; fi
if [ -e "broken-$2-$5" ]; then echo "error: it is broken"; exit "$(cat "broken-$2-$5")"; fi
cp "made/receipts/$2/$5.json" "receipts/$2/$5.json"
"""
ALL = [("check", "all"), *(("tile", group) for group in GROUPS), ("pretrain", "all")]
ALL += [*(("extract", group) for group in GROUPS), ("mil", "all"), ("report", "all")]


@pytest.fixture
def study(tmp_path):
    """An output folder with spaces in its name, what its jobs would make, and how they are started."""
    out = tmp_path / "my study"
    for stage, group in ALL:
        write_receipt(out / "made", Receipt(stage, group, f"{stage} {group}"))
    (tmp_path / "job.sh").write_text(JOB)
    return out


def planned(out, states):
    """A plan by states (``new`` unless said); receipts of jobs that are not new are there."""
    jobs = []
    for stage, group in ALL:
        state = states.get((stage, group), states.get("else", "new"))
        jobs.append(Planned(stage, group, f"{stage} {group}", {}, {}, ("a", "b"), state))
        if state != "new":
            write_receipt(out, Receipt(stage, group, "old" if state == "stale" else f"{stage} {group}"))
    plan = StudyPlan(tuple(jobs), "settings")
    write_plan(plan_file(out), plan)
    return plan


def engine(out, plan, **options):
    wanted = RunOptions(engine="snakemake", jobs=2, **options)
    check_engine(wanted)
    return run_snakemake(out, plan, wanted, f"bash {shlex.quote(str(out.parent / 'job.sh'))}")


def calls(out):
    """The jobs that ran, sorted, as (stage, group)."""
    file = out / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(tuple(line.split()[:2]) for line in lines)


def fingerprints(out):
    return {(receipt.stage, receipt.group): receipt.fingerprint for receipt in read_receipts(out)}


def test_a_new_study_runs_every_job_once_and_tells_each_its_share_of_the_machine(study, capsys):
    plan = planned(study, {})
    assert engine(study, plan) == ExitCode.DONE
    assert calls(study) == sorted(ALL)
    said = {tuple(line.split()[:2]): line for line in (study / "calls.txt").read_text().splitlines()}
    assert said["tile", "1-of-2"].endswith("--set compute.workers=1 --set compute.threads=1")
    assert said["pretrain", "all"].endswith("--set compute.workers=2 --set compute.threads=2")
    assert "done    report all  8 of 8 jobs" in capsys.readouterr().err
    assert fingerprints(study) == {job: " ".join(job) for job in ALL}


def test_only_what_the_plan_calls_not_current_runs_whatever_files_times_say(study, capsys):
    # A new slide in the second group: the check comes before all, and the encoder is pinned.
    stale = [("check", "all"), ("extract", "2-of-2"), ("mil", "all"), ("report", "all")]
    plan = planned(study, {"else": "current", ("tile", "2-of-2"): "failed", **dict.fromkeys(stale, "stale")})
    failed = Receipt(
        "tile", "2-of-2", "tile 2-of-2", slides=(SlideReceipt("b", "failed", "it is damaged"), SlideReceipt("a", "done"))
    )
    write_receipt(study / "made", failed)
    for number, (stage, group) in enumerate(reversed(ALL)):
        os.utime(receipt_path(study, stage, group), (1e9 + number, 1e9 + number))
    assert engine(study, plan) == ExitCode.SOME_FAILED
    assert calls(study) == sorted([*stale, ("tile", "2-of-2")])
    said = capsys.readouterr().err
    assert "1 of 2 slides failed" in said
    assert "failed  b  tile: it is damaged" in said


def test_a_job_that_breaks_ends_what_follows_from_it_and_nothing_else(study, capsys):
    plan = planned(
        study, {"else": "current", **{(stage, group): "stale" for stage, group in ALL if stage not in {"check", "pretrain"}}}
    )
    (study / "broken-extract-1-of-2").write_text("2")
    assert engine(study, plan, snakemake_report=True) == ExitCode.USAGE
    assert not (study / "report").exists(), "there is nothing to report on yet"
    assert calls(study) == [("extract", "1-of-2"), ("extract", "2-of-2"), ("tile", "1-of-2"), ("tile", "2-of-2")]
    now = fingerprints(study)
    assert now["tile", "1-of-2"] == "tile 1-of-2"
    assert now["extract", "2-of-2"] == "extract 2-of-2"
    assert now["extract", "1-of-2"] == now["mil", "all"] == "old"  # an earlier receipt outlives a job that breaks
    assert "failed  extract 1-of-2  error: it is broken - see logs/extract/1-of-2.log" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("name", ["st #2", "a: b", "'q'", 'O\'Neil $HOME "{log}" ü \U0001f600'])
def test_a_study_in_a_folder_whose_name_says_something_in_yaml_or_a_shell(study, name):
    (study.parent / "st").mkdir()  # what "st #2" is in YAML
    out = study.rename(study.parent / name)
    last = {("mil", "all"): "new", ("report", "all"): "stale"}
    assert engine(out, planned(out, {"else": "current", **last})) == ExitCode.DONE
    assert calls(out) == [("mil", "all"), ("report", "all")]
    assert list((study.parent / "st").iterdir()) == []


def test_what_snakemake_is_told_of_the_study_holds_no_path_that_yaml_may_read(tmp_path):
    """Values of --config are YAML, and reach the jobs of a cluster by a shell."""
    call = snakemake_engine._Snakemake(tmp_path / "st #2", RunOptions(engine="snakemake", until="mil"), "").call()
    given = call[call.index("--config") + 1 :]
    assert given == ["out=.", f"engine={os.getpid()}", "until=mil"]
    assert call[call.index("--directory") + 1] == str(tmp_path / "st #2")


def test_jobs_find_the_key_of_the_logs_from_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = snakemake_engine._Snakemake(tmp_path / "out", RunOptions(engine="snakemake"), "")
    for named, meant in {"keys/a.key": str(tmp_path / "keys" / "a.key"), "/etc/a.key": "/etc/a.key", "": ""}.items():
        monkeypatch.setenv("PATHFM_AUDIT_KEY", named)
        assert called.environment["PATHFM_AUDIT_KEY"] == meant
    monkeypatch.delenv("PATHFM_AUDIT_KEY")
    assert "PATHFM_AUDIT_KEY" not in called.environment


def test_an_up_to_date_study_starts_nothing(study, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert engine(study, planned(study, {"else": "current"})) == ExitCode.DONE
    assert "everything is up to date" in capsys.readouterr().out


def test_two_engines_on_one_study_are_refused(study):
    other = pytest.raises(UsageError, match="another engine works on this study")
    with study_to_oneself(study), other, study_to_oneself(study):
        pass
    with Leases(120.0) as leases:  # it was given back
        assert leases.take(study / "engine")


def test_without_snakemake_the_install_line_is_said(study, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[pipelines\]'"):
        engine(study, planned(study, {}))


def test_pictures_that_cannot_be_drawn_are_refused_in_one_line(study, monkeypatch):
    plan = planned(study, {})
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match=r"kinds: \.dot, \.svg, \.png, \.mmd"):
        engine(study, plan, dag=Path("jobs.gif"))
    with pytest.raises(UsageError, match="graphviz"):
        engine(study, plan, dag=Path("jobs.svg"))


def test_profiles_force_what_is_in_the_graph_and_let_no_time_decide():
    names = sorted(path.parent.name for path in pipelines().glob("profiles/*/config.yaml"))
    assert names == ["kubernetes", "local", "slurm"]
    for name in names:
        profile = yaml.safe_load((pipelines() / "profiles" / name / "config.yaml").read_text())
        assert profile["forceall"] is profile["rerun-incomplete"] is profile["keep-going"] is True
        assert profile["rerun-triggers"] == ["params", "input"]


def test_every_stage_has_a_rule():
    assert re.findall(r'^    "(\w+)": \(', (pipelines() / "Snakefile").read_text(), re.MULTILINE) == list(STAGES)


def test_how_a_run_ends_when_jobs_or_snakemake_itself_end_badly():
    assert snakemake_engine._worst([75, 3]) == ExitCode.SOME_FAILED
    assert snakemake_engine._worst([3, 137, 2]) == ExitCode.INTERNAL
    assert snakemake_engine._trouble(-signal.SIGKILL, ["1 of 8 steps"]).exit_code == ExitCode.INTERNAL


def test_a_profile_that_is_none_is_refused_even_with_nothing_to_do(study, tmp_path, monkeypatch):
    plan = planned(study, {"else": "current"})
    with pytest.raises(UsageError) as refused:
        engine(study, plan, profile="nosuch", dry_run=True)
    assert str(refused.value) == "nosuch: there is no such profile (local, slurm, kubernetes, or a folder)"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    with pytest.raises(UsageError, match=r"needs a config\.yaml"):
        engine(study, plan, profile="./slurm")  # the user's, not the shipped one
    (tmp_path / "slurm" / "config.yaml").write_text("jobs: [")
    with pytest.raises(UsageError, match="no YAML"):
        engine(study, planned(study, {}), profile="./slurm")


def program(folder, name, text):
    """A program of a cluster, as far as it matters here."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


def test_where_sacct_fails_jobs_are_watched_by_squeue(tmp_path, monkeypatch, capsys):
    ask_squeue = ("--slurm-status-command", "squeue")
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin', 'sacct', 'echo it is disabled >&2; exit 1')}:{os.environ['PATH']}")
    assert snakemake_engine._status_command({"executor": "slurm"}) == ask_squeue
    assert capsys.readouterr().out == "jobs are watched by squeue, because sacct fails: it is disabled\n"
    assert snakemake_engine._status_command({"executor": "slurm", "slurm-status-command": "sacct"}) == ()
    assert snakemake_engine._status_command({"executor": "local"}) == ()
    program(tmp_path / "bin", "sacct", "sleep 30")
    monkeypatch.setattr(snakemake_progress, "ASK_S", 0.2)
    assert snakemake_engine._status_command({"executor": "slurm"}) == ask_squeue
    program(tmp_path / "bin", "sacct", "exit 0")
    assert snakemake_engine._status_command({"executor": "slurm"}) == ()


SAID = """SLURM run ID: some-name
rule tile:
    jobid: 3
    wildcards: group=1-of-2
rule tile:
    jobid: 4
    wildcards: group=2-of-2
Job 3 has been submitted with SLURM jobid 12 (log: x.log).
Job 4 has been submitted with SLURM jobid 13 (log: x.log).
Error in rule tile:
    message: SLURM-job '13' failed.For further error details see the cluster/cloud log
    jobid: 4
"""


def test_jobs_of_slurm_are_said_when_submitted_when_they_wait_and_when_they_fail(tmp_path, monkeypatch, capsys):
    progress = Progress(tmp_path, "slurm")
    for line in SAID.splitlines():
        progress.take(line)
    assert progress.active == {"3": "12"}
    assert progress.failed == {("tile", "2-of-2"): "SLURM-job '13' failed."}
    said = capsys.readouterr().err.splitlines()
    assert said == ["submitted tile 1-of-2  as SLURM job 12", "submitted tile 2-of-2  as SLURM job 13"]
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for answer, expected in {
        'echo "$*" > "$0.asked"; echo "12|PENDING|Resources"': "pending tile 1-of-2  SLURM job 12: Resources",
        'echo "12|RUNNING|None"': "running tile 1-of-2  SLURM job 12",
        "true": "unknown tile 1-of-2  SLURM job 12: not in SLURM's queue any more",
        "echo no controller >&2; exit 1": "waiting squeue  SLURM does not answer: no controller",
    }.items():
        program(tmp_path / "bin", "squeue", answer)
        progress.say_queue()
        assert capsys.readouterr().err == f"{expected}\n"
    assert "--name=some-name" in (tmp_path / "bin" / "squeue.asked").read_text()
    assert progress.left_behind() == "jobs on the cluster go on: scancel --name some-name ends them"
    for line in ("Finished jobid: 3 (Rule: tile)", "1 of 3 steps (33%) done"):
        progress.take(line)
    assert progress.counts == (1, 2)
    assert progress.left_behind() == ""


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_second_signal_ends_a_snakemake_that_only_waits(tmp_path, monkeypatch, capsys, executor):
    monkeypatch.setattr(snakemake_progress, "SAME_S", 0.1)
    monkeypatch.setattr(snakemake_progress, "QUIET_S", (0.05, 60.0))
    asked = []
    monkeypatch.setattr(Progress, "say_queue", lambda self: asked.append(1))
    ready = tmp_path / "ready"

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        for pause in (0.01, 0.5, 0.0):  # the second comes with the first: one program, two signals
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    waits = f"trap '' INT TERM; touch {shlex.quote(str(ready))}; sleep 30"
    code, sent = follow(["bash", "-c", waits], dict(os.environ), Progress(tmp_path, executor))
    thread.join()
    assert (code, sent) == (-signal.SIGKILL, signal.SIGINT)
    assert 0.4 < time.monotonic() - began < 20
    assert capsys.readouterr().err == "ending  the run  waiting for 0 jobs to end; again to stop now\n"
    assert bool(asked) == (executor == "slurm")


def test_submit_checks_everything_before_it_submits_anything(tmp_path):
    submit, asked = pipelines() / "slurm" / "submit.sh", tmp_path / "asked.txt"
    program(tmp_path / "bin", "sbatch", f'echo "$*" >> {asked}; wc -l < {asked}')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def call(*words):
        done = subprocess.run(["bash", submit, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "study.yaml").touch()
    assert call("none.yaml") == (2, "submit.sh: none.yaml: there is no such study file, or it cannot be read\n")
    assert call("study.yaml", "tile", "mill") == (2, "submit.sh: there is no stage 'mill' (tile, pretrain, extract, mil)\n")
    assert not asked.exists()
    assert call("study.yaml", "tile", "mil", "--", "--time=5") == (0, "tile 1\nmil 2\n")
    first, second = asked.read_text().splitlines()
    assert first.endswith("--time=5 " + f"{submit.parent / 'tile.sh'} study.yaml")
    assert "--time=5 --dependency=afterok:1" in second


@pytest.mark.parametrize("cores", ["12", None], ids=["as many cores as the header says", "cores by GPU"])
def test_the_tasks_of_pretraining_get_the_cores_of_the_job(tmp_path, cores):
    """Since SLURM 22.05, srun takes no cores from the job: a task that does not ask for them gets one."""
    asked = tmp_path / "asked.txt"
    program(tmp_path / "bin", "srun", f'printf "%s\\n" "$@" > {asked}; exit 75')
    program(tmp_path / "bin", "scontrol", f'echo "scontrol $*" >> {asked}')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment.pop("SLURM_CPUS_PER_TASK", None)
    environment |= {"SLURM_CPUS_PER_TASK": cores} if cores else {}
    done = subprocess.run(["bash", pipelines() / "slurm" / "pretrain.sh", "my study.yaml"], env=environment)
    words = asked.read_text().splitlines()
    assert done.returncode == 75
    assert [word for word in words if "cpus" in word] == ([f"--cpus-per-task={cores}"] if cores else [])
    assert words[-4:] == ["pathfm", "pretrain", "my study.yaml", "scontrol requeue 7"]


def test_the_rules_are_found_in_an_installation_too(tmp_path, monkeypatch):
    monkeypatch.setattr(snakemake_engine, "__file__", str(tmp_path / "lib" / "pathfm" / "snakemake_engine.py"))
    rules = tmp_path / "share" / "pathfm" / "pipelines" / "Snakefile"
    rules.parent.mkdir(parents=True)
    rules.touch()

    class Installed(type(Path())):
        def locate(self):
            return tmp_path / self

    monkeypatch.setattr(
        "importlib.metadata.files", lambda name: [Installed("../x.py"), Installed("share/pathfm/pipelines/Snakefile")]
    )
    assert pipelines() == rules.parent


@pytest.mark.long
def test_until_a_stage_and_pictures_of_what_is_left(study, tmp_path, capsys):
    plan = planned(study, {})
    assert engine(study, plan, until="pretrain", dry_run=True) == ExitCode.DONE
    assert calls(study) == []
    assert "4 jobs would run" in capsys.readouterr().out
    engine(study, plan, until="tile", dag=tmp_path / "jobs.mmd")
    engine(study, plan, dag=tmp_path / "jobs.dot")
    some, every = (tmp_path / "jobs.mmd").read_text(), (tmp_path / "jobs.dot").read_text()
    assert "flowchart" in some
    assert "extract" not in some
    assert every.count("[label = ") == len(ALL) + 1
    assert engine(study, plan, until="tile") == ExitCode.DONE
    assert calls(study) == sorted(job for job in ALL if job[0] in {"check", "tile"})
    lock = study / ".snakemake" / "locks" / "0.input.lock"
    lock.touch()
    unlock(study)
    assert not lock.exists()


@pytest.mark.long
def test_snakemakes_own_report_needs_no_network(study):
    plan = planned(study, {})
    assert engine(study, plan, snakemake_report=True) == ExitCode.DONE
    text = (study / "report" / "snakemake.html").read_text()
    assert "extract" in text
    assert 'src="http' not in text


@pytest.mark.long
def test_snakemake_without_pathfm_run_makes_the_plan_once(study):
    planned(study, {"else": "current", ("mil", "all"): "new", ("report", "all"): "new"})
    script = study.parent / "job.sh"
    script.write_text('if [ "$1" = plan ]; then echo "$*" >> plans.txt; exit; fi\n' + JOB)
    config = [f"out={study}", f"command=bash {shlex.quote(str(script))}"]
    command = [sys.executable, "-m", "snakemake", "-s", pipelines() / "Snakefile", "--cores", "2", "--config", *config]
    subprocess.run(
        [*command, "--profile", pipelines() / "profiles" / "local"], check=True, capture_output=True, cwd=study.parent
    )
    assert calls(study) == [("mil", "all"), ("report", "all")]
    assert (study.parent / "plans.txt").read_text() == f"plan {study}\n"


@pytest.mark.long
def test_snakemakes_own_trouble_is_one_line(study, tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text("executor: nonsense\n")
    with pytest.raises(UsageError, match=r"Snakemake has failed: .*nonsense"):
        engine(study, planned(study, {}), profile=str(tmp_path / "profile"))


KUBECTL = """#!/bin/bash
if [ "$1" = create ]; then
    script=$(sed -n 's/.*command: .bash, "\\(.*\\)".*/\\1/p')
    (bash "$script" > /dev/null 2>&1 && echo ok || echo no) > "$script.ended" &
    echo "$script"
else
    [ "$(cat "$2.ended")" = ok ] && echo "x 1/" || echo "x /$([ -s "$2.ended" ] && echo 1)"
fi
"""


@pytest.mark.long
def test_the_kubernetes_profile_submits_jobs_and_asks_for_them(study, monkeypatch):
    if importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None:
        pytest.skip("snakemake-executor-plugin-cluster-generic is not installed")
    kubectl = study.parent / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")
    last = {("mil", "all"): "new", ("report", "all"): "stale"}
    assert engine(study, planned(study, {"else": "current", **last}), profile="kubernetes") == ExitCode.DONE
    said = (study / "calls.txt").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["mil", "report"]
    assert said[0].endswith("--set compute.device=cpu")


ENGINE = """
import sys
from pathlib import Path
from pathfm.running import RunOptions
from pathfm.snakemake_engine import run_snakemake
from pathfm.study_plan import read_plan
out = Path(sys.argv[1])
sys.exit(run_snakemake(out, read_plan(out), RunOptions(jobs=2), sys.argv[2]))
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_ended_engine_leaves_what_is_finished_and_the_next_goes_on(study, number):
    plan = planned(study, {})
    (study / "slow-tile-2-of-2").touch()
    command = f"bash {shlex.quote(str(study.parent / 'job.sh'))}"
    process = subprocess.Popen([sys.executable, "-c", ENGINE, study, command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((study / "began-tile-2-of-2").exists() and receipt_path(study, "tile", "1-of-2").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: ExitCode.PREEMPTED, signal.SIGINT: ExitCode.INTERRUPTED}
    assert process.wait(60) == expected[number]
    assert fingerprints(study).keys() == {("check", "all"), ("tile", "1-of-2")}
    (study / "slow-tile-2-of-2").unlink()
    (study / "calls.txt").unlink()
    done = {("check", "all"): "current", ("tile", "1-of-2"): "current"}
    plan = planned(study, done)
    assert engine(study, plan) == ExitCode.DONE
    assert calls(study) == sorted(set(ALL) - done.keys())


@pytest.mark.long
def test_a_dry_run_builds_the_graph_and_writes_nothing(study_file, capsys):
    study = load_study(study_file, ["compute.group_slides=4"])
    assert run_study(study, RunOptions(engine="snakemake", dry_run=True)) == ExitCode.DONE
    assert "10 jobs would run" in capsys.readouterr().out
    assert not study.out.exists()


@pytest.mark.long
def test_a_real_study_is_the_same_by_both_engines(study_file, tmp_path):
    made = {}
    for name in ("local", "snakemake"):
        options = ["--engine", name, "--set", f"out={tmp_path / name}", "--set", "compute.group_slides=4"]
        code, out, err = run("run", study_file, *options, *(["--jobs", "2"] if name == "snakemake" else []))
        assert code == 0, (out, err)
        made[name] = {(receipt.stage, receipt.group): receipt for receipt in read_receipts(tmp_path / name)}
    assert made["local"] == made["snakemake"]
    assert {stage for stage, _ in made["local"]} == set(STAGES)
    plan = json.loads((tmp_path / "snakemake" / "receipts" / "plan.json").read_text())
    assert (
        read_receipt(receipt_path(tmp_path / "snakemake", "mil", "all")).fingerprint
        == plan["stages"]["mil"]["all"]["fingerprint"]
    )
    code, out, _ = run("run", study_file, *options, "--jobs", "2")
    assert (code, "everything is up to date" in out) == (0, True)
