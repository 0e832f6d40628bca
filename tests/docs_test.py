"""README.md and docs/: commands parse, cheap ones run, code runs, links lead somewhere."""

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import absl.flags
import helpers
import numpy as np
import pytest
import soundfile
from helpers import RATE, ROOT, init_params, micro_config
from markdown_it import MarkdownIt

import moss_tok
from moss_tok import assets
from moss_tok.cli import main as cli
from moss_tok.codec import pretrained
from moss_tok.codec.config import PatchConfig, TransformerConfig
from moss_tok.codec.presets import mirror
from moss_tok.objectives import flags as train_flags

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
    ROOT / "tpu_scripts" / "README.md",
]
SHELL = ("", "sh")  # languages of blocks that may hold commands
SKIPPED = ("pip", "srun", "mkdocs", "sox", "play", "git")


@cache
def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page, *languages):
    """(first line, text) of the code blocks of some languages; indented ones have none, ""."""
    found = []
    for token in tokens(page):
        if token.type in ("fence", "code_block") and token.info in languages:
            found.append((token.map[0] + 1, token.content))
    return found


def command_lines(page):
    """(line number, words) of each command of a page, pipes and && split."""
    for first, text in blocks(page, *SHELL):
        joined = re.sub(r"\\\n\s*", " ", text)
        for number, line in enumerate(joined.splitlines()):
            if re.match(r"\s*(\w+=\S+ )*(\S*moss-tok|\S*python3?) ", line):
                for words in split(line):
                    yield first + number, words


def split(line):
    """The words of each program of a line, without what it sets in the environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&")
    lexer.whitespace_split = True
    programs = [[]]
    for word in lexer:
        if set(word) <= set("|&"):
            programs.append([])
        elif programs[-1] or not re.fullmatch(r"\w+=\S*", word):
            programs[-1].append(word)
    return programs


def name(page):
    return str(page.relative_to(ROOT))


# --------------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the flag files of the project, and codes where pages train on codes."""
    for link in ("experiments", "tpu_scripts"):
        (tmp_path / link).symlink_to(ROOT / link)
    for codes in ("codes", "codes_all", "v1_codes", "prompt_codes", "number_codes"):
        (tmp_path / codes).mkdir()
        (tmp_path / codes / "plan.json").write_text("{}")
    (tmp_path / "codes.jsonl").write_text('{"audio_codes": [[0]], "text": "one"}\n')
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    absl.flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page, folder):
    for number, words in command_lines(page):
        try:
            check_command(words)
        except (Exception, SystemExit) as error:
            line = " ".join(words)
            pytest.fail(f"{name(page)}:{number}: {line}\n{error!r}", pytrace=False)


def check_command(words):
    program, *arguments = words
    program = Path(program).name
    if program == "moss-tok":
        check_moss_tok(arguments)
    elif program in ("python", "python3"):
        check_python(arguments)
    elif program not in SKIPPED:
        raise ValueError(f"{program} is not a program that the tests know")


def check_moss_tok(arguments):
    """Runs nothing."""
    if arguments == ["--version"] or arguments == ["--help"]:
        return
    command, *rest = arguments
    if ">" in rest:
        rest = rest[: rest.index(">")]
    assert command in cli.COMMANDS
    cli.build_parser(command).parse_args(rest)


def check_python(arguments):
    script, *rest = arguments
    if script in ("-m", "-c"):
        return
    assert (ROOT / script).is_file(), f"no file {script}"
    rest = [word for word in rest if word != "..."]
    if script == "train.py":
        check_flags(rest)
        return
    text = (ROOT / script).read_text()
    for word in rest:
        if word == "--":
            check_flags(rest[rest.index("--") + 1 :])
            return
        option = re.match(r"--[\w-]+", word)
        # Scripts of absl name flags without dashes where they define them.
        if option and not knows(text, option[0]):
            raise ValueError(f"{script} has no {option[0]}")


def knows(script, option):
    """Whether a script defines an option; the flags of train.py pass through some scripts."""
    bare = option.removeprefix("--")
    negated = bare.removeprefix("no")  # of a boolean flag of absl
    names = (f'"{option}"', f'"{bare}"', f'"{negated}"')
    return any(name in script for name in names) or bare in known_flags()


@cache
def known_flags():
    helpers.train_script()
    return {"flagfile", *absl.flags.FLAGS}


def check_flags(arguments):
    """The settings of train.py, whose objective must have all flags."""
    helpers.train_script()
    absl.flags.FLAGS.unparse_flags()
    # Whether data are codes is looked up, which must not wait for a network.
    local = [word.replace("gs://", "buckets/") for word in arguments]
    rest = absl.flags.FLAGS(["train.py", *local])
    assert not rest[1:], f"unexpected {rest[1:]}"
    if "--helpfull" not in arguments:
        train_flags.config()


def test_the_readme_has_two_commands_to_set_up():
    first, second = [text.strip() for _, text in blocks(ROOT / "README.md", "sh")]
    assert "moss-tok compare experiments/starter/" in first
    assert second.endswith("python -m pytest")
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def small_config():
    """One layer per side, which compiles fast, and as many quantizers as the pages use."""
    encoder = (PatchConfig(16), TransformerConfig(16, 8, 8, 1, 1, 16, 0.006))
    config = micro_config()
    quantizer = replace(config.quantizer, num_quantizers=16)
    return replace(config, encoder=encoder, decoder=mirror(encoder), quantizer=quantizer)


