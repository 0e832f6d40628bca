"""Writes what the official PyTorch class answers for a codec in the official layout.

    python experiments/official_answers.py moss_tok/assets/codec MOSS-Audio-Tokenizer clip.wav \
        tests/golden/codec/expected.npz

It needs torch, transformers, safetensors and a clone of github.com/OpenMOSS/MOSS-Audio-Tokenizer,
but not moss_tok. clip.wav is 16 bit mono at the codec's sample rate; its first seconds are used.

The class in that repository has the tensor names of v1 and one attention context for all stages.
For a codec in the layout of v2, tensors are renamed, projections that are identity matrices are
left out, and the context of each stage is set afterwards. All that is computed is official code.
"""

import argparse
import hashlib
import importlib
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

SECONDS = 3
NAMES = {
    "ffn.0.": "linear1.",
    "ffn.2.": "linear2.",
    "self_attn.in_proj.": "self_attn.in_projs.0.",
    "self_attn.out_proj.": "self_attn.out_projs.0.",
}
# Keys of config.json that the class of v1 does not have.
NOT_V1 = ("auto_map", "architectures", "dtype", "identity_projections")


def official_model(codec: Path, clone: Path) -> Any:
    """The official class with the weights of `codec`, in float32."""
    sys.path.insert(0, str(clone.resolve().parent))
    module = importlib.import_module(f"{clone.resolve().name}.modeling_moss_audio_tokenizer")
    fields = json.loads((codec / "config.json").read_text())
    contexts: dict[str, list[float | None]] = {}
    for side in ("encoder", "decoder"):
        modules = fields[f"{side}_kwargs"]
        contexts[side] = [kwargs.pop("context_duration", None) for kwargs in modules]
    config = module.MossAudioTokenizerConfig(
        **{key: value for key, value in fields.items() if key not in NOT_V1}
    )
    model = module.MossAudioTokenizerModel(config).float().eval()
    model.load_state_dict(renamed(load_file(codec / "model.safetensors"), model.state_dict()))
    rate = float(config.sampling_rate)
    for stage, context in zip(model.encoder, contexts["encoder"], strict=True):
        set_context(stage, rate, context)
        rate /= stage.downsample_ratio
    for stage, context in zip(model.decoder, contexts["decoder"], strict=True):
        set_context(stage, rate, context)
        rate *= stage.downsample_ratio
    return model


def renamed(tensors: dict[str, torch.Tensor], expected: Any) -> dict[str, torch.Tensor]:
    """Tensors in float32 with the names of v1."""
    state = {}
    for name, tensor in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name in expected:
            state[name] = tensor.float()
        elif not torch.equal(tensor.float(), torch.eye(len(tensor))):
            raise ValueError(f"the official class has no tensor {name}")
    return state


def set_context(stage: Any, rate: float, seconds: float | None) -> None:
    """Sets the attention window of a stage at a frame rate (Hz)."""
    if seconds is not None:
        for layer in stage.transformer.layers:
            layer.self_attn.context = round(rate * seconds)


def read_clip(path: Path, sample_rate: int) -> np.ndarray:
    """Samples [S] int16."""
    with wave.open(str(path)) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (sample_rate, 1, 2):
            raise ValueError(f"{path}: must be 16 bit mono at {sample_rate} Hz")
        return np.frombuffer(file.readframes(SECONDS * sample_rate), "<i2")


def main() -> None:
    """Writes the answers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("codec", "clone", "clip", "output"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    model = official_model(args.codec, args.clone)
    samples = read_clip(args.clip, model.config.sampling_rate)
    samples = samples[: samples.size // model.config.downsample_rate * model.config.downsample_rate]
    weights = (args.codec / "model.safetensors").read_bytes()
    answers = {"wav_int16": samples, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    with torch.no_grad():
        wav = torch.from_numpy(samples.astype(np.float32) / 32768)[None, None]
        codes = model.encode(wav, return_dict=True).audio_codes  # [Q, 1, T]
        answers["codes"] = codes[:, 0].numpy().astype(np.int16)
        for number in (len(codes), 4):
            audio = model.decode(codes[:number], return_dict=True).audio[0, 0].numpy()
            answers[f"audio_{number}"] = audio.astype(np.float32)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **answers)
    for name, value in answers.items():
        print(name, getattr(value, "shape", value))


if __name__ == "__main__":
    main()
