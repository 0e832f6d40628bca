"""The .npz files of codes that `moss-tok encode` writes and `moss-tok decode` reads."""

import dataclasses
from pathlib import Path

import numpy as np

from moss_tok import storage, summary
from moss_tok.audio import files
from moss_tok.codec.checks import check_code_range
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.pretrained import quantizer_fingerprint

_FINGERPRINT = "quantizer"  # missing in files of earlier versions
_KEYS = ("sample_rate", "num_samples", "num_channels", "hop_length", "codebook_size")


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """Codes of one recording.

    Attributes:
      codes: [Q, T] int16.
      num_samples: Samples per channel of the recording at the codec's sample rate.
    """

    codes: np.ndarray
    num_samples: int

    def __repr__(self) -> str:
        codes = summary.describe_array(self.codes)
        return f"CodeFile(codes: {codes}, num_samples: {self.num_samples})"


def write(path: str | Path, codes: np.ndarray, num_samples: int, codec: Codec) -> None:
    """Writes codes [Q, T], together with the properties of the codec that `read` checks."""
    config = codec.config
    fields = {
        "codes": np.asarray(codes).astype(np.int16),
        "sample_rate": config.sample_rate,
        "num_samples": num_samples,
        "num_channels": config.num_channels,
        "hop_length": config.hop_length,
        "codebook_size": config.quantizer.codebook_size,
        _FINGERPRINT: quantizer_fingerprint(codec),
    }
    files.write_atomically(path, lambda file: np.savez(file, **fields))


def read(path: str | Path, codec: Codec) -> CodeFile:
    """Reads a code file and checks that a codec can decode it. Nothing is unpickled.

    Raises:
      ValueError: The file is not an .npz file, lacks a key, or has codes of another codec.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        fields = _load(path)
    except Exception as error:  # numpy and zipfile raise any type on files that are not archives
        reason = storage.pointer_hint(path) or error
        raise ValueError(f"{path}: not a .npz file of codes ({reason})") from error
    for key in ("codes", *_KEYS):
        if key not in fields:
            raise ValueError(f"{path}: missing key {key!r}")
    try:
        file = _check(fields, codec.config)
        if _FINGERPRINT in fields:
            check_quantizer(str(fields[_FINGERPRINT]), codec)
        return file
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_quantizer(fingerprint: str, codec: Codec) -> None:
    """Raises ValueError unless the codec has this `quantizer_fingerprint`."""
    expected = quantizer_fingerprint(codec)
    if fingerprint != expected:
        raise ValueError(
            f"the codes are of another codec (quantizer {fingerprint}, this checkpoint has "
            f"{expected})"
        )


def _load(path: Path) -> dict[str, np.ndarray]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    fields = {}
    with archive:
        for key in ("codes", *_KEYS, _FINGERPRINT):
            if key in archive:
                fields[key] = archive[key]
    for key, value in fields.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{key} is not an array")
    return fields


def _check(fields: dict[str, np.ndarray], config: CodecConfig) -> CodeFile:
    numbers = {}
    for key in _KEYS:
        if fields[key].shape != () or fields[key].dtype.kind not in "iu":
            raise ValueError(f"{key} must be one integer, got {fields[key].dtype} array")
        numbers[key] = int(fields[key])
    expected = {
        "sample_rate": config.sample_rate,
        "num_channels": config.num_channels,
        "hop_length": config.hop_length,
        "codebook_size": config.quantizer.codebook_size,
    }
    for key, value in expected.items():
        if numbers[key] != value:
            raise ValueError(f"{key} must be {value} for this checkpoint, got {numbers[key]}")
    codes = fields["codes"]
    num_samples = numbers["num_samples"]
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [Q, T], got {codes.dtype} {list(codes.shape)}")
    if codes.size == 0:
        raise ValueError("codes are empty")
    max_quantizers = config.quantizer.num_quantizers
    if codes.shape[0] > max_quantizers:
        raise ValueError(f"codes must have 1..{max_quantizers} quantizers, got {codes.shape[0]}")
    check_code_range("codes", codes, expected["codebook_size"])
    if num_samples < 1 or config.num_frames(num_samples) != codes.shape[1]:
        raise ValueError(
            f"num_samples {num_samples} does not match {codes.shape[1]} frames of "
            f"{config.hop_length} samples"
        )
    return CodeFile(codes.astype(np.int16), num_samples)
