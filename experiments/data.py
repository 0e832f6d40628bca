"""Makes training data from Debian packages: downloads, verifies, converts and lists them.

    python experiments/data.py --out=data [--corpus=corpus/manifest.jsonl] [--debs=FOLDER]

Run it on Debian 12, or with its apt sources, after `apt-get update`; packages are downloaded, not
installed. With --debs it uses the .deb files that are already in a folder. The sha256 sum of every
package is checked. OUT/audio gets mono FLAC of at most 24 kHz; long recordings are cut into pieces
of 20 s. OUT/manifest.jsonl has a line per piece with split, domain, source and licence. The files
speech.jsonl, music.jsonl, sound.jsonl and corpus.jsonl have parts of it, for use as a mixture;
read_speech.jsonl has the sentences of corpus.jsonl once more. PyAV (pip install av) decodes raw
G.722 and all other formats; dpkg-deb opens the packages.

About one recording in thirty is held out as the split "test"; all pieces of a recording have the
same split. --corpus adds the train lines of another manifest, split by the same rule. Its test
lines are never added, nor are other cuts of the same readings: choose recipes by the "test" split
that is made here, and report results on that of the corpus.

The licences are from each package's /usr/share/doc/PACKAGE/copyright, read in November 2026. All
permit modification and redistribution, also commercial; CC BY-SA and GPL require the same licence.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile

from moss_tok.errors import exit_code
from moss_tok.json_files import read_json_lines

PIECE_SECONDS = 20.0
SHORTEST_SECONDS = 0.3
MAX_RATE = 24000
SENTENCE_SECONDS = 1.5  # the shortest length of a sentence
HELD_OUT = 30  # one recording in this many is held out
AUDIO = (".g722", ".ogg", ".opus", ".wav", ".flac")
ARCHIVES = (".pk3",)


@dataclasses.dataclass(frozen=True)
class Package:
    """A Debian package with recordings.

    Attributes:
      name: Its name for apt.
      sha256: Checksum of the .deb file.
      domain: speech, music or sound.
      licence: Licence of the recordings; with several, its copyright file has that of each file.
      skip: Files with this text in their path are left out.
    """

    name: str
    sha256: str
    domain: str
    licence: str
    skip: str = ""


PACKAGES = (
    Package(
        "asterisk-core-sounds-en-g722",
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
        "speech",
        "CC-BY-SA-3.0",
    ),
    Package(
        "asterisk-core-sounds-es-g722",
        "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
        "speech",
        "CC-BY-SA-3.0",
    ),
    Package(
        "asterisk-core-sounds-fr-g722",
        "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
        "speech",
        "CC-BY-SA-3.0",
    ),
    Package(
        "asterisk-core-sounds-it-g722",
        "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
        "speech",
        "CC-BY-3.0",
    ),
    Package(
        "asterisk-core-sounds-ru-g722",
        "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
        "speech",
        "CC-BY-3.0",
    ),
    Package(
        "festvox-ru",
        "21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4",
        "speech",
        "BSD-like",
    ),
    Package(
        "fillets-ng-data-cs",
        "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
        "speech",
        "GPL-2",
    ),
    Package(
        "fillets-ng-data-nl",
        "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
        "speech",
        "GPL-2",
    ),
    Package(
        "klettres-data",
        "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8",
        "speech",
        "GPL-2+",
    ),
    Package(
        "ktuberling-data",
        "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed",
        "speech",
        "GPL-2+",
    ),
    Package(
        "asterisk-moh-opsound-g722",
        "8d6b39d6f2e8feff54a042c4a25e1b72f3e2478d05ee372c92f77446fa0b1671",
        "music",
        "CC-BY-SA-3.0",
    ),
    Package(
        "fillets-ng-data",
        "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
        "music",
        "GPL-2",
        skip="/sound/",
    ),
    Package(
        "ufoai-music",
        "2465d55e9dce75a3a2a1ad1c8ca67da84e251c04e0965d63a8562b2d9f76f9e6",
        "music",
        "CC-BY-3.0, CC-BY-SA-3.0, GPL-2+",
    ),
    Package(
        "warzone2100-music",
        "d3b2c9f90ea5438d45d4aff18339a03ec808e1affa9dac91f7dad61cb15ee64e",
        "music",
        "GPL-2+, CC-BY-SA-3.0",
    ),
    Package(
        "wesnoth-1.16-music",
        "f9bc3cde92b4ab30db5d7b85f89b4bcc3d788dd92602956d0347250850bf59bb",
        "music",
        "GPL-2+",
    ),
    Package(
        "hydrogen-drumkits",
        "6ea3c6df9a67762e2362f946c695e619859126b19fbccf32a2e8f07dfd03b2f4",
        "sound",
        "GPL-2+, CC-BY-3.0, CC-BY-SA-3.0, CC0",
    ),
    Package(
        "ufoai-sound",
        "0224308c10e1265581d1829f19eaef031175390fd0eafeb4a1d558ac6561ed4e",
        "sound",
        "CC-BY-3.0, CC-BY-SA-3.0, GPL-2+, public domain",
    ),
)


def fetch(package: Package, folder: Path) -> Path:
    """The package's .deb file in `folder`, downloaded if missing; its checksum is verified."""
    paths = sorted(folder.glob(f"{package.name}_*.deb"))
    if not paths:
        subprocess.run(["apt-get", "download", package.name], cwd=folder, check=True)
        paths = sorted(folder.glob(f"{package.name}_*.deb"))
    path = paths[-1]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {package.sha256}")
    return path


