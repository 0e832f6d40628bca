"""HTML pages with plots, tables and audio of an evaluation or of a training run."""

import dataclasses
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from moss_tok.audio import files
from moss_tok.errors import is_number
from moss_tok.evaluation import report, results
from moss_tok.json_files import read_json_object, read_log

_TEMPLATE = Path(__file__).with_name("page.html")
_MAX_NAME_BYTES = 250  # without a suffix: file names have at most 255 bytes
_MAX_CLIPS = 8  # per data set
_MAX_BITRATES = 4  # per system


@dataclasses.dataclass(frozen=True)
class Version:
    """A recording to listen to.

    Attributes:
      name: Heading, such as the system.
      audio: Its file.
      picture: File of its spectrogram.
      text: What is said, or what a recogniser has understood; "" if unknown.
    """

    name: str
    audio: Path
    picture: Path
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Versions of a recording."""

    title: str
    versions: tuple[Version, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """Contents of a page, in this order.

    Attributes:
      title: Heading.
      notes: Paragraphs.
      pictures: (caption, file).
      clips: Recordings to listen to.
      tables: (caption, rows of cells, of which the first holds the column heads).
    """

    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[tuple[str, Path]] = ()
    clips: Sequence[Clip] = ()
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes a page for screens of any width. It needs no network, only the files beside it."""

    def link(file: Path) -> str:
        relative = Path(os.path.relpath(file, path.parent))
        return quote(relative.as_posix())

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["link"] = link
    template = environment.from_string(_TEMPLATE.read_text())
    files.write_text(path, template.render(page=page))


def write_evaluation(output: Path) -> Path:
    """Writes report.html about the results of `moss-tok evaluate` in `output`; returns its path.

    Raises:
      ValueError: There are no results.
    """
    table = results.read_results(output)
    if not table:
        raise ValueError(f"{output}: no results.json in it")
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    pictures = []
    tables = []
    for number, (name, rows) in enumerate(table.items()):
        picture = folder / f"rates_{number}.png"
        domain = name.rpartition(", ")[2]
        report.save_rates(picture, _curves(rows), domain)
        pictures.append((f"{name}: quality over bitrate", picture))
        tables.append((name, results.to_cells(rows)))
    for caption, bits in results.read_entropy(output):
        head = ["quantizer"]
        values = ["bits"]
        for number, value in enumerate(bits, 1):
            head.append(str(number))
            values.append(f"{value:.1f}")
        tables.append((caption, [head, values]))
    systems = set()
    for rows in table.values():
        systems |= {row.system for row in rows}
    note = (
        "Lower is better for mel_loss, stft, spectral_convergence, wer and cer; higher is better "
        "for all others."
    )
    page = Page(
        title=f"Evaluation: {output.absolute().name}",
        notes=[note],
        pictures=pictures,
        clips=_clips(output, sorted(systems), folder),
        tables=tables,
    )
    write_page(output / "report.html", page)
    return output / "report.html"


def _curves(rows: Sequence[results.Result]) -> dict[str, list[report.Point]]:
    """A curve per codec; a system without a bitrate is a curve of its own."""
    curves: dict[str, list[report.Point]] = {}
    for row in rows:
        means = {}
        for name in results.COLUMNS:
            if name in row.means:
                means[name] = row.means[name]
        label = row.system if row.bps is None else _codec_of(row.system)
        curves.setdefault(label, []).append((row.bps, means))
    return curves


def _codec_of(system: str) -> str:
    """The codec of a system "CODEC/BITRATE"."""
    return system.rpartition("/")[0] or system


def _clips(output: Path, systems: Sequence[str], folder: Path) -> list[Clip]:
    """Some recordings of each data set: the reference, and each codec at some bitrates."""
    systems_of: dict[str, list[str]] = {}  # data set -> systems
    for system in systems:
        for manifest in sorted((output / system).glob("*/manifest.json")):
            systems_of.setdefault(manifest.parent.name, []).append(system)
    clips = []
    for dataset, names in systems_of.items():
        chosen = _choose_bitrates(names)
        first = output / chosen[-1] / dataset
        file_names = read_json_object(first / "manifest.json")["dataset"]["output_names"]
        texts = {name: _read_texts(output / name / dataset / "texts.jsonl") for name in chosen}
        for file_name in _spread(file_names, _MAX_CLIPS):
            said = texts[chosen[-1]].get(file_name, {}).get("text", "")
            sources = [("reference", first / "gt_audios" / file_name, said)]
            for system in chosen:
                audio = output / system / dataset / "syn_audios" / file_name
                understood = texts[system].get(file_name, {}).get("understood", "")
                sources.append((system, audio, understood))
            stem = Path(file_name).stem
            versions = _draw_versions(sources, f"{dataset}_{stem}", folder)
            clips.append(Clip(f"{dataset}: {stem}", versions))
    return clips


