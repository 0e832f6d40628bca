"""Writes docs/listening.md and the audio beside it: recordings at several bitrates.

    python docs/listening.py

The recordings are test recordings of the starter set. It needs opusenc and opusdec. Run it again
when the codec in the package changes.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import moss_tok
from moss_tok.audio import files
from moss_tok.codec import pretrained
from moss_tok.evaluation import baselines, sweep
from moss_tok.json_files import read_json_lines

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "experiments" / "starter"
PAGE = ROOT / "docs" / "listening.md"
AUDIO = ROOT / "docs" / "listening"

SECONDS = 4.0
KBPS = "32"  # of the files that one listens to
RECORDINGS = {
    "speech-test-00": "a man reads",
    "speech-test-05": "a woman reads",
    "music-test-00": "oboe",
    "music-test-02": "a loop from a game",
    "sound-test-02": "a clock strikes",
    "sound-test-03": "fire",
}
NUMBERS = (16, 4, 1)  # of quantizers

TEXT = """# Listen to the codec in the package

    moss-tok compare experiments/starter/speech-test-00.opus compared

writes a recording at five bitrates; it takes any recording of yours. Below are the first
{seconds:g} s of test recordings of the [starter set](../experiments/starter/README.md), coded by
the codec in the package (fingerprint {fingerprint}) and by Opus at its lowest bitrate. The codec
was not trained on these recordings. All files are stored as Opus at {kbps} kbit/s, which changes
little.

{table}

Licences and authors; the coded versions are under the licence of their original:

{credits}
"""


def versions(codec: moss_tok.Codec, wav: np.ndarray) -> dict[str, np.ndarray]:
    """The original [C, S] and its coded versions, by name."""
    rate = codec.config.sample_rate
    result = {"original": wav}
    for number, wav_hat in sweep.reconstruct(codec, wav, NUMBERS).items():
        result[f"{number}"] = wav_hat
    (opus,) = baselines.parse("opus:6")
    result["opus"] = opus.code(Path(), wav, rate)
    return result


def write(path: Path, wav: np.ndarray, rate: int) -> None:
    """Writes Opus for listening."""
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/a.wav"
        files.write(source, wav, rate)
        command = ["opusenc", "--quiet", "--bitrate", KBPS, "--serial", "0", source, path]
        subprocess.run(command, check=True)


def main() -> None:
    """Writes the audio and the page."""
    codec = moss_tok.load()
    config = codec.config
    rows = [row for _, row in read_json_lines(STARTER / "manifest.jsonl")]
    manifest = {Path(row["path"]).stem: row for row in rows}
    shutil.rmtree(AUDIO, ignore_errors=True)
    AUDIO.mkdir()
    heads = ["original", *(f"{config.bitrate(n):.0f} bit/s" for n in NUMBERS), "Opus, 6000 bit/s"]
    table = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    credits = []
    for name, title in RECORDINGS.items():
        row = manifest[name]
        wav = files.read_segment(STARTER / row["path"], 0.0, SECONDS, config.sample_rate)
        cells = [title]
        for version, samples in versions(codec, wav).items():
            path = AUDIO / f"{name}-{version}.opus"
            write(path, samples, config.sample_rate)
            cells.append(f"[listen]({path.relative_to(PAGE.parent)})")
        table.append(f"| {' | '.join(cells)} |")
        credits.append(f"- {title}: {row['licence']}; {row['attribution']}")
    text = TEXT.format(
        seconds=SECONDS, kbps=KBPS, fingerprint=pretrained.fingerprint(codec),
        table="\n".join(table), credits="\n".join(credits),
    )  # fmt: skip
    PAGE.write_text(text)
    size = sum(path.stat().st_size for path in AUDIO.iterdir())
    print(f"{PAGE}: {len(RECORDINGS)} recordings, {size / 1000:.0f} kB of audio")


if __name__ == "__main__":
    main()
