"""Package metadata of moss_tok."""

import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent

CODEC = [
    "absl-py",
    "etils[epath]",
    "flax>=0.12",
    "jax>=0.10",
    "lazy_loader>=0.4",
    "librosa>=0.10",
    "ml_dtypes",
    "numpy>=1.26",
    "orbax-checkpoint>=0.11",
    "pystoi>=0.4.1",
    "safetensors>=0.8",
    "scipy",
    "shtab>=1.7",
    "soundfile>=0.13",
    "soxr>=0.5",
    "tqdm",
]
TRAIN = [
    "array_record>=0.7",
    "grain>=0.2.18",
    "jinja2>=3.1",
    "jiwer>=3",
    "matplotlib>=3.8",
    "msgpack",
    "optax>=0.2.6",
    "tensorboardX>=2.6",
]
BEAM = ["apache-beam>=2.60"]
GCS = ["gcsfs"]
DEMO = ["aiohttp>=3.9", "matplotlib>=3.8"]
EVAL = ["mir_eval>=0.8", "pesq>=0.0.4"]
LANGUAGE = ["tokenizers>=0.20"]
EXPORT = ["flatbuffers"]
FFMPEG = ["av>=16"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1", "ruff==0.17.6"]
TESTS = [
    "gcp-storage-emulator",
    "markdown-it-py>=3",
    "num2words>=0.5.13",
    "playwright",
    "pytest>=8",
    "pytest-xdist>=3",
    "ruff==0.17.6",
]

setuptools.setup(
    name="moss_tok",
    version=runpy.run_path(str(ROOT / "moss_tok/version.py"))["__version__"],
    description="A causal Transformer audio codec (CAT) in JAX: train, fine-tune, encode, decode.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["moss_tok", "moss_tok.*"]),
    package_data={
        "": ["*.pyi"],
        "moss_tok": ["py.typed"],
        "moss_tok.assets": ["codec/*"],
        "moss_tok.demo": ["page/*"],
        "moss_tok.evaluation": ["page.html"],
    },
    install_requires=CODEC,
    extras_require={
        "train": TRAIN,
        "beam": TRAIN + BEAM,
        "demo": DEMO,
        "docs": DOCS,
        "eval": TRAIN + EVAL,
        "export": EXPORT,
        "ffmpeg": FFMPEG,
        "language": TRAIN + LANGUAGE,
        "gcs": TRAIN + GCS,
        "tests": TRAIN + BEAM + DEMO + EVAL + EXPORT + FFMPEG + LANGUAGE + GCS + TESTS,
    },
    entry_points={"console_scripts": ["moss-tok = moss_tok.cli.main:main"]},
)
