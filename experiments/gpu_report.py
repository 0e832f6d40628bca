"""What to expect of a GPU: trains, encodes, streams and tokenizes for at most eight minutes.

    python experiments/gpu_report.py --output=gpu_report [--official=DIR] [--parts=large,bulk]

Each part is a process with a time limit of its own. Its output goes to the screen and to
OUTPUT/PART.txt as it comes, so that a part that is stopped leaves what it measured. At the end all
tables are in OUTPUT/report.md. Weights and most audio are random; training reads
experiments/starter. DIR is a checkout of github.com/OpenMOSS/MOSS-Audio-Tokenizer, to compare with
the official class under torch.compile (needs torch and transformers). --rehearse makes every part
so small that a CPU runs it in minutes; its numbers say nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from moss_tok.cli.commands import Parser

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parent
STARTER = EXPERIMENTS / "starter" / "manifest.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report: commands that run one after another within a time limit."""

    name: str
    title: str
    limit_seconds: int
    commands: list[list[str]]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def script(name: str, *arguments: str) -> list[str]:
    """The command of a script in experiments/."""
    return [sys.executable, str(EXPERIMENTS / name), *arguments]


def train(flagfile: str, workdir: Path, *flags: str) -> list[str]:
    """The command of a training run on the recordings of experiments/starter."""
    command = [sys.executable, str(ROOT / "train.py"), f"--flagfile={EXPERIMENTS / flagfile}"]
    return [*command, f"--train_data={STARTER}", f"--workdir={workdir}", *flags]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the parts are."""

    recipe: str  # what is added to small_codec.flags
    rate: tuple[str, ...]  # the product that the utilisation refers to
    small: tuple[str, ...]  # flags of the small runs
    large: tuple[str, ...]  # runs of benchmark_training.py
    presets: str
    seconds: str
    batches: str
    slots: str
    minutes: str


FULL = Sizes(
    recipe="batch_size=48,segment_seconds=1.92",
    rate=("--matmul_dtype=bfloat16", "--matmul_size=16384"),
    small=("--batch_size=48", "--num_workers=8", "--num_steps=300", "--log_every=100"),
    large=(
        "v1:batch_size=64,segment_seconds=12,dtype=bfloat16,remat=dots",
        "v1:batch_size=32,segment_seconds=12,dtype=bfloat16,remat=dots,stage=adversarial",
        "nano:batch_size=64,segment_seconds=6,dtype=bfloat16,remat=dots",
    ),
    presets="v1,nano",
    seconds="10",
    batches="1,16,64",
    slots="1,64",
    minutes="20",
)
TINY = Sizes(
    recipe="batch_size=2,segment_seconds=0.96,mel_turns=10",
    rate=("--matmul_size=512",),
    small=("--batch_size=2", "--num_steps=4", "--log_every=2", "--num_eval_clips=1"),
    large=("tiny:batch_size=2,segment_seconds=0.96",),
    presets="tiny",
    seconds="1",
    batches="1,2",
    slots="1,2",
    minutes="0.2",
)


def all_parts(output: Path, official: str | None, rehearse: bool) -> list[Part]:
    """The parts, the important ones first: the last ones may find no time left."""
    sizes = TINY if rehearse else FULL
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"{ROOT}/tests/attention_test.py"]
    cuda = {} if rehearse else {"MOSS_TOK_TEST_PLATFORM": "cuda"}
    return [
        *training_parts(output, sizes),
        *inference_parts(sizes, official),
        Part("attention", "Tests of the attention kernel", 60, [tests], cuda),
    ]


def training_parts(output: Path, sizes: Sizes) -> list[Part]:
    """Compiling, large models, small models."""
    codec = f"{EXPERIMENTS}/small_codec.json:flagfile={EXPERIMENTS}/small_codec.flags"
    run = f"{codec},precision=highest,{sizes.recipe}"
    compiling = script("benchmark_training.py", "--num_steps=5", *sizes.rate, run)
    large = script("benchmark_training.py", "--num_steps=8", *sizes.rate, *sizes.large)
    small = [
        train("quickstart.flags", output / "quickstart", *sizes.small, "--num_microbatches=1"),
        train("small_codec.flags", output / "small_codec", *sizes.small, "--precision=highest"),
    ]
    return [
        Part(
            "compile",
            "Compiling the step of small_codec.flags: cold, then from the cache",
            70,
            [compiling, compiling],
            {"JAX_COMPILATION_CACHE_DIR": str(output / "cache")},
        ),
        Part(
            "large",
            "Training large models",
            220,
            [large],
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"},
        ),
        Part(
            "small",
            "Training small models: steps per second, share of the time waiting for data",
            60,
            small,
        ),
    ]


def inference_parts(sizes: Sizes, official: str | None) -> list[Part]:
    """Encoding and decoding, streams, and a data set."""
    presets = f"--presets={sizes.presets}"
    bulk = [presets, f"--seconds={sizes.seconds}", f"--batch_sizes={sizes.batches}"]
    if official:
        bulk += [f"--official={official}", "--compile"]
    streams = [presets, f"--slots={sizes.slots}", "--num_chunks=100"]
    preset = sizes.presets.split(",")[-1]
    tokenize = [f"--preset={preset}", f"--minutes={sizes.minutes}", "--precision=bfloat16"]
    return [
        Part(
            "bulk",
            "Encoding and decoding, bfloat16",
            90,
            [script("benchmark_codec.py", *bulk, "--dtype=bfloat16")],
        ),
        Part(
            "streaming",
            "Streams",
            40,
            [script("benchmark_streaming.py", *streams, "--dtype=bfloat16")],
        ),
        Part("tokenize", "moss-tok tokenize", 40, [script("benchmark_tokenize.py", *tokenize)]),
    ]


@contextlib.contextmanager
def time_limit(process: subprocess.Popen, seconds: float) -> Iterator[threading.Event]:
    """Kills a process and its children after a time; the event says whether it did."""
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield stopped
    finally:
        timer.cancel()


def run_part(part: Part, output: Path, seconds: float) -> str:
    """Runs a part; returns its output, with a last line for an error or a stop."""
    lines = []
    began = time.monotonic()
    with open(output / f"{part.name}.txt", "w") as log:

        def show(line: str) -> None:
            lines.append(line)
            log.write(line)
            log.flush()
            sys.stdout.write(line)
            sys.stdout.flush()

        for command in part.commands:
            seconds_left = began + seconds - time.monotonic()
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=os.environ | part.environment,
                start_new_session=True,  # so that a stop ends its workers, too
            )
            with time_limit(process, max(1.0, seconds_left)) as stopped:
                for line in process.stdout:
                    show(line)
                code = process.wait()
            if stopped.is_set():
                show(f"stopped: {part.name} took longer than {seconds:.0f} s\n")
                break
            if code:
                show(f"failed: exit code {code}\n")
    return "".join(lines)


def summarize(part: Part, text: str) -> str:
    """The tables of a part and the lines that say how fast it was, as Markdown."""
    lines = []
    for line in text.splitlines():
        is_table = line.startswith("|")
        if lines and is_table and not lines[-1].startswith("|"):
            lines.append("")
        measured = ("compiled in", "TFLOP/s in", "audio per s", "passed", "stopped:", "failed:")
        if is_table or any(words in line for words in measured):
            if not is_table and lines:
                lines.append("")
            lines.append(line)
    return f"## {part.title}\n\n" + "\n".join(lines) + "\n"


def speeds(output: Path) -> str:
    """A table of the last lines of metrics.jsonl of the small runs."""
    lines = ["| run | steps per s | audio s/s | share of waiting for data |", "|---|---|---|---|"]
    for path in sorted(output.glob("*/metrics.jsonl")):
        row = json.loads(path.read_text().splitlines()[-1])
        numbers = [row["steps_per_second"], row["audio_seconds_per_second"]]
        share = row["data_wait_share"]
        lines.append(f"| {path.parent.name} | {numbers[0]:.2f} | {numbers[1]:.0f} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the parts within the time limit and writes the report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_report", help="a new folder (default: gpu_report)")
    parser.add_argument("--official", help="checkout of the official repository")
    parser.add_argument(
        "--parts",
        default="",
        help="names, separated by commas: compile, large, small, bulk, streaming, tokenize, "
        "attention (default: all)",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time limit of everything (default: 8)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args()
    output = Path(args.output).resolve()
    parts = all_parts(output, args.official, args.rehearse)
    names = args.parts.split(",") if args.parts else [part.name for part in parts]
    if unknown := set(names) - {part.name for part in parts}:
        accepted = ", ".join(part.name for part in parts)
        parser.error(f"unknown part {min(unknown)!r}; parts are {accepted}")
    if output.exists():
        parser.error(f"{output} exists; pass another --output")
    output.mkdir(parents=True)
    deadline = time.monotonic() + 60 * args.minutes
    report = [f"# {' '.join(sys.argv)}\n"]
    for part in parts:
        seconds_left = deadline - time.monotonic()
        if part.name not in names or seconds_left < 5:
            continue
        print(f"== {part.title}", flush=True)
        limit = seconds_left if args.rehearse else min(part.limit_seconds, seconds_left)
        text = run_part(part, output, limit)
        if part.name == "small":
            report.append(f"## {part.title}\n\n{speeds(output)}")
        else:
            report.append(summarize(part, text))
        (output / "report.md").write_text("\n".join(report))
    shutil.rmtree(output / "cache", ignore_errors=True)
    print((output / "report.md").read_text())


if __name__ == "__main__":
    main()
