"""Codes inside a JAX training loop of one's own: a classifier of speech, music and sound.

    python experiments/examples/jax_training.py

The codec is an argument of the jitted step, like the parameters of the classifier. The step calls
`moss_tok.encode`, so audio goes to the device and codes never leave it. Prints the loss and the
accuracy on training segments while it trains, then the accuracy on unseen recordings.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import command
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import moss_tok
from moss_tok.audio import files, manifest

STARTER = Path(__file__).parents[1] / "starter" / "manifest.jsonl"
NUM_QUANTIZERS = 4
SEGMENT_SECONDS = 1.0
BATCH_SIZE = 16

optimizer = optax.adam(3e-3)


class Classifier(nn.Module):
    """Codes [B, Q, T] to logits [B, num_classes]: the mean embedding of all codes, and an MLP."""

    codebook_size: int
    num_classes: int
    dim: int = 64

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """See the class."""
        num_quantizers = codes.shape[1]
        first_rows = self.codebook_size * jnp.arange(num_quantizers)[:, None]
        x = nn.Embed(num_quantizers * self.codebook_size, self.dim)(codes + first_rows)
        x = nn.gelu(nn.Dense(self.dim)(x.mean((1, 2))))
        return nn.Dense(self.num_classes)(x)


@functools.partial(jax.jit, static_argnums=0)
def train_step(model: Classifier, codec, params, opt_state, wav, labels):
    """One update of the classifier on audio [B, C, S] with labels [B]."""
    codes = moss_tok.encode(codec, wav, num_quantizers=NUM_QUANTIZERS).codes

    def loss_fn(params):
        logits = model.apply(params, codes)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    (loss, accuracy), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss, accuracy


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Classifier, codec, params, wav):
    """The most likely class [B] of audio [B, C, S]."""
    codes = moss_tok.encode(codec, wav, num_quantizers=NUM_QUANTIZERS).codes
    return model.apply(params, codes).argmax(-1)


def batches(items: Sequence[Any], classes: Sequence[str], config: Any) -> Iterator[Any]:
    """Endless batches of random segments: wav [B, C, S] and labels [B]; classes are balanced."""
    random = np.random.default_rng(0)
    num_samples = round(SEGMENT_SECONDS * config.sample_rate)
    while True:
        wavs = []
        labels = []
        for row in range(BATCH_SIZE):
            label = row % len(classes)
            chosen = [item for item in items if item.domain == classes[label]]
            item = chosen[random.integers(len(chosen))]
            start = random.uniform(0, max(0, item.duration_seconds - SEGMENT_SECONDS))
            wav = files.read_segment(item.path, start, SEGMENT_SECONDS, config.sample_rate)
            wav = files.to_channels(wav, config.num_channels)[:, :num_samples]
            wavs.append(np.pad(wav, ((0, 0), (0, num_samples - wav.shape[1]))))
            labels.append(label)
        yield np.stack(wavs), np.array(labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and tests the classifier."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(STARTER), help="manifest with domains and splits")
    parser.add_argument("--num_steps", type=int, default=60)
    args = parser.parse_args(argv)
    codec = moss_tok.load()
    items = manifest.find_items(args.data)
    classes = sorted({item.domain for item in items})
    train = batches([item for item in items if item.split == "train"], classes, codec.config)
    test = batches([item for item in items if item.split == "test"], classes, codec.config)

    model = Classifier(codec.config.quantizer.codebook_size, len(classes))
    no_codes = jnp.zeros((1, NUM_QUANTIZERS, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), no_codes)
    opt_state = optimizer.init(params)
    for step in range(1, args.num_steps + 1):
        wav, labels = next(train)
        params, opt_state, loss, accuracy = train_step(model, codec, params, opt_state, wav, labels)
        if step % 10 == 0 or step == args.num_steps:
            print(f"step {step}: loss {loss:.3f}, accuracy {accuracy:.2f}", flush=True)
    right = []
    for _ in range(6):
        wav, labels = next(test)
        right.append(predict(model, codec, params, wav) == labels)
    print(f"accuracy on unseen recordings: {np.mean(right):.2f} ({', '.join(classes)})")


if __name__ == "__main__":
    command.run(main)
