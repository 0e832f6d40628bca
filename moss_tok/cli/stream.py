"""Encodes PCM or decodes codes in real time, from standard input to standard output.

Codes are lines of JSON: first a header that says how to decode them, then a line
{"codes": [[...], ...]}, [Q, T], per chunk. With --input a file goes through encoder and decoder,
and the time that each chunk takes is printed.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok stream --input speech.flac"

_PCM = {"s16": ("<i2", 32768), "f32": ("<f4", 1)}  # type, full scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_codec(parser)
    parser.add_argument(
        "--decode", action="store_true", help="decode codes to PCM, instead of encoding PCM"
    )
    parser.add_argument(
        "--pcm",
        choices=tuple(_PCM),
        help="PCM samples: 16-bit integers or 32-bit floats, little-endian, channels interleaved, "
        "at the codec's sample rate (default: s16)",
    )
    parser.add_argument(
        "--chunk-ms",
        type=float,
        default=80.0,
        metavar="MS",
        help="milliseconds of audio per chunk (default: 80)",
    )
    parser.add_argument(
        "--input", metavar="FILE", help="audio file to encode and decode chunk by chunk"
    )
    parser.add_argument(
        "--output", metavar="OUT.wav", help="file for the decoded audio of --input (default: none)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import os
    import sys

    import moss_tok

    _check(args)
    pcm = args.pcm or "s16"
    if not args.input:
        with contextlib.suppress(OSError, ValueError):  # in tests standard input is no file
            # A non-blocking read that finds no data yet looks like the end of the input.
            os.set_blocking(sys.stdin.fileno(), True)
    component = "all" if args.input else "decoder" if args.decode else "encoder"
    codec = moss_tok.load(args.checkpoint, component=component)
    codec.config.check_num_quantizers(args.num_quantizers)
    frames = max(1, round(args.chunk_ms / 1000 * codec.config.frame_rate))
    try:
        if args.input:
            _round_trip(codec, args.num_quantizers, frames, args.input, args.output)
        elif args.decode:
            _decode(codec, args.num_quantizers, frames, pcm)
        else:
            _encode(codec, args.num_quantizers, frames, pcm)
    except BrokenPipeError:  # the reader has gone, as after `| head`
        arguments.discard_output()


def _check(args: argparse.Namespace) -> None:
    import sys

    from moss_tok.audio import files

    if not args.input and sys.stdin is None:  # as after `<&-`
        raise ValueError("standard input is closed")
    arguments.check_standard_output()
    for name in ("input", "output"):
        if getattr(args, name) == "":
            raise ValueError(f"{name} must be a file, got ''")
    if args.output and not args.input:
        raise ValueError("--output needs --input")
    if args.input and args.decode:
        raise ValueError("--input encodes and decodes: it cannot be combined with --decode")
    if args.input and args.pcm:
        raise ValueError("--pcm is for standard input and output, not for --input")
    if not 0 < args.chunk_ms <= 60000:
        raise ValueError(f"chunk-ms must be above 0 and at most 60000, got {args.chunk_ms:g}")
    if args.output:
        files.check_output(args.output)
        arguments.check_not_overwritten(args.input, args.output)


def _encode(codec: Any, num_quantizers: int | None, frames: int, pcm: str) -> None:
    import json
    import sys

    import numpy as np

    import moss_tok
    from moss_tok.codec import pretrained

    config = codec.config
    dtype, full_scale = _PCM[pcm]
    sample_bytes = config.num_channels * np.dtype(dtype).itemsize
    chunk_bytes = frames * config.hop_length * sample_bytes
    stream = moss_tok.EncoderStream(codec, num_quantizers, chunk_frames=[frames])

    def print_codes(codes: np.ndarray) -> None:
        if codes.shape[1]:
            print(json.dumps({"codes": codes.tolist()}), flush=True)

    header = _header(config, config.check_num_quantizers(num_quantizers))
    header["quantizer"] = pretrained.quantizer_fingerprint(codec)
    print(json.dumps(header), flush=True)
    rest = 0  # bytes of an incomplete sample, which only the end of the input can leave
    while not rest and (data := sys.stdin.buffer.read(chunk_bytes)):
        rest = len(data) % sample_bytes
        samples = np.frombuffer(data[: len(data) - rest], dtype).reshape(-1, config.num_channels)
        print_codes(stream.push(samples.T.astype(np.float32) / full_scale))
    print_codes(stream.finish())
    if rest:
        raise ValueError(f"standard input ended within a sample of {sample_bytes} bytes")


def _header(config: Any, num_quantizers: int) -> dict[str, int]:
    return {
        "sample_rate": config.sample_rate,
        "num_channels": config.num_channels,
        "hop_length": config.hop_length,
        "codebook_size": config.quantizer.codebook_size,
        "num_quantizers": num_quantizers,
    }


def _decode(codec: Any, num_quantizers: int | None, frames: int, pcm: str) -> None:
    import sys

    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.json_files import parse_json_object

    dtype, full_scale = _PCM[pcm]
    stream = None
    for number, text in enumerate(sys.stdin, 1):
        try:
            line = parse_json_object(text)
            if stream is None:
                available = _check_header(codec, line)
                used = available if num_quantizers is None else num_quantizers
                if used > available:
                    raise ValueError(
                        f"num_quantizers must be 1..{available} for this stream, got {used}"
                    )
                stream = moss_tok.DecoderStream(codec, used, chunk_frames=[frames])
                continue
            wav = stream.push(_codes(line, available)[:used])
        except ValueError as error:
            raise ValueError(f"standard input, line {number}: {error}") from error
        if full_scale > 1:
            wav = files.to_pcm16(wav)
        sys.stdout.buffer.write(np.ascontiguousarray(wav.T).astype(dtype).tobytes())
        sys.stdout.buffer.flush()
    if stream is None:
        raise ValueError("standard input is empty: the header line is missing")


def _check_header(codec: Any, header: dict[str, Any]) -> int:
    """Checks a stream's first line, and returns its number of quantizers."""
    from moss_tok.codec import codes

    config = codec.config
    num_quantizers = header.get("num_quantizers")
    for key, expected in _header(config, num_quantizers).items():
        value = header.get(key)
        if value != expected:
            raise ValueError(f"{key} must be {expected} for this checkpoint, got {value!r}")
    if "quantizer" in header:  # missing in streams of earlier versions
        codes.check_quantizer(str(header["quantizer"]), codec)
    # None would mean all quantizers.
    return config.check_num_quantizers(0 if num_quantizers is None else num_quantizers)


