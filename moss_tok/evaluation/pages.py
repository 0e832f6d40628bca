"""Pages to look and listen: of an evaluation, or of a training run, by one generator."""

import dataclasses
import hashlib
import html
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moss_tok.audio import files
from moss_tok.errors import is_number
from moss_tok.evaluation import protocol, report
from moss_tok.json_files import read_json_lines, read_json_object

_LONGEST_NAME = 250  # of the 255 bytes that a name may have, without a suffix
_CLIPS = 8  # of a data set
_VERSIONS = 4  # bitrates of a system


@dataclasses.dataclass(frozen=True)
class Clip:
    """Something to compare by ear: (what it is, audio file, picture file) of each system."""

    title: str
    versions: tuple[tuple[str, Path, Path], ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """What is on a page, in this order.

    Attributes:
      title: Heading.
      notes: Paragraphs.
      pictures: (caption, file).
      clips: To listen to.
      tables: (caption, rows of cells, the first of them column heads).
    """

    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[tuple[str, Path]] = ()
    clips: Sequence[Clip] = ()
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = ()


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
img { max-width: 100%; height: auto; display: block }
.plot { min-width: 44rem }
audio { width: 100% }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.versions { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
.version { border: 1px solid #ddd; border-radius: .4rem; padding: .6rem; min-width: 0 }
select { font: inherit; max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 }
  td, th, .version { border-color: #444 }
}
"""
# One clip at a time; playing one version goes on where another stopped, and stops that.
_SCRIPT = """
const clips = document.querySelectorAll('.clip'), choice = document.querySelector('select');
function show() { clips.forEach((c, i) => { c.hidden = i != choice.selectedIndex; }); }
if (choice) { choice.addEventListener('change', show); show(); }
clips.forEach(clip => { let last = null; const all = clip.querySelectorAll('audio');
  all.forEach(a => a.addEventListener('play', () => {
    if (last && last !== a) { last.pause(); a.currentTime = last.currentTime; }
    last = a; })); });
"""


def write_page(path: Path, page: Page) -> None:
    """Writes a page that works from its folder, without network, on screens of any width."""
    escape = html.escape

    def link(file: Path) -> str:
        return escape(quote(Path(os.path.relpath(file, path.parent)).as_posix()))

    parts = [f"<h1>{escape(page.title)}</h1>"]
    parts += [f"<p>{escape(note)}</p>" for note in page.notes]
    for caption, file in page.pictures:
        parts.append(
            f'<h2>{escape(caption)}</h2><div class="wide"><a href="{link(file)}">'
            f'<img class="plot" src="{link(file)}" alt="{escape(caption)}"></a></div>'
        )
    if page.clips:
        options = "".join(f"<option>{escape(clip.title)}</option>" for clip in page.clips)
        parts.append(f"<h2>Listen</h2><p><label>Clip <select>{options}</select></label></p>")
    for clip in page.clips:
        parts.append(f'<div class="clip"><h3>{escape(clip.title)}</h3><div class="versions">')
        for what, audio, picture in clip.versions:
            parts.append(
                f'<div class="version"><b>{escape(what)}</b>'
                f'<audio controls preload="none" src="{link(audio)}"></audio>'
                f'<img loading="lazy" src="{link(picture)}" alt="spectrogram"></div>'
            )
        parts.append("</div></div>")
    for caption, (head, *rows) in page.tables:
        cells = "".join(f"<th>{escape(x)}</th>" for x in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows
        )
        parts.append(
            f"<h2>{escape(caption)}</h2>"
            f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'
        )
    text = "\n".join(parts)
    files.write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(page.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style>\n{text}\n<script>{_SCRIPT}</script></html>\n",
    )


def write_evaluation(output: Path) -> Path:
    """Writes report.html of what `moss-tok evaluate` has written into `output`; returns its path.

    Raises:
      ValueError: There are no results.
    """
    results = protocol.read_results(output)
    if not results:
        raise ValueError(f"{output}: no results.json in it")
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    pictures, tables = [], []
    for number, (name, rows) in enumerate(results.items()):
        curves: dict[str, list[tuple[float | None, dict[str, float]]]] = {}
        for system, bps, means in rows:
            means = {m: means[m] for m in protocol.COLUMNS if m in means}
            label = system if bps is None else system.rpartition("/")[0] or system
            curves.setdefault(label, []).append((bps, means))
        picture = folder / f"rates_{number}.png"
        report.save_rates(picture, curves, name.rpartition(", ")[2])
        pictures.append((f"{name}: quality over bitrate", picture))
        tables.append((name, protocol.cells_of(rows)))
    for path in sorted(output.rglob("entropy.json")):
        for name, bits in read_json_object(path).items():
            caption = f"Bits used of a code, {path.parent.relative_to(output)} on {name}"
            head = ["quantizer", *map(str, range(1, len(bits) + 1))]
            tables.append((caption, [head, ["bits", *(f"{b:.1f}" for b in bits)]]))
    systems = sorted({system for rows in results.values() for system, *_ in rows})
    lower = "Lower is better: mel_loss, stft, spectral_convergence, wer, cer. Higher: all others."
    page = Page(f"Evaluation: {output.absolute().name}", [lower], pictures,
                _clips(output, systems, folder), tables)  # fmt: skip
    write_page(output / "report.html", page)
    return output / "report.html"


def _clips(output: Path, systems: Sequence[str], folder: Path) -> list[Clip]:
    """Some recordings of each data set: the reference, and each system at some bitrates."""
    chosen: dict[str, list[str]] = {}  # data set -> folders of systems
    for system in systems:
        for manifest in sorted((output / system).glob("*/manifest.json")):
            chosen.setdefault(manifest.parent.name, []).append(system)
    clips = []
    for dataset, names in chosen.items():
        names = [n for group in _groups(names) for n in _spread(group, _VERSIONS)]
        first = output / names[-1] / dataset
        found = read_json_object(first / "manifest.json")["dataset"]["output_names"]
        for file in _spread(found, _CLIPS):
            sources = [("reference", first / "gt_audios" / file)]
            sources += [(n, output / n / dataset / "syn_audios" / file) for n in names]
            versions = []
            for what, audio in sources:
                name = f"{what.replace('/', '_')}_{dataset}_{Path(file).stem}"
                picture = folder / f"{_shortened(name)}.png"
                if audio.exists():
                    if not picture.exists() or picture.stat().st_mtime < audio.stat().st_mtime:
                        report.save_spectrogram(picture, *files.read_native(audio))
                    versions.append((what, audio, picture))
            clips.append(Clip(f"{dataset}: {Path(file).stem}", tuple(versions)))
    return clips


def _shortened(name: str) -> str:
    """`name`, or, where no file can be called so, its beginning and a hash of it."""
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{name[:40]}_{digest[:16]}"


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Bitrates of one system together, ascending."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    return [sorted(group, key=_numbers) for group in groups.values()]


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name.rpartition("/")[2])]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `items`, evenly spread, the ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def write_run(workdir: Path) -> Path:
    """Writes report.html of a training run into its workdir; returns its path.

    Raises:
      ValueError: It is no workdir.
    """
    config = workdir / "train_config.json"
    if not config.is_file():
        raise ValueError(f"{workdir}: no train_config.json, so no workdir of train.py")
    rows = [r for r in read_json_lines(workdir / "metrics.jsonl") if "step" in r]
    if importlib.util.find_spec("matplotlib"):  # training draws them with an evaluation
        report.save_curves(workdir / "curves.png", rows)
    pictures = [("Losses and codebooks", workdir / "curves.png")]
    pictures = [(caption, file) for caption, file in pictures if file.exists()]
    tables = []
    evaluations = read_json_lines(workdir / "evaluation.jsonl")
    evaluations = [e for e in evaluations if {"step", "table"} <= e.keys()]
    for domain, found in (evaluations[-1]["table"] if evaluations else {}).items():
        names = list(dict.fromkeys(m for means in found.values() for m in means))
        body = [
            [s, *(f"{means[m]:.3f}" if m in means else "" for m in names)]
            for s, means in found.items()
        ]
        tables.append((f"{domain}, step {evaluations[-1]['step']}", [["", *names], *body]))
    settings = read_json_object(config)
    body = [[name, str(value)] for name, value in sorted(settings.items())]
    tables.append(("Settings", [["", "value"], *body]))
    page = Page(f"Run: {workdir.absolute().name}", _speed(rows), pictures,
                _samples(workdir / "samples"), tables)  # fmt: skip
    write_page(workdir / "report.html", page)
    return workdir / "report.html"


def _speed(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["No step has been logged yet."]
    last = rows[-1]
    loss = last.get("loss")
    notes = [
        f"Step {last['step']}, " + (f"loss {loss:.4g}." if is_number(loss) else "no finite loss.")
    ]
    if "audio_seconds_per_second" in last:
        notes.append(f"{last['audio_seconds_per_second']:.3g} s of audio per s at the end.")
    return notes


def _samples(folder: Path) -> list[Clip]:
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*_*.wav")):
        groups.setdefault(file.name.partition("_")[0], []).append(file)
    clips = []
    for domain, found in groups.items():
        found.sort(key=lambda f: (not f.stem.endswith("_input"), -_leading_number(f)))
        versions = []
        for file in found:
            picture = file.with_suffix(".png")
            report.save_spectrogram(picture, *files.read_native(file))
            versions.append((file.stem.partition("_")[2].replace("_", " "), file, picture))
        clips.append(Clip(domain, tuple(versions)))
    return clips


def _leading_number(file: Path) -> int:
    number = file.stem.partition("_")[2].partition("_")[0]
    return int(number) if number.isdecimal() else 0
