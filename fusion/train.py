"""Training a fusion head from caches: AdamW, full-model gradient clipping, a stepped learning rate with warm-up.

Everything a step does follows from the seed and the step number: its batch, its dropout, its learning rate. So a run
that was killed and resumes from its last checkpoint computes the very numbers of a run that was never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.machine import compute_device
from regionspot.cache.progress import duration
from regionspot.cache.state_dicts import require_finite
from regionspot.cache.store import FeatureCache
from regionspot.fusion.batches import BatchPlan, Planned, read_ahead
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.config import CHECKPOINT_SECONDS, CHECKPOINT_STEPS, FIRST_CHECKPOINT_SECONDS, TrainConfig
from regionspot.fusion.curves import draw_curves
from regionspot.fusion.decoding import decode_on_device
from regionspot.fusion.head import FusionHead
from regionspot.fusion.losses import region_loss
from regionspot.fusion.metrics import Meter, read_metrics
from regionspot.fusion.run_folder import RunFolder
from regionspot.fusion.sources import Source, head_config_for, open_source, run_identity, run_info
from regionspot.fusion.stop_signals import Stopped, StopSignals
from regionspot.fusion.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. `loss` is the mean over its last interval; `seconds` counts the runs it resumed too."""

    checkpoint: Path
    step: int
    loss: float
    seconds: float

    def text(self) -> str:
        """The result in a few words."""
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
    """Train a head on one or more caches and leave it in `out_dir`/head.safetensors (see run_folder.py for the rest).

    vocabularies   one a cache, in the order of its categories
    preset         name of the backbones' pair, kept with the head so that evaluation can load them
    ratios         share of the batches from each cache, in any unit; default: by their numbers of usable images
    map_set, token_set  feature sets to learn from, where a cache holds several
    resume         from the last checkpoint in `out_dir`; where there is none, begin. More iterations than that run had
                   make it longer (fusion/config.py says with which learning rates)
    device         default: the GPU where there is one
    checkpoint_every, checkpoint_seconds  a checkpoint after so many steps, and when so many seconds have passed

    On a CPU, a resumed run gives the same bits for the same number of threads. SIGINT and SIGTERM take effect once the
    step under way is done and saved. Raises InputError for what does not fit together, for a folder that holds
    something else, and when the loss is no longer finite; the last checkpoint is whole then.
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if value < 1:
            raise InputError(f"training: {name} is {value}, expected at least 1 step")
    if not checkpoint_seconds > 0:
        raise InputError(f"training: checkpoint_seconds is {checkpoint_seconds}, expected more than 0")
    sources = [open_source(cache, map_set, token_set) for cache in caches]
    head_config = head_config_for(sources, vocabularies, config)
    plan = BatchPlan([len(source.rows) for source in sources], config.batch_size, config.seed, ratios)
    identity = run_identity(sources, vocabularies, plan.shares, config, preset)
    folder = RunFolder(out_dir)
    folder.claim(identity, resume)
    info = run_info(sources, vocabularies, identity)
    place = compute_device(device)
    # Forked, so that seeding every step leaves the caller's random numbers alone.
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(config.seed)
        head = FusionHead(head_config).to(place).train()
        run = _Run(folder, sources, plan, config, head, info, place)
        with StopSignals() as signals:
            return run.go(vocabularies, _Saves(checkpoint_every, checkpoint_seconds), log_every, signals)


class _Saves:
    """When the next checkpoint is due."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self._seconds = steps, seconds
        self._due = time.monotonic() + min(seconds, FIRST_CHECKPOINT_SECONDS)

    def due_by_time(self) -> bool:
        return time.monotonic() >= self._due

    def done(self) -> None:
        self._due = time.monotonic() + self._seconds