def _codes(line: dict[str, Any], num_quantizers: int) -> Any:
    import numpy as np

    try:
        codes = np.array(line.get("codes"))
    except ValueError:  # rows of different lengths
        codes = np.array(None)
    if codes.dtype.kind != "i" or codes.ndim != 2 or codes.shape[0] != num_quantizers:
        raise ValueError(f'expected "codes": {num_quantizers} lists of integers of equal length')
    return codes


def _round_trip(
    codec: Any, num_quantizers: int | None, frames: int, source: str, output: str | None
) -> None:
    """Encodes and decodes a file chunk by chunk, and prints the time of each chunk."""
    import collections

    from moss_tok.audio import files

    config = codec.config

    def print_line(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            if not output:
                raise
            arguments.discard_output()  # the output file is still wanted

    blocks = _timed_chunks(codec, num_quantizers, frames, source, print_line)
    if output:
        seconds = files.duration_seconds(source)
        files.write_blocks(output, blocks, config.sample_rate, config.num_channels, seconds)
    else:
        collections.deque(blocks, maxlen=0)  # runs the iterator


def _timed_chunks(
    codec: Any,
    num_quantizers: int | None,
    frames: int,
    source: str,
    print_line: Callable[[str], None],
) -> Iterator[Any]:
    """Yields a file's reconstruction chunk by chunk, after printing each chunk's time."""
    import array
    import itertools
    import time

    import numpy as np

    import moss_tok
    from moss_tok.audio import files

    config = codec.config
    size = frames * config.hop_length
    seconds = frames / config.frame_rate
    encoder = moss_tok.EncoderStream(codec, num_quantizers, chunk_frames=[frames])
    decoder = moss_tok.DecoderStream(codec, num_quantizers, chunk_frames=[frames])
    blocks = files.read_blocks(source, config.sample_rate, config.num_channels, max(1.0, seconds))
    chunks = itertools.chain(files.rechunk(blocks, size), [None])
    chunk = next(chunks)
    times = array.array("d")  # ms
    while chunk is not None:
        following = next(chunks)
        start = time.perf_counter()
        codes = encoder.push(chunk)
        if following is None:
            codes = np.concatenate([codes, encoder.finish()], axis=1)
        encoded = time.perf_counter()
        wav_hat = decoder.push(codes)
        decoded = time.perf_counter()
        encode_ms = 1000 * (encoded - start)
        decode_ms = 1000 * (decoded - encoded)
        position = len(times) * seconds
        times.append(encode_ms + decode_ms)
        print_line(f"{position:9.2f} s  encode {encode_ms:6.1f} ms  decode {decode_ms:6.1f} ms")
        yield wav_hat[:, : chunk.shape[1]]
        chunk = following
    median, high = np.percentile(times, [50, 99])
    print_line(
        f"{len(times)} chunks of {1000 * seconds:g} ms: median {median:.1f} ms, 99 % within "
        f"{high:.1f} ms, real-time factor {np.mean(times) / 1000 / seconds:.3f}"
    )
