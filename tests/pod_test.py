"""The commands for Google Cloud, as printed, and against a stand-in for gcloud."""

import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moss_tok.mesh import parse_mesh

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tpu_scripts"))
import pod  # noqa: E402

WHERE = ("v1", "--zone=us-east5-a", "--dry_run")
GONE = "ERROR: (gcloud) NOT_FOUND: Resource 'v1' was not found"
OFFLINE = "ERROR: (gcloud) There was a problem refreshing your current auth tokens"


def run(*args):
    script = [sys.executable, str(ROOT / "tpu_scripts" / "pod.py"), *args]
    return subprocess.run(
        script, capture_output=True, text=True, cwd=ROOT / "tests", start_new_session=True
    )


def commands(*args):
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_create_asks_for_spot_chips():
    (command,) = commands("create", *WHERE, "--type=v5p-128", "--spot", "--project=p")
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "v1"]
    assert {"--spot", "--zone=us-east5-a", "--project=p", "--accelerator-type=v5p-128"} <= {
        *command
    }


def test_launch_runs_the_flags_on_all_workers():
    flags = ["--flagfile=a b.flags", "--train_data=gs://b/*.array_record:0.5"]
    command = commands("launch", *WHERE, "--", *flags)[-1]
    assert "--worker=all" in command
    (remote,) = (part.removeprefix("--command=") for part in command if "--command=" in part)
    # What the remote shell would pass to train.py.
    inner = shlex.split(shlex.split(remote.partition(" sh ")[2])[1].partition("; echo")[0])
    assert inner == [".venv/bin/python", "train.py", *flags]


