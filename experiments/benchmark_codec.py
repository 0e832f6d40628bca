"""Times encode and decode per preset, and the official PyTorch class with the same weights.

  python experiments/benchmark_codec.py --presets=v1 --seconds=10,60 --official=DIR --compile

DIR is a checkout of github.com/OpenMOSS/MOSS-Audio-Tokenizer (which needs torch and transformers).
--compile also measures it with each of its Transformer layers under torch.compile.
Weights are random. A ratio is our time over theirs; below 1, ours is faster. Without a GPU, every
measurement runs in its own process, alternating between implementations. Memory peaks are then
those of the process, including the interpreter and the remains of compilation (0.5 GB). On a GPU,
each implementation has one process, and peaks are the memory that the program reserves (ours) or
that the allocator used (PyTorch).
"""

import argparse
import functools
import importlib.util
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok.codec.presets import PRESETS, preset
from moss_tok.errors import exit_code


def main() -> None:
    """Runs all measurements and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = f"of {', '.join(PRESETS)}; with commas"
    parser.add_argument("--presets", default="tiny,nano,v1", type=names_of(PRESETS), help=known)
    parser.add_argument("--seconds", default="10,60,180,600", help="lengths of audio")
    parser.add_argument("--batch_sizes", default="1", help="batch sizes")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; prints the median")
    dtypes = names_of(("float32", "bfloat16"))
    parser.add_argument("--dtype", default="float32", type=dtypes, help="or bfloat16, or both")
    parser.add_argument("--official", help="checkout of the official repository (presets v1, tiny)")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--convert", action="store_true", help="also measure conversion's memory")
    parser.add_argument("--functions", default="encode,decode", help="functions to time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        for worker in args.worker.split(","):
            for result in _WORKERS[worker](args):
                print(f"{worker}: {result}", file=sys.stderr)
                print(json.dumps(result), flush=True)
        return
    others = ["official", "compiled"][: 1 + args.compile] if args.official else []
    heads = ["preset", "dtype", "batch", "seconds", "what", "ours"]
    for other in others:
        heads += [other, "ratio"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in args.presets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            _measure_preset(name, others, Path(folder) / "official", args)


def _measure_preset(name: str, others: list[str], weights: Path, args: argparse.Namespace) -> None:
    from moss_tok.codec import huggingface

    config = preset(name)
    weights.mkdir()
    huggingface.write_official(weights, config, random_params(config), "float32")
    size_gb = sum(f.stat().st_size for f in weights.glob("*.safetensors")) / 1e9
    lengths = list(filter(None, args.seconds.split(",")))
    cases = list(itertools.product(args.batch_sizes.split(","), lengths, args.functions.split(",")))
    together = shutil.which("nvidia-smi") is not None
    groups = [cases] if together else [[case] for case in cases]
    dtypes = args.dtype.split(",")
    for dtype, group in itertools.product(dtypes, groups):
        results = {"ours": _spawn("ours", name, weights, args, dtype, group)}
        if others and config.layout == "v1":  # the layout of the official class
            both = _spawn(",".join(others), name, weights, args, dtype, group)
            for i, other in enumerate(others):
                results[other] = both[i * len(group) :]
        for number, case in enumerate(group):
            of_case = {worker: rows[number] for worker, rows in results.items()}
            _print_rows([name, dtype, *case], others, of_case)
    if args.convert:
        for worker in ("import", "export"):
            peak = _spawn(worker, name, weights, args, dtypes[0], [])[0]["peak memory"]
            print(f"{name}: {worker} peaks at {peak:.2f} GB, weights {size_gb:.2f} GB: "
                  f"{peak / size_gb:.2f} times", flush=True)  # fmt: skip


def _print_rows(case: list[str], others: list[str], results: dict[str, dict[str, float]]) -> None:
    for quantity, ours in results["ours"].items():
        unit = "GB" if "memory" in quantity else "s"
        cells = [*case[:-1], case[-1] + quantity, f"{ours:.3g} {unit}"]
        for other in others:
            theirs = results.get(other, {}).get(quantity)
            cells += [f"{theirs:.3g} {unit}", f"{ours / theirs:.2f}"] if theirs else ["-", "-"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _spawn(
    worker: str, name: str, weights: Path, args: Any, dtype: str, cases: list[tuple[str, ...]]
) -> list[dict[str, float]]:
    command = [sys.executable, __file__, f"--worker={worker}", f"--presets={name}"]
    command += [f"--cases={json.dumps(cases)}", f"--repeats={args.repeats}"]
    command += [f"--dtype={dtype}"]
    command += [f"--official={args.official}::{weights}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def names_of(known: Collection[str]) -> Callable[[str], str]:
    """Checks an argument of names separated by commas."""

    def check(text: str) -> str:
        for name in text.split(","):
            if name not in known:
                accepted = ", ".join(known)
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {accepted}")
        return text

    return check


def random_params(config: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of plausible size, numpy float32."""
    import jax

    from moss_tok.codec import pretrained

    constant = {"scale": 1.0, "bias": 0.0, "gain": 1.0}
    constant |= {"attention_scale": 0.01, "mlp_scale": 0.01}

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in constant:
            return np.full(leaf.shape, constant[name], np.float32)
        generator = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        values = generator.standard_normal(leaf.shape, np.float32)
        values *= 0.03 if name != "codebooks" else 1.0
        return values

    leaves, tree = jax.tree_util.tree_flatten_with_path(pretrained.param_shapes(config))
    with ThreadPoolExecutor() as pool:
        return jax.tree.unflatten(tree, pool.map(draw, *zip(*leaves, strict=True)))


