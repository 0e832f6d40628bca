"""Estimates the speed of speech generation on a TPU chip, from compiled programs, on any machine.

    python tpu_scripts/speech_check.py --topology=v5e:2x2 --num_quantizers=32

Needs libtpu (`pip install 'jax[tpu]'`). It compiles for one chip of the slice, in bfloat16 and with
weights stored in bfloat16: the prompt, a frame of one sequence (and its depth Transformer alone),
and a frame of the codec's decoder. It prints the bytes that each moves to and from main memory, and
the time that this takes at the published bandwidth. Sampling one sequence is bound by reading
weights, so these times are lower bounds.
"""

import argparse
from collections.abc import Callable
from typing import Any

import compile_check  # first, because it sets the environment of libtpu
import hlo
import jax
import jax.numpy as jnp
from estimates import CHIPS, Chip, giga
from flax import linen as nn

from moss_tok.cli.commands import Parser
from moss_tok.codec import pretrained as codecs
from moss_tok.codec import streaming
from moss_tok.codec.inference import Codec
from moss_tok.codec.presets import load_codec_config
from moss_tok.language.text import ByteTokenizer
from moss_tok.nn.blocks import empty_cache
from moss_tok.nn.compute import PRECISIONS
from moss_tok.speech import generate, pretrained, steps
from moss_tok.speech.config import PUBLISHED, published
from moss_tok.speech.sampling import DEFAULT

COMPUTE = PRECISIONS["bfloat16"]


class Compiler:
    """Compiles programs for one chip, and estimates their time."""

    def __init__(self, chip: Chip, device: jax.Device):
        """Programs are compiled for `device`; `chip` has its rates."""
        self.chip = chip
        self._sharding = jax.sharding.SingleDeviceSharding(device)

    def place(self, tree: Any, dtype: Any = None) -> Any:
        """Shapes with a sharding; floating-point ones get the type `dtype`."""

        def place_one(x: Any) -> jax.ShapeDtypeStruct:
            is_cast = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
            new_dtype = dtype if is_cast else x.dtype
            return jax.ShapeDtypeStruct(x.shape, new_dtype, sharding=self._sharding)

        return jax.tree.map(place_one, tree)

    def seconds(self, title: str, function: Callable[..., Any], *args: Any) -> float:
        """Compiles a function, prints its costs, and returns its estimated time."""
        program = compile_check.compiled(jax.jit(function).lower(*args))
        costs = hlo.analyse(program.text)
        memory = costs.hbm_bytes / self.chip.hbm_rate
        arithmetic = costs.flops / self.chip.flops
        seconds = max(memory, arithmetic)
        print(
            f"{title:<20} {giga(costs.hbm_bytes):>5} GB moved, {1000 * seconds:5.2f} ms, "
            f"peak {giga(program.peak)} of {giga(self.chip.hbm_bytes)} GB",
            flush=True,
        )
        return seconds


def speech_of(compiler: Compiler, name: str) -> steps.Speech:
    """A published model, as shapes in bfloat16."""
    config = published(name)
    params = nn.meta.unbox(pretrained.boxed_shapes(config))
    return steps.Speech(compiler.place(params, jnp.bfloat16), config, ByteTokenizer(), COMPUTE)


def state_of(compiler: Compiler, speech: steps.Speech, cache_size: int) -> steps.State:
    """The shapes of the state of one sequence."""
    config = speech.config
    temporal = config.temporal

    def make() -> steps.State:
        seen = (1, config.num_quantizers, config.codebook_size + 1)
        zero = jnp.zeros(1, jnp.int32)
        return steps.State(
            hidden=jnp.zeros((1, temporal.model_dim), jnp.bfloat16),
            cache=empty_cache(temporal.block, temporal.num_layers, COMPUTE, 1, cache_size),
            position=zero,
            num_frames=zero,
            max_frames=zero,
            ended=jnp.zeros(1, bool),
            seen=jnp.zeros(seen, bool),
            keys=jax.random.split(jax.random.key(0), 1),
        )

    return compiler.place(jax.eval_shape(make))


def estimate(compiler: Compiler, args: argparse.Namespace) -> None:
    """Prints the costs of all programs, and what follows from them."""
    speech = speech_of(compiler, args.model)
    config = speech.config
    number = generate.check_num_quantizers(config, args.num_quantizers)
    state = state_of(compiler, speech, args.cache)

    def sample_channels(speech, state):
        return steps.sample_channels(speech, state, state.keys, number, DEFAULT)

    def sample_frame(speech, state):
        return steps.sample_frame(speech, state, number, DEFAULT)

    def begin(speech, text, codes, length, keys):
        return steps.begin(speech, text, codes, length, length, keys, number, args.cache)

    text = jax.ShapeDtypeStruct((1, args.prompt), jnp.int32)
    codes = jax.ShapeDtypeStruct((1, config.num_quantizers, args.prompt), jnp.int32)
    prompt = compiler.place((text, codes, state.position, state.keys))
    prompt_seconds = compiler.seconds("prompt", begin, speech, *prompt)
    compiler.seconds("depth Transformer", sample_channels, speech, state)
    frame_seconds = compiler.seconds("frame", sample_frame, speech, state)
    decoder_seconds = decoder_frame(compiler, args.codec, number)
    total = frame_seconds + decoder_seconds
    print(f"first audio after at least {1000 * (prompt_seconds + total):.1f} ms")
    print(f"real-time factor at least {total * config.frame_rate:.2f}")


def decoder_frame(compiler: Compiler, name: str, number: int) -> float:
    """Seconds to decode one frame of a stream."""
    config = load_codec_config(name)
    params = nn.meta.unbox(codecs.boxed_shapes(config))
    codec = Codec(compiler.place(params, jnp.bfloat16), config, COMPUTE)
    state = compiler.place(jax.eval_shape(lambda: streaming.init_stream(codec, "decoder", 1)))
    codes = compiler.place(jax.ShapeDtypeStruct((1, number, 1), jnp.int32))
    return compiler.seconds("decoder, a frame", streaming.decode_step, codec, state, codes)


def main() -> None:
    """Compiles and prints."""
    args = parser().parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # no device here can run the programs
    try:
        mesh = compile_check.get_mesh(args.topology, "data:-1")
        chip = CHIPS[args.topology.partition(":")[0]]
        estimate(Compiler(chip, mesh.devices.flat[0]), args)
    except ValueError as error:
        parser().error(str(error))


def parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2", help="slice with the chip")
    parser.add_argument("--model", default=PUBLISHED[0], choices=PUBLISHED)
    parser.add_argument("--codec", default="v1", help="preset of its codec")
    parser.add_argument("--num_quantizers", type=int, help="default: all")
    parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
    parser.add_argument("--cache", type=int, default=1024, help="positions of the cache")
    return parser


if __name__ == "__main__":
    main()
