"""Sends an audio file, or a folder of them, through the codec and back."""

import argparse
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN", help="audio of any kind, rate and channels; or a folder"
    )
    parser.add_argument("output", metavar="OUT.wav", help="wav, flac or ogg; or a folder")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok
    from moss_tok import storage
    from moss_tok.audio import files

    if not storage.to_local_path(args.input).is_dir():
        files.check_output(args.output)
    codec = moss_tok.load(args.checkpoint)
    num_quantizers = codec.config.check_num_quantizers(args.num_quantizers)
    reconstruct = functools.partial(_reconstruct, codec, num_quantizers)
    return arguments.each_file(
        args.input, args.output, (*files.readable_suffixes(), ".wav"), reconstruct
    )


def _reconstruct(codec: Any, num_quantizers: int, source: Path, output: Path) -> str:
    import numpy as np

    from moss_tok.audio import files
    from moss_tok.codec import inference
    from moss_tok.evaluation import metrics

    config, seconds = codec.config, files.duration_seconds(source)
    shape, distances, sizes = (config.sample_rate, config.num_channels), [], []
    if seconds <= inference.CHUNK_SECONDS:
        wav = files.read(source, *shape)
        codes = inference.encode_one(codec, wav, num_quantizers)
        pairs = [(wav, inference.decode_one(codec, codes)[:, : wav.shape[1]])]
    else:
        blocks = files.read_blocks(source, *shape, inference.CHUNK_SECONDS)
        pairs = _round_trip(codec, num_quantizers, blocks)
        pairs = arguments.progress(pairs, seconds, inference.CHUNK_SECONDS)

    def heard():
        for wav, wav_hat in pairs:
            pair = wav, np.clip(wav_hat, -1, 1)
            found, _ = metrics.compute_each(*pair, config.sample_rate, ("mel_loss",))
            if found:  # of 65 ms or more
                distances.append(found["mel_loss"])
                sizes.append(wav.shape[1])
            yield wav_hat

    files.write_blocks(output, heard(), *shape, seconds)
    said = f", mel distance {np.average(distances, weights=sizes):.3f}" if distances else ""
    bitrate = f"{config.bitrate(num_quantizers):.0f} bit/s"
    return f"{output}: {bitrate} ({num_quantizers} quantizers){said}"


def _round_trip(
    codec: Any, num_quantizers: int, blocks: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    """Blocks of a recording, cut anew, each with what becomes of it; [C, S] and [C, S]."""
    import numpy as np

    import moss_tok
    from moss_tok.audio import files

    frames = arguments.chunk_frames(codec.config)
    size = frames * codec.config.hop_length
    with (
        moss_tok.EncoderStream(codec, num_quantizers, 1, [frames]) as encoder,
        moss_tok.DecoderStream(codec, num_quantizers, 1, [frames]) as decoder,
    ):
        for wav in files.rechunk(blocks, size):
            wav_hat = decoder.push(encoder.push(wav))
            if wav.shape[1] < size:  # the last
                wav_hat = np.concatenate([wav_hat, decoder.push(encoder.finish())], axis=1)
            yield wav, wav_hat[:, : wav.shape[1]]
