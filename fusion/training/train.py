"""Training a fusion head from caches: AdamW, full-model gradient clipping, a stepped learning rate with warm-up.

The batch, the dropout and the learning rate of a step follow from the seed and the step number alone. So a run that was
killed and resumed from its last checkpoint computes the same numbers as a run that was never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.progress import duration
from regionspot.cache.state_dicts import require_finite
from regionspot.cache.store import FeatureCache
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint, weights_digest
from regionspot.fusion.heads.spec import HeadSpec, check_head
from regionspot.fusion.training.batches import TrainingBatch, batch_shares, read_batches
from regionspot.fusion.training.config import (
    CHECKPOINT_SECONDS,
    CHECKPOINT_STEPS,
    FIRST_CHECKPOINT_SECONDS,
    VALIDATION_STEPS,
    VALIDATIONS,
    TrainConfig,
)
from regionspot.fusion.training.distributed import Group, process_group
from regionspot.fusion.training.fit import fit_prototypes
from regionspot.fusion.training.metrics import Meter, draw_curves, read_metrics
from regionspot.fusion.training.run_folder import KEPT_CHECKPOINTS, RunFolder
from regionspot.fusion.training.step import StepSums, TrainStep
from regionspot.fusion.training.stop_signals import Stopped, StopSignals
from regionspot.fusion.training.trackers import Tracker, open_trackers, require_tracker
from regionspot.fusion.training.training_sets import (
    TrainingSet,
    head_info,
    head_spec_for,
    initial_head,
    open_flipped,
    open_training_set,
    run_identity,
)
from regionspot.fusion.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """`loss` is the mean over the last interval; `seconds` includes the earlier processes of a resumed run."""

    checkpoint: Path
    step: int
    loss: float
    seconds: float

    def text(self) -> str:
        """A one-line summary."""
        if not self.step:
            return f"one pass over the cache in {duration(self.seconds)}"
        return f"{self.step:,} steps in {duration(self.seconds)}, loss {self.loss:.4g}"


Validate = Callable[[nn.Module], Mapping[str, float]]


def train(
    caches: Sequence[FeatureCache],
    vocabularies: Sequence[Vocabulary],
    out_dir: Path,
    config: TrainConfig,
    *,
    preset: str | None = None,
    ratios: Sequence[float] | None = None,
    map_set: str | None = None,
    token_set: str | None = None,
    init: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    compile: bool = False,
    validate: Validate | None = None,
    validate_every: int | None = None,
    checkpoint_every: int = CHECKPOINT_STEPS,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    kept_checkpoints: int = KEPT_CHECKPOINTS,
    log_every: int = 20,
    log_to: str | None = None,
) -> TrainResult | None:
    """Train a head on one or more caches and write it to `out_dir`/head.safetensors; run_folder.py lists all files.

    None in the processes of a group that write no files: in all but the first.

    vocabularies   one for each cache, in the order of its categories
    preset         name of the pair of backbones, saved with the head so that evaluation can load them
    ratios         share of the batches from each cache, in any unit; default: by `config.ratio`
    map_set, token_set  feature sets to train on, where a cache holds several
    init           a checkpoint, ours or a released one, whose weights the head starts from
    resume         from the last checkpoint in `out_dir`; start if there is none. With more iterations than before, the
                   run becomes longer (fusion/training/config.py describes its learning rates)
    device         default: the GPU if there is one
    compile        the head by torch.compile
    validate       scores of the head in evaluation mode, the most important first; called every `validate_every` steps
                   and at the end; by default 50 times, but not within VALIDATION_STEPS of the last one. The head with
                   the best score is kept
    checkpoint_every, checkpoint_seconds  save a checkpoint after this many steps, and after this many seconds
    kept_checkpoints  the heads of the last checkpoints that are kept
    log_to         "trackio" or "wandb": a tracker that gets the metrics, too (fusion/training/trackers.py)

    Under torchrun, all processes compute one run (fusion/training/distributed.py). On a CPU, a resumed run of one
    process is bitwise equal for the same number of threads. SIGINT and SIGTERM take effect after the current step is
    finished and saved. Raises InputError for inputs that do not fit together, for a folder that holds something else,
    and when the loss is no longer finite; the last checkpoint is intact then.
    """
    if validate_every is None:
        validate_every = max(VALIDATION_STEPS, math.ceil(config.iterations / VALIDATIONS))
    for name, value in (
        ("checkpoint_every", checkpoint_every),
        ("kept_checkpoints", kept_checkpoints),
        ("log_every", log_every),
        ("validate_every", validate_every),
    ):
        if value < 1:
            raise InputError(f"training: {name} is {value}, expected at least 1")
    require_tracker(log_to)
    if not checkpoint_seconds > 0:
        raise InputError(f"training: checkpoint_seconds is {checkpoint_seconds}, expected more than 0")
    training_sets = [open_training_set(cache, map_set, token_set) for cache in caches]
    spec = head_spec_for(training_sets, vocabularies, config)
    check_head(spec, training_sets[0].maps.shape[0])
    shares = batch_shares(training_sets, ratios or ([1.0] * len(caches) if config.ratio == "equal" else None))
    if config.views == "flip":
        # The second view of each cache is a training set of its own, which gives half of the cache's batches.
        training_sets = [view for one in training_sets for view in (one, open_flipped(one))]
        vocabularies = [vocabulary for vocabulary in vocabularies for _ in range(2)]
        shares = np.repeat(shares / 2, 2)
        head_spec_for(training_sets, vocabularies, config)  # the views must fit together
    identity = run_identity(training_sets, vocabularies, shares, config, preset)
    initial = None
    if init is not None:
        initial = initial_head(init, spec, training_sets[0])
        identity["init"] = weights_digest(initial.head.state_dict())
    info = head_info(training_sets, vocabularies, identity, initial.info if initial else None)
    folder = RunFolder(out_dir, kept_checkpoints)
    with process_group(device) as (group, torch_device), closing(folder):
        if group.is_first:
            folder.claim(identity, resume)
        group.wait()
        if spec.type == "prototypes":
            return _fitted(folder, training_sets, vocabularies, spec, info, torch_device, group)
        # Forked because every step sets the seed: the caller's random state must not change.
        with torch.random.fork_rng(devices=[torch_device] if torch_device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            head = spec.build()
            if initial is not None:
                head.load_state_dict(initial.head.state_dict())
            texts = [vocabulary.embeddings.to(torch_device) for vocabulary in vocabularies]
            step = TrainStep(head.to(torch_device).train(), config, texts, torch_device, group, compile)
            batches = partial(read_batches, training_sets, shares, config, torch_device, group=group)
            trackers = open_trackers(out_dir, log_to, folder.run_id, identity) if group.is_first else []
            trainer = _Trainer(folder, config, spec, step, info, batches, group, validate, trackers)
            with StopSignals() as signals, closing(trainer):
                return trainer.run(checkpoint_every, checkpoint_seconds, validate_every, log_every, signals)


def _fitted(
    folder: RunFolder,
    training_sets: Sequence[TrainingSet],
    vocabularies: Sequence[Vocabulary],
    spec: HeadSpec,
    info: HeadInfo,
    device: torch.device,
    group: Group,
) -> TrainResult | None:
    """A head that needs no training steps: one pass over the caches, by the first process of a group."""
    if not group.is_first:
        return None
    begin = time.monotonic()
    spec, head = fit_prototypes(training_sets, vocabularies, spec, device)
    require_finite(folder.head, head.state_dict())
    save_checkpoint(folder.head, spec, head, info)
    return TrainResult(folder.head, 0, math.nan, time.monotonic() - begin)


class _Trainer:
    """Runs a training from its last checkpoint to the end. Only the first process of a group writes files."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        spec: HeadSpec,
        step: TrainStep,
        info: HeadInfo,
        batches: Callable[..., Generator[TrainingBatch]],
        group: Group,
        validate: Validate | None,
        trackers: Sequence[Tracker],
    ) -> None:
        self.folder, self.config, self.spec, self.step, self.info = folder, config, spec, step, info
        self.batches, self.group, self.validate = batches, group, validate
        self.first_step, interval = folder.restore(step.head, step.optimizer)
        if interval:
            step.clear(interval["loss"], interval["grad_norm"])
        self.meter = None
        if group.is_first:
            self.meter = Meter(folder.metrics, self.first_step, config.iterations, interval, trackers)
        # Of the steps since the last check, to name the images of a step that failed.
        self.rows = dict[int, tuple[TrainingSet, NDArray[np.int64]]]()

    def run(
        self,
        checkpoint_every: int,
        checkpoint_seconds: float,
        validate_every: int,
        log_every: int,
        signals: StopSignals,
    ) -> TrainResult | None:
        iterations, group = self.config.iterations, self.group
        if self.first_step:
            log.info("%s: resumed after step %s", self.folder.path, f"{self.first_step:,}")
        done = saved = self.first_step
        next_checkpoint = time.monotonic() + min(checkpoint_seconds, FIRST_CHECKPOINT_SECONDS)
        try:
            with closing(self.batches(self.first_step)) as batches:
                while True:
                    begin = time.perf_counter()
                    # One process stops at any step. Several stop together, at the end of an interval.
                    batch = signals.interruptible(lambda: next(batches, None), enabled=group.size == 1)
                    if batch is None:
                        break
                    wait_seconds = time.perf_counter() - begin
                    self.step(batch)
                    done = batch.step + 1
                    self.rows[batch.step] = batch.training_set, batch.rows
                    if self.meter:
                        self.meter.add(images=len(batch), bytes=batch.stored_bytes, wait_seconds=wait_seconds)
                    regular = done % checkpoint_every == 0 or done == iterations
                    # A regular checkpoint ends the metrics interval. A checkpoint by time must not: nobody can predict
                    # its step, and a resumed run would average over other steps.
                    validates = self.validate is not None and (done % validate_every == 0 or done == iterations)
                    ends_interval = regular or validates or done % log_every == 0
                    if ends_interval:
                        self._end_interval(done, self.validate if validates else None)
                    if group.size == 1 or ends_interval:
                        if regular or group.any(time.monotonic() >= next_checkpoint):
                            self._save(done)
                            saved, next_checkpoint = done, time.monotonic() + checkpoint_seconds
                        if group.size > 1 and group.any(signals.received):
                            raise Stopped
        except Stopped:
            if done > saved:
                self._save(done)
            message = f"saved the checkpoint of step {done:,}" if done else "no step is complete, so nothing is saved"
            log.info("%s: %s", self.folder.path, message)
            signals.take_effect()
            raise KeyboardInterrupt from None
        if self.meter is None:
            return None
        draw_curves(read_metrics(self.folder.metrics), self.folder.curves)
        loss = float(self.meter.last["loss"]) if self.meter.last else math.nan
        return TrainResult(self.folder.head, iterations, loss, self.meter.seconds)

    def close(self) -> None:
        """Close the trackers of the metrics."""
        if self.meter:
            self.meter.close()

    def _end_interval(self, done: int, validate: Validate | None) -> None:
        sums = self._checked_sums()
        if self.meter:
            scores = self._validate(validate, done, self.meter) if validate else None
            self.meter.write(done, self.config.learning_rate(done - 1), sums.loss, sums.grad_norm, scores)
        self.step.clear()

    def _validate(self, validate: Validate, done: int, meter: Meter) -> Mapping[str, float]:
        head = self.step.head.eval()
        with meter.paused(), torch.no_grad():
            scores = validate(head)
        with self._one_line_if_not_written(done):
            self.folder.keep_best(self.spec, head, replace(self.info, step=done), scores)
        head.train()
        return scores

    def _checked_sums(self) -> StepSums:
        """Loss and gradient norm of the interval. Raises InputError if one of them was not finite."""
        sums = self.step.read()
        if sums.bad_step is not None:
            training_set, rows = self.rows[sums.bad_step]
            cache = training_set.cache
            ids = ", ".join(str(image_id) for image_id in cache.manifest.image_ids[rows])
            raise InputError(
                f"step {sums.bad_step + 1}: the loss is {sums.bad_loss} and the norm of its gradients "
                f"{sums.bad_grad_norm} on images {ids} of {cache.path}; check their features, or train "
                f"with a lower learning rate than {self.config.lr}. The last checkpoint in {self.folder.path} is intact"
            )
        self.rows.clear()
        return sums

    def _save(self, step: int) -> None:
        sums = self._checked_sums()
        if self.meter is None:
            return
        head = self.step.head
        try:
            require_finite(self.folder.head, head.state_dict())
        except WeightsError as error:
            raise InputError(
                f"step {step}: the update left weights that are not finite ({error}); train with a lower learning rate "
                f"than {self.config.lr}. The last checkpoint in {self.folder.path} is intact"
            ) from None
        with self._one_line_if_not_written(step):
            interval = self.meter.open_interval(sums.loss, sums.grad_norm)
            self.folder.save(self.spec, head, replace(self.info, step=step), self.step.optimizer, interval)

    @contextmanager
    def _one_line_if_not_written(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder.path}: the checkpoint of step {step} cannot be written ({error.strerror}); "
                "free some disk space and resume with --resume"
            ) from None
