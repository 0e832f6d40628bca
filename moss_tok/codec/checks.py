"""Checks of what users pass: the shapes, types and values of audio, codes and lengths.

Shapes and types are checked always. Values are checked where they can be looked at; the docstring
of `moss_tok` says where that is. Nothing in here adds an operation to a traced function.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SAMPLE = float(np.finfo(np.float32).max)


def check_part(codec: Any, name: str) -> None:
    """Raises ValueError if the codec was loaded without that side."""
    if name not in codec.params:
        raise ValueError(f"this codec was loaded without its {name}")


def check_wav(
    wav: Any, shape: tuple[str | int, ...], lengths: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Audio and its lengths as arrays.

    Args:
      wav: What should be floating point audio.
      shape: Its wanted shape [B, C, S]; names stand for any size above 0.
      lengths: What should be the valid samples of each item; default: all of them.

    Returns:
      The audio, and the lengths [B] int32.

    Raises:
      ValueError: Another shape or type, lengths beyond the array, or samples before them that are
        not finite numbers.
    """
    given = _to_array("wav", wav, "floating point in [-1, 1]")
    check_shape("wav", given, shape, _wav_hint(given.shape, shape))
    check_floating("wav", given)
    array = jnp.asarray(given)
    lengths, ends = _read_lengths(lengths, array)
    for part in _valid_parts(array, given, ends):
        check_samples("wav", part)
    return array, lengths


def check_codes(
    codes: Any, shape: tuple[str | int, ...], codebook_size: int, lengths: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and their lengths as arrays.

    Args:
      codes: What should be integers.
      shape: Their wanted shape [B, Q, T]; names stand for any size above 0.
      codebook_size: K.
      lengths: What should be the valid frames of each item; default: all of them.

    Returns:
      The codes, and the lengths [B] int32.

    Raises:
      ValueError: Another shape or type, lengths beyond the array, or codes before them that are
        not in [0, K).
    """
    given = _to_array("codes", codes, "integers")
    hint = "use codes[None] for one recording" if given.ndim == 2 else ""
    check_shape("codes", given, shape, hint)
    check_integers("codes", given)
    array = _to_int32(given)
    lengths, ends = _read_lengths(lengths, array)
    for part in _valid_parts(array, given, ends):
        check_code_range("codes", part, codebook_size)
    return array, lengths


def check_recordings(
    name: str, recordings: Any, shape: tuple[str | int, ...]
) -> list[np.ndarray | jax.Array]:
    """Recordings as arrays, without a batch. Raises ValueError unless each has the shape."""
    arrays = []
    for number, recording in enumerate(recordings):
        array = _to_array(f"{name} {number}", recording, "one recording each")
        check_shape(f"{name} {number}", array, shape)
        arrays.append(array)
    return arrays


def _read_lengths(lengths: Any, x: jax.Array) -> tuple[jax.Array, np.ndarray | None]:
    """Lengths [B] within the last axis of `x` [B, ...]; default: all of it.

    Returns:
      int32, clamped where the values cannot be looked at; and the values, None where they cannot.

    Raises:
      ValueError: Another shape or type, or lengths that are negative or beyond the axis.
    """
    size = x.shape[-1]
    if lengths is None:
        everything = jnp.full(x.shape[:1], size, jnp.int32)
        # Computed, so it is traced wherever anything is.
        is_traced = isinstance(everything, jax.core.Tracer)
        return everything, None if is_traced else np.full(x.shape[:1], size)
    given = _to_array("lengths", lengths, "integers")
    if given.shape != x.shape[:1] or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of the shape [{x.shape[0]}], "
            f"got {given.dtype} {list(given.shape)}"
        )
    clamped = jnp.clip(_to_int32(given), 0, size)
    if isinstance(clamped, jax.core.Tracer):
        return clamped, None
    values = _host_values(given)
    if values is not None and not (values.min() >= 0 and values.max() <= size):
        raise ValueError(f"lengths must be 0..{size}, got {_range(values)}")
    return clamped, values


def check_shape(
    name: str, x: Any, shape: tuple[str | int, ...], hint: str = "", may_be_empty: bool = False
) -> None:
    """Raises ValueError unless `x` has the shape; names stand for any size above 0.

    Args:
      name: What messages call it.
      x: An array.
      shape: What it should be.
      hint: How it could become so, for the message.
      may_be_empty: Sizes of 0 are accepted, too.
    """
    fits = x.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits or (0 in x.shape and not may_be_empty):
        wanted = ", ".join(map(str, shape))
        message = f"{name} must have the shape [{wanted}], got {list(x.shape)}"
        raise ValueError(f"{message}: {hint}" if hint else message)


def check_floating(name: str, x: Any) -> None:
    """Raises ValueError unless `x` is floating point; of integers it says how they become so."""
    if jnp.issubdtype(x.dtype, jnp.floating):  # bfloat16 too
        return
    hint = ""
    if x.dtype == np.int16:
        hint = f": use {name} / 32768"
    elif jnp.issubdtype(x.dtype, jnp.integer):
        hint = ": divide it by the integers' full scale"
    raise ValueError(f"{name} must be floating point in [-1, 1], got {x.dtype}{hint}")


def check_integers(name: str, x: Any) -> None:
    """Raises ValueError unless `x` has an integer type."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {x.dtype}")


