"""Checks of the shapes, types and values of the audio, codes and lengths that users pass.

Shapes and types are always checked. Values are checked where they can be read without waiting; see
the docstring of `moss_tok`. The checks add no operation to a traced function.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SAMPLE = float(np.finfo(np.float32).max)


def check_part(codec: Any, name: str) -> None:
    """Raises ValueError if the codec was loaded without the part `name`, "encoder" or "decoder"."""
    if name not in codec.params:
        raise ValueError(f"this codec was loaded without its {name}")


def check_static(name: str, value: Any) -> None:
    """Raises ValueError if an argument that must be static is traced by a transformation."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be static under jax.jit: static_argnames={name!r}")


def check_wav(
    wav: Any,
    shape: tuple[str | int, ...],
    lengths: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Checks audio and its lengths, and converts them to JAX arrays.

    Args:
      wav: Floating point audio [B, C, S], an array or array-like.
      shape: The required shape; a name stands for any size above 0.
      lengths: [B] integers, valid samples of each item; default: all S.

    Returns:
      The audio, and the lengths [B] int32.

    Raises:
      ValueError: Wrong shape or type, lengths beyond the array, or valid samples that are not
        finite.
    """
    given = _to_array("wav", wav, "floating point in [-1, 1]")
    check_shape("wav", given, shape, _wav_hint(given.shape, shape))
    check_floating("wav", given)
    array = jnp.asarray(given)
    lengths, ends = _read_lengths(lengths, array)
    for samples in _valid_parts(array, given, ends):
        check_samples("wav", samples)
    return array, lengths


def check_codes(
    codes: Any,
    shape: tuple[str | int, ...],
    codebook_size: int,
    lengths: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Checks codes and their lengths, and converts them to JAX arrays.

    Args:
      codes: Integers [B, Q, T], an array or array-like.
      shape: The required shape; a name stands for any size above 0.
      codebook_size: K.
      lengths: [B] integers, valid frames of each item; default: all T.

    Returns:
      The codes [B, Q, T] int32, and the lengths [B] int32.

    Raises:
      ValueError: Wrong shape or type, lengths beyond the array, or valid codes outside [0, K).
    """
    given = _to_array("codes", codes, "integers")
    hint = "use codes[None] for one recording" if given.ndim == 2 else ""
    check_shape("codes", given, shape, hint)
    check_integers("codes", given)
    array = _to_int32(given)
    lengths, ends = _read_lengths(lengths, array)
    for valid_codes in _valid_parts(array, given, ends):
        check_code_range("codes", valid_codes, codebook_size)
    return array, lengths


def check_recordings(
    name: str,
    recordings: Any,
    shape: tuple[str | int, ...],
) -> list[np.ndarray | jax.Array]:
    """Converts unbatched recordings to arrays. Raises ValueError unless each has the shape."""
    arrays = []
    for number, recording in enumerate(recordings):
        array = _to_array(f"{name} {number}", recording, "one recording each")
        check_shape(f"{name} {number}", array, shape)
        arrays.append(array)
    return arrays


def _read_lengths(lengths: Any, x: jax.Array) -> tuple[jax.Array, np.ndarray | None]:
    """Checks lengths [B] along the last axis of `x` [B, ...]; default: its full size.

    Returns:
      The lengths as int32, clamped to the axis in case their values cannot be read; and their
      values on the host, None if they cannot be read.

    Raises:
      ValueError: Wrong shape or type, or lengths that are negative or beyond the axis.
    """
    size = x.shape[-1]
    if lengths is None:
        full = jnp.full(x.shape[:1], size, jnp.int32)
        # `full` is a computed value, so it is a tracer whenever anything is traced.
        is_traced = isinstance(full, jax.core.Tracer)
        return full, None if is_traced else np.full(x.shape[:1], size)
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
    name: str,
    x: Any,
    shape: tuple[str | int, ...],
    hint: str = "",
    may_be_empty: bool = False,
) -> None:
    """Raises ValueError unless `x` has the shape.

    Args:
      name: Name of the argument, for the message.
      x: An array.
      shape: The required shape; a name stands for any size above 0.
      hint: How to fix a wrong shape, for the message.
      may_be_empty: Whether sizes of 0 are accepted, too.
    """
    if _has_shape(x, shape) and (may_be_empty or 0 not in x.shape):
        return
    required = ", ".join(map(str, shape))
    message = f"{name} must have the shape [{required}], got {list(x.shape)}"
    if hint:
        message = f"{message}: {hint}"
    raise ValueError(message)


