"""A file imports only from lower floors or from earlier rooms of its own package."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moss_tok"

# Rooms from the ground up; a tuple's rooms may import those before them in the same tuple.
FLOORS = [
    ["version", "assets", "extras", "errors", "json_files", "settings", "mesh", "summary",
     "batching", "storage", "sharding", "tensors", "checkpoint"],
    ["nn.compute", "nn.products", "nn.rope", "nn.cache", "nn.kernels", "nn.attention", "nn.layers",
     "nn.blocks"],
    ["audio.notes", "audio.windows", "audio.decoder", "audio.mpeg", "audio.flac", "audio.ogg",
     "audio.containers", "audio.kinds", "audio.libsndfile", "audio.ffmpeg", "audio.opening",
     "audio.writing", "audio.files", "audio.folders", "audio.manifest", "audio.spectral"],
    ["codec.config", "codec.presets", "codec.checks", "codec.masks",
     "codec.transformer", "codec.quantizer", "codec.model",
     "codec.init", "codec.chunks", "codec.inference", "codec.streaming", "codec.buffering",
     "codec.live", "codec.huggingface_config", "codec.huggingface", "codec.pretrained",
     "codec.export", "codec.codes"],
    ["language.config", "language.text", "language.model", "language.generate",
     "language.qwen", "language.pretrained", "speech.config", "speech.model",
     "speech.layout", "speech.sampling", "speech.steps", "speech.generate",
     "speech.huggingface_config", "speech.huggingface", "speech.pretrained", "speech.speaking",
     "convert"],
    ["data.config", "data.jobs", "data.records", "data.sources", "data.pipeline", "data.prepare",
     "data.synthetic", "data.codes", "data.code_batches", "data.speech_batches", "data.batches",
     "data.code_shards", "data.reading", "data.tokenize"],
    ["evaluation.metrics", "evaluation.sweep", "evaluation.report", "evaluation.baselines",
     "evaluation.datasets", "evaluation.reconstruction", "evaluation.scoring",
     "evaluation.results", "evaluation.transcription", "evaluation.pages"],
    ["training.config", "training.provenance", "training.objective", "training.optimizer",
     "training.microbatches", "training.state", "training.step", "training.checkpoints",
     "training.writer",
     "training.interrupts", "training.start", "training.progress", "training.loop"],
    ["objectives.config", "objectives.flags", "objectives.losses", "objectives.discriminators",
     "objectives.code_use", "objectives.text", "objectives.audio", "objectives.base",
     "objectives.codec",
     "objectives.adversarial", "objectives.recognition", "objectives.code_data",
     "objectives.code_recognition", "objectives.speech_data", "objectives.speech",
     "objectives.flops"],
    ["demo.sound", "demo.speech", "demo.server"],
    ["cli.arguments", "cli.commands", "cli.decode", "cli.encode", "cli.reconstruct", "cli.compare",
     "cli.convert", "cli.demo",
     "cli.info", "cli.prepare", "cli.stream",
     "cli.export", "cli.speech_lists", "cli.speak", "cli.evaluate", "cli.tokenize",
     "cli.transcribe", "cli.report",
     "cli.selftest", "cli.doctor", "cli.completion",
     "cli.main"],
]  # fmt: skip
LAZY = ("language", "data", "speech")  # rooms whose public names are imported on use
ORDER = [room for floor in FLOORS for room in floor]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_floors(path):
    here = module_name(path)
    assert here in ORDER, f"{here} has no floor yet"
    for name in imported(path):
        room = name.removeprefix("moss_tok.")
        if name.startswith("moss_tok.") and room in ORDER:
            assert ORDER.index(room) < ORDER.index(here), f"{here} imports {room}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_never_torch_nor_tensorflow(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"torch", "tensorflow", "transformers"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import moss_tok.cli.main; moss_tok.cli.main.COMMANDS", ["jax", "numpy"]),
        ("import moss_tok; moss_tok.load, moss_tok.encode", ["grain", "optax", "librosa"]),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"{statement}; import sys; sys.exit(any(m in sys.modules for m in {absent}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_training_core_names_no_domain():
    """Loop, step, state, checkpoints and writer serve any objective."""
    for path in sorted((ROOT / "training").glob("*.py")):
        domains = {n for n in imported(path) if n.startswith(("moss_tok.codec", "moss_tok.language",
                                                              "moss_tok.objectives"))}  # fmt: skip
        assert not domains, f"{path.name} imports {domains}"


@pytest.mark.parametrize(
    "package", ["moss_tok", "moss_tok.language", "moss_tok.data", "moss_tok.speech"]
)
def test_stub_and_package_have_the_same_names(package):
    """Type checkers and tab completion see the names that can be imported."""
    module = importlib.import_module(package)
    stub = Path(module.__file__).with_suffix(".pyi")
    names = set()
    for node in ast.parse(stub.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        source = importlib.import_module(f"{package}.{node.module}")
        for alias in node.names:
            assert alias.asname == alias.name  # otherwise type checkers take it as private
            assert getattr(module, alias.name) is getattr(source, alias.name)
            names.add(alias.name)
    assert names == set(module.__all__) == set(dir(module))
    with pytest.raises(AttributeError, match="encod$"):
        module.encod  # noqa: B018
