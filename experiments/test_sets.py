"""Lists a local copy of one of the paper's four test sets, for `moss-tok evaluate --dataset`.

  python experiments/test_sets.py KIND DIR OUT.jsonl

  KIND         DIR has
  librispeech  SPEAKER/CHAPTER/*.flac and *.trans.txt, as test-clean
  aishell2     wav.scp or wav/SPEAKER/*.wav, and trans.txt if there are transcripts
  audioset     *.wav, *.flac and *.mp3 anywhere
  musdb18hq    test/TRACK/mixture.wav

A line is {"path": absolute path, "domain": speech, sound or music, "transcript": if known}. The
name of OUT.jsonl is the name of the data set in the results.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moss_tok.audio import files
from moss_tok.cli.commands import Parser
from moss_tok.errors import exit_code

# (audio, its transcript or "")
Recordings = list[tuple[Path, str]]


def find_librispeech(root: Path) -> Recordings:
    """Recordings of test-clean or another LibriSpeech set."""
    texts: dict[str, str] = {}
    for listing in sorted(root.glob("*/*/*.trans.txt")):
        texts |= _read_pairs(listing)
    paths = sorted(root.glob("*/*/*.flac"))
    _check_texts(root, texts, paths)
    return [(path, texts.get(path.stem, "")) for path in paths]


def find_aishell2(root: Path) -> Recordings:
    """The test set of AISHELL-2: the recordings in wav.scp, or without it all of wav/."""
    texts = _read_pairs(root / "trans.txt") if (root / "trans.txt").exists() else {}
    if not (root / "wav.scp").exists():
        paths = sorted(root.glob("wav/*/*.wav"))
        _check_texts(root, texts, paths)
        return [(path, texts.get(path.stem, "")) for path in paths]
    listed = {name: root / path for name, path in _read_pairs(root / "wav.scp").items()}
    if missing := [path for path in listed.values() if not path.is_file()]:
        raise ValueError(f"{root / 'wav.scp'}: no such file: {missing[0]}")
    return [(path, texts.get(name, "")) for name, path in listed.items()]


def find_audioset(root: Path) -> Recordings:
    """The evaluation clips of AudioSet, in any folder layout."""
    kinds = (".wav", ".flac", ".mp3")
    return [(path, "") for path in sorted(root.rglob("*")) if path.suffix.lower() in kinds]


def find_musdb(root: Path) -> Recordings:
    """The mixtures of MUSDB18-HQ's test tracks."""
    return [(path, "") for path in sorted(root.glob("test/*/mixture.wav"))]


# Name -> function that finds it, domain, layout of its folder.
SETS = {
    "librispeech": (find_librispeech, "speech", "SPEAKER/CHAPTER/*.flac"),
    "aishell2": (find_aishell2, "speech", "wav.scp, or wav/SPEAKER/*.wav"),
    "audioset": (find_audioset, "sound", "*.wav, *.flac or *.mp3"),
    "musdb18hq": (find_musdb, "music", "test/TRACK/mixture.wav"),
}


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of "NAME TEXT"; ValueError for any other line."""
    pairs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(maxsplit=1)
        if len(words) < 2:
            raise ValueError(f"{path}, line {number}: must be NAME TEXT, got {line!r}")
        pairs[words[0]] = words[1].strip()
    return pairs


def _check_texts(root: Path, texts: dict[str, str], paths: Sequence[Path]) -> None:
    if missing := sorted(texts.keys() - {path.stem for path in paths}):
        raise ValueError(f"{root}: no audio of {missing[0]}, which has a transcript")


def write_listing(kind: str, root: Path, output: Path) -> int:
    """Writes the list of a test set (atomically); returns the number of recordings.

    Raises:
      ValueError: No recordings, or files that others refer to are missing.
    """
    find, domain, layout = SETS[kind]
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    recordings = find(root)
    if not recordings:
        raise ValueError(f"{root}: nothing of {kind}, which has {layout}")
    rows = []
    for path, text in recordings:
        row = {"path": str(path.absolute()), "domain": domain}
        if text:
            row["transcript"] = text
        rows.append(row)
    files.write_text(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a list; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=SETS)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    args = parser.parse_args(argv)

    def run() -> None:
        number = write_listing(args.kind, args.root, args.output)
        print(f"{args.output}: {number} recordings")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
