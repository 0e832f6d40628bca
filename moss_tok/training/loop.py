"""The training run, for any objective."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from moss_tok import sharding, storage
from moss_tok.training import checkpoints, progress, provenance, start, writer
from moss_tok.training.config import TrainConfig
from moss_tok.training.interrupts import StoppedError, StopSignal, Trace
from moss_tok.training.objective import Arrays, Batch, Objective, TrainingData
from moss_tok.training.state import Recipe, TrainState, state_shapes, zero_totals
from moss_tok.training.step import sharded_train_step

_MIN_READS = 100  # before the share of failed reads is checked


def train(config: TrainConfig, objective: Objective) -> bool:
    """Runs or resumes training in the workdir; evaluates and saves along the way.

    Returns:
      Whether num_steps was reached and the last evaluation finished; False if SIGTERM ended the
      run, after a checkpoint.

    Raises:
      ValueError: A setting is wrong, data is bad, or the workdir is of a run with other settings;
        nothing is written then. Or too many files cannot be read, too many updates are not finite,
        or the disk is full.
    """
    mesh = sharding.make_mesh(config.devices.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size)
    recipe = Recipe(
        objective=objective,
        optimizer=config.optimizer,
        seed=config.run.seed,
        num_microbatches=config.devices.num_microbatches,
    )
    shapes = state_shapes(recipe, mesh)
    workdir = storage.to_path(config.run.workdir)
    start.check_same_run(workdir, config)
    mirror = storage.Mirror(workdir)
    data = objective.find_data(config, mirror, progress.say)
    start.write_config(workdir, config)
    progress.introduce(config, objective, data)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        steps = checkpoints.Checkpoints(workdir, config.run, objective, provenance.describe(config))
        saver = stack.enter_context(steps)
        state = start.first_state(recipe, config.run.init_from, shapes, saver, progress.say)
        first = int(state.step)
        log = None
        if sharding.is_main_process():
            log = stack.enter_context(writer.MetricsWriter(mirror, first))
        rows = sharding.local_rows(mesh, config.data.batch_size)
        batches = data.batches(first, rows)
        stack.callback(batches.close)
        trace = Trace(config.run.profile_steps, mirror, config.run.workdir, progress.say)
        stack.enter_context(trace)
        run = Run(config, recipe, shapes, data, saver, log, stop, trace)
        state = run.steps(state, batches)
        saver.wait()
        if int(state.step) < config.run.num_steps:
            progress.say(f"stopped by SIGTERM after step {int(state.step)}, which is saved")
            return False
        finished = sharding.all_agree(run.evaluate(state))  # also makes the other processes wait
    if not finished:
        progress.say("stopped by SIGTERM during the last evaluation; the same command repeats it")
    return finished


@dataclasses.dataclass
class Run:
    """The loop over training steps, with everything it uses."""

    config: TrainConfig
    recipe: Recipe
    shapes: TrainState  # with shardings
    data: TrainingData
    saver: checkpoints.Checkpoints
    log: writer.MetricsWriter | None  # None except in the main process
    stop: StopSignal
    trace: Trace

    def __post_init__(self):
        self._bad_files: set[tuple[int, int]] = set()
        self._mesh = self.shapes.step.sharding.mesh
        self._batch_size = self.config.data.batch_size
        self._num_rows = len(sharding.local_rows(self._mesh, self._batch_size))
        self._terminal = sys.stderr.isatty() and sharding.is_main_process()
        self._bar = self._progress_bar(0, "training", "step")
        self._rates = progress.Rates(0)
        whole = sharding.replicated(self._mesh)
        objective = self.recipe.objective
        self._zero_totals = jax.jit(lambda: zero_totals(objective), out_shardings=whole)

    def _progress_bar(self, total: int, name: str, unit: str) -> tqdm.tqdm:
        return tqdm.tqdm(total=total, desc=name, unit=unit, disable=not self._terminal)

    def steps(self, state: TrainState, batches: Iterator[Batch]) -> TrainState:
        """Trains until num_steps or SIGTERM; logs, evaluates and saves along the way.

        A process that gets SIGTERM sets a flag in its next batch. All processes see the flag in the
        metrics of the same step, and the step after that is the last one. It is at most the third
        step after the signal.
        """
        config = self.config.run
        first = int(state.step)
        train_step = sharded_train_step(self.recipe, self.shapes, self._batch_size)
        self._rates = progress.Rates(first)
        self._bar.reset(config.num_steps)
        self._bar.update(first)
        metrics = None
        batch = self._put(batches) if first < config.num_steps else None
        for step in range(first + 1, config.num_steps + 1):
            previous_metrics = metrics
            self.trace.at(step, previous_metrics)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch | self._stop_flags())
            is_stopped = previous_metrics is not None and self._check(step - 1, previous_metrics)
            is_last = step == config.num_steps or is_stopped
            if not is_last:
                began = time.perf_counter()
                batch = self._put(batches)  # while the step runs
                if metrics["loss"].is_ready():
                    self._rates.add_wait(time.perf_counter() - began)
            self._bar.update()
            if step % config.log_every == 0 or step == config.num_steps:
                state = self._log_line(step, state)
            if is_last or step % config.checkpoint_every == 0:
                self._check(step, metrics)
                if self.log is not None:
                    self.log.send()  # a resumed run needs the lines up to its checkpoint
                self.saver.save(state)
            if config.eval_every and step % config.eval_every == 0 and not is_last:
                self.evaluate(state)
            if is_last:
                break
        self._bar.close()
        return state

    def _put(self, batches: Iterator[Batch]) -> Arrays:
        """Sends the next batch to the devices; warns of files that could not be read."""
        try:
            batch = next(batches)
        except RuntimeError as error:  # from grain, when a worker died
            raise ValueError(f"reading training data: {error}") from error
        failed = batch.pop("failed")  # [B, tries, 2]
        is_failure = failed[..., 0] >= 0
        for source, index in failed[is_failure]:
            if (source, index) not in self._bad_files:
                self._bad_files.add((source, index))
                reason = self.data.failure(int(source), int(index))
                progress.say(f"warning: {reason}; replaced", everywhere=True)
        batch["failed_reads"] = np.sum(is_failure, -1, np.int32)
        return sharding.global_batch(self._mesh, self._batch_size, batch)

    def _stop_flags(self) -> Arrays:
        flags = {"stop": np.full(self._num_rows, self.stop.received)}
        return sharding.global_batch(self._mesh, self._batch_size, flags)

    def _check(self, step: int, metrics: Arrays) -> bool:
        """Returns whether to stop the run.

        Raises:
          ValueError: max_skipped_steps updates in a row were skipped.
        """
        limit = self.config.run.max_skipped_steps
        if int(metrics["skipped_in_row"]) < limit:
            return bool(metrics["stop"])
        not_finite = [name for name, value in metrics.items() if not np.isfinite(value)]
        raise ValueError(
            f"step {step}: {', '.join(not_finite)} not finite; {limit} updates "
            "in a row were skipped; the last checkpoint is intact"
        )

    def _log_line(self, step: int, state: TrainState) -> TrainState:
        """Writes the means since the last line; returns the state with its sums reset."""
        values = writer.summarize(self.recipe, state)
        self._check_reads(step, values["failed_reads"])
        values |= self._rates.since_last(step, self.data.batch_seconds)
        if self.log is not None:
            self.log.write(step, values)
        if "loss" in values:  # not if all updates were skipped
            self._bar.set_postfix(loss=f"{values['loss']:.2f}")
        if not self._terminal:
            progress.say(
                progress.line(step, self.config.run.num_steps, values, self.recipe.objective)
            )
        return state.replace(totals=state.totals.restarted(self._zero_totals()))

    def _check_reads(self, step: int, failed: int) -> None:
        reads = step * self._batch_size
        share = self.config.data.max_failed_share
        if reads >= _MIN_READS and failed > share * reads:
            raise ValueError(
                f"{failed} of {reads} reads failed, more than max_failed_share "
                f"{share:g}; the files are named above"
            )

    def evaluate(self, state: TrainState) -> bool:
        """Draws the loss curves, scores the evaluation recordings, and writes samples.

        The main process does this on one device; the others wait for it in their next step.

        Returns:
          Whether the evaluation finished; SIGTERM interrupts it.
        """
        began = time.perf_counter()
        params = sharding.on_one_device(state.best_params, self._mesh)
        if self.log is not None:
            self.log.save_curves()
            progress.say(f"loss curves: {self.config.run.workdir}/curves.png")
            try:
                self._show(int(state.step), params)
            except StoppedError:
                return False
        self._rates.leave_out(time.perf_counter() - began)  # not training time
        return True

    def _show(self, step: int, params: Any) -> None:
        objective = self.recipe.objective
        result = objective.evaluate(params, self.data, progress.say, self._evaluation_progress)
        if result is None:
            return
        if result.samples:
            self.log.write_samples(step, result.samples, result.sample_rate)
            progress.say(f"listen: {self.config.run.workdir}/samples/*.wav, see *.png beside them")
        self.log.write_evaluation(step, result.table, result.text)
        progress.say(f"step {step}, unseen audio: {result.text}")

    @contextlib.contextmanager
    def _evaluation_progress(self, total: int, unit: str) -> Iterator[Callable[[], None]]:
        with self._progress_bar(total, "evaluating", unit) as bar:

            def done() -> None:
                bar.update()
                if self.stop.received:
                    raise StoppedError

            yield done
