"""StableHLO artifacts of a codec's functions, through `jax.export`, to run without moss_tok.

An artifact is a directory:

  FUNCTION.jaxexport   the program for CPUs, GPUs and TPUs; jax and other runtimes for StableHLO can
                       call it
  params.safetensors   its first argument, a dict of arrays by name; absent if the weights are part
                       of the program
  signature.json       shapes and dtypes of its arguments and results, and the codec's config
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from moss_tok import extras, tensors
from moss_tok.codec import inference, streaming
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import Caches, empty_caches
from moss_tok.errors import check_choice
from moss_tok.json_files import format_json
from moss_tok.nn.cache import Cache

FUNCTIONS = ("encode", "decode", "encode_step", "decode_step")
WEIGHTS = ("beside", "inside")
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_INSIDE_BYTES = 10**9  # a serialized program must stay below 2 GB

_Arrays = dict[str, Any]


def export(
    codec: Codec,
    function: str,
    num_quantizers: int | None = None,
    chunk_frames: int = 1,
    weights: str = "beside",
) -> tuple[bytes, _Arrays, dict[str, Any]]:
    """Lowers one function of a codec for all platforms.

    The program takes flat dicts and arrays, and returns a tuple of them:

      encode       (params, wav [B, C, S], lengths [B]) -> codes [B, Q, T], lengths
      decode       (params, codes [B, Q, T], lengths [B]) -> wav [B, C, S], lengths
      encode_step  (params, state, wav [B, C, S], lengths [B]) -> state, codes [B, Q, T]
      decode_step  (params, state, codes [B, Q, T], lengths [B]) -> state, wav [B, C, S]

    B may be any number, and so may S and T of encode and decode. The initial state is all zeros.

    Args:
      codec: A codec with the side that the function needs.
      function: One of FUNCTIONS.
      num_quantizers: Q; default: all.
      chunk_frames: T of the step functions, 1..4096.
      weights: "beside": the weights are the first argument; "inside": they are part of the program,
        which then takes no `params` argument.

    Returns:
      The serialized program, the parameters by name (empty if they are inside), and the content of
      signature.json.

    Raises:
      ValueError: An argument is out of range, the weights are too large to go inside, or the
        package flatbuffers is not installed.
    """
    _check(codec, function, chunk_frames, weights)
    side = _side(function)
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    params = {side: codec.params[side], "quantizer": codec.params["quantizer"]}
    params = traverse_util.flatten_dict(params, sep=".")
    if weights == "inside":
        _check_size(params)
    # Blocked attention allows symbolic shapes.
    compute = dataclasses.replace(codec.compute, attention="blocked")
    codec = Codec(None, codec.config, compute)
    flat_function, shapes = _flat_function(codec, function, num_quantizers, chunk_frames)
    arguments = jax.tree.map(_describe, shapes)
    if weights == "inside":
        flat_function = functools.partial(flat_function, params)
        params = {}
    else:
        shapes = [_shapes_of(params), *shapes]
        arguments = ["params", *arguments]
    exported = jax_export.export(jax.jit(flat_function), platforms=PLATFORMS)(*shapes)
    signature = _signature(codec, function, arguments, exported)
    return bytes(exported.serialize()), params, signature


def _side(function: str) -> str:
    return "encoder" if function.startswith("encode") else "decoder"


def _shapes_of(arrays: _Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {}
    for name, array in arrays.items():
        shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return shapes


def _signature(
    codec: Codec,
    function: str,
    arguments: list[Any],
    exported: jax_export.Exported,
) -> dict[str, Any]:
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "function": function,
        "platforms": PLATFORMS,
        "arguments": arguments,
        "results": jax.tree.map(_describe, results),
        "config": json.loads(codec.config.to_json()),
    }


def write(
    folder: Path,
    function: str,
    program: bytes,
    params: _Arrays,
    signature: dict[str, Any],
) -> None:
    """Writes the results of `export` into an existing folder."""
    (folder / f"{function}.jaxexport").write_bytes(program)
    (folder / "signature.json").write_text(format_json(signature))
    if params:
        arrays = jax.tree.map(np.asarray, params)
        tensors.write_tensors(folder / "params.safetensors", arrays)


def _check(codec: Codec, function: str, chunk_frames: int, weights: str) -> None:
    check_choice("function", function, FUNCTIONS)
    check_choice("weights", weights, WEIGHTS)
    inference.check_part(codec, _side(function))
    if not isinstance(chunk_frames, int) or not 1 <= chunk_frames <= 4096:
        raise ValueError(f"chunk_frames must be 1..4096, got {chunk_frames!r}")
    try:
        import flatbuffers  # noqa: F401  jax.export serializes with it
    except ImportError as error:
        raise ValueError(f"export needs flatbuffers: {extras.install('export')}") from error


def _check_size(params: _Arrays) -> None:
    size_bytes = sum(array.nbytes for array in params.values())
    if size_bytes > LARGEST_INSIDE_BYTES:
        raise ValueError(
            f"weights of {size_bytes / 1e9:.1f} GB do not fit inside a program, the limit is "
            f"{LARGEST_INSIDE_BYTES / 1e9:g} GB; use weights=beside"
        )


def _flat_function(
    codec: Codec,
    function: str,
    num_quantizers: int,
    chunk_frames: int,
) -> tuple[Callable[..., Any], list[Any]]:
    """A function over flat dicts and arrays, and the shapes of its arguments except `params`."""
    config = codec.config
    batch, samples, frames = jax_export.symbolic_shape("B, S, T")
    if function.endswith("_step"):
        samples = chunk_frames * config.hop_length
        frames = chunk_frames
    wav = jax.ShapeDtypeStruct((batch, config.num_channels, samples), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch, num_quantizers, frames), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def encode(params, wav, lengths):
        full = _with_params(codec, params)
        encoded = inference.encode(full, wav, lengths, num_quantizers, chunk_seconds=0)
        return tuple(encoded)

    def decode(params, codes, lengths):
        full = _with_params(codec, params)
        decoded = inference.decode(full, codes, lengths, chunk_seconds=0)
        return tuple(decoded)

    def encode_step(params, state, wav, lengths):
        full = _with_params(codec, params)
        state = _unflatten_state(state)
        state, codes = streaming.encode_step(full, state, wav, lengths, num_quantizers)
        return _flatten_state(state), codes

    def decode_step(params, state, codes, lengths):
        full = _with_params(codec, params)
        state = _unflatten_state(state)
        state, wav = streaming.decode_step(full, state, codes, lengths)
        return _flatten_state(state), wav

    if function == "encode":
        return encode, [wav, lengths]
    if function == "decode":
        return decode, [codes, lengths]
    if function == "encode_step":
        return encode_step, [_state_shapes(codec, "encoder", batch), wav, lengths]
    return decode_step, [_state_shapes(codec, "decoder", batch), codes, lengths]


def _state_shapes(codec: Codec, side: str, batch: Any) -> _Arrays:
    """Shapes of the flat state of `batch` streams, which may be symbolic."""
    caches = functools.partial(empty_caches, codec.config, codec.compute, side, 1)
    shapes = {"position": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    for name, array in _flatten_caches(jax.eval_shape(caches)).items():
        num_layers, _, *sizes = array.shape
        shapes[name] = jax.ShapeDtypeStruct((num_layers, batch, *sizes), array.dtype)
    return shapes


def _with_params(codec: Codec, params: _Arrays) -> Codec:
    return codec.replace(params=traverse_util.unflatten_dict(params, sep="."))


def _flatten_state(state: streaming.StreamState) -> _Arrays:
    return {"position": state.position} | _flatten_caches(state.caches)


def _unflatten_state(arrays: _Arrays) -> streaming.StreamState:
    caches = dict(arrays)
    position = caches.pop("position")
    return streaming.StreamState(position, _unflatten_caches(caches))


def _flatten_caches(caches: Caches) -> _Arrays:
    """Arrays under the names STAGE.keys and STAGE.values."""
    arrays = {}
    for stage, cache in caches.items():
        arrays[f"{stage}.keys"] = cache.keys
        arrays[f"{stage}.values"] = cache.values
    return arrays


def _unflatten_caches(arrays: _Arrays) -> Caches:
    stages = traverse_util.unflatten_dict(arrays, sep=".")
    return {stage: Cache(**parts) for stage, parts in stages.items()}


def _describe(x: Any) -> dict[str, Any]:
    """Shape and dtype for JSON; symbolic sizes become text."""
    shape = [size if isinstance(size, int) else str(size) for size in x.shape]
    return {"shape": shape, "dtype": x.dtype.name}
