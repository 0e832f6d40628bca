"""Other codecs to compare with: Opus and Codec2 by their tools, and folders of reconstructions."""

import collections
import dataclasses
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moss_tok import storage
from moss_tok.audio import files

_TOOLS = {"opus": ("opusenc", "opusdec"), "codec2": ("c2enc", "c2dec")}
_CODEC2_RATE = 8000
_CODEC2_MODES = (3200, 2400, 1600, 1400, 1300, 1200)

# What a recording becomes: (its file, reference [C, S], sample rate) -> [C, S'].
Coder = Callable[[Path, np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another codec.

    Attributes:
      name: Folder of its results: "opus/6kbps", "codec2/3200bps", "NAME/KBPSkbps" or "NAME".
      bps: Nominal bits per second; None for a folder whose rate was not said.
      code: What it does.
      files: Of a folder, by their names without suffix; None where any recording can be coded.
    """

    name: str
    bps: int | None
    code: Coder
    files: dict[str, list[Path]] | None = None


def parse(text: str) -> list[Baseline]:
    """Baselines of "opus:6,codec2:3200,NAME:KBPS=FOLDER": any reconstructions, rated if known.

    Raises:
      ValueError: Another form or rate, tools that are not installed, no such folder, or one name
        twice.
    """
    found = [_parse_one(part.strip()) for part in text.split(",") if part.strip()]
    names = collections.Counter(baseline.name for baseline in found)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"baselines has {repeated[0]} more than once")
    return found


def check(found: Sequence[Baseline], recordings: Sequence[Path]) -> None:
    """Raises ValueError where a folder has no, or no certain, reconstruction of a recording."""
    known: dict[str, Path] = {}
    for baseline in (b for b in found if b.files is not None):
        for audio in recordings:
            name = audio.stem
            if name not in baseline.files:
                raise ValueError(f"{baseline.name}: no reconstruction called {name}")
            several = baseline.files[name]
            if len(several) > 1 or known.setdefault(name, audio) != audio:
                raise ValueError(f"{baseline.name}: {name} is the name of several recordings")


def check_name(name: str) -> str:
    """Returns the name of a codec, which becomes a folder of the output.

    Raises:
      ValueError: It would not, or hides what else is there.
    """
    if not name.strip(".") or "/" in name or name == "report":
        raise ValueError(
            f"the name of a codec must be a folder's name, and not report, got {name!r}"
        )
    return name


def _parse_one(part: str) -> Baseline:
    if "=" in part:
        return _parse_folder(part)
    kind, _, rate = part.partition(":")
    if kind not in _TOOLS or not rate.isdecimal():
        raise ValueError(
            "baselines must be opus:KBPS, codec2:BPS, NAME=FOLDER or NAME:KBPS=FOLDER, with commas "
            f"between, got {part!r}"
        )
    if missing := [tool for tool in _TOOLS[kind] if shutil.which(tool) is None]:
        raise ValueError(f"{part}: {missing[0]} is not installed")
    if kind == "opus":
        if not 6 <= int(rate) <= 256:
            raise ValueError(f"{part}: opus takes 6..256 kbit/s")
        return Baseline(f"opus/{rate}kbps", 1000 * int(rate), _opus(int(rate)))
    if int(rate) not in _CODEC2_MODES:
        raise ValueError(f"{part}: codec2 takes {', '.join(map(str, _CODEC2_MODES))} bit/s")
    return Baseline(f"codec2/{rate}bps", int(rate), _codec2(rate))


def _parse_folder(part: str) -> Baseline:
    named, _, folder = part.partition("=")
    name, colon, rate = named.partition(":")
    if not (name and Path(folder).is_dir()):
        raise ValueError(f"{part}: NAME=FOLDER needs a name and a folder that exists")
    check_name(name)
    recordings = _find_files(Path(folder))
    bps = None
    if colon:
        if not re.fullmatch(r"\d+(\.\d+)?", rate) or not 1 <= 1000 * float(rate) <= 10**7:
            raise ValueError(f"{part}: KBPS must be a number of kbit/s, 0.001..10000")
        name, bps = f"{name}/{rate}kbps", round(1000 * float(rate))
    return Baseline(name, bps, _from_folder(Path(folder), recordings), recordings)


def _opus(kbps: int) -> Coder:
    def code(_: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            source, coded, decoded = (f"{folder}/{n}" for n in ("in.wav", "coded.opus", "out.wav"))
            files.write(source, wav, sample_rate)
            _run("opusenc", "--quiet", "--bitrate", str(kbps), source, coded)
            _run("opusdec", "--quiet", "--rate", str(sample_rate), coded, decoded)
            return files.read(decoded, sample_rate, wav.shape[0])

    return code


def _codec2(mode: str) -> Coder:
    def code(_: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        mono = files.resample(wav.mean(0, keepdims=True), sample_rate, _CODEC2_RATE)[0]
        with tempfile.TemporaryDirectory() as folder:
            source, coded, decoded = (Path(folder) / n for n in ("in.raw", "coded", "out.raw"))
            source.write_bytes(files.to_pcm16(mono).tobytes())
            _run("c2enc", mode, str(source), str(coded))
            _run("c2dec", mode, str(coded), str(decoded))
            found = np.frombuffer(decoded.read_bytes(), "<i2").astype(np.float32) / 32768
        found = files.resample(found[None], _CODEC2_RATE, sample_rate)
        return files.to_channels(found, wav.shape[0])

    return code


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip().split("\n")[-1]
        raise ValueError(f"{command[0]} failed: {reason}") from error


def _find_files(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in storage.files_under(folder):
        if path.suffix.lower() not in files.readable_suffixes():
            continue
        found.setdefault(path.stem, []).append(path)
    return found


def _from_folder(folder: Path, found: dict[str, list[Path]]) -> Coder:
    """Takes the file of the same name, whatever its suffix."""

    def code(audio: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        if audio.stem not in found:
            raise ValueError(f"{folder}: no reconstruction called {audio.stem}")
        return files.read(found[audio.stem][0], sample_rate, wav.shape[0])

    return code
