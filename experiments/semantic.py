r"""Information about words in the codes: linear probes of codes, and the loss of texts.

    python experiments/semantic.py probe --data=digits.jsonl --checkpoint=runs/with \
        --checkpoint=runs/without
    python experiments/semantic.py gap --data=sentences.jsonl --checkpoint=runs/asr

`probe`: accuracy of a linear classifier of transcripts that occur many times (digits), from the
codes of the first quantizers, on the test split. `gap`: cross-entropy of each test text given its
own audio, audio of another recording of the same length, and no audio.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moss_tok
from moss_tok.audio import files, manifest
from moss_tok.audio.manifest import TASKS
from moss_tok.codec import inference
from moss_tok.errors import exit_code
from moss_tok.language import generate
from moss_tok.language import pretrained as language_models

PARTS = 4  # parts of a recording, each with its own histogram


def read(codec, items):
    """Recordings [C, S], texts and tasks of the items that have a text."""
    recordings = []
    for item in items:
        text, task = manifest.read_text(item.metadata)
        if text:
            wav = files.read(item.path, codec.config.sample_rate, codec.config.num_channels)
            recordings.append((wav, text, task))
    if not recordings:
        raise ValueError("no recordings with a text in both splits of --data")
    return recordings


def split(data, name):
    """The items of a split of a manifest."""
    return [item for item in manifest.find_items(data) if item.split == name]


def interval(values):
    """95 % bootstrap interval of the mean of [N] values over N recordings."""
    values = np.asarray(values, np.float64)
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (10000, len(values)))].mean(-1)
    return np.percentile(means, [2.5, 97.5])


def histograms(codec, recordings, num_quantizers):
    """Shares of each code in each part of each recording: [N, PARTS * Q * K]."""
    size = codec.config.quantizer.codebook_size
    rows = []
    for wav, *_ in recordings:
        codes = inference.encode_one(codec, wav)[:num_quantizers]
        counts = []
        for part in np.array_split(codes, PARTS, axis=1):
            counts += [np.bincount(row, minlength=size) for row in part]
        rows.append(np.concatenate(counts) / codes.shape[1])
    return np.sqrt(np.array(rows, np.float32))


def fit(features, labels, num_classes, decay=1e-3, num_steps=500):
    """Weights of a multinomial logistic regression."""
    optimizer = optax.adamw(0.05, weight_decay=decay)

    def loss(weights):
        logits = features @ weights
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(_, carry):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jnp.zeros((features.shape[1], num_classes))
    return jax.lax.fori_loop(0, num_steps, step, (weights, optimizer.init(weights)))[0]


def probe(args):
    """Prints the accuracy of probes of each checkpoint, and its difference to the last one."""
    correct = {}
    numbers = [int(n) for n in args.num_quantizers.split(",")]
    for checkpoint in args.checkpoint:
        codec = moss_tok.load(checkpoint, component="encoder")
        train = read(codec, split(args.data, "train"))
        test = read(codec, split(args.data, "test"))
        names = sorted({text for _, text, _ in train})
        for _, text, _ in test:
            if text not in names:
                raise ValueError(f"{args.data}: no training recording has the test text {text!r}")
        train_labels = np.array([names.index(text) for _, text, _ in train])
        test_labels = np.array([names.index(text) for _, text, _ in test])
        for number in numbers:
            train_features = histograms(codec, train, number)
            test_features = histograms(codec, test, number)
            weights = fit(jnp.asarray(train_features), jnp.asarray(train_labels), len(names))
            guesses = np.argmax(test_features @ np.asarray(weights), axis=1)
            correct[checkpoint, number] = guesses == test_labels
    print(f"{len(train)} training, {len(test)} test recordings, {len(names)} texts; 95 % intervals")
    print("| checkpoint | quantizers | accuracy | above the last checkpoint |\n|---|---|---|---|")
    for (checkpoint, number), is_correct in correct.items():
        difference = is_correct.astype(float) - correct[args.checkpoint[-1], number]
        accuracy = "{:.3f} ({:.3f} to {:.3f})".format(is_correct.mean(), *interval(is_correct))
        gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(difference.mean(), *interval(difference))
        print(f"| {checkpoint} | {number} | {accuracy} | {gain} |", flush=True)


def gap(args):
    """Prints the mean loss per token with the right, a wrong, and no audio, and the gaps."""
    if len(args.checkpoint) > 1:
        raise ValueError("gap takes one --checkpoint")
    checkpoint = args.checkpoint[0]
    codec = moss_tok.load(checkpoint, "encoder")
    language = language_models.load(checkpoint)
    max_samples = args.seconds * codec.config.sample_rate
    recordings = []
    for recording in read(codec, split(args.data, "test")):
        wav, *_ = recording
        if wav.shape[1] <= max_samples:
            recordings.append(recording)
    if len(recordings) < 2:
        raise ValueError(f"{args.data}: fewer than 2 test recordings with a text within --seconds")
    rows = []
    for index, (wav, *text) in enumerate(recordings):
        wavs = (wav, other_audio(recordings, index), wav[:, :0])
        rows.append([loss(codec, language, x, *text) for x in wavs])
    losses = np.array(rows)
    print(f"{len(losses)} test recordings, nats per token; 95 % intervals over recordings")
    for name, column in zip(("right audio", "wrong audio", "no audio"), losses.T, strict=True):
        cells = "{:.3f} ({:.3f} to {:.3f})".format(column.mean(), *interval(column))
        print(f"| {name} | {cells} |")
    for name, column in (("wrong - right", 1), ("none - right", 2)):
        difference = losses[:, column] - losses[:, 0]
        cells = "{:+.4f} ({:+.4f} to {:+.4f})".format(difference.mean(), *interval(difference))
        print(f"| {name} | {cells} |")


def other_audio(recordings, index):
    """Audio of the next recording, cut or repeated to the length of the one at `index`."""
    wav, *_ = recordings[(index + 1) % len(recordings)]
    size = recordings[index][0].shape[1]
    return np.tile(wav, -(-size // wav.shape[1]))[:, :size]


def loss(codec, language, wav, text, task):
    """Cross-entropy per token of a text given audio [C, S], S may be 0."""
    tokens = np.array([language.tokenizer.encode(text)], np.int32)
    size = wav.shape[1]
    frames = inference.bucket_frames(max(1, codec.config.num_frames(size)))
    padded = np.pad(wav, ((0, 0), (0, frames * codec.config.hop_length - size)))[None]
    latents, lengths = generate.input_latents(codec, language, padded, np.array([size]))
    padding = -tokens.shape[1] % 32
    arguments = (latents, lengths, jnp.array([TASKS.index(task)]),
                 np.pad(tokens, ((0, 0), (0, padding))), jnp.array([tokens.shape[1]]))  # fmt: skip
    return float(_apply(language, *arguments)[0])


@jax.jit
def _apply(language, *arguments):
    return language.apply(*arguments)


def main():
    """Runs a study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=["probe", "gap"])
    parser.add_argument("--data", required=True, help="manifest with transcripts and both splits")
    parser.add_argument("--checkpoint", required=True, action="append")
    parser.add_argument(
        "--num_quantizers", "--num-quantizers", default="1,4", help="numbers of quantizers to probe"
    )
    parser.add_argument("--seconds", type=float, default=20, help="gap skips longer recordings")
    args = parser.parse_args()
    {"probe": probe, "gap": gap}[args.study](args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
