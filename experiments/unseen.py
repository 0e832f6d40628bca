"""Makes a test set from sources that data.py does not have: packages and public repositories.

    python experiments/unseen.py --out=unseen [--debs=FOLDER] [--clones=FOLDER]
    moss-tok evaluate --dataset unseen/unseen.jsonl --output evaluation --baselines opus:6,opus:12

It needs what data.py needs, and git. Packages and clones that are in the folders already are used;
checksums and commits are verified. OUT/audio gets mono FLAC of at most 10 s and 24 kHz. Nothing in
these sources is in the training data or in the corpus; of repositories that also hold parts of such
data (a dog of ESC-10, a sentence of LJ Speech), those files are left out.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import data
import numpy as np
import soundfile

from moss_tok.errors import exit_code

CUT_SECONDS = 10.0
SHORTEST_SECONDS = 1.0
SILENCE = 1e-3  # peak of recordings that are left out

PACKAGES = {
    "alsa-utils": "fb24eb1a318228b974efbef726190dd90c6106a208814a3ee8f5d69b91ee0ba4",
    "hedgewars-data": "722225903a72604403e6e0026e40e9a6953f47a74d94efc5f55504bc05bb4761",
    "lincity-ng-data": "8f5e85bd42879abdc7099b035d7a3d7468eceb6b93b52a12270c28f3f3c792f9",
    "supertux-data": "a6ad8865972f1dbb5e7b49f4e1b381dd16a68f3028a3502cfeaca2400285d27f",
}
REPOSITORIES = {
    "cmusphinx/pocketsphinx": "511126b492dcb267cf30d49d631946d7b61a9530",
    "facebookresearch/encodec": "0e2d0aed29362c8e8f52494baf3e6f99056b214f",
    "librosa/data": "450cdd8a002c98e7bdbfebb309fc1ed024001f77",
    "openai/whisper": "c0d2f624c09dc18e709e37c2ad90c039a4eb72a2",
    "speechbrain/speechbrain": "9c826ef3937bac885c8a6ca86c6889a30f256fb5",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Recordings of one kind in a source.

    Attributes:
      source: Name of a package or repository.
      pattern: Of their paths, for Path.glob.
      domain: speech, acted (voices of games: shouts, laughs), music or sound.
      number: At most so many, chosen by a digest of their names.
      cuts: Number of cuts from recordings longer than CUT_SECONDS.
      skip: Files with one of these texts in their path are left out.
    """

    source: str
    pattern: str
    domain: str
    number: int = 1000
    cuts: int = 1
    skip: tuple[str, ...] = ()


_HEDGEWARS = "usr/share/games/hedgewars/Data"
_SUPERTUX = "usr/share/games/supertux2"
_LINCITY = "usr/share/games/lincity-ng"
_NO_MUSIC = ("-0000", "bird", "humpback", "pibble")

CHOICES = (
    Choice("cmusphinx/pocketsphinx", "test/data/cards/*.wav", "speech"),
    Choice("cmusphinx/pocketsphinx", "test/data/forever/input_*_16k.wav", "speech"),
    Choice("cmusphinx/pocketsphinx", "test/data/librivox/*.wav", "speech"),
    Choice("speechbrain/speechbrain", "tests/samples/ASR/spk*.wav", "speech"),
    Choice("openai/whisper", "tests/jfk.flac", "speech"),
    Choice("librosa/data", "audio/*-0000.ogg", "speech"),
    Choice("alsa-utils", "usr/share/sounds/alsa/*.wav", "speech", skip=("Noise",)),
    Choice("hedgewars-data", f"{_HEDGEWARS}/Sounds/voices/*/*.ogg", "acted", 16, skip=("Robot",)),
    Choice("librosa/data", "audio/*.ogg", "music", cuts=2, skip=(*_NO_MUSIC, ".hq.")),
    Choice("facebookresearch/encodec", "test_24k.wav", "music", cuts=2),
    Choice("supertux-data", f"{_SUPERTUX}/music/*/*.ogg", "music", 6),
    Choice("lincity-ng-data", f"{_LINCITY}/music/*/*.ogg", "music"),
    Choice("hedgewars-data", f"{_HEDGEWARS}/Music/*.ogg", "music", 4),
    Choice("speechbrain/speechbrain", "tests/samples/ESC50/audio/*.wav", "sound",
           skip=("100032",)),
    *(Choice("librosa/data", f"audio/*{name}*.ogg", "sound", skip=(".hq.",))
      for name in _NO_MUSIC[1:]),
    Choice("supertux-data", f"{_SUPERTUX}/sounds/*", "sound", 8),
    Choice("lincity-ng-data", f"{_LINCITY}/sounds/*", "sound", 8),
    Choice("hedgewars-data", f"{_HEDGEWARS}/Sounds/*.ogg", "sound", 8),
)  # fmt: skip


