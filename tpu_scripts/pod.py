"""A TPU slice on Google Cloud, from creating it to deleting it; prints the commands it runs.

    python tpu_scripts/pod.py create v1 --zone=us-east5-a --type=v5p-128 --spot
    python tpu_scripts/pod.py setup v1 --zone=us-east5-a
    python tpu_scripts/pod.py launch v1 --zone=us-east5-a -- --flagfile=... --train_data=...
    python tpu_scripts/pod.py logs v1 --zone=us-east5-a
    python tpu_scripts/pod.py watch v1 --zone=us-east5-a --type=v5p-128 --spot -- --flagfile=...
    python tpu_scripts/pod.py delete v1 --zone=us-east5-a

Needs gcloud, logged in. --dry_run prints without running. watch does all of it: it creates the
slice and launches, again whenever the slice was taken away, until the run has reached num_steps.
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

from moss_tok.cli.main import Parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "moss_tok_run"  # on each worker
STATUS = "status"  # a file there: "running", or the exit code of train.py
_POLL_SECONDS = 60
_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_LOST = ("SUSPENDED", "SUSPENDING", "FAILED")


class Pod:
    """Commands on one slice."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        """Takes the command line, and what follows -- in it."""
        self.args, self.flags = args, flags
        self._where = [f"--zone={args.zone}"]
        if args.project:
            self._where.append(f"--project={args.project}")

    def create(self) -> None:
        """Asks for the slice and waits until it is there."""
        args, kind = self.args, self.args.type.partition("-")[0]
        command = [
            "queued-resources", "create", args.name, f"--node-id={args.name}", *self._where,
            f"--accelerator-type={args.type}", f"--runtime-version={_RUNTIMES[kind]}",
        ]  # fmt: skip
        self._gcloud(*command, *(["--spot"] if args.spot else []))
        while not args.dry_run and (state := self.state()) != "ACTIVE":
            if state in _LOST:
                raise OSError(f"{args.name} is {state}; see the output above, delete it, try again")
            print(f"{args.name} is {state or 'unknown'}", flush=True)
            time.sleep(_POLL_SECONDS)

    def state(self) -> str:
        """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; empty if there is none."""
        command = ["queued-resources", "describe", self.args.name, *self._where]
        return self._gcloud(*command, "--format=value(state.state)", check=False)

    def setup(self) -> None:
        """Copies this repository to all workers and installs it."""
        archive = f"{tempfile.gettempdir()}/{FOLDER}.tar.gz"
        git = ["git", "-C", str(ROOT), "archive"]  # of the folder it runs in
        self._run([*git, "--format=tar.gz", f"--output={archive}", "HEAD"])
        self._gcloud("tpu-vm", "scp", archive, f"{self.args.name}:", *self._where, "--worker=all")
        # The images have Python 3.10; uv brings another.
        self._ssh(
            f"mkdir -p {FOLDER} && tar xzf {FOLDER}.tar.gz -C {FOLDER} && cd {FOLDER} && "
            "python3 -m pip install -q --user uv && "
            "python3 -m uv venv -q --allow-existing --python 3.12 .venv && "
            "python3 -m uv pip install -q --python .venv -e '.[gcs]' 'jax[tpu]'"
        )

    def launch(self) -> None:
        """Starts train.py on all workers, in the background; its output goes to train.log."""
        train = shlex.join([".venv/bin/python", "train.py", *self.flags])
        script = f"{train}; echo $? > {STATUS}"
        # The subshell outlives the connection.
        self._ssh(
            f"cd {FOLDER} && echo running > {STATUS} && "
            f"(nohup sh -c {shlex.quote(script)} >> train.log 2>&1 &)"
        )

    def logs(self) -> None:
        """Follows the output of the first worker."""
        self._ssh(f"tail -n 100 -f {FOLDER}/train.log", worker="0")

    def watch(self) -> None:
        """Creates and launches, again after each preemption, until the run is finished."""
        while True:
            state = self.state()
            if state in _LOST:
                self.delete()
                state = ""
            if not state:
                self.create()
                state = "ACTIVE"
            if (state == "ACTIVE" and self._go_on()) or self.args.dry_run:
                return
            time.sleep(_POLL_SECONDS)

    def _go_on(self) -> bool:
        """Launches what does not run yet or was preempted; returns whether it is finished."""
        command = f"cat {FOLDER}/{STATUS} || echo none"
        status = self._ssh(command, worker="0", check=False)
        if self.args.dry_run or status == "none":
            self.setup()
            self.launch()
        elif status == str(128 + signal.SIGTERM):
            self.launch()
        elif status not in ("", "0", "running"):  # nothing: no answer this time
            raise OSError(f"train.py ended with {status}, see `logs`")
        return status == "0"

    def delete(self) -> None:
        """Deletes the slice with all that is on it."""
        command = ["queued-resources", "delete", self.args.name, *self._where]
        self._gcloud(*command, "--force", "--quiet")

    def _ssh(self, command: str, worker: str = "all", check: bool = True) -> str:
        where = [*self._where, f"--worker={worker}", f"--command={command}"]
        return self._gcloud("tpu-vm", "ssh", self.args.name, *where, check=check)

    def _gcloud(self, *command: str, check: bool = True) -> str:
        return self._run(["gcloud", "compute", "tpus", *command], check)

    def _run(self, command: list[str], check: bool = True) -> str:
        """Prints a command and runs it; returns its output where failing is an answer."""
        print(shlex.join(command), flush=True)
        if self.args.dry_run:
            return ""
        stdout = None if check else subprocess.PIPE
        done = subprocess.run(command, check=check, stdout=stdout, text=True)
        return (done.stdout or "").strip()


def main() -> int:
    """Runs one action."""
    parser = Parser(
        prog="pod.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = ("create", "setup", "launch", "logs", "watch", "delete")
    parser.add_argument("action", choices=actions)
    parser.add_argument("name", help="of the slice")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: gcloud's")
    parser.add_argument("--type", default="", help="accelerator type, as in v5p-128")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    argv, flags = sys.argv[1:], []
    if "--" in argv:
        argv, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(argv)
    if not args.zone:
        parser.error("--zone must not be empty")
    kinds = "|".join(_RUNTIMES)
    if args.action in ("create", "watch") and not re.fullmatch(rf"({kinds})-[1-9]\d*", args.type):
        parser.error(f"--type must be {kinds} and a size, as in v5p-128, got {args.type!r}")
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