def extract(path: Path, folder: Path) -> None:
    """Unpacks a .deb file and the archives with audio in it."""
    subprocess.run(["dpkg-deb", "-x", path, folder], check=True)
    for archive in sorted(folder.rglob("*")):
        if archive.suffix in ARCHIVES:
            with zipfile.ZipFile(archive) as files:
                files.extractall(archive.with_suffix(""))


def read(path: Path) -> tuple[np.ndarray, int]:
    """Audio [S] float32 as mono of at most 24 kHz, and its sample rate."""
    kind = "g722" if path.suffix == ".g722" else None
    with av.open(str(path), format=kind, metadata_errors="ignore") as container:
        stream = container.streams.audio[0]
        rate = min(MAX_RATE, stream.rate)
        resampler = av.AudioResampler("flt", "mono", rate)
        blocks = []
        for frame in container.decode(stream):
            blocks += [x.to_ndarray()[0] for x in resampler.resample(frame)]
        blocks += [x.to_ndarray()[0] for x in resampler.resample(None)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def pieces(wav: np.ndarray, rate: int) -> Iterator[np.ndarray]:
    """Cuts [S] into pieces of about PIECE_SECONDS; drops those below SHORTEST_SECONDS."""
    count = max(1, round(wav.size / rate / PIECE_SECONDS))
    for piece in np.array_split(wav, count):
        if piece.size >= SHORTEST_SECONDS * rate:
            yield piece


def split_of(recording: str) -> str:
    """The split of a recording: one in HELD_OUT is "test", chosen by a digest of its name."""
    digest = hashlib.sha256(recording.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else "train"


def convert(package: Package, folder: Path, out: Path) -> list[dict]:
    """Writes the recordings below `folder` to `out`/audio; returns their manifest lines."""
    lines = []
    unreadable = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix not in AUDIO or path.is_symlink() or (package.skip and package.skip in name):
            continue
        try:
            wav, rate = read(path)
        except (av.FFmpegError, IndexError):
            unreadable.append(name)
            continue
        wav = wav * min(1.0, 0.99 / max(np.abs(wav).max(initial=0), 1e-9))
        stem = name.removeprefix("usr/share/").replace("/", "_").replace(" ", "_")
        for number, piece in enumerate(pieces(wav, rate)):
            target = Path("audio", package.name, f"{stem}-{number}.flac")
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(out / target, piece, rate, subtype="PCM_16")
            lines.append({
                "path": str(target), "split": split_of(f"{package.name}/{name}"),
                "domain": package.domain, "duration_s": round(piece.size / rate, 3),
                "sample_rate": rate, "source": package.name, "source_path": name,
                "licence": package.licence,
            })  # fmt: skip
    if unreadable:
        print(f"{package.name}: {len(unreadable)} files that PyAV cannot read are left out, "
              f"the first is {unreadable[0]}", flush=True)  # fmt: skip
    return lines


def reading_of(line: dict) -> str:
    """What a line of another manifest was cut from: its file name without the number of the cut."""
    stem = Path(line.get("source_path") or line["path"]).stem
    return re.sub(r"-\d+$", "", stem)


def corpus_lines(manifest: Path, out: Path) -> list[dict]:
    """The train lines of another manifest, some of whose recordings become "test".

    Lines that were cut from the same reading as a test line are left out. Paths become relative to
    the folder `out`: the digest of a list is then the same wherever the two folders are.
    """
    rows = []
    for place, line in read_json_lines(manifest):
        missing = {"path", "split", "licence", "duration_s", "domain"} - line.keys()
        if missing:
            raise ValueError(f"{place}: has no {', '.join(sorted(missing))}")
        rows.append(line)
    tested = {reading_of(line) for line in rows if line["split"] == "test"}
    train = [line for line in rows if line["split"] == "train"]
    lines = []
    for line in train:
        if reading_of(line) not in tested:
            recording = line.get("source_path") or line["path"]
            path = os.path.relpath(manifest.parent.resolve() / line["path"], out.resolve())
            lines.append(line | {"path": path, "split": split_of(str(recording)),
                                 "source": line.get("subset", manifest.parent.name)})  # fmt: skip
    if len(lines) < len(train):
        print(f"{manifest}: {len(train) - len(lines)} train lines are left out; they were cut from "
              "readings of which the test has another cut", flush=True)  # fmt: skip
    return lines


def is_read_speech(line: dict) -> bool:
    """Whether a line has sentences, not single words, which are shorter."""
    return line["domain"] == "speech" and line["duration_s"] >= SENTENCE_SECONDS


def report(lines: list[dict]) -> None:
    """Prints minutes by source."""
    rows: dict[tuple[str, str], list] = {}
    for line in lines:
        row = rows.setdefault((line["source"], line["domain"]), [set(), 0.0, 0.0])
        row[0].add(line["licence"])
        row[1 if line["split"] == "train" else 2] += line["duration_s"] / 60
    print("| source | domain | licence | minutes | held out |\n|---|---|---|---|---|")
    for (source, domain), (licences, train, held_out) in rows.items():
        print(f"| {source} | {domain} | {', '.join(sorted(licences))} "
              f"| {train:.1f} | {held_out:.1f} |")  # fmt: skip
    for domain in ("speech", "music", "sound"):
        minutes = sum(x["duration_s"] for x in lines if x["domain"] == domain) / 60
        print(f"{domain}: {minutes:.0f} minutes")


def main() -> None:
    """Converts the packages that are not converted yet, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder of the .deb files; default: OUT/debs")
    parser.add_argument("--corpus", type=Path, help="manifest whose train lines are added")
    parser.add_argument("--packages", default="", help="names, with commas between; default: all")
    args = parser.parse_args()
    debs = args.debs or args.out / "debs"
    args.out.mkdir(parents=True, exist_ok=True)
    debs.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in args.packages.split(",") if name]
    if unknown := set(chosen) - {package.name for package in PACKAGES}:
        parser.error(f"unknown packages: {', '.join(sorted(unknown))}")
    added = corpus_lines(args.corpus, args.out) if args.corpus else []
    lines = []
    for package in PACKAGES:
        if chosen and package.name not in chosen:
            continue
        done = args.out / "lines" / f"{package.name}.json"
        if not done.exists():
            path = fetch(package, debs)
            with tempfile.TemporaryDirectory(dir=args.out) as folder:
                extract(path, Path(folder))
                converted = convert(package, Path(folder), args.out)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(converted))
        lines += json.loads(done.read_text())
    lines = [line | {"group": line["domain"]} for line in lines]
    if args.corpus:
        lines += [line | {"group": "corpus"} for line in added]
    groups = {"manifest": lines}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    if args.corpus:
        groups["read_speech"] = [line for line in groups.get("corpus", []) if is_read_speech(line)]
    for name, group in groups.items():
        text = "".join(json.dumps(line) + "\n" for line in group)
        (args.out / f"{name}.jsonl").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{args.out / name}.jsonl: {len(group)} lines, sha256 {digest}")
    report(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
