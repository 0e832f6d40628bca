"""Measures how fast a speech model streams. See `speech.md`.

    python experiments/speech_speed.py
    python experiments/speech_speed.py --checkpoint=runs/half --codec=runs/joint

Prints the time to the first block and the real-time factor of `speech.stream`. Without a
checkpoint, it measures a random model with the shape of `tts_digits.flags`; the weights do not
change the speed.
"""

import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from codec_copies import NUMBERS
from flax import linen as nn

import moss_tok
from moss_tok import speech
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec
from moss_tok.errors import exit_code
from moss_tok.language.text import ByteTokenizer
from moss_tok.speech import layout, pretrained
from moss_tok.speech.config import preset

NUM_STREAMS = 7  # of which medians are taken


def random_model(codec: Codec) -> speech.Speech:
    """A random model with the shape of `tts_digits.flags`, which never ends speech by itself."""
    tokenizer = ByteTokenizer()
    config = preset(
        "tiny",
        codebook_size=codec.config.quantizer.codebook_size,
        num_quantizers=codec.config.quantizer.num_quantizers,
        frame_rate=codec.config.frame_rate,
        **layout.token_fields(tokenizer),
    )
    init = jax.jit(pretrained.init_boxed, static_argnums=0)
    params = nn.meta.unbox(init(config, jax.random.key(0)))
    # silu(x) x times a positive matrix is positive, so that the frame is always more likely than
    # the end of speech.
    heads = params["out"]
    heads["up"] = heads["up"].at[0].set(heads["gate"][0])
    heads["down"] = heads["down"].at[0].set(abs(heads["down"][0]))
    heads["text_head"] = heads["text_head"].at[:, config.slot_id].set(1)
    heads["text_head"] = heads["text_head"].at[:, config.end_id].set(-1)
    return speech.Speech(params, config, tokenizer)


def _clocks() -> np.ndarray:
    """Seconds by the clock and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def stream_seconds(
    model: speech.Speech, codec: Codec, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Streams a text.

    Returns:
      Seconds to the first block and in total, both by the clock and of processor time; and seconds
      of audio.
    """
    start = _clocks()
    first = None
    num_samples = 0
    request = speech.Request("four seven")
    for wav in speech.stream(model, codec, request, seed=seed, num_quantizers=number):
        if first is None:
            first = _clocks() - start
        num_samples += wav.shape[1]
    return first, _clocks() - start, num_samples / codec.config.sample_rate


def print_table(codec: Codec, model: speech.Speech) -> None:
    """Prints a row for each number of quantizers."""
    print("| quantizers | first block, ms of processor time (clock) | real-time factor, by "
          "processor time (clock) |")  # fmt: skip
    print("|---|---|---|")
    for number in NUMBERS:
        if number <= model.config.num_quantizers:
            _print_speed(model, codec, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a model; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="speech model (default: a random one)")
    parser.add_argument("--codec", help="its codec (default: the one in the package)")
    args = parser.parse_args(argv)

    def run() -> None:
        codec = moss_tok.load(args.codec)
        model = speech.load(args.checkpoint) if args.checkpoint else random_model(codec)
        print_table(codec, model)

    return exit_code(run)


def _print_speed(model: speech.Speech, codec: Codec, number: int) -> None:
    """Prints a row of medians."""
    stream_seconds(model, codec, number, seed=0)  # compiles the programs
    first_blocks = []
    factors = []
    for seed in range(NUM_STREAMS):
        first, total, audio_seconds = stream_seconds(model, codec, number, seed)
        first_blocks.append(1000 * first)
        factors.append(total / audio_seconds)
    clock, processor = np.median(first_blocks, axis=0)
    clock_factor, processor_factor = np.median(factors, axis=0)
    print(f"| {number} | {processor:.0f} ({clock:.0f}) | {processor_factor:.2f} "
          f"({clock_factor:.2f}) |", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
