"""What to expect of a GPU: trains, encodes, streams and tokenizes for at most eight minutes.

    python experiments/gpu_report.py --output=gpu_report [--official=DIR] [--parts=large,options]

Each part is a process that is stopped when its share of the time, and what parts before it left,
is over. Its output goes to the screen and to OUTPUT/PART.txt as it comes, so that a part that is
stopped leaves what it measured. At the end all tables are in OUTPUT/report.md. Weights and most
audio are random; training reads experiments/starter. DIR is a checkout of
github.com/OpenMOSS/MOSS-Audio-Tokenizer, to compare with the official class under torch.compile
(needs torch and transformers). --rehearse makes every part so small that a CPU runs it in minutes;
its numbers say nothing.
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
from importlib import metadata
from pathlib import Path

from moss_tok.cli.commands import Parser

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parent
STARTER = EXPERIMENTS / "starter" / "manifest.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report: commands that run one after another within a time limit.

    `seconds` is its share of the time, of eight minutes in all.
    """

    name: str
    title: str
    seconds: int
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
    options: tuple[str, ...]  # the first of them with one option each
    presets: str
    seconds: str
    batches: str
    official: tuple[str, ...]  # what the official class is compared with
    slots: str
    minutes: str


_V1 = "v1:segment_seconds=12,dtype=bfloat16,remat=dots,batch_size="
FULL = Sizes(
    recipe="batch_size=48,segment_seconds=1.92",
    rate=("--matmul_dtype=bfloat16", "--matmul_size=16384", "--num_steps=8"),
    small=("--batch_size=48", "--num_workers=8", "--num_steps=300", "--log_every=100"),
    large=(
        f"{_V1}64",
        "nano:segment_seconds=6,dtype=bfloat16,remat=dots,batch_size=64",
        f"{_V1}32,stage=adversarial",
    ),
    options=(
        f"{_V1}64,unroll_layers=4",
        f"{_V1}64,xla_gpu_enable_dynamic_slice_fusion=true",
        f"{_V1}80",
    ),
    presets="v1,nano",
    seconds="10",
    batches="1,16,64",
    official=("--presets=v1", "--seconds=10,60", "--batch_sizes=16"),
    slots="1,64",
    minutes="10",
)
_SMALL = "tiny:segment_seconds=0.96,batch_size=2,mel_windows=512"
TINY = Sizes(
    recipe="batch_size=2,segment_seconds=0.96,mel_windows=512,mel_turns=1,unroll_layers=1",
    rate=("--matmul_size=256", "--num_steps=2"),
    small=(
        "--batch_size=2",
        "--num_workers=2",
        "--num_steps=4",
        "--log_every=2",
        "--mel_windows=512",
        "--mel_turns=1",
    ),
    large=(_SMALL, f"{_SMALL},stage=adversarial,discriminator_periods=3,discriminator_windows="),
    options=(f"{_SMALL},unroll_layers=2", f"{_SMALL},xla_gpu_enable_dynamic_slice_fusion=true"),
    presets="tiny",
    seconds="1",
    batches="2",
    official=("--presets=tiny", "--seconds=1", "--batch_sizes=2"),
    slots="1,2",
    minutes="0.2",
)


def all_parts(output: Path, official: str | None, rehearse: bool) -> list[Part]:
    """The parts, the important ones first: the last ones may find no time left."""
    sizes = TINY if rehearse else FULL
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cudnn"]
    tests += [f"{ROOT}/tests/attention_test.py"]
    cuda = {} if rehearse else {"MOSS_TOK_TEST_PLATFORM": "cuda"}
    compiling, large, small, options = training_parts(output, sizes)
    return [
        compiling,
        large,
        *inference_parts(sizes, official),
        small,
        Part("attention", "Tests of the attention of cuDNN", 20, [tests], cuda),
        options,
    ]


def training_parts(output: Path, sizes: Sizes) -> list[Part]:
    """Compiling, large models, small models, options for large models."""
    recipe = "experiments/small_codec.json:flagfile=experiments/small_codec.flags"
    run = f"{recipe},precision=highest,{sizes.recipe}"
    compiling = script("benchmark_training.py", *sizes.rate, run)
    small = [*sizes.small, "--num_eval_clips=0"]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}

    def training(name: str, title: str, seconds: int, runs: tuple[str, ...]) -> Part:
        command = script("benchmark_training.py", "--one_by_one", *sizes.rate, *runs)
        return Part(name, title, seconds, [command], memory)

    return [
        Part(
            "compile",
            "Compiling the step of small_codec.flags: cold, then from the cache",
            55,
            [compiling, compiling],
            {"JAX_COMPILATION_CACHE_DIR": str(output / "cache")},
        ),
        training("large", "Training large models", 180, sizes.large),
        Part(
            "small",
            "Training small models",
            55,
            [
                train("quickstart.flags", output / "tiny", *small, "--num_microbatches=1"),
                train("small_codec.flags", output / "small_codec", *small, "--precision=highest"),
            ],
        ),
        training("options", "Options for the first large model", 25, sizes.options),
    ]