@pytest.fixture
def small_box(folder, monkeypatch):
    """In place of the codec in the package: one of some thousand parameters, of 16 quantizers."""
    config = small_config()
    pretrained.save(folder / "codec", config, init_params(config))
    monkeypatch.setattr(assets, "CODEC", folder / "codec")
    wav = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    soundfile.write("speech.flac", wav, RATE)
    Path("recordings").mkdir()
    soundfile.write("recordings/one.wav", wav, RATE)
    Path("experiments").unlink()
    Path("experiments/starter").mkdir(parents=True)
    short = "experiments/starter/speech-test-00.opus"
    soundfile.write(short, wav, RATE, format="OGG", subtype="OPUS")


def test_cheap_commands_run(small_box, capsys):
    """Those of the page on encoding that need no other codec, in its order."""
    ran = set()
    for _, (_, command, *rest) in command_lines(ROOT / "docs" / "encode.md"):
        if "--checkpoint" not in rest and not set(rest) & {"compared"} and command != "info":
            assert cli.main([command, *rest]) == 0, capsys.readouterr().err
            ran.add(command)
    assert ran == {"encode", "decode", "reconstruct"}
    assert {path.name for path in Path().glob("*.[nw]*")} == {"speech.npz", "speech.wav",
                                                              "again.wav"}  # fmt: skip


# ------------------------------------------------------------------------- code


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_compiles(page):
    for number, text in blocks(page, "python"):
        compile("\n" * number + text, name(page), "exec")


def test_the_code_of_the_readme_runs(small_box):
    ((_, text),) = blocks(ROOT / "README.md", "python")
    names = {}
    exec(compile(text, "README.md", "exec"), names)
    frames = RATE // names["codec"].config.hop_length
    assert names["codes"].shape == (1, 8, frames)
    assert names["wav_hat"].shape == (1, 1, RATE)
    assert names["chunk"].ndim == 2


# ------------------------------------------------------------------------ links


def headings(page):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for token, following in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in following.children)
            kept = re.sub(r"[^\w\- ]", "", text.lower())
            found.append(kept.replace(" ", "-"))
    assert len(found) == len(set(found)), f"two headings of {page} have one anchor"
    return found


def targets(page):
    """The targets of links and pictures."""
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "link_open":
                yield child.attrs["href"]
            elif child.type == "image":
                yield child.attrs["src"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    for target in targets(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: no file {target}"
        assert ROOT in file.parents, f"{name(page)}: {target} is outside of the project"
        if anchor:
            assert anchor in headings(file), f"{name(page)}: no heading {target}"


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in targets(ROOT / "README.md")}
    for page in (ROOT / "docs").rglob("*.md"):
        assert page in linked, f"README.md has no link to {name(page)}"


def test_every_page_begins_with_a_command():
    for page in (ROOT / "docs").glob("*.md"):
        kinds = [token.type for token in tokens(page)]
        first = next(i for i, kind in enumerate(kinds) if kind in ("fence", "code_block"))
        others = kinds[:first].count("heading_open")
        assert others == 1, f"{name(page)}: the first block comes after a second heading"


def test_no_page_says_what_is_missing():
    for page in PAGES:
        assert "@@" not in page.read_text()


# -------------------------------------------------------------------- generated


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current():
    helpers.train_script()  # a process can define its flags only once
    generate = script("generate")
    advice = "run python docs/generate.py"
    assert (generate.FOLDER / "commands.md").read_text() == generate.commands(), advice
    assert (generate.FOLDER / "flags.md").read_text() == generate.flags(), advice


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 300_000


def test_the_listening_page_is_of_the_codec_in_the_package():
    text = (ROOT / "docs" / "listening.md").read_text()
    fingerprint = pretrained.fingerprint(moss_tok.load())
    assert f"fingerprint {fingerprint}" in text, "run python docs/listening.py"
    audio = {path.name: path for path in (ROOT / "docs" / "listening").iterdir()}
    assert set(re.findall(r"\(listening/([^)]*)\)", text)) == audio.keys()
    assert sum(path.stat().st_size for path in audio.values()) < 600_000
    for path in audio.values():
        assert 1 < soundfile.info(path).duration < 5


# ------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_the_first_command_prints_what_the_readme_says(folder, capsys):
    """With the codec in the package; the same numbers up to rounding."""
    command = blocks(ROOT / "README.md", "sh")[0][1]
    *_, (_, *arguments) = split(command)
    assert cli.main(arguments) == 0
    printed = table(capsys.readouterr().out)
    shown = [rows for _, text in blocks(ROOT / "README.md", "") if (rows := table(text))]
    np.testing.assert_allclose(printed, shown[0], atol=2e-3)
    script("pictures").draw(folder / "compared", folder / "picture.png")
    assert 50_000 < (folder / "picture.png").stat().st_size < 300_000


def table(text):
    """The rows of numbers below a line that begins with quantizers."""
    _, found, rest = text.partition("quantizers ")
    lines = rest.splitlines()[1:] if found else []
    rows = [line.split() for line in lines if re.fullmatch(r"[\d. ]+", line)]
    return [[float(word) for word in row] for row in rows]


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    argv = ["-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "docs" / "mkdocs.yml")]
    subprocess.run([sys.executable, *argv, "--site-dir", str(tmp_path / "site")], check=True)
    assert (tmp_path / "site" / "train.html").is_file()
