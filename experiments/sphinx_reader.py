"""Reads English with PocketSphinx and the model in its package (pip install pocketsphinx)."""

from collections.abc import Iterable, Sequence

import librosa
import numpy as np

RATE = 16000  # of its model, Hz
_EDGE_SECONDS = 0.25  # of quiet noise before and after the speech; without it, words are missed
_NOISE = 1e-4
# On the probability of a word. With the default, 0.65, the quiet edges are read as words.
_WORD_PENALTY = 1e-3


class Reader:
    """Reads speech.

    Attributes:
      decoder: Of PocketSphinx.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        """Reads sequences of these words, or any English text if there are none.

        Words that are not in its dictionary are never read.

        Raises:
          ModuleNotFoundError: PocketSphinx is not installed.
        """
        import pocketsphinx

        self.decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
        words = [word for word in sorted(set(words)) if self.decoder.lookup_word(word)]
        if words:
            self.decoder.config["wip"] = _WORD_PENALTY
            self.decoder.add_jsgf_string(
                "words", f"#JSGF V1.0;\ngrammar words;\npublic <text> = ({' | '.join(words)})+;\n"
            )
            self.decoder.activate_search("words")

    def read(self, wav: np.ndarray, rate: int) -> str:
        """The words in audio [S] of a sample rate in Hz."""
        wav = librosa.resample(np.asarray(wav, np.float32), orig_sr=rate, target_sr=RATE)
        noise = np.random.default_rng(0)
        padded = np.pad(wav, int(_EDGE_SECONDS * RATE))
        padded = padded + _NOISE * noise.standard_normal(len(padded))
        samples = (np.clip(padded, -1, 1) * 32767).astype(np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(samples.tobytes(), full_utt=True)
        self.decoder.end_utt()
        best = self.decoder.hyp()
        return best.hypstr if best else ""

    def read_all(self, wavs: Sequence[np.ndarray], rate: int) -> list[str]:
        """The words in each of several recordings [S]."""
        return [self.read(wav, rate) for wav in wavs]
