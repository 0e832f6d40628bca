"""Word and character error rates of a language model's transcripts.

In `moss-tok evaluate` the transcripts go into OUTPUT/MODEL/rvqN/DATASET/texts.jsonl.
"""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_tok import extras
from moss_tok.audio import files
from moss_tok.codec.inference import Codec
from moss_tok.evaluation import reconstruction, results, sweep
from moss_tok.evaluation.datasets import Dataset
from moss_tok.language.generate import Language, Sampling, transcribe_codes, transcribe_wavs

_MAX_RECORDINGS = 256  # in memory at once


def normalize(text: str) -> str:
    """Lower case without punctuation and repeated spaces; apostrophes within words stay."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    characters = []
    for character in text:
        is_sign = unicodedata.category(character)[0] in "PS"  # punctuation and symbols
        if is_sign and character != "'":
            character = " "
        characters.append(character)
    return " ".join("".join(characters).split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Word and character error rates of normalized texts, pooled over all texts.

    Args:
      references: Correct texts; those without a word are left out.
      hypotheses: The model's texts, one per reference.

    Returns:
      {"wer": ..., "cer": ...}: errors per word and per character of the references.

    Raises:
      ValueError: No reference has a word, the numbers of texts differ, or jiwer is not installed.
    """
    check_installed()
    import jiwer

    scored_references = []
    scored_hypotheses = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        normalized = normalize(reference)
        if normalized:
            scored_references.append(normalized)
            scored_hypotheses.append(normalize(hypothesis))
    if not scored_references:
        raise ValueError("error rates need at least one reference with a word")
    return {
        "wer": float(jiwer.wer(scored_references, scored_hypotheses)),
        "cer": float(jiwer.cer(scored_references, scored_hypotheses)),
    }


def check_installed() -> None:
    """Raises ValueError if jiwer is not installed."""
    if not extras.is_installed("jiwer"):
        raise ValueError(f"error rates need jiwer: {extras.install('train')}")


def has_words(texts: Sequence[str]) -> bool:
    """Whether any text has a word to score."""
    return any(map(normalize, texts))


def _sampling(language: Language, references: Sequence[str]) -> Sampling:
    """Greedy decoding of up to twice the longest reference, at most 65536 tokens.

    The number of tokens is a multiple of 256, for few compiles.
    """
    longest = max(len(language.tokenizer.encode(text)) for text in references)
    num_blocks = math.ceil(2 * longest / 256)
    return Sampling(max_tokens=256 * min(256, max(1, num_blocks)))


def evaluate(
    codec: Codec,
    language: Language,
    recordings: Sequence[np.ndarray],
    texts: Sequence[str],
    numbers: Sequence[int],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Transcribes recordings from their first n codes, for each n, and scores the transcripts.

    Args:
      codec: The codec.
      language: The language model.
      recordings: Audio [C, S], or codes [q, T] integers.
      texts: Correct texts, at least one with a word.
      numbers: Numbers of quantizers.

    Returns:
      {system: {"wer", "cer", "exact"}}, where "exact" is the share of texts without an error; and
      the transcripts of the last number.
    """
    are_codes = np.issubdtype(recordings[0].dtype, np.integer)
    transcribe = transcribe_codes if are_codes else transcribe_wavs
    sampling = _sampling(language, texts)
    table = {}
    transcripts: list[str] = []
    for number in numbers:
        transcripts = transcribe(codec, language, recordings, number, sampling=sampling)
        num_exact = 0
        for text, transcript in zip(texts, transcripts, strict=True):
            num_exact += normalize(text) == normalize(transcript)
        row = error_rates(texts, transcripts)
        row["exact"] = num_exact / len(texts)
        table[sweep.system_name(number)] = row
    return table, transcripts


def write_dataset(
    codec: Codec,
    language: Language,
    dataset: Dataset,
    numbers: Sequence[int],
    folder: Path,
) -> None:
    """Writes error rates and transcripts of a data set reconstructed from its first n codes.

    results.json gets the rates as "wer" and "cer". Recordings without a text do not count. A
    language model that takes latents transcribes the references; these do not depend on n, so it
    does so once.

    Args:
      codec: The codec.
      language: The language model.
      dataset: The data set.
      numbers: Numbers of quantizers.
      folder: OUTPUT/MODEL.

    Raises:
      ValueError: As `error_rates`.
    """
    names = []
    texts = []
    for name, text in zip(dataset.output_names(), dataset.texts, strict=True):
        if text:
            names.append(name)
            texts.append(text)
    sampling = _sampling(language, texts)
    transcripts = None
    for number in numbers:
        system = folder / f"rvq{number}"
        if language.config.audio == "codes":
            arrays = [reconstruction.read_codes(folder, dataset, name, codec) for name in names]
            transcripts = transcribe_codes(codec, language, arrays, number, sampling=sampling)
        elif transcripts is None:
            paths = [system / dataset.name / "gt_audios" / name for name in names]
            transcripts = _transcribe_files(codec, language, paths, sampling)
        lines = []
        for name, text, transcript in zip(names, texts, transcripts, strict=True):
            row = {"name": name, "text": text, "understood": transcript}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        files.write_text(system / dataset.name / "texts.jsonl", "".join(lines))
        results.write_means(system, dataset, error_rates(texts, transcripts))


def _transcribe_files(
    codec: Codec,
    language: Language,
    paths: Sequence[Path],
    sampling: Sampling,
) -> list[str]:
    """Transcribes files at the codec's rate, a limited number at once to save memory."""
    texts = []
    for start in range(0, len(paths), _MAX_RECORDINGS):
        wavs = []
        for path in paths[start : start + _MAX_RECORDINGS]:
            wav, _ = files.read_native(path)
            wavs.append(wav)
        texts += transcribe_wavs(codec, language, wavs, sampling=sampling)
    return texts
