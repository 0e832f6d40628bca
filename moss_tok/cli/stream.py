"""Live: raw PCM on standard input to codes on standard output, back, or a file through both.

Codes are lines of JSON: first one that says how to decode them, then {"codes": [[...], ...]},
[Q, T], for each chunk.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from moss_tok.cli import arguments

_PCM = {"s16": ("<i2", 32768), "f32": ("<f4", 1)}  # type, full scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    arguments.add_codec(parser)
    parser.add_argument("--decode", action="store_true", help="codes to PCM instead")
    parser.add_argument(
        "--pcm", default="s16", choices=tuple(_PCM),
        help="samples: 16 bit or float32, little-endian, channels interleaved, at the codec's rate",
    )  # fmt: skip
    parser.add_argument(
        "--chunk-ms", type=float, default=80.0, metavar="MS", help="of audio per chunk (80)"
    )
    parser.add_argument("--input", metavar="FILE", help="an audio file, encoded and decoded live")
    parser.add_argument("--output", metavar="OUT.wav", help="keeps what comes back of --input")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import os
    import sys

    import moss_tok
    from moss_tok.audio import files

    if not args.input and sys.stdin is None:  # as after `<&-`
        raise ValueError("standard input is closed")
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    if args.output and not args.input:
        raise ValueError("--output is for --input")
    if args.input and args.decode:
        raise ValueError("--input goes both ways, without --decode")
    if not 0 < args.chunk_ms <= 60000:
        raise ValueError(f"chunk-ms must be above 0 and at most 60000, got {args.chunk_ms:g}")
    if args.output:
        files.check_output(args.output)
        arguments.check_not_read(args.input, args.output)
    if not args.input:
        with contextlib.suppress(OSError, ValueError):  # no file, in tests
            os.set_blocking(sys.stdin.fileno(), True)  # else what comes late seems to be the end
    component = "all" if args.input else "decoder" if args.decode else "encoder"
    codec = moss_tok.load(args.checkpoint, component=component)
    codec.config.check_num_quantizers(args.num_quantizers)
    frames = max(1, round(args.chunk_ms / 1000 * codec.config.frame_rate))
    try:
        if args.input:
            _round_trip(codec, args.num_quantizers, frames, args.input, args.output)
        elif args.decode:
            _decode(codec, args.num_quantizers, frames, args.pcm)
        else:
            _encode(codec, args.num_quantizers, frames, args.pcm)
    except BrokenPipeError:  # nobody listens any more, as after `| head`
        arguments.print_nowhere()


def _encode(codec: Any, num_quantizers: int | None, frames: int, pcm: str) -> None:
    import json
    import sys

    import numpy as np

    import moss_tok

    config, (dtype, full_scale) = codec.config, _PCM[pcm]
    sample_bytes = config.num_channels * np.dtype(dtype).itemsize
    stream = moss_tok.EncoderStream(codec, num_quantizers, chunk_frames=[frames])

    def say(codes: np.ndarray) -> None:
        if codes.shape[1]:
            print(json.dumps({"codes": codes.tolist()}), flush=True)

    print(json.dumps(_header(config, config.check_num_quantizers(num_quantizers))), flush=True)
    left = 0
    while not left and (data := sys.stdin.buffer.read(frames * config.hop_length * sample_bytes)):
        left = len(data) % sample_bytes
        samples = np.frombuffer(data[: len(data) - left], dtype).reshape(-1, config.num_channels)
        say(stream.push(samples.T.astype(np.float32) / full_scale))
    say(stream.finish())
    if left:
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
                given = _check_header(codec.config, line)
                used = given if num_quantizers is None else num_quantizers
                if used > given:
                    raise ValueError(f"num_quantizers must be 1..{given}, the stream has no more")
                stream = moss_tok.DecoderStream(codec, used, chunk_frames=[frames])
                continue
            wav = stream.push(_codes(line, given)[:used])
        except ValueError as error:
            raise ValueError(f"standard input, line {number}: {error}") from error
        if full_scale > 1:
            wav = files.to_pcm16(wav)
        sys.stdout.buffer.write(np.ascontiguousarray(wav.T).astype(dtype).tobytes())
        sys.stdout.buffer.flush()
    if stream is None:
        raise ValueError("standard input is empty: no line says how to decode")


def _check_header(config: Any, header: dict[str, Any]) -> int:
    """The number of quantizers that a stream's first line announces."""
    given = header.get("num_quantizers")
    wanted = _header(config, given)
    for key, want in wanted.items():
        if header.get(key) != want:
            raise ValueError(f"{key} must be {want} for this checkpoint, got {header.get(key)!r}")
    return config.check_num_quantizers(given if given is not None else 0)


def _codes(line: dict[str, Any], num_quantizers: int) -> Any:
    import numpy as np

    try:
        codes = np.array(line.get("codes"))
    except ValueError:  # rows of different lengths
        codes = np.array(None)
    if codes.dtype.kind != "i" or codes.ndim != 2 or codes.shape[0] != num_quantizers:
        raise ValueError(f'expected "codes", {num_quantizers} lists of integers, all as long')
    return codes


def _round_trip(
    codec: Any, num_quantizers: int | None, frames: int, source: str, output: str | None
) -> None:
    """Encodes and decodes a file chunk by chunk, and prints what each took."""
    import collections

    from moss_tok.audio import files

    config = codec.config

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            if not output:
                raise
            arguments.print_nowhere()  # the file is still wanted

    blocks = _live(codec, num_quantizers, frames, source, say)
    if output:
        seconds = files.duration_seconds(source)
        files.write_blocks(output, blocks, config.sample_rate, config.num_channels, seconds)
    else:
        collections.deque(blocks, maxlen=0)  # runs it


def _live(
    codec: Any, num_quantizers: int | None, frames: int, source: str, say: Callable[[str], None]
) -> Iterator[Any]:
    """What comes back of a file, chunk by chunk, each when it has been said what it took."""
    import array
    import itertools
    import time

    import numpy as np

    import moss_tok
    from moss_tok.audio import files

    config = codec.config
    size, seconds = frames * config.hop_length, frames / config.frame_rate
    coder = moss_tok.EncoderStream(codec, num_quantizers, chunk_frames=[frames])
    player = moss_tok.DecoderStream(codec, num_quantizers, chunk_frames=[frames])
    blocks = files.read_blocks(source, config.sample_rate, config.num_channels, max(1.0, seconds))
    chunks = itertools.chain(files.rechunk(blocks, size), [None])
    chunk, times = next(chunks), array.array("d")  # ms
    while chunk is not None:
        following = next(chunks)
        began = time.perf_counter()
        codes = coder.push(chunk)
        if following is None:
            codes = np.concatenate([codes, coder.finish()], axis=1)
        encoded = time.perf_counter()
        wav_hat = player.push(codes)
        encode, decode = 1000 * (encoded - began), 1000 * (time.perf_counter() - encoded)
        times.append(encode + decode)
        say(f"{(len(times) - 1) * seconds:9.2f} s  encode {encode:6.1f} ms  "
            f"decode {decode:6.1f} ms")  # fmt: skip
        yield wav_hat[:, : chunk.shape[1]]
        chunk = following
    median, high = np.percentile(times, [50, 99])
    say(
        f"{len(times)} chunks of {1000 * seconds:g} ms: median {median:.1f} ms, 99 % within "
        f"{high:.1f} ms, real-time factor {np.mean(times) / 1000 / seconds:.3f}"
    )
