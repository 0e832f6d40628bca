"""The commands for Google Cloud, as printed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moss_tok import config

ROOT = Path(__file__).parents[1]
WHERE = ("v1", "--zone=us-east5-a", "--dry_run")


def pod(*args):
    script = [sys.executable, str(ROOT / "tpu_scripts" / "pod.py"), *args]
    return subprocess.run(script, capture_output=True, text=True)


def commands(*args):
    done = pod(*args)
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
    command = commands("launch", *WHERE, "--", *flags)[0]
    assert "--worker=all" in command
    (remote,) = (part.removeprefix("--command=") for part in command if "--command=" in part)
    # What the remote shell would pass to train.py.
    inner = shlex.split(shlex.split(remote.partition("(nohup ")[2])[2].partition("; echo")[0])
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
    """A gcloud that writes down its commands and answers with the files beside it."""
    fake = tmp_path / "gcloud"
    fake.write_text(
        '#!/bin/sh\ncd "$(dirname "$0")"\necho "$@" >> log\n'
        'case "$*" in *describe*) cat state;; *status*none*) cat status;; esac\n'
    )
    fake.chmod(0o755)
    (tmp_path / "log").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "code", "launches"), [("0", 0, 0), ("2", 2, 0), ("143", None, 1), ("none", None, 1)]
)
def test_watch_goes_by_what_the_run_says(gcloud, status, code, launches):
    (gcloud / "state").write_text("ACTIVE")
    (gcloud / "status").write_text(status)
    script = [sys.executable, str(ROOT / "tpu_scripts" / "pod.py"), "watch", "v1", "--zone=z"]
    process = subprocess.Popen([*script, "--type=v6e-64", "--", "--flagfile=x"], cwd=ROOT)
    if code is None:  # it watches on
        while "train.py" not in (gcloud / "log").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert process.wait(60) == (-signal.SIGKILL if code is None else code)
    assert (gcloud / "log").read_text().count("train.py") == launches


def test_the_job_for_kubernetes_uses_all_chips_of_its_slice():
    job = yaml.safe_load((ROOT / "tpu_scripts" / "jobset.yaml").read_text())
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == 4 * 4 * 4 // 4
    (container,) = spec["template"]["spec"]["containers"]
    assert container["workingDir"] == "/moss_tok"
    (mesh,) = [flag for flag in container["command"] if flag.startswith("--mesh=")]
    sizes = config.parse_mesh(mesh.removeprefix("--mesh="))
    assert sizes == {"data": -1, "fsdp": 16, "tensor": 1}


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
        (("start", *WHERE), "invalid choice: 'start'"),
    ],
)
def test_errors(args, message):
    done = pod(*args)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert done.stderr.count("\n") == 1
