"""The training run, in the order in which things happen."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from moss_tok import checkpoint, sharding, storage
from moss_tok.audio import files
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.presets import load_codec_config
from moss_tok.data import pipeline, sources, synthetic
from moss_tok.evaluation import sweep, transcription
from moss_tok.json_files import read_json_object
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.generate import Language
from moss_tok.language.text import Tokenizer
from moss_tok.training import checkpoints, writer
from moss_tok.training.config import FREE_FIELDS, TrainConfig
from moss_tok.training.state import TrainState, init_state, state_shapes, zero_totals
from moss_tok.training.step import segment_samples, sharded_train_step

_CONFIG_NAME = "train_config.json"
_PROFILE = "profile"
_MIN_READS = 100  # before the share of failed ones means anything


def train(config: TrainConfig) -> bool:
    """Runs or resumes training in `config.workdir`, evaluating and saving on the way.

    Returns:
      Whether num_steps was reached and the last evaluation done; False where SIGTERM ended the run
      after a checkpoint.

    Raises:
      ValueError: A wrong setting or bad data, before anything is written; a workdir of a run with
        other settings; too many unreadable files, updates that are not finite, a full disk.
    """
    codec = _codec_config(config)
    num_samples = segment_samples(config, codec)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config.batch_size)
    language, tokenizer = language_models.of_run(config, codec)
    shapes = state_shapes(config, codec, mesh, language)
    workdir = storage.to_path(config.workdir)
    _check_same_run(workdir, config)
    mirror = storage.Mirror(workdir)
    seconds = num_samples / codec.sample_rate
    mixture, eval_items = _find_data(config, codec, seconds, mirror, tokenizer)
    _write_config(workdir, config)
    counts = f"{len(mixture)} training segments, {len(eval_items)} evaluation recordings"
    _say(f"{counts}; workdir {workdir}")
    if 0 < config.decay_steps < config.num_steps:
        _say(f"warning: the learning rate is 0 from step {config.decay_steps} (decay_steps) on")
    texts = language_models.files(language, tokenizer) if language else {}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopSignal())
        saver = stack.enter_context(checkpoints.Checkpoints(workdir, codec, config, texts))
        state = _start(config, codec, language, tokenizer, shapes, saver)
        start = int(state.step)
        log = None
        if sharding.is_main_process():
            log = stack.enter_context(writer.MetricsWriter(mirror, start))
        batches = pipeline.batches(
            config,
            mixture,
            num_samples=num_samples,
            sample_rate=codec.sample_rate,
            num_channels=codec.num_channels,
            start=start,
            rows=sharding.local_rows(mesh, config.batch_size),
            tokenizer=tokenizer,
        )
        stack.callback(batches.close)
        trace = stack.enter_context(_Trace(config, mirror))
        run = Run(
            config, codec, language, tokenizer, shapes, mixture, eval_items, saver, log, stop, trace
        )
        state = run.steps(state, batches)
        saver.wait()
        if int(state.step) < config.num_steps:
            _say(f"stopped by SIGTERM after step {int(state.step)}, which is saved")
            return False
        finished = sharding.all_agree(run.evaluate(state))  # and the others wait for the first
    if not finished:
        _say("stopped by SIGTERM during the last evaluation; the same command repeats it")
    return finished


def _codec_config(config: TrainConfig) -> CodecConfig:
    """The codec of the newest checkpoint, of `init_from`, or of `model`."""
    workdir = storage.to_path(config.workdir)
    steps = checkpoint.saved_steps(workdir)
    for step in reversed(steps):  # the newest may be broken, see `Checkpoints.restore_latest`
        folder = workdir / checkpoint.STEPS_FOLDER / checkpoint.step_name(step)
        try:
            return pretrained.load_config(folder)
        except (ValueError, OSError):
            if step == steps[0]:
                raise
    if not config.init_from:
        return load_codec_config(config.model or "tiny")
    codec = pretrained.load_config(config.init_from)
    if config.model:
        wanted = load_codec_config(config.model)
        blank = {"official_json": "", "layout": ""}
        if {**vars(codec), **blank} != {**vars(wanted), **blank}:
            raise ValueError(
                f"init_from {config.init_from} holds another model than {config.model}"
            )
    return codec


def _check_same_run(workdir: storage.Path, config: TrainConfig) -> None:
    """Refuses a workdir whose run differs in a setting that defines the result."""
    path = workdir / _CONFIG_NAME
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is no folder")
    if not path.exists():
        return
    before = read_json_object(path)
    differences = [
        f"{field.name} was {before[field.name]!r}, now {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in FREE_FIELDS
        and before.setdefault(field.name, field.default) != getattr(config, field.name)
    ]
    if differences:
        raise ValueError(f"workdir {workdir} holds another run: {'; '.join(differences)}")


def _find_data(
    config: TrainConfig,
    codec: CodecConfig,
    segment_seconds: float,
    mirror: storage.Mirror,
    tokenizer: Tokenizer | None,
) -> tuple[sources.Mixture, list[AudioItem]]:
    """What to train on and to evaluate; creates the workdir once it is known that both exist."""
    workdir = storage.to_path(config.workdir)

    def find(train_data: str, eval_data: str) -> tuple[Any, Any]:
        mixture = sources.training_mixture(train_data, segment_seconds) if train_data else None
        if not eval_data:
            return mixture, None
        items = sources.evaluation_items(eval_data, config.num_eval_clips)
        if config.eval_data and config.num_eval_clips and not items:
            raise ValueError(f"eval_data {eval_data}: no files of the split 'test'")
        for item in items:
            if not item.path.is_file():
                raise ValueError(f"{item.path}: no such file")
        return mixture, items

    mixture, items = find(config.train_data, config.eval_data or config.train_data)
    if tokenizer is not None:
        _check_texts(config, mixture, tokenizer, segment_seconds)
    workdir.mkdir(parents=True, exist_ok=True)
    if mixture is None:
        made = str(workdir / "synthetic" / synthetic.MANIFEST)
        if sharding.is_main_process() and not storage.to_path(made).exists():
            synthetic.write_dataset(mirror.local / "synthetic", codec.sample_rate)
            mirror.send()
        sharding.barrier("synthetic data")
        mixture, made_items = find(made, made)
        items = made_items if items is None else items
    return mixture, items


def _check_texts(
    config: TrainConfig,
    mixture: sources.Mixture | None,
    tokenizer: Tokenizer,
    segment_seconds: float,
) -> None:
    """Says how many texts are used; ValueError where the language model has none to learn from.

    What texts are in shards only reading them tells.
    """
    found = mixture.sources if mixture else ()
    if not all(isinstance(source, sources.FileSource) for source in found):
        return
    texts = [text for source in found for text in source.texts(segment_seconds)]
    used = sum(len(tokenizer.encode(text)) <= config.max_text_tokens for text in texts)
    if not used:
        raise ValueError(
            f"train_data has no recording of at most segment_seconds {segment_seconds:.3g} with a "
            f"text of at most max_text_tokens {config.max_text_tokens} for language_model to learn"
        )
    total = sum(len(source.texts(math.inf)) for source in found)
    _say(
        f"{used} of {total} texts are used: no longer than max_text_tokens "
        f"{config.max_text_tokens}, of recordings no longer than {segment_seconds:.3g} s"
    )


def _write_config(workdir: storage.Path, config: TrainConfig) -> None:
    """Writes the settings; ValueError if some process does not see what the first one wrote."""
    path, text = workdir / _CONFIG_NAME, json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    if sharding.is_main_process():
        files.write_text(path, text)
    sharding.barrier("settings")
    if not sharding.all_agree(path.exists() and path.read_text() == text):
        raise ValueError(f"workdir {workdir}: must be a folder that all processes share")


def _start(
    config: TrainConfig,
    codec: CodecConfig,
    language: LanguageConfig | None,
    tokenizer: Tokenizer | None,
    shapes: TrainState,
    saver: checkpoints.Checkpoints,
) -> TrainState:
    """The newest checkpoint's state; else a fresh one, from `init_from` if that is set."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    state = saver.restore_latest(shapes, _say)
    if state is not None:
        _say(f"going on from step {int(state.step)}")
        return state
    params, discriminators = {}, None
    head = None
    if config.init_from:
        params = pretrained.load(config.init_from).params
        params = {name: sharding.whole(tree, shardings.params[name])
                  for name, tree in params.items()}  # fmt: skip
        if config.adversarial:
            discriminators = checkpoints.load_discriminators(
                config.init_from, shapes.discriminators
            )
        found = ["generator"] + ["discriminators"] * (discriminators is not None)
        if language:
            wanted = shapes.params["language"]
            head = checkpoints.load_language(config.init_from, language, tokenizer, wanted)
            found += ["language model"] * (head is not None)
        _say(f"starting from the {' and '.join(found)} of {config.init_from}")
    if language and head is None:
        head = language_models.start(config.language_model, language)
    if head is not None:
        params["language"] = sharding.whole(head, shardings.params["language"])
    init = jax.jit(init_state, static_argnums=(0, 1, 4), out_shardings=shardings)
    return init(config, codec, params, discriminators, language)