def _has_shape(x: Any, shape: tuple[str | int, ...]) -> bool:
    if x.ndim != len(shape):
        return False
    for size, required in zip(x.shape, shape, strict=True):
        if not isinstance(required, str) and size != required:
            return False
    return True


def check_floating(name: str, x: Any) -> None:
    """Raises ValueError unless `x` is floating point; the message says how to convert integers."""
    if jnp.issubdtype(x.dtype, jnp.floating):  # np.issubdtype does not know bfloat16
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
        lowest = wav.min()  # NaN if any sample is NaN
        highest = wav.max()
    if not (lowest >= -_LARGEST_SAMPLE and highest <= _LARGEST_SAMPLE):
        raise ValueError(f"{name} has samples that are not finite numbers")


def check_code_range(name: str, codes: np.ndarray, codebook_size: int) -> None:
    """Raises ValueError unless all codes are in [0, codebook_size)."""
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(f"{name} must be 0..{codebook_size - 1}, got {_range(codes)}")


def _range(values: np.ndarray) -> str:
    return f"{values.min()}..{values.max()}"


def _wav_hint(shape: tuple[int, ...], required: tuple[str | int, ...]) -> str:
    """How to add the missing batch or channel axis to audio of `shape`; "" if unclear."""
    channels = required[1]
    if len(shape) == 1 and channels == 1:
        return "use wav[None, None]"
    if len(shape) == 2 and shape[0] == channels:
        return "use wav[None]"
    if len(shape) == 2 and shape[1] == channels:
        return "use wav.T[None]"
    if len(shape) == 2 and channels == 1:
        return "use wav[:, None] for a batch"
    return ""


def _to_array(name: str, x: Any, accepted: str) -> np.ndarray | jax.Array:
    """Converts `x` to an array; data in host memory stays there."""
    try:
        if isinstance(x, jax.Array):
            return x
        return np.asarray(x) if _is_on_host(x) else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # Causes: text, lists of unequal lengths, torch tensors that require gradients.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} must be an array, {accepted}, got {type(x).__name__} ({reason})"
        ) from error


def _is_on_host(x: Any) -> bool:
    """Whether the data of an array-like value is in host memory."""
    if isinstance(x, (list, tuple)):
        return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    # Torch tensors in GPU memory, for example, have both attributes.
    return hasattr(x, "__array__") and not hasattr(x, "__cuda_array_interface__")


def _to_int32(integers: np.ndarray | jax.Array) -> jax.Array:
    """Converts integers to int32; wide numpy values are clamped to 0..2**31 - 1, not wrapped."""
    if isinstance(integers, np.ndarray) and integers.dtype.itemsize >= 4:
        integers = np.clip(integers, 0, np.iinfo(np.int32).max).astype(np.int32)
    return jnp.asarray(integers).astype(jnp.int32)


def _host_values(given: np.ndarray | jax.Array) -> np.ndarray | None:
    """The values of a concrete array; None if other processes hold some of them."""
    if isinstance(given, np.ndarray):
        return given
    return np.asarray(given) if given.is_fully_addressable else None


def _valid_parts(
    array: jax.Array,
    given: np.ndarray | jax.Array,
    ends: np.ndarray | None,
) -> list[np.ndarray]:
    """The valid values of each item; an empty list if they cannot be read without waiting."""
    if ends is None or isinstance(array, jax.core.Tracer):
        return []
    if isinstance(given, jax.Array):
        platforms = {device.platform for device in given.devices()}
        if platforms != {"cpu"}:
            return []
    values = _host_values(given)
    if values is None:
        return []
    parts = []
    for row, end in zip(values, ends, strict=True):
        parts.append(row[..., :end])
    return parts


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; booleans do not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_num_samples(alternative: str, number: int) -> None:
    """Raises ValueError for more samples than int32 can count; symbolic sizes are not checked."""
    if isinstance(number, int) and number >= 2**31:
        raise ValueError(
            f"{number} samples in one call, the limit is {2**31 - 1}: use {alternative}"
        )
