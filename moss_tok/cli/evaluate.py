"""Reconstructs data sets at several bitrates and scores them, by the published protocol."""

import argparse
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments, commands

EXAMPLE = "moss-tok evaluate --dataset test.jsonl --output evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--dataset",
        default=[],
        action="append",
        metavar="D.jsonl",
        help='recordings, one {"path": ...} per line; repeat the option for several data sets',
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder; an unfinished output is resumed by the same command",
    )
    parser.add_argument(
        "--num-quantizers",
        default="",
        metavar="N,...",
        help="numbers of quantizers: all, or numbers and ranges as in 1,2,4..8 "
        "(default: powers of two, and all quantizers)",
    )
    parser.add_argument(
        "--metrics",
        default="",
        metavar="M,...",
        help="metrics to compute; wer and cer need transcripts and a checkpoint with a language "
        "model (default: all)",
    )
    parser.add_argument(
        "--baselines",
        default="",
        metavar="B,...",
        help="other codecs to compare with: opus:KBPS and codec2:BPS, which run the installed "
        "tools, or NAME[:KBPS]=FOLDER, a folder of reconstructions",
    )
    parser.add_argument(
        "--name",
        default="",
        help="name of the codec in the results (default: the checkpoint's folder name)",
    )
    parser.add_argument(
        "--speak",
        metavar="LIST",
        help="instead of a data set: a file of texts as moss-tok speak takes it, which the speech "
        "model of --checkpoint speaks; the output has ID.wav files and a meta.lst, which the "
        "scripts of Seed-TTS-eval read",
    )
    parser.add_argument("--codec", metavar="C", help="with --speak: the codec of the speech model")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="number of scoring processes (default: all cores)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if bool(args.speak) == bool(args.dataset):
        raise ValueError("give either --dataset, to score reconstructions, or --speak")
    if args.codec and not args.speak:
        raise ValueError("codec has no effect without --speak; the codec to score is --checkpoint")
    if args.speak:
        _speak(args)
    else:
        _reconstruct(args)


def _speak(args: argparse.Namespace) -> None:
    """Speaks the texts of a list, as `moss-tok speak` does."""
    from moss_tok.cli import speak, speech_lists

    for name in ("metrics", "baselines", "name"):
        if getattr(args, name):
            raise ValueError(f"{name} has no effect with --speak; leave one of them out")
    if not args.checkpoint:
        raise ValueError("speak needs --checkpoint, a speech model")
    if not speech_lists.is_list(args.speak):
        suffixes = ", ".join(speech_lists.SUFFIXES)
        raise ValueError(f"{args.speak}: a file of texts must end in {suffixes}")
    arguments_of_speak = [f"--checkpoint={args.checkpoint}"]
    if args.codec:
        arguments_of_speak.append(f"--codec={args.codec}")
    if args.num_quantizers:
        arguments_of_speak.append(f"--num-quantizers={args.num_quantizers}")
    arguments_of_speak += ["--", args.speak, args.output]
    speak.run(commands.build_parser("speak").parse_args(arguments_of_speak))


def _reconstruct(args: argparse.Namespace) -> None:
    """Scores the codec on data sets."""
    import moss_tok
    from moss_tok import assets
    from moss_tok.codec import pretrained
    from moss_tok.evaluation import baselines, datasets, pages, reconstruction, results, sweep

    requested, audio_metrics = _parse_metrics(args.metrics)
    if args.num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {args.num_workers}")
    data = [datasets.read_dataset(path) for path in args.dataset]
    if len({dataset.name for dataset in data}) < len(data):
        raise ValueError("two data sets have the same file name")
    config = pretrained.load_config(args.checkpoint)
    numbers = sweep.bitrates(config)
    if args.num_quantizers:
        numbers = reconstruction.parse_numbers(args.num_quantizers, config.quantizer.num_quantizers)
    folder = Path(args.checkpoint).absolute() if args.checkpoint else assets.codec_folder()
    name = baselines.check_name(args.name or folder.name)
    codecs = _parse_baselines(args.baselines, name, data)
    output = Path(args.output)
    reconstruction.check_output(args.output)
    language = _load_language(args.checkpoint, data, requested)
    codec = moss_tok.load(args.checkpoint)
    model = _describe(name, codec)
    rate = functools.partial(_rate, metric_names=audio_metrics, num_workers=args.num_workers)
    problems = []
    for dataset in data:
        problems += _evaluate_codec(codec, language, dataset, numbers, output / name, model, rate)
        for baseline in codecs:
            folder = output / baseline.name
            names = reconstruction.reconstruct_by(
                baseline, dataset, folder, config.sample_rate, config.num_channels
            )
            _show_progress(names, dataset, f"by {baseline.name}")
            problems.append(rate(dataset, folder, baseline.bps))
    print(results.write_summary(output))
    print(pages.write_evaluation(output))
    for problem in problems:
        if problem:
            raise ValueError(problem)


