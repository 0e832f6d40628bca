"""Encodes a file, or a whole folder, and decodes it again; prints the mel_loss of a file."""

import argparse
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok reconstruct speech.flac again.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_audio_input(parser)
    arguments.add_audio_output(parser)
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok
    from moss_tok.audio import files

    arguments.check_audio_output(args.input, args.output)
    codec = moss_tok.load(args.checkpoint)
    num_quantizers = codec.config.check_num_quantizers(args.num_quantizers)
    reconstruct = functools.partial(_reconstruct, codec, num_quantizers)
    suffixes = (*files.readable_suffixes(), ".wav")
    return arguments.each_file(args.input, args.output, suffixes, reconstruct)


def _reconstruct(codec: Any, num_quantizers: int, source: Path, output: Path) -> str:
    import numpy as np

    from moss_tok.audio import files
    from moss_tok.evaluation import metrics

    config = codec.config
    seconds = files.duration_seconds(source)
    pairs = _round_trip(codec, num_quantizers, source, seconds)
    distances = []
    sizes = []

    def measured():
        for wav, wav_hat in pairs:
            clipped = np.clip(wav_hat, -1, 1)
            values, _ = metrics.compute_each(wav, clipped, config.sample_rate, ("mel_loss",))
            if values:  # the metric needs 65 ms
                distances.append(values["mel_loss"])
                sizes.append(wav.shape[1])
            yield wav_hat

    files.write_blocks(output, measured(), config.sample_rate, config.num_channels, seconds)
    line = f"{output}: {config.bitrate(num_quantizers):.0f} bit/s ({num_quantizers} quantizers)"
    if distances:
        line += f", mel_loss {np.average(distances, weights=sizes):.3f}"
    return line


def _round_trip(
    codec: Any, num_quantizers: int, source: Path, seconds: float
) -> Iterable[tuple[Any, Any]]:
    """A recording, whole or in chunks: the input [C, S] and its reconstruction [C, S]."""
    from moss_tok.audio import files
    from moss_tok.codec import inference

    config = codec.config
    if not inference.is_long(seconds):
        wav = files.read(source, config.sample_rate, config.num_channels)
        codes = inference.encode_one(codec, wav, num_quantizers)
        return [(wav, inference.decode_one(codec, codes)[:, : wav.shape[1]])]
    blocks = files.read_blocks(
        source, config.sample_rate, config.num_channels, inference.CHUNK_SECONDS
    )
    pairs = _round_trip_chunks(codec, num_quantizers, blocks)
    return arguments.progress(pairs, seconds, inference.CHUNK_SECONDS)


def _round_trip_chunks(
    codec: Any, num_quantizers: int, blocks: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    """Yields whole chunks of a recording [C, S], each with its reconstruction [C, S]."""
    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.codec import inference

    frames = inference.chunk_frames(codec.config)
    size = frames * codec.config.hop_length
    with (
        moss_tok.EncoderStream(codec, num_quantizers, 1, [frames]) as encoder,
        moss_tok.DecoderStream(codec, num_quantizers, 1, [frames]) as decoder,
    ):
        for wav in files.rechunk(blocks, size):
            wav_hat = decoder.push(encoder.push(wav))
            if wav.shape[1] < size:  # the last chunk
                wav_hat = np.concatenate([wav_hat, decoder.push(encoder.finish())], axis=1)
            yield wav, wav_hat[:, : wav.shape[1]]
