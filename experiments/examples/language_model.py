"""A language model over codes in Flax: trains on recordings, samples codes, decodes them to audio.

    python experiments/examples/language_model.py sample.wav

The first 4 codes of each frame become 4 tokens, one after another. Prints the cross-entropy per
token (a uniform guess among 1024 codes: 6.93) and where the sample is.
"""

import argparse
from pathlib import Path

import command
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import moss_tok
from moss_tok.audio import files, manifest

STARTER = Path(__file__).parents[1] / "starter" / "manifest.jsonl"
Q = 4  # codes per frame
FRAMES = 50  # per sequence
BATCH_SIZE = 16  # sequences
optimizer = optax.adamw(2e-3)


class LanguageModel(nn.Module):
    """Tokens [B, N] to logits [B, N, K]; those of token n depend on the tokens before it."""

    codebook_size: int
    dim: int = 128

    @nn.compact
    def __call__(self, tokens):
        """See the class. Row 0 of the first table starts a sequence."""
        place = jnp.arange(tokens.shape[1])
        level = place % Q  # quantizer of each token
        rows = jnp.pad(tokens + self.codebook_size * level + 1, ((0, 0), (1, 0)))[:, :-1]
        x = nn.Embed(Q * self.codebook_size + 1, self.dim)(rows)
        x += nn.Embed(FRAMES * Q, self.dim)(place) + nn.Embed(Q, self.dim)(level)
        for _ in range(2):
            attention = nn.MultiHeadDotProductAttention(4)
            x += attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
            x += nn.Dense(self.dim)(nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x))))
        return nn.Dense(self.codebook_size)(nn.LayerNorm()(x))


@jax.jit(static_argnums=0)
def train_step(model, params, opt_state, tokens):
    """One update on tokens [B, N]."""

    def loss_fn(params):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    loss, gradient = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@jax.jit(static_argnums=0)
def sample(model, params, key):
    """Tokens [1, N], drawn one by one; without a cache, so each draw runs the whole model."""

    def draw(n, tokens):
        logits = model.apply(params, tokens)[:, n]
        return tokens.at[:, n].set(jax.random.categorical(jax.random.fold_in(key, n), logits))

    return jax.lax.fori_loop(0, FRAMES * Q, draw, jnp.zeros((1, FRAMES * Q), jnp.int32))


def read_tokens(codec, data):
    """Tokens [B, FRAMES * Q], frame by frame, of all training recordings that are long enough."""
    config = codec.config
    num_samples = FRAMES * config.hop_length
    rows = []
    for item in manifest.find_items(data):
        if item.split == "train" and item.duration_seconds * config.sample_rate >= num_samples:
            wav = files.read(item.path, config.sample_rate, config.num_channels)
            codes = moss_tok.encode(codec, wav[None, :, :num_samples], None, Q).codes[0]
            rows.append(codes.T.ravel())
    if not rows:
        raise ValueError(f"{data}: no training recording of {num_samples} samples or more")
    return np.stack(rows)


def main(argv=None):
    """Trains a model and writes a sample."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="audio file to write")
    parser.add_argument("--data", default=str(STARTER), help="manifest or folder of recordings")
    parser.add_argument("--num_steps", type=int, default=100)
    args = parser.parse_args(argv)
    files.check_output(args.output)
    codec = moss_tok.load()
    tokens = read_tokens(codec, args.data)
    model = LanguageModel(codec.config.quantizer.codebook_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1])
    opt_state = optimizer.init(params)
    random = np.random.default_rng(0)
    for step in range(1, args.num_steps + 1):
        batch = tokens[random.integers(len(tokens), size=BATCH_SIZE)]
        params, opt_state, loss = train_step(model, params, opt_state, batch)
        if step % 20 == 0 or step == args.num_steps:
            print(f"step {step}: cross-entropy {loss:.2f}", flush=True)
    sampled = sample(model, params, jax.random.key(1)).reshape(1, FRAMES, Q).swapaxes(1, 2)
    wav = moss_tok.decode(codec, sampled).wav[0]
    files.write(args.output, np.asarray(wav), codec.config.sample_rate)
    print(f"{args.output}: {wav.shape[1] / codec.config.sample_rate:.1f} s of sampled codes")


if __name__ == "__main__":
    command.run(main)
