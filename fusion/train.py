"""Training a fusion head from caches: AdamW, full-model gradient clipping, a stepped learning rate with warm-up.

The batch, the dropout and the learning rate of a step follow from the seed and the step number alone. So a run that was
killed and resumed from its last checkpoint computes the same numbers as a run that was never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.machine import compute_device
from regionspot.cache.progress import duration
from regionspot.cache.reading.batch import Batch
from regionspot.cache.state_dicts import require_finite
from regionspot.cache.store import FeatureCache
from regionspot.fusion.batches import TrainingBatch, batch_shares, decode_on_device, read_batches
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.config import CHECKPOINT_SECONDS, CHECKPOINT_STEPS, FIRST_CHECKPOINT_SECONDS, TrainConfig
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.losses import region_loss
from regionspot.fusion.metrics import Meter, draw_curves, read_metrics
from regionspot.fusion.run_folder import RunFolder
from regionspot.fusion.stop_signals import Stopped, StopSignals
from regionspot.fusion.training_sets import TrainingSet, head_info, head_spec_for, open_training_set, run_identity
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
        return f"{self.step:,} steps in {duration(self.seconds)}, loss {self.loss:.4g}"


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
    resume: bool = False,
    device: str | None = None,
    checkpoint_every: int = CHECKPOINT_STEPS,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    log_every: int = 20,
) -> TrainResult:
    """Train a head on one or more caches and write it to `out_dir`/head.safetensors; run_folder.py lists all files.

    vocabularies   one for each cache, in the order of its categories
    preset         name of the pair of backbones, saved with the head so that evaluation can load them
    ratios         share of the batches from each cache, in any unit; default: the number of usable images
    map_set, token_set  feature sets to train on, where a cache holds several
    resume         from the last checkpoint in `out_dir`; start if there is none. With more iterations than before, the
                   run becomes longer (fusion/config.py describes its learning rates)
    device         default: the GPU if there is one
    checkpoint_every, checkpoint_seconds  save a checkpoint after this many steps, and after this many seconds

    On a CPU, a resumed run is bitwise equal for the same number of threads. SIGINT and SIGTERM take effect after the
    current step is finished and saved. Raises InputError for inputs that do not fit together, for a folder that holds
    something else, and when the loss is no longer finite; the last checkpoint is intact then.
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if value < 1:
            raise InputError(f"training: {name} is {value}, expected at least 1 step")
    if not checkpoint_seconds > 0:
        raise InputError(f"training: checkpoint_seconds is {checkpoint_seconds}, expected more than 0")
    training_sets = [open_training_set(cache, map_set, token_set) for cache in caches]
    spec = head_spec_for(training_sets, vocabularies, config)
    shares = batch_shares(training_sets, ratios)
    identity = run_identity(training_sets, vocabularies, shares, config, preset)
    folder = RunFolder(out_dir)
    folder.claim(identity, resume)
    info = head_info(training_sets[0], vocabularies, identity)
    torch_device = compute_device(device)
    # Forked because every step sets the seed: the caller's random state must not change.
    with torch.random.fork_rng(devices=[torch_device] if torch_device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        head = spec.build().to(torch_device).train()
        trainer = _Trainer(folder, training_sets, shares, config, spec, head, info, torch_device)
        with StopSignals() as signals:
            return trainer.run(vocabularies, checkpoint_every, checkpoint_seconds, log_every, signals)


class _Trainer:
    """Runs a training from its last checkpoint to the end, in one process."""

    def __init__(
        self,
        folder: RunFolder,
        training_sets: Sequence[TrainingSet],
        shares: NDArray[np.float64],
        config: TrainConfig,
        spec: HeadSpec,
        head: nn.Module,
        info: HeadInfo,
        device: torch.device,
    ) -> None:
        self.folder, self.training_sets, self.shares, self.config = folder, training_sets, shares, config
        self.spec, self.head, self.info, self.device = spec, head, info, device
        self.optimizer = AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.first_step, interval = folder.restore(head, self.optimizer)
        self.meter = Meter(folder.metrics, self.first_step, config.iterations, interval)
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self.autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def run(
        self,
        vocabularies: Sequence[Vocabulary],
        checkpoint_every: int,
        checkpoint_seconds: float,
        log_every: int,
        signals: StopSignals,
    ) -> TrainResult:
        config, iterations, meter = self.config, self.config.iterations, self.meter
        texts = [vocabulary.embeddings.to(self.device) for vocabulary in vocabularies]
        if self.first_step:
            log.info("%s: resumed after step %s", self.folder.path, f"{self.first_step:,}")
        done = saved = self.first_step
        self.loss_sum, self.grad_norm_sum = meter.resumed_sums
        next_checkpoint = time.monotonic() + min(checkpoint_seconds, FIRST_CHECKPOINT_SECONDS)
        batches = read_batches(
            self.training_sets,
            self.shares,
            config.batch_size,
            config.seed,
            self.first_step,
            iterations,
            pin_memory=self.device.type == "cuda",
        )
        try:
            with closing(batches):
                while True:
                    begin = time.perf_counter()
                    batch = signals.interruptible(lambda: next(batches, None))
                    if batch is None:
                        break
                    wait_seconds = time.perf_counter() - begin
                    loss, grad_norm = self._step(batch, texts[batch.set_index])
                    done = batch.step + 1
                    self.loss_sum += loss
                    self.grad_norm_sum += grad_norm
                    meter.add(images=len(batch.batch), bytes=_feature_bytes(batch.batch), wait_seconds=wait_seconds)
                    regular = done % checkpoint_every == 0 or done == iterations
                    # A regular checkpoint ends the metrics interval. A checkpoint by time must not: nobody can predict
                    # its step, and a resumed run would average over other steps.
                    if regular or done % log_every == 0:
                        meter.write(done, config.learning_rate(batch.step), self.loss_sum, self.grad_norm_sum)
                        self.loss_sum = self.grad_norm_sum = 0.0
                    if regular or time.monotonic() >= next_checkpoint:
                        self._save(done)
                        saved, next_checkpoint = done, time.monotonic() + checkpoint_seconds
        except Stopped:
            if done > saved:
                self._save(done)
            message = f"saved the checkpoint of step {done:,}" if done else "no step is complete, so nothing is saved"
            log.info("%s: %s", self.folder.path, message)
            signals.take_effect()
            raise KeyboardInterrupt from None
        draw_curves(read_metrics(self.folder.metrics), self.folder.curves)
        loss = float(meter.last["loss"]) if meter.last else math.nan
        return TrainResult(self.folder.head, iterations, loss, meter.seconds)

    def _step(self, training_batch: TrainingBatch, text: Tensor) -> tuple[float, float]:
        """Update the weights once. Returns the loss and the norm of the gradients before clipping."""
        config, batch, step = self.config, training_batch.batch, training_batch.step
        # Dropout depends on the step only, so there is no random state to save.
        torch.manual_seed(config.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        training_set = self.training_sets[training_batch.set_index]
        tokens = decode_on_device(batch.tokens, batch.token_scale, training_set.tokens, self.device)
        feature_map = decode_on_device(batch.feature_map, batch.map_scale, training_set.maps, self.device)
        manifest = training_set.cache.manifest
        boxes = relative_boxes(batch.boxes_xyxy, manifest.heights[batch.rows], manifest.widths[batch.rows])
        mask, categories, box_tensor = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (batch.region_mask, batch.categories, boxes)
        )
        with self.autocast:
            semantic = self.head(tokens, mask, feature_map, box_tensor)
        loss = region_loss(semantic, text, categories)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), config.clip_norm)
        # Checked before the update, so that NaN and infinity never reach the weights or a checkpoint. `tolist` also
        # waits for the device: the copies above are complete before the buffers of the batch are reused.
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            ids = ", ".join(str(image_id) for image_id in batch.image_ids.tolist())
            raise InputError(
                f"step {step + 1}: the loss is {loss_value} and the norm of its gradients {norm_value} on images {ids} "
                f"of {training_set.cache.path}; check their features, or train with a lower learning rate than "
                f"{config.lr}. The last checkpoint in {self.folder.path} is intact"
            )
        self.optimizer.step()
        return loss_value, norm_value

    def _save(self, step: int) -> None:
        try:
            require_finite(self.folder.head, self.head.state_dict())
        except WeightsError as error:
            raise InputError(
                f"step {step}: the update left weights that are not finite ({error}); train with a lower learning rate "
                f"than {self.config.lr}. The last checkpoint in {self.folder.path} is intact"
            ) from None
        try:
            # The state is last: it marks the step as done, and the head of this step must exist by then.
            save_checkpoint(self.folder.head, self.spec, self.head, replace(self.info, step=step))
            interval = self.meter.open_interval(self.loss_sum, self.grad_norm_sum)
            self.folder.save(step, self.head, self.optimizer, interval)
        except OSError as error:
            raise InputError(
                f"{self.folder.path}: the checkpoint of step {step} cannot be written ({error.strerror}); "
                "free some disk space and resume with --resume"
            ) from None


def _feature_bytes(batch: Batch) -> int:
    """Bytes of the features of a batch in their stored form."""
    return sum(array.nbytes for array in (batch.tokens, batch.token_scale, batch.feature_map, batch.map_scale))
