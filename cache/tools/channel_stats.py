"""Mean and variance of every channel of a feature set, in one pass over a cache with dask.

Each part yields the count, mean and sum of squared deviations of its rows. They are combined by Chan's formula, which
stays exact where the mean is much larger than the deviation, unlike a sum of squares.
"""

# n rows: map tokens or regions; D channels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import to_json, write_file
from regionspot.cache.store import FeatureCache

_BLOCK_BYTES = 4 << 20  # of float64 rows at a time: fits into the CPU cache
_COMBINED = 16  # partial results that one task combines
_OUTLIER = 10  # times the median deviation: such channels lose precision in int8 without statistics


@dataclass(frozen=True, eq=False)
class Moments:
    """Number of rows, their mean, and the sum of squared deviations from it; both float64 (D,)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Statistics over all map tokens or all regions of the readable images.

    count      number of map tokens or regions
    left_out   number of images that could not be read
    mean       float64 (D,)
    variance   float64 (D,), population variance
    """

    name: str
    count: int
    left_out: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def text(self) -> str:
        """A summary of a few lines."""
        deviation = np.sqrt(self.variance)
        usual = float(np.median(deviation))
        outliers = np.flatnonzero(deviation > _OUTLIER * usual)
        widest = np.argsort(-deviation)[:5]
        left_out = f"; {self.left_out:,} images that could not be read are left out" if self.left_out else ""
        return "\n".join(
            [
                f"{self.name}: {len(self.mean):,} channels over {self.count:,} vectors{left_out}",
                f"  mean       {self.mean.min():.4g} to {self.mean.max():.4g}, median {np.median(self.mean):.4g}",
                f"  deviation  {deviation.min():.4g} to {deviation.max():.4g}, median {usual:.4g}",
                f"  widest     {', '.join(f'channel {channel} {deviation[channel]:.4g}' for channel in widest)}",
                f"  outliers   {len(outliers):,} channels deviate more than {_OUTLIER} times the median",
            ]
        )

    def save(self, path: Path) -> None:
        """Write `mean`, `variance` and `count` as .npz, or all fields as .json; InputError for other suffixes."""
        check_stats_suffix(path)
        if path.suffix == ".npz":
            with path.open("wb") as file:
                np.savez(file, mean=self.mean, variance=self.variance, count=self.count)
            return
        fields = {"name": self.name, "count": self.count, "left_out": self.left_out}
        write_file(path, to_json({**fields, "mean": self.mean.tolist(), "variance": self.variance.tolist()}))


def check_stats_suffix(path: Path) -> Path:
    """The path itself. Raises InputError for an unsupported suffix, before the computation."""
    if path.suffix not in (".npz", ".json"):
        raise InputError(f"{path}: statistics are written as .npz or .json, not {path.suffix!r}")
    return path


def channel_stats(cache: FeatureCache, name: str) -> ChannelStats:
    """Mean and variance of every channel of a feature set.

    Runs on dask's current scheduler: threads of this process, or the cluster of an active `distributed.Client`.
    Raises InputError for an unknown or empty set, NotExtractedError while parts of it are pending.
    """
    from dask.base import compute  # importing dask takes 0.5 s
    from dask.callbacks import Callback
    from dask.delayed import delayed

    parts = cache.dask(name).to_delayed().ravel().tolist()
    left_out = sum(len(cache.record(part, name).failures) for part in range(cache.n_parts))
    results = [delayed(moments)(part, dask_key_name=f"moments-{number}") for number, part in enumerate(parts)]
    while len(results) > 1:
        results = [delayed(combine)(results[at : at + _COMBINED]) for at in range(0, len(results), _COMBINED)]
    progress = Progress(cache.n_parts, "parts")
    with Callback(posttask=lambda key, *_: _count(key, progress)):
        total: Moments = compute(results[0])[0]
    if not total.count:
        raise InputError(f"{cache.path}: {name} holds no features: every image failed or has no region")
    return ChannelStats(name, total.count, left_out, total.mean, total.squares / total.count)


def _count(key: Any, progress: Progress) -> None:
    if str(key).startswith("moments-"):
        progress.step()


def moments(values: NDArray[Any]) -> Moments:
    """Moments of floating (..., D) values, without rows of NaN (images that could not be read)."""
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _BLOCK_BYTES // (8 * rows.shape[1]))
    return combine([_moments(rows[at : at + step]) for at in range(0, max(len(rows), 1), step)])


def _moments(rows: NDArray[Any]) -> Moments:
    valid = rows[~np.isnan(rows[:, 0])].astype(np.float64)
    if not len(valid):
        return Moments(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
    mean = valid.mean(axis=0)
    valid -= mean
    return Moments(len(valid), mean, np.einsum("nd,nd->d", valid, valid))


def combine(parts: Sequence[Moments]) -> Moments:
    """Moments of all rows of several parts (Chan, Golub and LeVeque, 1979)."""
    total = parts[0]
    for part in parts[1:]:
        if not part.count:
            continue
        count = total.count + part.count
        difference = part.mean - total.mean
        mean = total.mean + difference * (part.count / count)
        squares = total.squares + part.squares + difference**2 * (total.count * part.count / count)
        total = Moments(count, mean, squares)
    return total
