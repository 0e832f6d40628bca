"""What is installed: versions, extras, package data, and the commands that describe them."""

import ast
import fnmatch
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import types
from concurrent.futures import BrokenExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import setuptools

import moss_tok
from moss_tok import errors, extras, sharding
from moss_tok.audio import manifest
from moss_tok.cli import commands, completion, doctor, selftest
from moss_tok.cli.main import main
from moss_tok.codec import export, huggingface, presets
from moss_tok.data import code_shards
from moss_tok.nn import compute
from moss_tok.speech import config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata():
    """The arguments of setup() in setup.py."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", found.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def package_files():
    files = [path for path in (ROOT / "moss_tok").rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def test_every_file_of_the_package_is_installed(metadata):
    patterns = metadata["package_data"]
    packages = set(metadata["packages"])
    for path in package_files():
        folder = path.parent
        while ".".join(folder.relative_to(ROOT).parts) not in packages:
            folder = folder.parent
            assert folder != ROOT, f"{path} belongs to no package"
        package = ".".join(folder.relative_to(ROOT).parts)
        if path.suffix == ".py" and path.parent == folder:
            continue
        name = path.relative_to(folder).as_posix()
        accepted = [*patterns[""], *patterns.get(package, [])]
        assert any(fnmatch.fnmatch(name, pattern) for pattern in accepted), f"{path} is left out"


def test_nothing_but_the_package_is_installed(metadata):
    assert all(name.split(".")[0] == "moss_tok" for name in metadata["packages"])
    names = {path.suffix for path in package_files()}
    assert names <= {".py", ".pyi", ".typed", "", ".json", ".safetensors", ".html", ".js", ".css",
                     ".svg"}  # fmt: skip


def modules(requirements):
    names = [re.split(r"[\[<>=]", requirement)[0] for requirement in requirements]
    return {name.replace("-", "_") for name in names}


def test_extras_are_those_of_setup(metadata):
    found = dict(metadata["extras_require"])
    for name in ("tests", "docs"):  # for developers
        found.pop(name, None)
    assert found.keys() == extras.EXTRAS.keys()
    train = modules(found["train"])
    for name, extra in extras.EXTRAS.items():
        own = modules(found[name]) if name in ("train", "demo") else modules(found[name]) - train
        assert own == set(extra.modules), name


def test_every_extra_in_the_code_exists(metadata):
    """Messages, documents and scripts name no other extra."""
    files = [*package_files(), *ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*.py")]
    for path in files:
        if path.suffix not in (".py", ".md"):
            continue
        for names in re.findall(r"(?:moss_tok|-e '?\.)\[([a-z,]+)\]", path.read_text()):
            assert set(names.split(",")) <= metadata["extras_require"].keys(), f"{path}: {names}"


def test_messages_name_the_extra_of_a_missing_module():
    line = errors.user_error(ModuleNotFoundError("No module", name="tokenizers.models"), "")
    assert line == "tokenizers is not installed: pip install 'moss_tok[language]'"
    line = errors.user_error(ModuleNotFoundError("No module", name="shtab"), "")
    assert line == "shtab is not installed: pip install shtab"
    assert not errors.user_error(ModuleNotFoundError("No module", name="moss_tok.gone"), "")


def test_a_program_that_failed_is_named():
    error = subprocess.CalledProcessError(100, ["apt-get", "download", "x"])
    assert errors.user_error(error, "") == "apt-get download x: exit code 100"


def test_a_lack_of_memory_is_named():
    line = errors.user_error(MemoryError("Unable to allocate 5 GiB"), "use less")
    assert line == "not enough memory (Unable to allocate 5 GiB); use less"
    line = errors.user_error(BrokenExecutor("A process ended"), "use less")
    assert line.endswith("killed, probably for lack of memory; use less, or fewer workers")


def test_version(metadata, capsys):
    assert metadata["version"] == moss_tok.__version__
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"moss-tok {moss_tok.__version__}\n"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{moss_tok.__version__}]" in changes
    assert f"\nversion: {moss_tok.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_mypy_checks_the_modules_of_all_public_names():
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert all((ROOT / name).is_file() for name in checked)
    for stub in (ROOT / "moss_tok").rglob("*.pyi"):
        assert stub.relative_to(ROOT).as_posix() in checked
        for node in ast.walk(ast.parse(stub.read_text())):
            if isinstance(node, ast.ImportFrom):
                path = stub.parent / (node.module.replace(".", "/") + ".py")
                assert path.relative_to(ROOT).as_posix() in checked


CODES = np.zeros((1, 3, 24), int)
SILENCE = np.zeros((1, 1, 960))


class TestDoctor:
    def test_passes_and_says_what_is_missing(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "pesq", None)
        monkeypatch.setenv("JAX_SOMETHING", "1")
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"moss_tok    {moss_tok.__version__} in " in out
        assert f"jax {jax.__version__}," in out
        assert "PESQ and SDR in moss-tok evaluate: pip install 'moss_tok[eval]'" in out
        assert "environment JAX_SOMETHING=1" in out
        assert f"{jax.device_count()} x cpu, platform cpu" in out
        assert out.count("self-test   ok: ") == 4
        assert str(Path.home()) not in out or not str(ROOT).startswith(str(Path.home()))

    @pytest.mark.parametrize(
        ("module", "name", "broken", "message"),
        [
            (
                moss_tok,
                "encode",
                lambda *_: moss_tok.Encoded(CODES, None),
                "of the codes of encode",
            ),
            (moss_tok, "encode", lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
            (selftest, "_stream", lambda *_: CODES[0], "of a stream"),
            (moss_tok, "decode", lambda *_: moss_tok.Decoded(SILENCE * np.nan, None), "finite"),
            (moss_tok, "decode", lambda *_: moss_tok.Decoded(SILENCE, None), "the known one"),
            (huggingface, "read_official", lambda *_: (None, np.array([1.0, np.nan])), "1 of 2"),
        ],
    )
    def test_fails(self, capsys, monkeypatch, module, name, broken, message):
        works = {
            (moss_tok, "encode"): lambda *_: moss_tok.Encoded(selftest.known_codes()[None], None),
            (selftest, "_stream"): lambda *_: selftest.known_codes(),
            (moss_tok, "decode"): lambda *_: moss_tok.Decoded(SILENCE, None),
        }
        for place, function in (works | {(module, name): broken}).items():
            monkeypatch.setattr(*place, function, raising=False)
        assert main(["doctor"]) == 1
        assert message in capsys.readouterr().out.partition("FAILED")[2]
        assert not jax.config.read("jax_disable_most_optimizations")

    @pytest.mark.parametrize(
        ("installed", "has_gpu", "has_tpu", "expected"),
        [
            ([], False, False, []),
            ([], True, False, ["pip install 'jax[cuda13]'"]),
            ([], False, True, ["pip install 'jax[tpu]'"]),
            (["libtpu"], True, True, ["pip install 'jax[cuda13]'", "sees only CPUs"]),
            (["jax-cuda12-plugin", "jax_cuda12_pjrt"], True, False, ["sees only CPUs"]),
        ],
    )
    def test_why_there_are_only_cpus(self, monkeypatch, installed, has_gpu, has_tpu, expected):
        packages = [types.SimpleNamespace(name=name, version="1") for name in [None, *installed]]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
        monkeypatch.setattr("glob.glob", lambda _: ["/dev/nvidia0"] * has_gpu)
        monkeypatch.setattr(sharding, "has_tpu_chips", lambda: has_tpu)
        plugins = doctor._plugins()
        assert list(plugins) == installed
        text = "\n".join(line for _, line in doctor._explain_cpus(plugins))
        assert all(part in text for part in expected)
        assert bool(text) == bool(expected)

    def test_no_device(self, capsys, monkeypatch):
        def fail():
            raise RuntimeError("Unable to initialize backend 'tpu'")

        monkeypatch.setattr(jax, "devices", fail)
        assert main(["doctor"]) == 1
        assert "jax cannot start: Unable to initialize" in capsys.readouterr().out


class TestCompletion:
    @pytest.fixture(autouse=True)
    def _needs_shtab(self):
        pytest.importorskip("shtab")

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["rec"], "reconstruct"),
            (["encode", "--num"], "--num-quantizers"),
            (["encode", "spee"], "speech.flac"),
            (["encode", "a", "b", "--checkpoint", "spee"], "speech.flac"),
            (["convert", "a", "b", "--dtype", "b"], "bfloat16"),
            (["completion", "z"], "zsh"),
            (["tokenize", "--format", "j"], "jsonl"),
            (["info", "tt"], "tts-1.7b"),
            (["info", "spee"], "speech.flac"),
        ],
    )
    def test_bash(self, tmp_path, words, expected):
        (tmp_path / "speech.flac").touch()
        (tmp_path / "moss-tok.bash").write_text(completion.script("bash"))
        lines = f"""
            source ./moss-tok.bash
            COMP_WORDS=(moss-tok {" ".join(words)}); COMP_CWORD={len(words)}
            _shtab_moss_tok; echo "${{COMPREPLY[@]}}"
        """
        argv = ["bash", "-c", lines]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"{expected}\n", "")

    def test_values_are_those_that_commands_accept(self):
        accepted = {
            ("export", "function"): export.FUNCTIONS,
            ("export", "weights"): export.WEIGHTS,
            ("tokenize", "format"): tuple(code_shards.WRITERS),
            ("tokenize", "precision"): tuple(compute.PRECISIONS),
            ("transcribe", "task"): manifest.TASKS,
        }
        for key, values in accepted.items():
            assert completion.VALUES[key] == values
        assert completion.PRESETS == (*presets.PRESETS, *config.PUBLISHED)

    def test_zsh(self, tmp_path):
        script = completion.script("zsh")
        assert script.startswith("#compdef moss-tok")
        assert all(f"    {name}:'" in script for name in commands.COMMANDS)
        assert ":format:(arrayrecord jsonl)" in script
        if not shutil.which("zsh"):
            pytest.skip("zsh is not installed")
        (tmp_path / "_moss-tok").write_text(script)
        subprocess.run(["zsh", "-n", tmp_path / "_moss-tok"], check=True)