def _read_texts(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a texts.jsonl by the name of the recording; {} without the file."""
    return {row["name"]: row for row in read_log(path) if "name" in row}


def _draw_versions(
    sources: Sequence[tuple[str, Path, str]], name: str, folder: Path
) -> tuple[Version, ...]:
    """Draws the spectrograms of a recording's versions that exist, unless they are up to date.

    Args:
      sources: The label, the audio and the text of each version.
      name: Of the recording.
      folder: Of the pictures.
    """
    versions = []
    for label, audio, text in sources:
        if not audio.exists():
            continue
        picture = folder / f"{_shortened(f'{label}_{name}'.replace('/', '_'))}.png"
        if not picture.exists() or picture.stat().st_mtime < audio.stat().st_mtime:
            wav, sample_rate = files.read_native(audio)
            report.save_spectrogram(picture, wav, sample_rate)
        versions.append(Version(label, audio, picture, text))
    return tuple(versions)


def _shortened(name: str) -> str:
    """`name`; if it is too long for a file name, its beginning and a hash of it."""
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{name[:40]}_{digest[:16]}"


def _choose_bitrates(systems: Sequence[str]) -> list[str]:
    """Some bitrates of each codec, ascending."""
    groups: dict[str, list[str]] = {}
    for system in systems:
        groups.setdefault(_codec_of(system), []).append(system)
    chosen = []
    for group in groups.values():
        chosen += _spread(sorted(group, key=_numbers), _MAX_BITRATES)
    return chosen


def _numbers(system: str) -> list[int]:
    """The numbers in the name of a bitrate: [8] of "MODEL/rvq8"."""
    bitrate = system.rpartition("/")[2]
    return list(map(int, re.findall(r"\d+", bitrate)))


def _spread(items: Sequence[Any], maximum: int) -> list[Any]:
    """At most `maximum` of the items, evenly spread, the first and last included."""
    if len(items) <= maximum:
        return list(items)
    step = (len(items) - 1) / (maximum - 1)
    return [items[round(number * step)] for number in range(maximum)]


def write_run(workdir: Path) -> Path:
    """Writes report.html about a training run into its workdir; returns its path.

    Raises:
      ValueError: It is no workdir.
    """
    config = workdir / "train_config.json"
    if not config.is_file():
        raise ValueError(f"{workdir}: no train_config.json, so no workdir of train.py")
    rows = [row for row in read_log(workdir / "metrics.jsonl") if "step" in row]
    curves = workdir / "curves.png"
    if importlib.util.find_spec("matplotlib"):  # otherwise the file of the last evaluation stays
        report.save_curves(curves, rows)
    tables = _evaluation_tables(read_log(workdir / "evaluation.jsonl"))
    settings = [["", "value"]]
    for name, value in sorted(read_json_object(config).items()):
        settings.append([name, str(value)])
    tables.append(("Settings", settings))
    pictures = [("Losses and codebooks", curves)] if curves.exists() else []
    page = Page(
        title=f"Run: {workdir.absolute().name}",
        notes=_progress_notes(rows),
        pictures=pictures,
        clips=_samples(workdir / "samples"),
        tables=tables,
    )
    write_page(workdir / "report.html", page)
    return workdir / "report.html"


def _evaluation_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """A table per domain of the last evaluation."""
    complete = [row for row in rows if "step" in row and _is_table(row.get("table"))]
    if not complete:
        return []
    last = complete[-1]
    tables = []
    for domain, systems in last["table"].items():
        metrics: dict[str, None] = {}  # of all systems, in order
        for means in systems.values():
            metrics |= dict.fromkeys(means)
        cells = [["", *metrics]]
        for system, means in systems.items():
            values = [results.format_value(means, name) for name in metrics]
            cells.append([system, *values])
        tables.append((f"{domain}, step {last['step']}", cells))
    return tables


def _is_table(value: Any) -> bool:
    """Whether a value is domain -> system -> metric -> number."""
    try:
        means = [row for systems in value.values() for row in systems.values()]
        numbers = [number for row in means for number in row.values()]
    except AttributeError:  # one of them is no object
        return False
    return all(isinstance(number, (int, float)) for number in numbers)


def _progress_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Notes about the last logged step."""
    if not rows:
        return ["No step has been logged yet."]
    last = rows[-1]
    loss = last.get("loss")
    loss_note = f"loss {loss:.4g}." if is_number(loss) else "no finite loss."
    notes = [f"Step {last.get('step')}, {loss_note}"]
    speed = last.get("audio_seconds_per_second")
    if is_number(speed):
        notes.append(f"Speed at the end: {speed:.3g} s of audio per second.")
    return notes


def _samples(folder: Path) -> list[Clip]:
    """The samples that training has written, a clip per domain."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*_*.wav")):
        domain = file.name.partition("_")[0]
        groups.setdefault(domain, []).append(file)
    clips = []
    for domain, group in groups.items():
        versions = []
        for file in sorted(group, key=_version_order):
            picture = file.with_suffix(".png")
            wav, sample_rate = files.read_native(file)
            report.save_spectrogram(picture, wav, sample_rate)
            name = file.stem.partition("_")[2].replace("_", " ")
            versions.append(Version(name, file, picture))
        clips.append(Clip(domain, tuple(versions)))
    return clips


def _version_order(file: Path) -> tuple[bool, int]:
    """Sorts the input first, then reconstructions from many to few quantizers."""
    return not file.stem.endswith("_input"), -_num_quantizers(file)


def _num_quantizers(file: Path) -> int:
    """N of DOMAIN_N_quantizers.wav; 0 for other names."""
    number = file.stem.partition("_")[2].partition("_")[0]
    return int(number) if number.isdecimal() else 0