def test_watch_prints_a_whole_round():
    found = commands("watch", *WHERE, "--type=v6e-64", "--", "--flagfile=x")
    verbs = [" ".join(c[3:5]) for c in found if c[0] == "gcloud"]
    assert verbs == [
        "queued-resources describe", "queued-resources create", "tpu-vm ssh", "tpu-vm scp",
        "tpu-vm ssh", "tpu-vm ssh",
    ]  # fmt: skip


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A gcloud that writes down its commands and answers with the next line of a file beside it.

    The last line stays. Lines that begin with ERROR are failures.
    """
    fake = tmp_path / "gcloud"
    fake.write_text("""#!/bin/sh
        cd "$(dirname "$0")"
        echo "$@" >> log
        case "$*" in
            *describe*) file=state;; *none*) file=status;; *train.py*) file=launch;; *) exit 0;;
        esac
        line=$(head -n 1 $file)
        [ "$(wc -l < $file)" -eq 1 ] || sed -i 1d $file
        case "$line" in ERROR*) echo "$line" >&2; exit 1;; esac
        echo "$line"
    """)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(pod.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def watch(gcloud, monkeypatch, rounds, **answers):
    """The exit code of `watch`, None where it watches on, and what it did in so many rounds."""
    for name, lines in ({"launch": [""]} | answers).items():
        (gcloud / name).write_text("".join(f"{line}\n" for line in lines))
    pauses = iter(range(rounds - 1))
    monkeypatch.setattr(pod, "time", SimpleNamespace(sleep=lambda seconds: next(pauses)))
    argv = ["pod.py", "watch", "v1", "--zone=z", "--type=v6e-64", "--", "--flagfile=x"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT / "tests")
    try:
        code = pod.main()
    except StopIteration:
        code = None
    words = {"queued-resources create": "create", "queued-resources delete": "delete",
             "tpu-vm scp": "setup", "train.py": "launch"}  # fmt: skip
    log = (gcloud / "log").read_text().splitlines()
    return code, [words[key] for line in log for key in words if key in line]


@pytest.mark.parametrize(
    ("status", "code", "actions"),
    [
        ("0", 0, []),
        ("2", 2, []),
        ("running", None, []),
        ("143", None, ["launch"]),
        ("killed", None, ["launch"]),
        ("killed 134", None, ["launch"]),  # a rebooted worker, and one that missed it
        ("143 running", None, []),  # still saving
        ("none", None, ["setup", "launch"]),
        (OFFLINE, None, []),
    ],
)
def test_watch_goes_by_what_the_workers_say(gcloud, monkeypatch, status, code, actions):
    found = watch(gcloud, monkeypatch, 1, state=["ACTIVE"], status=[status])
    assert found == (code, actions)


def test_setup_sends_the_whole_repository(gcloud, monkeypatch):
    watch(gcloud, monkeypatch, 1, state=["ACTIVE"], status=["none"])
    with tarfile.open(gcloud / f"{pod.FOLDER}.tar.gz") as archive:
        assert {"setup.py", "train.py", "moss_tok/sharding.py"} <= {*archive.getnames()}


def test_watch_asks_again_where_gcloud_gives_no_answer(gcloud, monkeypatch, capsys):
    state = [OFFLINE, OFFLINE, "ACTIVE"]
    assert watch(gcloud, monkeypatch, 3, state=state, status=["0"]) == (0, [])
    assert capsys.readouterr().out.count(f"v1 is unknown: {OFFLINE}\n") == 2


def test_watch_goes_on_after_a_slice_that_was_lost_while_it_was_created(gcloud, monkeypatch):
    state = [GONE, "PROVISIONING", "SUSPENDED", GONE, "ACTIVE"]
    found = watch(gcloud, monkeypatch, 6, state=state, status=["none", "0"])
    assert found == (0, ["create", "delete", "create", "setup", "launch"])


def test_watch_goes_on_after_a_launch_on_a_slice_that_goes_down(gcloud, monkeypatch):
    state = ["ACTIVE", "SUSPENDING", "SUSPENDED", GONE, "ACTIVE"]
    launch, status = ["ERROR: ssh", ""], ["143", "none", "0"]
    found = watch(gcloud, monkeypatch, 6, state=state, status=status, launch=launch)
    assert found == (0, ["launch", "delete", "create", "setup", "launch"])


def test_watch_gives_up_on_a_slice_that_takes_no_commands(gcloud, monkeypatch):
    found = watch(gcloud, monkeypatch, 9, state=["ACTIVE"], status=["143"], launch=["ERROR: ssh"])
    assert found == (2, ["launch"] * pod._MAX_FAILURES)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """The folder on a worker, here; train.py waits for an exit code in a file `end`."""
    (fake := tmp_path / "gcloud").write_text(f"""#!/bin/sh
        cd {tmp_path}
        for word; do case "$word" in --command=*) exec sh -c "${{word#--command=}}";; esac; done
    """)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folder = tmp_path / pod.FOLDER
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to("/bin/sh")
    (folder / "train.py").write_text(
        'echo "$@" $$ >> pids; while [ ! -e end ]; do sleep 0.05; done; exit $(cat end)'
    )
    yield folder
    (folder / "end").write_text("0")


def test_launch_and_what_the_worker_says(worker):
    slice_ = pod.Pod(SimpleNamespace(name="v1", zone="z", project="", dry_run=False), [])
    launch = ("launch", "v1", "--zone=z", "--", "--flagfile=x")

    def wait_for(status):
        deadline = time.monotonic() + 30
        while slice_._statuses() != {status}:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    assert slice_._statuses() == {"none"}
    assert run(*launch).returncode == 0
    wait_for("running")
    again = run(*launch)
    assert again.returncode == 2
    assert again.stderr == "error: v1 runs train.py already, see `logs`\n"
    (worker / "end").write_text("7")
    wait_for("7")
    (worker / "end").unlink()
    assert run(*launch).returncode == 0
    wait_for("running")
    deadline = time.monotonic() + 30
    while len(pids := [line.split() for line in (worker / "pids").read_text().splitlines()]) < 2:
        assert time.monotonic() < deadline  # the lock is taken a moment before train.py starts
        time.sleep(0.05)
    assert [flag for flag, _ in pids] == ["--flagfile=x"] * 2
    os.killpg(os.getpgid(int(pids[-1][1])), signal.SIGKILL)  # as a reboot
    wait_for("killed")


def test_the_job_for_kubernetes_uses_all_chips_of_its_slice():
    job = yaml.safe_load((ROOT / "tpu_scripts" / "jobset.yaml").read_text())
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == 4 * 4 * 4 // 4
    (container,) = spec["template"]["spec"]["containers"]
    assert container["workingDir"] == "/moss_tok"
    (mesh,) = [flag for flag in container["command"] if flag.startswith("--mesh=")]
    sizes = parse_mesh(mesh.removeprefix("--mesh="))
    assert sizes == {"data": -1, "fsdp": 16, "tensor": 1}
    (rule,) = spec["podFailurePolicy"]["rules"]  # bad input is not tried again
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2]}
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_delete():
    (command,) = commands("delete", *WHERE)
    assert command[3:6] == ["queued-resources", "delete", "v1"] and "--force" in command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("create", *WHERE, "--type=v3-8"), "--type must be v4|v5litepod|v5p|v6e and a size"),
        (("create", *WHERE, "--type=v5p"), "and a size, as in v5p-128, got 'v5p'"),
        (("create", "v1", "--zone=", "--type=v5p-8"), "--zone must not be empty"),
        (("launch", *WHERE), "launch needs the flags of train.py"),
        (("launch", *WHERE, "--", "--flagfile=x", "--dry_run"), "--dry_run must come before --"),
        (("launch", *WHERE, "--", "--project=p"), "--project must come before --"),
        (("start", *WHERE), "invalid choice: 'start'"),
    ],
)
def test_errors(args, message):
    done = run(*args)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert done.stderr.count("\n") == 1
