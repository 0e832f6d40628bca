"""Creates, uses and deletes a TPU slice on Google Cloud; prints the commands it runs.

    python tpu_scripts/pod.py create v1 --zone=us-east5-a --type=v5p-128 --spot
    python tpu_scripts/pod.py setup v1 --zone=us-east5-a
    python tpu_scripts/pod.py launch v1 --zone=us-east5-a -- --flagfile=... --train_data=...
    python tpu_scripts/pod.py logs v1 --zone=us-east5-a
    python tpu_scripts/pod.py watch v1 --zone=us-east5-a --type=v5p-128 --spot -- --flagfile=...
    python tpu_scripts/pod.py delete v1 --zone=us-east5-a

Needs gcloud, logged in. --dry_run, before --, only prints the commands. watch does everything: it
creates the slice and launches the run, and repeats this after each preemption until num_steps is
reached.
"""

import argparse
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moss_tok.cli.commands import Parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "moss_tok_run"  # on each worker; locked while train.py runs
STATUS = "status"  # file in FOLDER: the exit code of train.py, "killed" until there is one
_POLL_SECONDS = 60
_MAX_FAILURES = 5  # watch gives up after this many failed rounds in a row
_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_LOST = ("SUSPENDED", "FAILED")


class Pod:
    """Commands on one slice."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        """Takes the parsed command line, and the flags of train.py that follow --."""
        self.args = args
        self.flags = flags
        self._location = [f"--zone={args.zone}"]
        if args.project:
            self._location.append(f"--project={args.project}")

    def create(self) -> None:
        """Requests the slice and waits until it is ready."""
        self._request()
        while not self.args.dry_run and (state := self.state()) != "ACTIVE":
            if state in _LOST:
                raise OSError(f"{self.args.name} is {state}; delete it and try again")
            self._say(f"is {state or 'not there yet'}")
            time.sleep(_POLL_SECONDS)

    def _request(self) -> None:
        args = self.args
        kind = args.type.partition("-")[0]
        command = [
            "queued-resources", "create", args.name, f"--node-id={args.name}", *self._location,
            f"--accelerator-type={args.type}", f"--runtime-version={_RUNTIMES[kind]}",
        ]  # fmt: skip
        self._gcloud(*command, *(["--spot"] if args.spot else []))

    def state(self) -> str:
        """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; empty if there is no such slice."""
        command = ["queued-resources", "describe", self.args.name, *self._location]
        done = self._gcloud(*command, "--format=value(state.state)", check=False)
        if done.returncode and "NOT_FOUND" not in done.stderr:
            return f"unknown: {_line(done.stderr)}"
        return done.stdout.strip()

    def setup(self) -> None:
        """Copies this repository to all workers and installs it."""
        archive = f"{tempfile.gettempdir()}/{FOLDER}.tar.gz"
        git = ["git", "-C", str(ROOT), "archive"]  # archives the folder that it runs in
        self._run([*git, "--format=tar.gz", f"--output={archive}", "HEAD"])
        self._gcloud(
            "tpu-vm", "scp", archive, f"{self.args.name}:", *self._location, "--worker=all"
        )
        # The images have Python 3.10, which is too old; uv installs 3.12.
        self._ssh(
            f"mkdir -p {FOLDER} && tar xzf {FOLDER}.tar.gz -C {FOLDER} && cd {FOLDER} && "
            "python3 -m pip install -q --user uv && "
            "python3 -m uv venv -q --allow-existing --python 3.12 .venv && "
            "python3 -m uv pip install -q --python .venv -e '.[gcs]' 'jax[tpu]'"
        )

    def launch(self) -> None:
        """Starts train.py on all workers in the background; its output goes to train.log."""
        if "running" in self._statuses():
            raise OSError(f"{self.args.name} runs train.py already, see `logs`")
        self._start()

    def _start(self) -> None:
        train = shlex.join([".venv/bin/python", "train.py", *self.flags])
        script = f"{train}; echo $? > {STATUS}"
        # The subshell keeps running after the connection closes.
        self._ssh(
            f"cd {FOLDER} && flock -n . true && echo killed > {STATUS} && "
            f"(nohup flock -w 9 . sh -c {shlex.quote(script)} >> train.log 2>&1 &)"
        )

    def _statuses(self) -> set[str]:
        """States of the workers: "running", "none" or the text of STATUS; empty if unreachable."""
        done = self._ssh(
            f"cd {FOLDER} && if flock -n . true; then cat {STATUS}; else echo running; fi "
            "|| echo none",
            check=False,
        )
        if done.returncode:
            self._say(f"gives no answer: {_line(done.stderr)}")
        return {*done.stdout.split()}

    def logs(self) -> None:
        """Follows the output of the first worker."""
        self._ssh(f"tail -n 100 -f {FOLDER}/train.log", worker="0")

    def watch(self) -> None:
        """Creates the slice and launches the run; repeats after preemptions until it finishes."""
        failures = 0
        while True:
            try:
                if self._advance():
                    return
                failures = 0
            except subprocess.CalledProcessError:  # for example while the slice shuts down
                failures += 1
                if failures == _MAX_FAILURES:
                    raise
                self._say("did not take that command; checking its state again")
            time.sleep(_POLL_SECONDS)

    def _advance(self) -> bool:
        """Takes the next action for the state of the slice; returns whether the run is finished."""
        state = self.state()
        if state == "ACTIVE":
            return self._resume()
        if not state:
            self._request()
        else:
            self._say(f"is {state}")
            if state in _LOST:
                self.delete()
        return self.args.dry_run and self._resume()

    def _resume(self) -> bool:
        """Launches a run that is not running; returns whether it is finished."""
        statuses = self._statuses()
        if "running" in statuses:
            return False
        if self.args.dry_run or "none" in statuses:
            self.setup()
            self._start()
        elif statuses & {"killed", str(128 + signal.SIGTERM)}:
            self._start()
        elif statuses - {"0"}:
            raise OSError(f"train.py ended with {', '.join(sorted(statuses))}, see `logs`")
        return self.args.dry_run or statuses == {"0"}

    def delete(self) -> None:
        """Deletes the slice and everything on it."""
        command = ["queued-resources", "delete", self.args.name, *self._location]
        self._gcloud(*command, "--force", "--quiet")

    def _ssh(
        self, command: str, worker: str = "all", check: bool = True
    ) -> subprocess.CompletedProcess:
        target = [*self._location, f"--worker={worker}", f"--command={command}"]
        return self._gcloud("tpu-vm", "ssh", self.args.name, *target, check=check)

    def _gcloud(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        return self._run(["gcloud", "compute", "tpus", *command], check)

    def _run(self, command: list[str], check: bool = True) -> subprocess.CompletedProcess:
        """Prints and runs a command; captures its output if `check` is false."""
        print(shlex.join(command), flush=True)
        if self.args.dry_run:
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.run(command, check=check, capture_output=not check, text=True)

    def _say(self, text: str) -> None:
        print(f"{self.args.name} {text}", flush=True)


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def main() -> int:
    """Runs one action."""
    parser = Parser(
        prog="pod.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = ("create", "setup", "launch", "logs", "watch", "delete")
    parser.add_argument("action", choices=actions)
    parser.add_argument("name", help="name of the slice")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: the project of gcloud")
    parser.add_argument("--type", default="", help="accelerator type, as in v5p-128")
    parser.add_argument("--spot", action="store_true", help="cheaper; may be preempted")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    argv = sys.argv[1:]
    flags = []
    if "--" in argv:
        end = argv.index("--")
        flags = argv[end + 1 :]
        argv = argv[:end]
    args = parser.parse_args(argv)
    if not args.zone:
        parser.error("--zone must not be empty")
    kinds = "|".join(_RUNTIMES)
    if args.action in ("create", "watch") and not re.fullmatch(rf"({kinds})-[1-9]\d*", args.type):
        parser.error(f"--type must be {kinds} and a size, as in v5p-128, got {args.type!r}")
    for option in ("--zone", "--project", "--type", "--spot", "--dry_run"):
        if any(flag.partition("=")[0] == option for flag in flags):
            parser.error(f"{option} must come before --, after which are the flags of train.py")
    if args.action in ("launch", "watch") and not flags:
        parser.error(f"{args.action} needs the flags of train.py, after --")
    try:
        getattr(Pod(args, flags), args.action)()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
