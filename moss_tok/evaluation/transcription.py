"""How well a language model transcribes: word and character error rates.

For `moss-tok evaluate` what was understood goes into OUTPUT/MODEL/rvqN/DATASET/texts.jsonl.
"""

import importlib.util
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_tok.audio import files
from moss_tok.codec.inference import Codec
from moss_tok.evaluation import protocol, sweep
from moss_tok.language.generate import Language, Sampling, transcribe_codes, transcribe_wavs

_AT_ONCE = 256  # recordings in memory


def normalize(text: str) -> str:
    """Lower case, without punctuation and repeated spaces; apostrophes within words stay."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    kept = (" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join("".join(kept).split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Word and character error rates of normalized texts, over all of them together.

    Args:
      references: What is said.
      hypotheses: What was understood, as many.

    Returns:
      {"wer": ..., "cer": ...}, shares of the references' words and characters.

    Raises:
      ValueError: No reference with a word, other numbers of texts, or jiwer is not installed.
    """
    check_installed()
    import jiwer

    pairs = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r]
    if not pairs:
        raise ValueError("error rates need at least one reference with a word")
    references, hypotheses = ([pair[i] for pair in pairs] for i in range(2))
    rates = {"wer": jiwer.wer, "cer": jiwer.cer}
    return {name: float(rate(references, hypotheses)) for name, rate in rates.items()}


def check_installed() -> None:
    """Raises ValueError where jiwer is not installed."""
    if importlib.util.find_spec("jiwer") is None:
        raise ValueError("error rates need jiwer: pip install 'moss_tok[train]'")


def has_words(texts: Sequence[str]) -> bool:
    """Whether there is anything in the texts to score."""
    return any(map(normalize, texts))


def _sampling(language: Language, references: Sequence[str]) -> Sampling:
    """Greedy, up to twice the longest reference, in multiples of 256: few programs."""
    longest = max(len(language.tokenizer.encode(text)) for text in references)
    return Sampling(max_tokens=256 * min(256, max(1, -(-longest // 128))))


def evaluate(
    codec: Codec,
    language: Language,
    recordings: Sequence[np.ndarray],
    texts: Sequence[str],
    numbers: Sequence[int],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Error rates {system: {"wer", "cer"}} from the first n codes, and the last n's texts.

    Args:
      codec: The codec.
      language: What listens.
      recordings: Audio [C, S], or codes [q, T] integers.
      texts: What is said in them, one with a word at least.
      numbers: Of quantizers.
    """
    of_codes = np.issubdtype(recordings[0].dtype, np.integer)
    transcribe = transcribe_codes if of_codes else transcribe_wavs
    table = {}
    understood: list[str] = []
    sampling = _sampling(language, texts)
    for number in numbers:
        understood = transcribe(codec, language, recordings, number, sampling=sampling)
        pairs = zip(texts, understood, strict=True)
        exact = [normalize(said) == normalize(found) for said, found in pairs]
        rates = error_rates(texts, understood)
        table[sweep.system_name(number)] = rates | {"exact": float(np.mean(exact))}
    return table, understood


def write_dataset(
    codec: Codec,
    language: Language,
    dataset: protocol.Dataset,
    numbers: Sequence[int],
    folder: Path,
) -> None:
    """Writes error rates on the reconstructed data set of OUTPUT/MODEL from its first n codes.

    A language model that hears latents is given the references, once for all n. The rates go into
    results.json as "wer" and "cer". Recordings without a text do not count.

    Raises:
      ValueError: As `error_rates`.
    """
    names = [n for n, text in zip(dataset.output_names(), dataset.texts, strict=True) if text]
    texts = [text for text in dataset.texts if text]
    sampling, understood = _sampling(language, texts), None
    for number in numbers:
        where = folder / f"rvq{number}"
        if language.config.audio == "codes":
            heard = [protocol.read_codes(folder, dataset, name, codec.config) for name in names]
            understood = transcribe_codes(codec, language, heard, number, sampling=sampling)
        elif understood is None:
            paths = [where / dataset.name / "gt_audios" / name for name in names]
            understood = _transcribe_files(codec, language, paths, sampling)
        rows = [{"name": n, "text": t, "understood": u}
                for n, t, u in zip(names, texts, understood, strict=True)]  # fmt: skip
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(where / dataset.name / "texts.jsonl", lines)
        protocol.write_means(where, dataset, error_rates(texts, understood))


def _transcribe_files(
    codec: Codec, language: Language, paths: Sequence[Path], sampling: Sampling
) -> list[str]:
    """Texts of files at the codec's rate, of which not all have to fit into memory."""
    texts = []
    for start in range(0, len(paths), _AT_ONCE):
        wavs = [files.read_native(path)[0] for path in paths[start : start + _AT_ONCE]]
        texts += transcribe_wavs(codec, language, wavs, sampling=sampling)
    return texts
