"""Streaming classes that take blocks of any length: they buffer input for the pure steps."""

import numpy as np

from moss_tok.codec.buffering import BufferedStream
from moss_tok.codec.checks import (
    check_code_range,
    check_floating,
    check_integers,
    check_samples,
    check_shape,
)
from moss_tok.codec.streaming import decode_step, encode_step


class EncoderStream(BufferedStream):
    """Encodes audio that arrives in blocks of any length.

        with moss_tok.EncoderStream(codec) as stream:
            for block in microphone:  # [C, S] in [-1, 1], any S
                send(stream.push(block))  # codes [Q, T] int32 of the T >= 0 completed frames
            send(stream.finish())

    The codes equal those of `encode` for the whole recording. With a `source` of blocks, the stream
    is an iterator over codes. With several slots, `push` takes a dict of blocks by slot, and slots
    start (`reset`), pause and end (`finish`) independently. All chunk sizes are compiled when the
    stream is created, none later.
    """

    _side = "encoder"

    def _step(self, chunk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._state, out = encode_step(
            self._codec, self._open_state(), chunk, lengths, self._num_quantizers
        )
        return np.asarray(out)

    def _chunk_shape(self, num_frames: int) -> tuple[int, int]:
        return self._config.num_channels, num_frames * self._unit

    def _empty_input(self) -> np.ndarray:
        return np.zeros((self._config.num_channels, 0), np.float32)

    def _empty_output(self) -> np.ndarray:
        return np.zeros((self._num_quantizers, 0), np.int32)

    def _check(self, wav: np.ndarray, /) -> np.ndarray:
        channels = self._config.num_channels
        hint = "use wav[None]" if wav.ndim == 1 and channels == 1 else ""
        if wav.ndim == 2 and wav.shape[1] == channels:
            hint = "use wav.T"
        check_shape("wav", wav, (channels, "S"), hint, may_be_empty=True)
        check_floating("wav", wav)
        check_samples("wav", wav)
        return wav.astype(np.float32)


class DecoderStream(BufferedStream):
    """Decodes codes that arrive in blocks of any number of frames.

        with moss_tok.DecoderStream(codec) as stream:
            for block in receiver:  # codes [num_quantizers, T], any T
                play(stream.push(block))  # wav [C, T * hop_length] float32
            play(stream.finish())

    The audio equals that of `decode` for the whole recording. Iteration, slots and compilation are
    as in `EncoderStream`.
    """

    _side = "decoder"

    def _step(self, chunk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._state, out = decode_step(self._codec, self._open_state(), chunk, lengths)
        return np.asarray(out)

    def _chunk_shape(self, num_frames: int) -> tuple[int, int]:
        return self._num_quantizers, num_frames

    def _empty_input(self) -> np.ndarray:
        return np.zeros((self._num_quantizers, 0), np.int32)

    def _empty_output(self) -> np.ndarray:
        return np.zeros((self._config.num_channels, 0), np.float32)

    def _check(self, codes: np.ndarray, /) -> np.ndarray:
        check_shape("codes", codes, (self._num_quantizers, "T"), may_be_empty=True)
        if codes.size:  # an empty list becomes a float array
            check_integers("codes", codes)
        check_code_range("codes", codes, self._config.quantizer.codebook_size)
        return codes.astype(np.int32)