def inference_parts(sizes: Sizes, official: str | None) -> list[Part]:
    """Encoding and decoding, the official class, streams, and a data set."""
    presets = f"--presets={sizes.presets}"
    bulk = [presets, f"--seconds={sizes.seconds}", f"--batch_sizes={sizes.batches}"]
    compared = [*sizes.official, "--functions=encode", "--dtype=bfloat16"]
    if official:
        compared += [f"--official={official}", "--compile"]
    streams = [presets, f"--slots={sizes.slots}", "--num_chunks=100", "--dtype=bfloat16"]
    tokenize = [presets, f"--minutes={sizes.minutes}", "--precisions=bfloat16,highest"]
    return [
        Part(
            "bulk",
            "Encoding and decoding",
            65,
            [script("benchmark_codec.py", *bulk, "--dtype=bfloat16,float32")],
        ),
        Part(
            "official",
            "Encoding batches, compared with the official class" if official else "Long batches",
            30,
            [script("benchmark_codec.py", *compared)],
        ),
        Part("streaming", "Streams", 20, [script("benchmark_streaming.py", *streams)]),
        Part("tokenize", "moss-tok tokenize", 30, [script("benchmark_tokenize.py", *tokenize)]),
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
        if process.poll() is None:  # after Ctrl-C, which its session does not get
            stop()


def _start(command: list[str], part: Part) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | part.environment,
        start_new_session=True,  # so that a stop ends its workers, too
    )


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
            seconds_left = max(1.0, began + seconds - time.monotonic())
            with _start(command, part) as process, time_limit(process, seconds_left) as stopped:
                for line in process.stdout:
                    show(line)
                code = process.wait()
            if stopped.is_set():
                show(f"stopped: {part.name} took longer than {seconds:.0f} s\n")
                break
            if code:
                show(f"failed: exit code {code}, see {part.name}.txt\n")
    return "".join(lines)


def summarize(part: Part, text: str) -> str:
    """The tables of a part and the lines that say how fast it was, as Markdown."""
    lines = [f"## {part.title}"]
    measured = ("compiled in", "TFLOP/s in", "audio per s", " passed", " skipped", " failed")
    measured += ("stopped:", "failed:")
    for line in text.splitlines():
        is_table = line.startswith("|")
        if not is_table and not any(words in line for words in measured):
            continue
        if len(lines) == 1 or is_table != lines[-1].startswith("|"):
            lines.append("")
        lines.append(line if is_table else f"- {line}")
    return "\n".join(lines) + "\n"


def speeds(output: Path) -> str:
    """A table of the last lines of metrics.jsonl of the small runs."""
    lines = [
        "",
        "| run | steps per s | audio s/s | share of waiting for data |",
        "|---|---|---|---|",
    ]
    for path in sorted(output.glob("*/metrics.jsonl")):
        written = path.read_text().splitlines()
        if not written:
            continue
        row = json.loads(written[-1])
        numbers = [row["steps_per_second"], row["audio_seconds_per_second"]]
        share = row["data_wait_share"]
        lines.append(f"| {path.parent.name} | {numbers[0]:.2f} | {numbers[1]:.0f} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def run_parts(parts: list[Part], output: Path, seconds: float, shared: bool) -> None:
    """Runs the parts and writes the report after each of them.

    Args:
      parts: The parts, in order.
      output: Folder of the report.
      seconds: Time limit of all of them.
      shared: Whether each part must end when its share and those before it are over.
    """
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "moss_tok")]
    report = [f"# {' '.join(sys.argv)}\n\n{', '.join(versions)}\n"]
    began = time.monotonic()
    total = sum(part.seconds for part in parts)
    shares = 0
    for part in parts:
        shares += part.seconds
        allowed = seconds * shares / total if shared else seconds
        seconds_left = began + allowed - time.monotonic()
        print(f"== {part.title}", flush=True)
        if seconds_left < 5:
            text = f"stopped: no time was left for {part.name}\n"
        else:
            text = run_part(part, output, seconds_left)
        report.append(summarize(part, text))
        if part.name == "small":
            report[-1] += speeds(output)
        (output / "report.md").write_text("\n".join(report))


def main() -> None:
    """Runs the parts within the time limit and writes the report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_report", help="a new folder (default: gpu_report)")
    parser.add_argument("--official", help="checkout of the official repository")
    parser.add_argument(
        "--parts",
        default="",
        help="names, separated by commas: compile, large, bulk, official, streaming, tokenize, "
        "small, attention, options (default: all)",
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
    chosen = [part for part in parts if part.name in names]
    run_parts(chosen, output, 60 * args.minutes, shared=not args.rehearse)
    shutil.rmtree(output / "cache", ignore_errors=True)
    print((output / "report.md").read_text())


if __name__ == "__main__":
    main()