def _parse_metrics(text: str) -> tuple[list[str], list[str]]:
    """The metrics asked for, [] for all, and those of them that compare audio."""
    from moss_tok.evaluation import metrics, results

    requested = [name.strip() for name in text.split(",")] if text else []
    audio_metrics = list(metrics.METRICS)
    if requested:
        audio_metrics = [name for name in requested if name not in results.TEXT_METRICS]
    metrics.check(audio_metrics)
    return requested, audio_metrics


def _evaluate_codec(
    codec: Any,
    language: Any | None,
    dataset: Any,
    numbers: Sequence[int],
    folder: Path,
    model: dict[str, Any],
    rate: Callable[..., str],
) -> list[str]:
    """Writes everything about the codec on one data set; returns the problems, "" for none."""
    from moss_tok.evaluation import reconstruction, results, transcription

    names = reconstruction.reconstruct(codec, dataset, numbers, folder, model)
    _show_progress(names, dataset, "reconstructed")
    problems = []
    for n in numbers:
        problems.append(rate(dataset, folder / f"rvq{n}", round(codec.config.bitrate(n))))
    if language and transcription.has_words(dataset.texts):
        transcription.write_dataset(codec, language, dataset, numbers, folder)
    results.write_entropy(folder, dataset, codec)
    return problems


def _show_progress(names: Iterable[str], dataset: Any, title: str) -> None:
    """Runs an iterator of finished files, one per recording, and shows the progress."""
    with arguments.counter(len(dataset.items), f"{dataset.name}, {title}") as count:
        for _ in names:
            count()


def _rate(
    dataset: Any, folder: Path, bps: int | None, metric_names: list[str], num_workers: int
) -> str:
    """Scores a system on a data set and writes the means; returns a problem, or ""."""
    from moss_tok.evaluation import results, scoring

    rated = folder / dataset.name
    with arguments.counter(len(dataset.items), f"{dataset.name}, {folder.name} scored") as count:
        rows = scoring.score(rated, dataset, metric_names, num_workers, count)
    for line in results.describe_failures(rated, rows, metric_names):
        print(line)
    return results.write_results(rated, dataset, rows, metric_names, bps)


def _describe(name: str, codec: Any) -> dict[str, Any]:
    """The codec's entry in the manifests."""
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


def _parse_baselines(text: str, name: str, data: Sequence[Any]) -> list[Any]:
    """The baselines, checked against the codec's name and the recordings."""
    from moss_tok.evaluation import baselines

    codecs = baselines.parse(text)
    for baseline in codecs:
        if baseline.name.partition("/")[0] == name:
            raise ValueError(
                f"the codec and a baseline are both called {name}: give the codec another --name"
            )
    recordings = []
    for dataset in data:
        recordings += [audio for audio, *_ in dataset.items]
    baselines.check(codecs, recordings)
    return codecs


def _load_language(
    checkpoint: str | None, data: Sequence[Any], requested: Sequence[str]
) -> Any | None:
    """The checkpoint's language model if wer or cer can be computed; None otherwise.

    Raises:
      ValueError: wer or cer was asked for, but there are no transcripts or no language model.
    """
    from moss_tok.checkpoint import find_checkpoint
    from moss_tok.evaluation import results, transcription
    from moss_tok.language import pretrained as language_models

    text_requested = bool(set(requested) & set(results.TEXT_METRICS))
    if requested and not text_requested:
        return None
    texts = []
    for dataset in data:
        texts += dataset.texts
    if not transcription.has_words(texts):
        if text_requested:
            raise ValueError("wer and cer need a data set whose lines have a transcript")
        return None
    if language_models.load_config(find_checkpoint(checkpoint)):
        transcription.check_installed()
        return language_models.load(checkpoint)
    if text_requested:
        name = checkpoint or "the codec that comes with moss_tok"
        raise ValueError(f"wer and cer need a language model, {name} has none")
    return None
