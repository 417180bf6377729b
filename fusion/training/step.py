"""One update of a head's weights from one batch, without waiting for the device.

Reading a number from a GPU stops the host until everything before is computed. So the sums of loss and gradient norm,
and whether all of them were finite, stay on the device until `read` is called, every few steps. From the first loss or
norm that is not finite, the device skips all updates: nothing that is not finite reaches the weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from regionspot.fusion.losses import region_loss
from regionspot.fusion.training.batches import TrainingBatch
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.training.distributed import SINGLE, Group


@dataclass(frozen=True)
class StepSums:
    """Sums over the steps since `TrainStep.clear`.

    bad_step   the first step whose loss or gradients are not finite; None if there is none. Its `bad_loss` and
               `bad_grad_norm` are not part of the sums
    """

    loss: float
    grad_norm: float
    bad_step: int | None = None
    bad_loss: float = 0.0
    bad_grad_norm: float = 0.0


class TrainStep:
    """Forward pass, loss, backward pass, clipping and AdamW; a call computes one step of a training."""

    def __init__(
        self,
        head: nn.Module,
        config: TrainConfig,
        texts: list[Tensor],
        device: torch.device,
        group: Group = SINGLE,
        compile: bool = False,
    ) -> None:
        """`texts` are the text embeddings (V, E) of each training set, on the device, where the head is too."""
        self.head, self._config, self._texts, self._device, self._group = head, config, texts, device, group
        self.optimizer = AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        forward: nn.Module = torch.compile(head, dynamic=True) if compile else head  # type: ignore[assignment]
        self._forward = DistributedDataParallel(forward) if group.size > 1 else forward
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self._autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        self._stopped = torch.zeros((), device=device)  # 1 after a loss or norm that is not finite
        self._bad = torch.zeros(3, device=device)  # step, loss and norm of that step
        self._sums = torch.zeros(2, device=device)  # of loss and norm

    def __call__(self, batch: TrainingBatch) -> None:
        config, step, group = self._config, batch.step, self._group
        # Dropout depends on step and rank only, so there is no random state to save. A seed stays below 2^63: a
        # thousand ranks start at multiples of 2^53, and the seed of a configuration is less than 2^32.
        torch.manual_seed(config.seed * 1_000_003 + step + (group.rank << 53))
        for settings in self.optimizer.param_groups:
            settings["lr"] = config.learning_rate(step)
        with self._autocast:
            output = self._forward(batch.tokens, batch.region_mask, batch.feature_map, batch.boxes)
        semantic, own_loss = output if isinstance(output, tuple) else (output, None)
        loss = region_loss(
            semantic,
            self._texts[batch.set_index],
            batch.categories,
            known=batch.known,
            class_ids=batch.class_ids,
            ignored=batch.ignored,
        )
        if own_loss is not None:
            loss = loss + own_loss
        self.optimizer.zero_grad()
        # The loss is a sum over images and DistributedDataParallel averages over processes.
        (loss * group.size).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), config.clip_norm)
        self._account(step, torch.stack([loss.detach(), norm]))
        # As set by torch's GradScaler: the fused optimizer checks this flag on the device and skips the update.
        self.optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        self.optimizer.step()

    def _account(self, step: int, values: Tensor) -> None:
        bad = ~values.isfinite().all()
        first = bad & (self._stopped == 0)
        self._bad = torch.where(first, torch.cat([values.new_full((1,), step), values]), self._bad)
        self._stopped = torch.maximum(self._stopped, bad.float())
        self._sums = self._sums + torch.where(bad, 0.0, values)

    def read(self) -> StepSums:
        """The sums so far; waits for the device. All processes of a group must call it."""
        # The norm is that of the common gradients, the same in all processes; each has the loss of its own images.
        loss = self._group.sum(self._sums[:1].clone())
        total, norm, stopped, step, bad_loss, bad_norm = torch.cat(
            [loss, self._sums[1:], self._stopped[None], self._bad]
        ).tolist()
        return StepSums(total, norm, int(step) if stopped else None, bad_loss, bad_norm)

    def clear(self, loss: float = 0.0, grad_norm: float = 0.0) -> None:
        """Start new sums, from the given ones if a run resumes within an interval."""
        self._sums = torch.tensor([loss if self._group.is_first else 0.0, grad_norm], device=self._device)
