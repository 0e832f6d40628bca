"""Other codecs to compare with: Opus and Codec2 through their tools, or a folder of audio."""

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
# Milliseconds by which c2dec's output is late, by mode: the peak of the correlation of envelopes, a
# mean over 19 recordings of speech. STOI and spectral distances do not align signals.
_CODEC2_DELAY_MS = {3200: 16, 2400: 16, 1600: 16, 1400: 16, 1300: 20, 1200: 25}
_CODEC2_FRAME = 320  # samples of the longest frame; c2enc drops a partly filled one

# Encodes and decodes: (audio path, reference [C, S], sample rate) -> reconstruction [C, S'].
Coder = Callable[[Path, np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another codec.

    Attributes:
      name: Folder of its results: "opus/6kbps", "codec2/3200bps", "NAME/KBPSkbps" or "NAME".
      bps: Nominal bits per second; None for a folder without a stated rate.
      code: Encodes and decodes a recording.
      files: Reconstructions of a folder, by file name without suffix; None if any recording can
        be coded.
    """

    name: str
    bps: int | None
    code: Coder
    files: dict[str, list[Path]] | None = None


def parse(text: str) -> list[Baseline]:
    """Parses baselines such as "opus:6,codec2:3200,NAME=FOLDER,NAME:KBPS=FOLDER".

    Raises:
      ValueError: Another form or rate, a tool that is not installed, a folder that does not exist,
        or a repeated name.
    """
    baselines = []
    for part in text.split(","):
        part = part.strip()
        if part:
            baselines.append(_parse_one(part))
    counts = collections.Counter(baseline.name for baseline in baselines)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"baselines has {name} more than once")
    return baselines


def check(baselines: Sequence[Baseline], recordings: Sequence[Path]) -> None:
    """Raises ValueError unless each folder has exactly one reconstruction of each recording."""
    recording_of: dict[str, Path] = {}
    for baseline in baselines:
        if baseline.files is None:
            continue
        for audio in recordings:
            name = audio.stem
            if name not in baseline.files:
                raise ValueError(f"{baseline.name}: no reconstruction called {name}")
            same_name = recording_of.setdefault(name, audio)
            if len(baseline.files[name]) > 1 or same_name != audio:
                raise ValueError(f"{baseline.name}: {name} is the name of several recordings")


def check_name(name: str) -> str:
    """Returns the name of a codec, which becomes a folder of the output.

    Raises:
      ValueError: It is not a valid name of a folder, or it is the name of the report's folder.
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
            "baselines must be opus:KBPS, codec2:BPS, NAME=FOLDER or NAME:KBPS=FOLDER, separated "
            f"by commas, got {part!r}"
        )
    for tool in _TOOLS[kind]:
        if shutil.which(tool) is None:
            raise ValueError(f"{part}: {tool} is not installed")
    if kind == "opus":
        if not 6 <= int(rate) <= 256:
            raise ValueError(f"{part}: opus takes 6..256 kbit/s")
        return Baseline(f"opus/{rate}kbps", 1000 * int(rate), _opus(int(rate)))
    if int(rate) not in _CODEC2_DELAY_MS:
        raise ValueError(f"{part}: codec2 takes {', '.join(map(str, _CODEC2_DELAY_MS))} bit/s")
    return Baseline(f"codec2/{rate}bps", int(rate), _codec2(int(rate)))


def _parse_folder(part: str) -> Baseline:
    label, _, folder = part.partition("=")
    name, colon, rate = label.partition(":")
    if not (name and Path(folder).is_dir()):
        raise ValueError(f"{part}: NAME=FOLDER needs a name and a folder that exists")
    check_name(name)
    reconstructions = _find_files(Path(folder))
    bps = None
    if colon:
        if not re.fullmatch(r"\d+(\.\d+)?", rate) or not 1 <= 1000 * float(rate) <= 10**7:
            raise ValueError(f"{part}: KBPS must be a number of kbit/s, 0.001..10000")
        name = f"{name}/{rate}kbps"
        bps = round(1000 * float(rate))
    return Baseline(name, bps, _from_folder(Path(folder), reconstructions), reconstructions)


def _opus(kbps: int) -> Coder:
    def code(_: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            source = f"{folder}/in.wav"
            coded = f"{folder}/coded.opus"
            decoded = f"{folder}/out.wav"
            files.write(source, wav, sample_rate)
            _run("opusenc", "--quiet", "--bitrate", str(kbps), source, coded)
            _run("opusdec", "--quiet", "--rate", str(sample_rate), coded, decoded)
            return files.read(decoded, sample_rate, wav.shape[0])

    return code


def _codec2(mode: int) -> Coder:
    delay = _CODEC2_DELAY_MS[mode] * _CODEC2_RATE // 1000

    def code(_: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        mono = files.resample(wav.mean(0, keepdims=True), sample_rate, _CODEC2_RATE)[0]
        padded = np.pad(mono, (0, delay + _CODEC2_FRAME))
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "in.raw"
            coded = Path(folder) / "coded"
            decoded = Path(folder) / "out.raw"
            source.write_bytes(files.to_pcm16(padded).tobytes())
            _run("c2enc", str(mode), str(source), str(coded))
            _run("c2dec", str(mode), str(coded), str(decoded))
            pcm = np.frombuffer(decoded.read_bytes(), "<i2")
        aligned = pcm[delay:][: len(mono)]
        mono_hat = (aligned.astype(np.float32) / 32768)[None]
        wav_hat = files.resample(mono_hat, _CODEC2_RATE, sample_rate)
        return files.to_channels(wav_hat, wav.shape[0])

    return code


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip().split("\n")[-1]
        raise ValueError(f"{command[0]} failed: {reason}") from error


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """Audio files of a folder, by name without suffix.

    Other files need no note here: `check` refuses a folder that lacks a recording.
    """
    suffixes = files.readable_suffixes()
    by_name: dict[str, list[Path]] = {}
    for path in storage.files_under(folder):
        if path.suffix.lower() in suffixes:
            by_name.setdefault(path.stem, []).append(path)
    return by_name


def _from_folder(folder: Path, reconstructions: dict[str, list[Path]]) -> Coder:
    """Reads the file that has the recording's name, whatever its suffix."""

    def code(audio: Path, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        if audio.stem not in reconstructions:
            raise ValueError(f"{folder}: no reconstruction called {audio.stem}")
        return files.read(reconstructions[audio.stem][0], sample_rate, wav.shape[0])

    return code
