"""Times encode and decode per preset, beside the official PyTorch class on the same weights.

  python experiments/benchmark_codec.py --presets=v1 --seconds=10,60 --official=DIR --compile

DIR is a checkout of github.com/OpenMOSS/MOSS-Audio-Tokenizer (which needs torch and transformers).
Weights are random. Every measurement runs in a process of its own, the implementations in turns, so
the peaks of memory are their own: of the process, which includes the interpreter and what compiling
leaves (0.5 GB), or of the GPU if there is one. A ratio is ours over theirs: below 1 is faster.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok.config import PRESETS, preset


def main() -> None:
    """Runs all measurements and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="tiny,nano,v1", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--seconds", default="10,60,180,600", help="lengths of audio")
    parser.add_argument("--batch_sizes", default="1", help="clips at a time")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--official", help="checkout of the official repository (presets v1, tiny)")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--convert", action="store_true", help="also measure conversion's memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker, _, function = args.worker.partition(" ")
        print(json.dumps(_WORKERS[worker](args, function)))
        return
    others = ["official", "compiled"][: 1 + args.compile] if args.official else []
    heads = ["preset", "batch", "seconds", "what", "ours"]
    heads += [x for other in others for x in (other, "ratio")]
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
    workers = ["ours"] + (others if config.layout == "v1" else [])
    lengths = list(filter(None, args.seconds.split(",")))
    for batch, seconds in itertools.product(args.batch_sizes.split(","), lengths):
        for function in ("encode", "decode"):
            found = {
                w: _spawn(f"{w} {function}", name, weights, seconds, args, batch) for w in workers
            }
            for what, ours in found["ours"].items():
                unit = "GB" if "memory" in what else "s"
                cells = [name, batch, seconds, function + what, f"{ours:.3g} {unit}"]
                for other in others:
                    theirs = found.get(other, {}).get(what, math.nan)
                    cells += [f"{theirs:.3g} {unit}", f"{ours / theirs:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    if args.convert:
        for worker in ("import", "export"):
            peak = _spawn(worker, name, weights, "0", args)["peak memory"]
            print(f"{name}: {worker} peaks at {peak:.2f} GB, weights {size_gb:.2f} GB: "
                  f"{peak / size_gb:.2f} times", flush=True)  # fmt: skip


def _spawn(
    worker: str, name: str, weights: Path, seconds: str, args: Any, batch: str = "1"
) -> dict[str, float]:
    command = [sys.executable, __file__, f"--worker={worker}", f"--presets={name}"]
    command += [f"--seconds={seconds}", f"--batch_sizes={batch}", f"--repeats={args.repeats}"]
    command += [f"--dtype={args.dtype}"]
    command += [f"--official={args.official}::{weights}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def random_params(config: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of plausible size, numpy float32."""
    from moss_tok.codec import pretrained

    generator = np.random.default_rng(seed)

    def draw(tree: Any, name: str = "") -> Any:
        if isinstance(tree, dict):
            return {k: draw(v, k) for k, v in tree.items()}
        constant = {"scale": 1.0, "bias": 0.0, "gain": 1.0}
        constant |= {"attention_scale": 0.01, "mlp_scale": 0.01}
        if name in constant:
            return np.full(tree.shape, constant[name], np.float32)
        values = generator.standard_normal(tree.shape, np.float32)
        values *= 0.03 if name != "codebooks" else 1.0
        return values

    return draw(pretrained.param_shapes(config))


def _codes(config: Any, args: argparse.Namespace) -> np.ndarray:
    num_frames = round(float(args.seconds) * config.frame_rate)
    shape = (int(args.batch_sizes), config.quantizer.num_quantizers, num_frames)
    return np.random.default_rng(1).integers(0, config.quantizer.codebook_size, shape, np.int32)


def _audio(config: Any, args: argparse.Namespace) -> np.ndarray:
    num_samples = int(float(args.seconds) * config.sample_rate)
    shape = (int(args.batch_sizes), config.num_channels, num_samples)
    return 0.1 * np.random.default_rng(1).standard_normal(shape, np.float32)


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
    """The peak counts from here: loading holds two copies of some weights."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gb() -> float:
    """Peak resident memory of this process; getrusage would count what its parent had, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def _ours(args: argparse.Namespace, function: str) -> dict[str, float]:
    import jax

    import moss_tok

    weights = args.official.split("::")[1]
    codec = moss_tok.load(weights, compute=moss_tok.ComputeConfig(dtype=args.dtype))
    weights_gb = sum(x.nbytes for x in jax.tree.leaves(codec.params)) / 1e9
    audio = jax.device_put(_audio(codec.config, args))
    codes = jax.device_put(_codes(codec.config, args))

    def run():
        if function == "encode":
            return moss_tok.encode(codec, audio).codes.block_until_ready()
        return moss_tok.decode(codec, codes).wav.block_until_ready()

    def device_gb():
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9

    on_gpu = jax.default_backend() == "gpu"
    return _measure(run, weights_gb, args.repeats, device_gb if on_gpu else None)


def _official(args: argparse.Namespace, function: str, compiled: bool = False) -> dict[str, float]:
    import torch

    checkout, weights = args.official.split("::")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _official_class(Path(checkout)).from_pretrained(weights, dtype=torch.float32).eval()
    model = model.to(device)
    weights_gb = sum(x.nbytes for x in model.parameters()) / 1e9
    config = preset(args.presets)
    given = {
        "encode": torch.from_numpy(_audio(config, args)),
        "decode": torch.from_numpy(_codes(config, args)).transpose(0, 1).long(),  # [Q, B, T]
    }[function].to(device)
    call = getattr(model, function)
    call = torch.compile(call) if compiled else call

    def run():
        call(given, return_dict=True)
        if device == "cuda":
            torch.cuda.synchronize()

    def device_gb():
        return torch.cuda.max_memory_allocated() / 1e9

    bfloat16 = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    with torch.no_grad(), bfloat16:
        return _measure(run, weights_gb, args.repeats, device_gb if device == "cuda" else None)


def _compiled(args: argparse.Namespace, function: str) -> dict[str, float]:
    return _official(args, function, compiled=True)


def _measure(
    function: Any, weights_gb: float, repeats: int, device_gb: Any = None
) -> dict[str, float]:
    """Seconds, and peaks of memory: of the function, and of what came before.

    `device_gb` gives the GPU's peak, which counts instead of the process's.
    """
    loaded = (device_gb or _peak_gb)()
    if not device_gb:
        _forget_peak()
    seconds = _time(function, repeats)
    return {
        "": seconds,
        ", peak memory beyond weights": (device_gb or _peak_gb)() - weights_gb,
        ", peak memory while loading": loaded,
    }


def _official_class(checkout: Path) -> Any:
    """Imports the official modeling file as part of a package, wherever it is."""
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


def _import(args: argparse.Namespace, _: str) -> dict[str, float]:
    from moss_tok.convert import convert

    weights = Path(args.official.split("::")[1])
    convert(weights, weights.parent / "ours")
    return {"peak memory": _peak_gb()}


def _export(args: argparse.Namespace, _: str) -> dict[str, float]:
    from moss_tok.convert import convert

    folder = Path(args.official.split("::")[1]).parent
    convert(folder / "ours", folder / "exported")
    return {"peak memory": _peak_gb()}


_WORKERS = {
    "ours": _ours,
    "official": _official,
    "compiled": _compiled,
    "import": _import,
    "export": _export,
}

if __name__ == "__main__":
    main()