def clone(name: str, folder: Path) -> Path:
    """A clone of a repository in `folder`, in which only the chosen files are checked out."""
    path = folder / name.replace("/", "-")
    if not path.exists():
        address = f"https://github.com/{name}"
        options = ["--filter=blob:none", "--no-checkout"]
        subprocess.run(["git", "clone", *options, address, path], check=True)
    patterns = [f":(glob){choice.pattern}" for choice in CHOICES if choice.source == name]
    command = ["git", "-C", path, "checkout", "--quiet", REPOSITORIES[name], "--", *patterns]
    subprocess.run(command, check=True)
    return path


def cut(wav: np.ndarray, rate: int, number: int) -> Iterator[np.ndarray]:
    """At most `number` cuts of [S], with the same distance from each other and from the ends."""
    size = int(CUT_SECONDS * rate)
    if wav.size <= size:
        yield wav
        return
    for index in range(1, number + 1):
        start = (wav.size - size) * index // (number + 1)
        yield wav[start : start + size]


def recordings(choice: Choice, folder: Path) -> Iterator[tuple[Path, np.ndarray, int]]:
    """Yields path, audio [S] and sample rate of a choice's recordings that are long enough."""

    def digest(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    paths = [path for path in folder.glob(choice.pattern) if path.is_file()]
    number = 0
    for path in sorted(paths, key=digest):
        if number == choice.number or any(text in str(path) for text in choice.skip):
            continue
        try:
            wav, rate = data.read(path)
        except (av.FFmpegError, IndexError):  # no audio
            continue
        peak = np.abs(wav).max(initial=0)
        if wav.size >= SHORTEST_SECONDS * rate and peak > SILENCE:
            number += 1
            yield path, wav * min(1.0, 0.99 / peak), rate


def write(choice: Choice, folder: Path, out: Path) -> list[dict]:
    """Writes the cuts of a choice to `out`/audio; returns their lines."""
    lines = []
    for path, wav, rate in recordings(choice, folder):
        source = path.relative_to(folder).as_posix()
        stem = source.removeprefix("usr/share/").rpartition(".")[0].replace("/", "_")
        for index, piece in enumerate(cut(wav, rate, choice.cuts)):
            target = Path("audio", choice.source.replace("/", "-"), f"{stem}-{index}.flac")
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(out / target, piece, rate, subtype="PCM_16")
            lines.append({"path": str(target), "split": "test", "domain": choice.domain,
                          "duration_s": round(piece.size / rate, 3), "source": choice.source,
                          "source_path": source})  # fmt: skip
    return lines


def main() -> None:
    """Writes the recordings and OUT/unseen.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder of the .deb files; default: OUT/debs")
    parser.add_argument("--clones", type=Path, help="folder of the clones; default: OUT/clones")
    args = parser.parse_args()
    debs = args.debs or args.out / "debs"
    clones = args.clones or args.out / "clones"
    for folder in (args.out, debs, clones):
        folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory(dir=args.out) as temporary:
        folders = {name: clone(name, clones) for name in REPOSITORIES}
        for name, checksum in PACKAGES.items():
            folders[name] = Path(temporary, name)
            package = data.Package(name, checksum, domain="", licence="")
            data.extract(data.fetch(package, debs), folders[name])
        for choice in CHOICES:
            lines += write(choice, folders[choice.source], args.out)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (args.out / "unseen.jsonl").write_text(text)
    for domain in ("speech", "acted", "music", "sound"):
        seconds = [line["duration_s"] for line in lines if line["domain"] == domain]
        print(f"{domain}: {len(seconds)} recordings, {sum(seconds) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(exit_code(main))