def _input(args: argparse.Namespace, case: list[str]) -> np.ndarray:
    """The input of a case: audio [B, C, S] or codes [B, Q, T]."""
    batch, seconds, function = case
    config = preset(args.presets)
    generator = np.random.default_rng(1)
    if function == "encode":
        shape = (int(batch), config.num_channels, int(float(seconds) * config.sample_rate))
        return 0.1 * generator.standard_normal(shape, np.float32)
    shape = (config.quantizer.num_quantizers, round(float(seconds) * config.frame_rate))
    return generator.integers(0, config.quantizer.codebook_size, (int(batch), *shape), np.int32)


def _time(function: Any, repeats: int) -> float:
    """Median seconds of `function`, after one run that may compile."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _forget_peak() -> None:
    """Resets the peak of memory, because loading holds two copies of some weights."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gb() -> float:
    """Peak resident memory of this process in GB; getrusage would include that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def _ours(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    import jax

    import moss_tok

    weights = args.official.split("::")[1]
    codec = moss_tok.load(weights, compute=moss_tok.ComputeConfig(dtype=args.dtype))
    weights_gb = sum(x.nbytes for x in jax.tree.leaves(codec.params)) / 1e9
    on_gpu = jax.default_backend() == "gpu"
    loading = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9 if on_gpu else _peak_gb()

    def prepare(case):
        array = jax.device_put(_input(args, case))
        function = getattr(moss_tok, case[2])
        if on_gpu:
            function = jax.jit(function).lower(codec, array).compile()
        return function, array

    with ThreadPoolExecutor() as pool:
        prepared = list(pool.map(prepare, args.cases))
    for function, array in prepared:
        if on_gpu:
            memory = function.memory_analysis()
            needed = memory.temp_size_in_bytes + memory.output_size_in_bytes + array.nbytes

        def run(function=function, array=array):
            jax.block_until_ready(function(codec, array))

        seconds, peak = _measure(run, args.repeats)
        yield {
            "": seconds,
            ", peak memory beyond weights": needed / 1e9 if on_gpu else peak - weights_gb,
            ", peak memory while loading": loading,
        }


def _official(args: argparse.Namespace, compiled: bool = False) -> Iterator[dict[str, float]]:
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = _official_model(args.official, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 1000  # number of shapes
        for module in model.modules():
            if type(module).__name__.endswith("TransformerLayer"):
                module.compile()
    weights_gb = sum(x.nbytes for x in model.parameters()) / 1e9
    loading = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else _peak_gb()
    bfloat16 = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    for case in args.cases:
        tensor = torch.from_numpy(_input(args, case)).to(device)
        if case[2] == "decode":
            tensor = tensor.transpose(0, 1).long()  # [Q, B, T]
        function = getattr(model, case[2])

        def run(function=function, tensor=tensor):
            function(tensor, return_dict=True)
            if on_gpu:
                torch.cuda.synchronize()

        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(), bfloat16:
            seconds, peak = _measure(run, args.repeats)
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak
        yield {
            "": seconds,
            ", peak memory beyond weights": peak - weights_gb,
            ", peak memory while loading": loading,
        }


@functools.lru_cache(maxsize=1)
def _official_model(official: str, device: str) -> Any:
    import torch

    checkout, weights = official.split("::")
    model = _official_class(Path(checkout)).from_pretrained(weights, dtype=torch.float32)
    return model.eval().to(device)


def _measure(function: Any, repeats: int) -> tuple[float, float]:
    """Median seconds, and the peak of this process's memory during the runs in GB."""
    _forget_peak()
    return _time(function, repeats), _peak_gb()


def _official_class(checkout: Path) -> Any:
    """Imports the official modeling file as part of a package, from any folder."""
    for name in ("", ".configuration_moss_audio_tokenizer", ".modeling_moss_audio_tokenizer"):
        file = checkout / (f"{name[1:]}.py" if name else "__init__.py")
        spec = importlib.util.spec_from_file_location(
            f"official_codec{name}",
            file,
            submodule_search_locations=None if name else [str(checkout)],
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        if name:
            spec.loader.exec_module(module)
    return module.MossAudioTokenizerModel


def _import(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    from moss_tok.convert import convert

    weights = Path(args.official.split("::")[1])
    convert(weights, weights.parent / "ours")
    yield {"peak memory": _peak_gb()}


def _export(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    from moss_tok.convert import convert

    folder = Path(args.official.split("::")[1]).parent
    convert(folder / "ours", folder / "exported")
    yield {"peak memory": _peak_gb()}


_WORKERS = {
    "ours": _ours,
    "official": _official,
    "compiled": functools.partial(_official, compiled=True),
    "import": _import,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(exit_code(main))