class _StopSignal:
    """Whether SIGTERM came; a context manager. Outside the main thread it never does."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "_StopSignal":
        def receive(number, frame):
            del number, frame
            self.received = True

        with contextlib.suppress(ValueError):  # not in the main thread
            self._before = signal.signal(signal.SIGTERM, receive)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self._before)


class _Trace:
    """The profile of `profile_steps`; a context manager, which ends it whatever ends the run."""

    def __init__(self, config: TrainConfig, mirror: storage.Mirror):
        self._steps, self._on = config.profile_range, False
        self._mirror, self._workdir = mirror, config.workdir

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self._switch(False)

    def at(self, step: int, before: Any) -> None:
        """To be called before each step, with what the last one gives: it may still run."""
        wanted = step in self._steps
        if wanted != self._on:
            jax.block_until_ready(before)
        self._switch(wanted)

    def _switch(self, wanted: bool) -> None:
        if wanted and not self._on:
            jax.profiler.start_trace(str(self._mirror.local / _PROFILE))
        elif self._on and not wanted:
            jax.profiler.stop_trace()
            self._mirror.send()
            _say(f"profile: {self._workdir}/{_PROFILE}")
        self._on = wanted


@dataclasses.dataclass
class Run:
    """The loop over steps and what it needs."""

    config: TrainConfig
    codec: CodecConfig
    language: LanguageConfig | None
    tokenizer: Tokenizer | None
    shapes: TrainState  # with shardings
    mixture: sources.Mixture
    eval_items: list[AudioItem]
    saver: checkpoints.Checkpoints
    log: writer.MetricsWriter | None  # in the process that logs
    stop: _StopSignal
    trace: _Trace

    def __post_init__(self):
        self._bad_files: set[tuple[int, int]] = set()
        self._mesh = self.shapes.step.sharding.mesh
        self._num_rows = len(sharding.local_rows(self._mesh, self.config.batch_size))
        self._terminal = sys.stderr.isatty() and sharding.is_main_process()
        self._bar = self._progress(0, "training", "step")
        self._began, self._since = time.perf_counter(), 0  # of the rates in the next line
        whole = sharding.replicated(self._mesh)
        self._zero_totals = jax.jit(lambda: zero_totals(self.config), out_shardings=whole)

    def _progress(self, total: int, name: str, unit: str) -> tqdm.tqdm:
        return tqdm.tqdm(total=total, desc=name, unit=unit, disable=not self._terminal)

    def steps(self, state: TrainState, batches: Iterator[pipeline.Batch]) -> TrainState:
        """Steps until num_steps or SIGTERM; logs, evaluates and saves on the way.

        A SIGTERM to any process travels with its next batch, so all of them see it in the metrics
        of the same step; the step after that is the last, the third one at most from the signal.
        """
        config, start = self.config, int(state.step)
        train_step = sharded_train_step(config, self.codec, self.shapes, self.language)
        self._began, self._since = time.perf_counter(), start
        self._bar.reset(config.num_steps)
        self._bar.update(start)
        metrics = None
        batch = self._put(batches) if start < config.num_steps else None
        for step in range(start + 1, config.num_steps + 1):
            before = metrics
            self.trace.at(step, metrics)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch | self._stop_flags())
            stopped = before is not None and self._check(step - 1, before)
            last = step == config.num_steps or stopped
            if not last:
                batch = self._put(batches)  # while the step runs
            self._bar.update()
            if step % config.log_every == 0 or step == config.num_steps:
                state = self._log_line(step, state)
            if last or step % config.checkpoint_every == 0:
                self._check(step, metrics)
                if self.log is not None:
                    self.log.send()  # before the checkpoint that needs these lines
                self.saver.save(state)
            if config.eval_every and step % config.eval_every == 0 and not last:
                self.evaluate(state)
            if last:
                break
        self._bar.close()
        return state

    def _put(self, batches: Iterator[pipeline.Batch]) -> dict[str, jax.Array]:
        """The next batch on its way to the devices; files that could not be read are named."""
        try:
            batch = next(batches)
        except RuntimeError as error:  # of grain, where a worker died
            raise ValueError(f"reading training data: {error}") from error
        failed = batch.pop("failed")
        for number, index in failed[failed[..., 0] >= 0]:
            if (number, index) not in self._bad_files:
                self._bad_files.add((number, index))
                why = _why(self.mixture.sources[number], int(index))
                _say(f"warning: {why}; replaced", everywhere=True)
        batch["failed_reads"] = np.sum(failed[..., 0] >= 0, -1, np.int32)
        return sharding.global_batch(self._mesh, self.config.batch_size, batch)

    def _stop_flags(self) -> dict[str, jax.Array]:
        flags = {"stop": np.full(self._num_rows, self.stop.received)}
        return sharding.global_batch(self._mesh, self.config.batch_size, flags)

    def _check(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Whether to stop; ValueError where the last updates were all skipped."""
        if int(metrics["skipped_in_row"]) < self.config.max_skipped_steps:
            return bool(metrics["stop"])
        terms = [name for name, value in metrics.items() if not np.isfinite(value)]
        raise ValueError(
            f"step {step}: {', '.join(terms)} not finite; {self.config.max_skipped_steps} updates "
            "in a row had to be skipped; the last checkpoint is untouched"
        )

    def _log_line(self, step: int, state: TrainState) -> TrainState:
        """Writes the means since the last line; returns the state with new totals."""
        values = writer.summarize(self.config, state)
        self._check_reads(step, values["failed_reads"])
        seconds, steps = time.perf_counter() - self._began, step - self._since
        audio = steps * self.config.batch_size * segment_samples(self.config, self.codec)
        values["steps_per_second"] = steps / seconds
        values["audio_seconds_per_second"] = audio / self.codec.sample_rate / seconds
        if self.log is not None:
            self.log.write(step, values)
        self._bar.set_postfix(loss=f"{values['loss']:.2f}")
        if not self._terminal:
            _say(_line(step, self.config.num_steps, values))
        self._began, self._since = time.perf_counter(), step
        return state.replace(totals=self._zero_totals())

    def _check_reads(self, step: int, failed: int) -> None:
        reads = step * self.config.batch_size
        if reads >= _MIN_READS and failed > self.config.max_failed_share * reads:
            raise ValueError(
                f"{failed} of {reads} reads failed, more than max_failed_share "
                f"{self.config.max_failed_share:g}; the files are named above"
            )

    def evaluate(self, state: TrainState) -> bool:
        """Draws the curves, scores the evaluation recordings, and shows some.

        The first process does it, on one device; the others wait for it in their next step.

        Returns:
          Whether it came to its end; SIGTERM breaks it off.
        """
        began, step = time.perf_counter(), int(state.step)
        params = sharding.on_one_device(state.best_params, self._mesh)
        if self.log is not None:
            head = params.get("language")
            params = {name: tree for name, tree in params.items() if name != "language"}
            language = None
            if head is not None:
                language = Language(head, self.language, self.tokenizer)
            try:
                self._show(step, Codec(params, self.codec), language)
            except _StoppedError:
                return False
        self._began += time.perf_counter() - began  # rates are of training alone
        return True

    def _show(self, step: int, codec: Codec, language: Language | None) -> None:
        self.log.save_curves()
        _say(f"loss curves: {self.config.workdir}/curves.png")
        if not self.eval_items:
            return
        clips = sweep.read_clips(self.eval_items, codec, _say)
        table, texts = {}, []
        if language:
            table, text = self._understand(codec, language, clips)
            texts += [text] * bool(text)
        if self.config.trainable != "language":
            samples = sweep.samples(codec, clips)
            self.log.write_samples(step, samples, self.codec.sample_rate)
            _say(f"listen: {self.config.workdir}/samples/*.wav, see *.png beside them")
            scores = self._score(codec, clips)
            table |= scores
            note = "mel_loss, stft: lower is better; stoi: higher"
            texts.append(f"{len(clips)} clips ({note}):\n{sweep.format_table(scores)}")
        text = "\n\n".join(texts) or "no recording has a text"
        self.log.write_evaluation(step, table, text)
        _say(f"step {step}, unseen audio: {text}")

    def _understand(
        self, codec: Codec, language: Language, clips: list[sweep.Clip]
    ) -> tuple[sweep.Table, str]:
        """Error rates of what is understood of the recordings with texts, and some of it."""
        clips = [clip for clip in clips if clip.text]
        if not transcription.has_words([clip.text for clip in clips]):
            return {}, ""
        numbers = sorted({1, codec.config.quantizer.num_quantizers})
        rates, texts = transcription.evaluate(codec, language, clips, numbers)
        table = {"text": rates}
        shown = list(zip(clips, texts, strict=True))[:: max(1, len(clips) // 5)][:5]
        lines = [f"  said {clip.text!r}, understood {text!r}" for clip, text in shown]
        title = f"{len(clips)} clips with texts (wer, cer: lower is better):"
        return table, "\n".join([title, sweep.format_table(table), "", *lines])

    def _score(self, codec: Codec, clips: list[sweep.Clip]) -> sweep.Table:
        with self._progress(len(clips), "evaluating", "clip") as bar:

            def progress() -> None:
                bar.update()
                if self.stop.received:
                    raise _StoppedError

            return sweep.evaluate(codec, clips, sweep.bitrates(codec.config), progress)


class _StoppedError(Exception):
    """SIGTERM came during an evaluation."""


def _why(source: sources.Source, index: int) -> str:
    """What is wrong with a recording that could not be read."""
    try:
        recording = source[index]
        files.read_segment(recording.audio, 0.0, recording.duration_seconds, 16000)
    except ValueError as error:
        return str(error)
    return f"{source.name(index)}: could not be read"


def _line(step: int, num_steps: int, values: dict[str, Any]) -> str:
    left = (num_steps - step) / values["steps_per_second"]
    terms = [n for n in values if n.endswith("_loss") and "/" not in n]
    return (
        f"step {step}/{num_steps} loss {values['loss']:.3f} "
        + " ".join(f"{n.removesuffix('_loss')} {values[n]:.3f}" for n in terms)
        + f" perplexity {np.mean(values['codebook_perplexity']):.0f} "
        f"{values['audio_seconds_per_second']:.0f} s of audio per s, {left / 60:.1f} min left"
    )


def _say(text: str, everywhere: bool = False) -> None:
    """Prints a line in the main process; `everywhere`: what only this one may know."""
    if everywhere or sharding.is_main_process():
        tqdm.tqdm.write(text)
        sys.stdout.flush()
