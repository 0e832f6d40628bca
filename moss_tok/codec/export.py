"""StableHLO artifacts of a codec's functions, through `jax.export`: run them without moss_tok.

An artifact is a directory: FUNCTION.jaxexport, the program for CPUs, GPUs and TPUs, which any
process with jax (or, as StableHLO, another runtime) can call; params.safetensors, its first
argument, a dict of arrays by name; signature.json, what it takes and returns.
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

from moss_tok import tensors
from moss_tok.codec import inference, streaming
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import Caches, empty_caches
from moss_tok.errors import check_choice
from moss_tok.nn.cache import Cache

FUNCTIONS = ("encode", "decode", "encode_step", "decode_step")
WEIGHTS = ("beside", "inside")
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_INSIDE_BYTES = 10**9  # a serialised program must stay below 2 GB

_Arrays = dict[str, Any]


def export(
    codec: Codec,
    function: str,
    num_quantizers: int | None = None,
    chunk_frames: int = 1,
    weights: str = "beside",
) -> tuple[bytes, _Arrays, dict[str, Any]]:
    """Lowers one function of a codec for all platforms.

    The program takes, and returns as a tuple, flat dicts and arrays:

      encode       (params, wav [B, C, S], lengths [B]) -> codes [B, Q, T], lengths
      decode       (params, codes [B, Q, T], lengths [B]) -> wav [B, C, S], lengths
      encode_step  (params, state, wav [B, C, S], lengths [B]) -> state, codes [B, Q, T]
      decode_step  (params, state, codes [B, Q, T], lengths [B]) -> state, wav [B, C, S]

    B may be any number; so may S and T of encode and decode. A state begins as zeros.

    Args:
      codec: With the side that the function needs.
      function: One of FUNCTIONS.
      num_quantizers: Q; default: all.
      chunk_frames: T of the steps.
      weights: "beside": they are the first argument; "inside": they are part of the program,
        which has no `params` argument then.

    Returns:
      The serialised program, the parameters by name (empty where they are inside), and the shapes
      and dtypes of what it takes and returns.

    Raises:
      ValueError: An argument out of range, weights too large to go inside, or no flatbuffers.
    """
    _check(codec, function, chunk_frames, weights)
    side = "encoder" if function.startswith("encode") else "decoder"
    num_quantizers = codec.config.check_num_quantizers(num_quantizers)
    params = {name: codec.params[name] for name in (side, "quantizer")}
    params = traverse_util.flatten_dict(params, sep=".")
    if weights == "inside":
        _check_size(params)
    compute = dataclasses.replace(codec.compute, attention="blocked")  # whose shapes may be unknown
    codec = Codec(None, codec.config, compute)
    call, shapes = _call(codec, function, num_quantizers, chunk_frames)
    arguments = jax.tree.map(_describe, shapes)
    if weights == "inside":
        call, params = functools.partial(call, params), {}
    else:
        shapes = [{k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in params.items()}, *shapes]
        arguments = ["params", *arguments]
    exported = jax_export.export(jax.jit(call), platforms=PLATFORMS)(*shapes)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    signature = {
        "function": function,
        "platforms": PLATFORMS,
        "arguments": arguments,
        "results": jax.tree.map(_describe, results),
        "config": json.loads(codec.config.to_json()),
    }
    return bytes(exported.serialize()), params, signature


def write(
    folder: Path, function: str, program: bytes, params: _Arrays, signature: dict[str, Any]
) -> None:
    """Writes what `export` returned into an existing folder."""
    (folder / f"{function}.jaxexport").write_bytes(program)
    (folder / "signature.json").write_text(json.dumps(signature, indent=2) + "\n")
    if params:
        arrays = {name: np.asarray(x) for name, x in params.items()}
        tensors.write_tensors(folder / "params.safetensors", arrays)


def _check(codec: Codec, function: str, chunk_frames: int, weights: str) -> None:
    check_choice("function", function, FUNCTIONS)
    check_choice("weights", weights, WEIGHTS)
    inference.check_part(codec, "encoder" if function.startswith("encode") else "decoder")
    if not isinstance(chunk_frames, int) or not 1 <= chunk_frames <= 4096:
        raise ValueError(f"chunk_frames must be 1..4096, got {chunk_frames!r}")
    try:
        import flatbuffers  # noqa: F401  jax.export writes with it
    except ImportError as error:
        raise ValueError("to export, pip install 'moss_tok[export]'") from error


def _check_size(params: _Arrays) -> None:
    size_bytes = sum(x.nbytes for x in params.values())
    if size_bytes > LARGEST_INSIDE_BYTES:
        raise ValueError(
            f"weights of {size_bytes / 1e9:.1f} GB do not fit inside a program, at most "
            f"{LARGEST_INSIDE_BYTES / 1e9:g} GB; choose weights beside it"
        )


def _call(
    codec: Codec, function: str, num_quantizers: int, chunk_frames: int
) -> tuple[Callable[..., Any], list[Any]]:
    """A function of flat dicts and arrays, and the shapes of its arguments but the first."""
    c, f32, i32 = codec.config, jnp.float32, jnp.int32
    batch, samples, frames = jax_export.symbolic_shape("B, S, T")
    if function.endswith("_step"):
        samples, frames = chunk_frames * c.hop_length, chunk_frames
    wav = jax.ShapeDtypeStruct((batch, c.num_channels, samples), f32)
    codes = jax.ShapeDtypeStruct((batch, num_quantizers, frames), i32)
    x = wav if function.startswith("encode") else codes
    shapes = [x, jax.ShapeDtypeStruct((batch,), i32)]
    ready = functools.partial(_with_params, codec)
    if function == "encode":

        def call(params, wav, lengths):
            return tuple(inference.encode(ready(params), wav, lengths, num_quantizers, 0))

    elif function == "decode":

        def call(params, codes, lengths):
            return tuple(inference.decode(ready(params), codes, lengths, 0))

    else:
        side = "encoder" if function == "encode_step" else "decoder"
        caches = functools.partial(empty_caches, codec.config, codec.compute, side, 1)
        state = {"position": jax.ShapeDtypeStruct((batch,), i32)}
        for name, x in _flat(jax.eval_shape(caches)).items():
            state[name] = jax.ShapeDtypeStruct((x.shape[0], batch, *x.shape[2:]), x.dtype)
        shapes.insert(0, state)

        def call(params, state, x, lengths):
            caches = {name: x for name, x in state.items() if name != "position"}
            state = streaming.StreamState(state["position"], _nested(caches))
            if function == "encode_step":
                state, out = streaming.encode_step(ready(params), state, x, lengths, num_quantizers)
            else:
                state, out = streaming.decode_step(ready(params), state, x, lengths)
            return {"position": state.position} | _flat(state.caches), out

    return call, shapes


def _with_params(codec: Codec, params: _Arrays) -> Codec:
    return codec.replace(params=traverse_util.unflatten_dict(params, sep="."))


def _flat(caches: Caches) -> _Arrays:
    """Arrays by "stage.keys" and "stage.values"."""
    return {
        f"{stage}.{part}": getattr(cache, part)
        for stage, cache in caches.items()
        for part in ("keys", "values")
    }


def _nested(arrays: _Arrays) -> Caches:
    stages = traverse_util.unflatten_dict(arrays, sep=".")
    return {stage: Cache(**parts) for stage, parts in stages.items()}


def _describe(x: Any) -> dict[str, Any]:
    return {"shape": [n if isinstance(n, int) else str(n) for n in x.shape], "dtype": x.dtype.name}