def check_samples(name: str, wav: np.ndarray) -> None:
    """Raises ValueError unless all samples are finite in float32."""
    if not wav.size:
        return
    with np.errstate(invalid="ignore"):
        lowest = wav.min()  # NaN where there is one
        highest = wav.max()
    if not (lowest >= -_LARGEST_SAMPLE and highest <= _LARGEST_SAMPLE):
        raise ValueError(f"{name} has samples that are not finite numbers")


def check_code_range(name: str, codes: np.ndarray, codebook_size: int) -> None:
    """Raises ValueError unless all codes are in [0, codebook_size)."""
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(f"{name} must be 0..{codebook_size - 1}, got {_range(codes)}")


def _range(values: np.ndarray) -> str:
    return f"{values.min()}..{values.max()}"


def _wav_hint(shape: tuple[int, ...], wanted: tuple[str | int, ...]) -> str:
    """How audio of a shape without a batch, or without channels, gets the wanted one."""
    channels = wanted[1]
    if len(shape) == 1 and channels == 1:
        return "use wav[None, None]"
    if len(shape) == 2 and shape[0] == channels:
        return "use wav[None]"
    if len(shape) == 2 and shape[1] == channels:
        return "use wav.T[None]"
    if len(shape) == 2 and channels == 1:
        return "use wav[:, None] for a batch"
    return ""


def _to_array(name: str, x: Any, wanted: str) -> np.ndarray | jax.Array:
    """What is an array, or like one; arrays on the host are left there."""
    try:
        if isinstance(x, jax.Array):
            return x
        if isinstance(x, (list, tuple)):
            is_on_host = not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
        else:  # tensors of torch in the memory of a GPU, say, have both attributes
            is_on_host = hasattr(x, "__array__") and not hasattr(x, "__cuda_array_interface__")
        return np.asarray(x) if is_on_host else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # Text, lists of unequal lengths, tensors of torch that want gradients.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} must be an array, {wanted}, got {type(x).__name__} ({reason})"
        ) from error


def _to_int32(integers: np.ndarray | jax.Array) -> jax.Array:
    """Integers as jax has them, those that do not fit clamped to 0 or more, not wrapped."""
    if isinstance(integers, np.ndarray) and integers.dtype.itemsize >= 4:
        integers = np.clip(integers, 0, np.iinfo(np.int32).max).astype(np.int32)
    return jnp.asarray(integers).astype(jnp.int32)


def _host_values(given: np.ndarray | jax.Array) -> np.ndarray | None:
    """The values of a concrete array; None where other processes have some of them."""
    if isinstance(given, np.ndarray):
        return given
    return np.asarray(given) if given.is_fully_addressable else None


def _valid_parts(
    array: jax.Array, given: np.ndarray | jax.Array, ends: np.ndarray | None
) -> list[np.ndarray]:
    """The values of each item before its end, where they can be looked at; else nothing."""
    if ends is None or isinstance(array, jax.core.Tracer):
        return []
    if isinstance(given, jax.Array) and any(d.platform != "cpu" for d in given.devices()):
        return []
    values = _host_values(given)
    if values is None:
        return []
    return [row[..., :end] for row, end in zip(values, ends, strict=True)]


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
