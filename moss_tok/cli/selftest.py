"""The self-test of `moss-tok doctor`: a tiny codec whose codes and audio are known.

The parameters of the codec and its input follow from formulas, so the answers stay the same when
the codec in the package changes. They were computed on a CPU.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

import moss_tok
from moss_tok import assets
from moss_tok.codec import huggingface, pretrained
from moss_tok.codec.config import CodecConfig, PatchConfig, QuantizerConfig, TransformerConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.presets import mirror

_NUM_FRAMES = 24  # twice the attention window
_CODES = """
    36 40 35 10 40 10 40 8 35 43 19 8 43 42 19 1 19 42 42 42 43 42 17 42
    61 55 51 55 55 55 55 22 51 61 51 61 15 34 51 11 35 51 46 63 17 46 51 6
    22 10 6 18 51 18 29 21 6 7 6 38 41 46 43 43 1 41 39 46 37 46 48 41
"""
_SAMPLES = """
    -0.2798 -0.2589 -1.5698 -0.3768 0.1009 -0.4203 -0.5179 -0.5923 -1.0786 -0.6888 -0.1631 -0.0421
    -0.4138 -0.5254 -0.4777 -1.1659 -0.4897 -0.8925 -0.2202 -1.0522 -1.1087 -1.6255 -0.8002 0.1477
"""  # of the decoded audio, one of each frame
_NOT_OPTIMIZED = "jax_disable_most_optimizations"
_TOLERANCE = 1e-3  # of samples, in units of their peak


def run() -> Iterator[tuple[bool, str]]:
    """Yields whether each check passed, and what it found."""
    yield _check_weights()
    codec = _tiny_codec()
    wav = _wav()
    known = known_codes()
    with _fast_compilation():
        codes = np.asarray(moss_tok.encode(codec, wav[None]).codes)[0]
        yield _compare(codes, known, "codes of encode equal the known ones")
        yield _compare(_stream(codec, wav), codes, "codes of a stream equal those of encode")
        wav_hat = np.asarray(moss_tok.decode(codec, known[None]).wav)[0, 0]
    yield _check_audio(wav_hat)


def known_codes() -> np.ndarray:
    """The codes [Q, T] that the tiny codec gives for the input."""
    return np.array(_CODES.split(), int).reshape(-1, _NUM_FRAMES)


@contextlib.contextmanager
def _fast_compilation() -> Iterator[None]:
    """Compiles without optimizations on CPUs, which halves the time."""
    before = jax.config.read(_NOT_OPTIMIZED)
    jax.config.update(_NOT_OPTIMIZED, before or jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update(_NOT_OPTIMIZED, before)


def _tiny_codec() -> Codec:
    """A codec of some thousand parameters, 40 samples per frame and windows of 12 frames."""
    encoder = (PatchConfig(40), TransformerConfig(40, 16, 32, 2, 1, 64, 0.06))
    quantizer = QuantizerConfig(16, 16, 16, 3, 64, 4)
    config = CodecConfig(8000, 1, encoder, quantizer, mirror(encoder))
    shapes, tree = jax.tree.flatten(pretrained.param_shapes(config))
    params = []
    first = 0
    for array in shapes:
        number = np.arange(first, first + array.size, dtype=np.float64)
        first += array.size
        fan_in = array.shape[-2] if array.ndim > 1 else 1
        values = np.sin(number**2) * (2 / fan_in) ** 0.5  # as good as random
        params.append(values.reshape(array.shape).astype(np.float32))
    return Codec(tree.unflatten(params), config)


def _wav() -> np.ndarray:
    """A tone that rises [1, S]."""
    time = np.arange(40 * _NUM_FRAMES)
    return (0.3 * np.sin(time**1.4 / 9)).astype(np.float32)[None]


def _stream(codec: Codec, wav: np.ndarray) -> np.ndarray:
    size = 285  # no whole number of frames
    with moss_tok.EncoderStream(codec, chunk_frames=[8]) as stream:
        parts = [stream.push(wav[:, at : at + size]) for at in range(0, wav.shape[1], size)]
        parts.append(stream.finish())
    return np.concatenate(parts, axis=1)


def _compare(codes: np.ndarray, expected: np.ndarray, text: str) -> tuple[bool, str]:
    share = float(np.mean(codes == expected))
    return share == 1, f"{share:.1%} of the {text}"


def _check_audio(wav_hat: np.ndarray) -> tuple[bool, str]:
    if not np.isfinite(wav_hat).all():
        return False, "the decoded audio has samples that are not finite numbers"
    known = np.array(_SAMPLES.split(), float)
    difference = np.abs(wav_hat[20::40] - known).max() / np.abs(known).max()
    text = f"the decoded audio differs from the known one by {difference:.1e} of its peak"
    return bool(difference <= _TOLERANCE), text


def _check_weights() -> tuple[bool, str]:
    _, params = huggingface.read_official(assets.codec_folder())
    arrays = jax.tree.leaves(params)
    number = sum(array.size for array in arrays)
    num_finite = sum(int(np.isfinite(array).sum()) for array in arrays)
    text = f"{num_finite:,} of {number:,} weights of the codec in the package are finite numbers"
    return num_finite == number, text
