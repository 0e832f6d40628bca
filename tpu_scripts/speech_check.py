r"""Estimates the speed of speech generation on a TPU chip, from compiled programs, on any machine.

    python tpu_scripts/speech_check.py --topology=v5e:2x2 --num_quantizers=32

Needs libtpu (`pip install 'jax[tpu]'`). It compiles for one chip of the slice, in bfloat16 and with
weights stored in bfloat16: the prompt, a frame of one sequence (and its depth Transformer alone),
and a frame of the codec's decoder. It prints the traffic and the arithmetic of each, and the
real-time factor that they give: sampling one sequence is bound by reading weights.
"""

import argparse

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
from moss_tok.errors import check_choice
from moss_tok.language.text import ByteTokenizer
from moss_tok.nn.blocks import empty_cache
from moss_tok.nn.compute import PRECISIONS
from moss_tok.speech import pretrained, steps
from moss_tok.speech.config import PUBLISHED, published
from moss_tok.speech.sampling import DEFAULT

COMPUTE = PRECISIONS["bfloat16"]


class Chips:
    """Compiles programs for one chip of a slice."""

    def __init__(self, topology: str):
        """Raises ValueError if libtpu does not know the slice."""
        kind = topology.partition(":")[0]
        check_choice("topology", kind, tuple(CHIPS))
        self.chip: Chip = CHIPS[kind]
        mesh = compile_check.get_mesh(topology, "data:-1")
        self._sharding = jax.sharding.SingleDeviceSharding(mesh.devices.ravel()[0])

    def place(self, tree, dtype=None):
        """Shapes with a sharding; floating-point ones get the type `dtype`."""

        def place_one(x):
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            new_dtype = dtype if dtype and is_float else x.dtype
            return jax.ShapeDtypeStruct(x.shape, new_dtype, sharding=self._sharding)

        return jax.tree.map(place_one, tree)

    def seconds(self, title: str, function, *args) -> float:
        """Compiles a function, prints its costs, and returns its estimated time."""
        program = compile_check.compiled(jax.jit(function).lower(*args))
        costs = hlo.analyse(program.text)
        memory = costs.hbm_bytes / self.chip.hbm_rate
        arithmetic = costs.flops / self.chip.flops
        print(
            f"{title:<20} {giga(costs.hbm_bytes):>6} GB, {1000 * memory:6.2f} ms; "
            f"{costs.flops / 1e9:7.1f} GFLOP, {1000 * arithmetic:5.2f} ms; "
            f"peak {giga(program.peak)} of {giga(self.chip.hbm_bytes)} GB",
            flush=True,
        )
        return max(memory, arithmetic)


def speech_of(chips: Chips, name: str) -> steps.Speech:
    """A published model, as shapes in bfloat16."""
    config = published(name)
    params = nn.meta.unbox(pretrained.boxed_shapes(config))
    return steps.Speech(chips.place(params, jnp.bfloat16), config, ByteTokenizer(), COMPUTE)


def state_of(chips: Chips, speech: steps.Speech, cache_size: int) -> steps.State:
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

    return chips.place(jax.eval_shape(make))


def estimate(chips: Chips, args: argparse.Namespace) -> None:
    """Prints the costs of all programs, and what follows from them."""
    speech = speech_of(chips, args.model)
    config = speech.config
    number = args.num_quantizers or config.num_quantizers
    state = state_of(chips, speech, args.cache)
    integers = jnp.int32

    def sample_channels(speech, state):
        return steps.sample_channels(speech, state, state.keys, number, DEFAULT)

    def sample_frame(speech, state):
        return steps.sample_frame(speech, state, number, DEFAULT)

    def begin(speech, text, codes, one, keys):
        return steps.begin(speech, text, codes, one, one, keys, number, args.cache)

    text = jax.ShapeDtypeStruct((1, args.prompt), integers)
    codes = jax.ShapeDtypeStruct((1, config.num_quantizers, args.prompt), integers)
    prompt = chips.place((text, codes, state.position, state.keys))
    prompt_seconds = chips.seconds("prompt", begin, speech, *prompt)
    chips.seconds("depth Transformer", sample_channels, speech, state)
    frame_seconds = chips.seconds("frame", sample_frame, speech, state)
    decoder_seconds = decoder_frame(chips, args.codec, number)
    total = frame_seconds + decoder_seconds
    print(f"first audio after {1000 * (prompt_seconds + total):.1f} ms, at the earliest")
    print(f"real-time factor at least {total * config.frame_rate:.2f}, without overheads")


def decoder_frame(chips: Chips, name: str, number: int) -> float:
    """Seconds to decode one frame of a stream."""
    config = load_codec_config(name)
    params = nn.meta.unbox(codecs.boxed_shapes(config))
    codec = Codec(chips.place(params, jnp.bfloat16), config, COMPUTE)
    state = chips.place(jax.eval_shape(lambda: streaming.init_stream(codec, "decoder", 1)))
    codes = chips.place(jax.ShapeDtypeStruct((1, number, 1), jnp.int32))
    return chips.seconds("decoder, a frame", streaming.decode_step, codec, state, codes)


def main() -> None:
    """Compiles and prints."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2", help="slice with the chip")
    parser.add_argument("--model", default=PUBLISHED[0], choices=PUBLISHED)
    parser.add_argument("--codec", default="v1", help="preset of its codec")
    parser.add_argument("--num_quantizers", type=int, default=0, help="default: all")
    parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
    parser.add_argument("--cache", type=int, default=1024, help="positions of the cache")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # no device here can run the programs
    estimate(Chips(args.topology), args)


if __name__ == "__main__":
    main()
