"""Reconstructs data sets at several bitrates and scores them, by the published protocol."""

import argparse
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--dataset", required=True, action="append", metavar="D.jsonl",
        help="a path of audio per line, may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="one left unfinished is gone on with"
    )
    parser.add_argument(
        "--num-quantizers", default="", metavar="N,...", help="1,2,4..8 or all (powers of two)"
    )
    parser.add_argument(
        "--metrics", default="", metavar="M,...",
        help="which (all); wer and cer need a checkpoint with a language model, and transcripts",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", default="", metavar="B,...",
        help="opus:KBPS, codec2:BPS (by their tools), NAME[:KBPS]=FOLDER of reconstructions",
    )  # fmt: skip
    parser.add_argument("--name", default="", help="of the codec in the results (the folder's)")
    parser.add_argument(
        "--num-workers", type=int, default=os.cpu_count(), metavar="N",
        help="processes that score (all cores)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import moss_tok
    from moss_tok.codec import pretrained
    from moss_tok.evaluation import baselines, metrics, pages, protocol, sweep, transcription

    wanted = [m.strip() for m in args.metrics.split(",")] if args.metrics else []
    names = [m for m in wanted if m not in protocol.TEXT_METRICS]
    names = names if wanted else list(metrics.METRICS)
    metrics.check(names)
    if args.num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {args.num_workers}")
    datasets = [protocol.read_dataset(path) for path in args.dataset]
    if len({d.name for d in datasets}) < len(datasets):
        raise ValueError("two data sets have the same file name")
    config = pretrained.load_config(args.checkpoint)
    numbers = sweep.bitrates(config)
    if args.num_quantizers:
        numbers = protocol.parse_numbers(args.num_quantizers, config.quantizer.num_quantizers)
    name = baselines.check_name(args.name or Path(args.checkpoint).absolute().name)
    others = _others(args.baselines, name, datasets)
    protocol.check_output(args.output)
    language = _language(args.checkpoint, datasets, wanted)
    codec = moss_tok.load(args.checkpoint)
    folder = Path(args.output) / name
    model, problems = _describe(name, codec), []
    rate = functools.partial(_rate, names=names, num_workers=args.num_workers)
    for dataset in datasets:
        files = protocol.reconstruct(codec, dataset, numbers, folder, model)
        _show(files, dataset, "reconstructed")
        for n in numbers:
            problems.append(rate(dataset, folder / f"rvq{n}", round(config.bitrate(n))))
        if language and transcription.has_words(dataset.texts):
            transcription.write_dataset(codec, language, dataset, numbers, folder)
        protocol.write_entropy(folder, dataset, config)
        for other in others:
            where = Path(args.output) / other.name
            shape = config.sample_rate, config.num_channels
            files = protocol.reconstruct_by(other, dataset, where, *shape)
            _show(files, dataset, f"by {other.name}")
            problems.append(rate(dataset, where, other.bps))
    print(protocol.write_summary(Path(args.output)))
    print(pages.write_evaluation(Path(args.output)))
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)


def _show(files: Iterable[Any], dataset: Any, what: str) -> None:
    """Goes through files, one for each recording, and shows how far it is."""
    with arguments.counter(len(dataset.items), f"{dataset.name}, {what}") as count:
        for _ in files:
            count()


def _rate(dataset: Any, where: Path, bps: int | None, names: list[str], num_workers: int) -> str:
    """Scores what is in a folder, and writes the means; what is wrong, or ""."""
    from moss_tok.evaluation import protocol

    with arguments.counter(len(dataset.items), f"{dataset.name}, {where.name} scored") as count:
        rows = protocol.score(where / dataset.name, dataset, names, num_workers, count)
    return protocol.write_results(where / dataset.name, dataset, rows, names, bps)


def _describe(name: str, codec: Any) -> dict[str, Any]:
    """What the manifests say of the codec."""
    from moss_tok.codec import pretrained

    config = codec.config
    return {
        "adapter": "moss_tok",
        "name": name,
        "fingerprint": pretrained.fingerprint(codec),
        "sample_rate": config.sample_rate,
        "channels": config.num_channels,
        "frame_rate": config.frame_rate,
        "bps_per_quantizer": config.bitrate(1),
    }


def _others(text: str, name: str, datasets: list[Any]) -> list[Any]:
    """The baselines, which have what they need."""
    from moss_tok.evaluation import baselines

    others = baselines.parse(text)
    if name in [other.name.partition("/")[0] for other in others]:
        raise ValueError(f"a baseline is called {name} like the codec; give it another --name")
    baselines.check(others, [audio for dataset in datasets for audio, *_ in dataset.items])
    return others


def _language(checkpoint: str, datasets: list[Any], wanted: list[str]) -> Any | None:
    """The checkpoint's language model, if there is one, texts to score it by, and a wish to."""
    from moss_tok.checkpoint import find_checkpoint
    from moss_tok.evaluation import protocol, transcription
    from moss_tok.language import pretrained as language_models

    asked = bool(set(wanted) & set(protocol.TEXT_METRICS))
    if wanted and not asked:
        return None
    texts = [text for dataset in datasets for text in dataset.texts]
    if not transcription.has_words(texts):
        if asked:
            raise ValueError("wer and cer need a data set whose lines have a transcript")
        return None
    if language_models.load_config(find_checkpoint(checkpoint)):
        transcription.check_installed()
        return language_models.load(checkpoint)
    if asked:
        raise ValueError(f"wer and cer need a language model, {checkpoint} has none")
    return None
