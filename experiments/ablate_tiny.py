"""Ablation of the recipe for small models: short runs, each without one part.

    python experiments/ablate_tiny.py --train_data=corpus/manifest.jsonl --out=runs/ablation

Each variant is a shorter quickstart with one change, in its own process. Finished variants are not
run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.codec import init as codec_init
from moss_tok.errors import exit_code

FLAGS = Path(__file__).with_name("quickstart.flags")
RESULT = "result.json"

# Name -> additional flags, and parts of the code to undo.
VARIANTS = {
    "all of it": ([], ""),
    "random projections": ([], "low_pass"),
    "codes that see no sizes": ([], "sizes"),
    "quantizers' dimensions drawn": ([], "dealt"),
    "mel bands down to 1e-5": (["--mel_floor_db=-200"], ""),
    "mel windows of 32 to 2048 only": (["--mel_windows=32,64,128,256,512,1024,2048"], ""),
    "no waveform loss": (["--waveform_weight=0"], ""),
    "none of the five": (["--waveform_weight=0", "--mel_floor_db=-200"], "low_pass,sizes,dealt"),
    "12.5 Hz instead of 50": (["--model=12hz.json"], ""),
    "latents half as wide": (["--model=narrow.json"], ""),
    "no re-seeding": (["--reseed_every=0"], ""),
    "commitment weight 0.25": (["--commitment_weight=0.25"], ""),
    "dropout on all items": (["--quantizer_dropout=1"], ""),
    "no dropout": (["--quantizer_dropout=0"], ""),
    "discriminators from the start": (
        [
            "--stage=adversarial",
            "--num_microbatches=1",
            "--discriminator_channels=6",
            "--discriminator_windows=512,128",
            "--discriminator_learning_rate=1e-3",
            "--adversarial_weight=6",
            "--feature_matching_weight=60",
        ],
        "",
    ),
}


def undo(names: list[str]) -> None:
    """Disables parts of the initialization in `moss_tok.codec.init`."""
    if "low_pass" in names:
        codec_init._low_pass = lambda modules, stages, side: stages
    if "sizes" in names:
        paired = codec_init._paired

        def without_sizes(quantizer):
            result = paired(quantizer)
            projections = result["in_projections"] | {"bias": quantizer["in_projections"]["bias"]}
            codebooks = 0.1 * quantizer["codebooks"]
            return result | {"in_projections": projections, "codebooks": codebooks}

        codec_init._paired = without_sizes
    if "dealt" in names:
        codec_init._dimension_kernels = random_kernels


def random_kernels(num_quantizers: int, rvq_dim: int, codebook_dim: int) -> jax.Array:
    """Orthonormal kernels with random directions; the last column is zero."""
    shape = (num_quantizers, rvq_dim, codebook_dim)
    kernels = np.linalg.qr(np.random.default_rng(0).standard_normal(shape))[0]
    kernels[..., -1] = 0
    return jnp.asarray(kernels, jnp.float32)


def run_variant(name: str, args: argparse.Namespace) -> None:
    """Trains a variant, and writes its evaluation and artefacts to RESULT."""
    import artefacts
    from absl import flags

    import moss_tok
    from moss_tok.objectives import flags as train_flags
    from moss_tok.objectives.config import build_objective
    from moss_tok.training import loop, writer

    changes, undone = VARIANTS[name]
    undo(undone.split(","))
    workdir = folder_of(name, args)
    train_flags.define()
    flags.FLAGS([
        "train.py", f"--flagfile={FLAGS}",
        f"--workdir={workdir}", f"--train_data={args.train_data}",
        f"--num_steps={args.num_steps}", f"--decay_steps={args.num_steps}",
        *(change.replace("--model=", f"--model={args.out}/") for change in changes),
    ])  # fmt: skip
    config = train_flags.config()
    loop.train(config, build_objective(config))
    codec = moss_tok.load(config.run.workdir)
    evaluations = writer.read_rows(workdir / writer.EVALUATION)
    num_quantizers = codec.config.quantizer.num_quantizers
    result = {
        "table": evaluations[-1]["table"],
        "artefacts": artefacts.measure(codec, config.data.train_data, [num_quantizers]),
    }
    (workdir / RESULT).write_text(json.dumps(result))


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """The workdir of a variant."""
    return args.out / name.replace(" ", "_")


def write_models(folder: Path) -> None:
    """Writes 12hz.json, with 12.5 frames per second, and narrow.json, of about the size of tiny."""
    from moss_tok.codec import presets
    from moss_tok.codec.config import CodecConfig, QuantizerConfig

    def write(name, patches, widths, latent, rvq_dim):
        rows = [
            (240, widths[0], 128, 2, 2, 384, 1.0),
            (widths[0] * patches[1], widths[1], 192, 3, 2, 512, 1.0),
        ]
        encoder = presets._stack(patches, rows, "v1", layer_scale=0.1)
        quantizer = QuantizerConfig(latent, rvq_dim, latent, 16, 1024, 8)
        codec = CodecConfig(24000, 1, encoder, quantizer, presets.mirror(encoder), "v1")
        (folder / name).write_text(codec.to_json())

    write("12hz.json", (240, 4, 2), (128, 256), 512, 96)
    write("narrow.json", (240, 2), (80, 128), 128, 48)


def row(name: str, result: dict) -> str:
    """A line of the table."""
    table = result["table"]
    systems = ("1 quantizer", "16 quantizers")
    cells = []
    for domain in ("speech", "music", "sound"):
        cells.append(" ".join(f"{table[domain][system]['mel_loss']:.2f}" for system in systems))
    cells.append(" ".join(f"{table['speech'][system]['stoi']:.2f}" for system in systems))
    figures = result["artefacts"]["16 quantizers"]
    combs = [v for k, v in figures.items() if k.startswith("comb") and "largest" not in k]
    cells += [f"{figures['pitch']:.1f}", f"{max(combs):.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Runs the variants that are not finished, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), default="runs/ablation")
    parser.add_argument("--num_steps", type=int, default=500)
    parser.add_argument("--variant", choices=VARIANTS, help="run only this one, in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.variant:
        run_variant(args.variant, args)
        return
    write_models(args.out)
    print("| | mel speech, 1 and 16 quantizers | music | sound | STOI | pitch dB | comb dB |")
    print("|---|---|---|---|---|---|---|")
    for name in VARIANTS:
        folder = folder_of(name, args)
        if not (folder / RESULT).exists():
            log = folder.with_suffix(".log")
            with open(log, "w") as output:
                command = [sys.executable, __file__, *sys.argv[1:], f"--variant={name}"]
                result = subprocess.run(command, check=False, stdout=output, stderr=output)
            if result.returncode:
                raise ValueError(f"{name}: exit code {result.returncode}, see {log}")
        print(row(name, json.loads((folder / RESULT).read_text())), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