class _Run:
    """One process's share of a run: from its last checkpoint to the end."""

    def __init__(
        self,
        folder: RunFolder,
        sources: Sequence[Source],
        plan: BatchPlan,
        config: TrainConfig,
        head: FusionHead,
        info: HeadInfo,
        device: torch.device,
    ) -> None:
        self.folder, self.sources, self.plan, self.config = folder, sources, plan, config
        self.head, self.info, self.device = head, info, device
        self.optimizer = AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.first, interval = folder.restore(head, self.optimizer)
        self.meter = Meter(folder.metrics, self.first, config.iterations, interval)
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self.precision = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def go(
        self, vocabularies: Sequence[Vocabulary], saves: _Saves, log_every: int, signals: StopSignals
    ) -> TrainResult:
        config, iterations, meter = self.config, self.config.iterations, self.meter
        texts = [vocabulary.embeddings.to(self.device) for vocabulary in vocabularies]
        if self.first:
            log.info("%s: resumed after step %s", self.folder.path, f"{self.first:,}")
        done = saved = self.first
        pinned = self.device.type == "cuda"
        try:
            with closing(read_ahead(self.sources, self.plan, self.first, iterations, pinned)) as batches:
                while True:
                    begin = time.perf_counter()
                    planned = signals.interruptible(lambda: next(batches, None))
                    if planned is None:
                        break
                    waited = time.perf_counter() - begin
                    loss, grad_norm = self._step(planned, texts[planned.source])
                    done = planned.step + 1
                    meter.add(loss, grad_norm, len(planned.batch), waited)
                    regular = done % saves.steps == 0 or done == iterations
                    # A regular checkpoint closes the interval; one by time must not, for its step is not foreseen and
                    # a resumed run would average over other steps.
                    if regular or done % log_every == 0:
                        meter.write(done, config.rate(planned.step))
                    if regular or saves.due_by_time():
                        self._save(done)
                        saves.done()
                        saved = done
        except Stopped:
            if done > saved:
                self._save(done)
            kept = f"saved the checkpoint of step {done:,}" if done else "no step was done, so there is none to save"
            log.info("%s: %s", self.folder.path, kept)
            signals.take_effect()
            raise KeyboardInterrupt from None
        draw_curves(read_metrics(self.folder.metrics), self.folder.curves)
        loss = float(meter.last["loss"]) if meter.last else math.nan
        return TrainResult(self.folder.head, iterations, loss, meter.seconds)

    def _step(self, planned: Planned, text: Tensor) -> tuple[float, float]:
        """One update. Returns the loss and the gradients' norm before clipping."""
        config, batch = self.config, planned.batch
        # Dropout depends on the step and not on what ran before it, so there is no generator to save.
        torch.manual_seed(config.seed * 1_000_003 + planned.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(planned.step)
        source = self.sources[planned.source]
        tokens = decode_on_device(batch.tokens, batch.token_scale, source.tokens, self.device)
        feature_map = decode_on_device(batch.feature_map, batch.map_scale, source.maps, self.device)
        mask, categories = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (batch.region_mask, batch.categories)
        )
        with self.precision:
            semantic = self.head(tokens, mask, feature_map)
        loss = region_loss(semantic, text, categories)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), config.clip_norm)
        # Looked at before the update: what is not finite never reaches the weights or a checkpoint. It also waits for
        # the device, so that the copies above are over before the batch's memory is used again.
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._not_finite(planned, loss_value, norm_value)
        self.optimizer.step()
        return loss_value, norm_value

    def _not_finite(self, planned: Planned, loss: float, norm: float) -> InputError:
        ids = ", ".join(str(image_id) for image_id in planned.batch.image_ids.tolist())
        return InputError(
            f"step {planned.step + 1}: the loss is {loss} and its gradients' norm {norm} on images {ids} of "
            f"{self.sources[planned.source].cache.path}; look at their features, or train with a lower rate than "
            f"{self.config.lr}. The last checkpoint in {self.folder.path} is whole"
        )

    def _save(self, step: int) -> None:
        try:
            require_finite(self.folder.head, self.head.state_dict())
        except WeightsError as error:
            raise InputError(
                f"step {step}: the update left weights that are not finite ({error}); train with a lower learning rate "
                f"than {self.config.lr}. The last checkpoint in {self.folder.path} is whole"
            ) from None
        try:
            # The state comes last: it says that this step is done, so the head of this step must be there by then.
            save_checkpoint(self.folder.head, self.head, replace(self.info, step=step))
            self.folder.save(step, self.head, self.optimizer, self.meter.open_interval())
        except OSError as error:
            raise InputError(
                f"{self.folder.path}: the checkpoint of step {step} could not be written ({error.strerror}); "
                "make room and resume with --resume"
            ) from None
