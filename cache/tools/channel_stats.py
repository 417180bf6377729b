"""Mean and variance of every channel of a feature set, over a whole cache in one pass: what `cache.dask` is good for.

Each part gives the count, mean and sum of squared deviations of its rows; two such are joined by Chan's rule, which
loses no digits where a mean is large beside its deviation, as a sum of squares would.
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

_BLOCK_BYTES = 4 << 20  # of float64 rows at a time: they stay in the processor's cache, and memory stays small
_JOINED = 16  # partial results that one task joins
_WIDE = 10  # times as wide as the median channel: what int8 without statistics would suffer from


@dataclass(frozen=True, eq=False)
class Moments:
    """Count of rows, their mean float64 (D,), and the sum of the squares of their deviations from it, float64 (D,)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Over all map tokens, or all regions, of the images that could be read.

    count      of them
    left_out   images that could not be read
    mean       float64 (D,)
    variance   float64 (D,), of the population
    """

    name: str
    count: int
    left_out: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def text(self) -> str:
        """Some lines for people."""
        deviation = np.sqrt(self.variance)
        usual = float(np.median(deviation))
        wide = np.flatnonzero(deviation > _WIDE * usual)
        widest = np.argsort(-deviation)[:5]
        left_out = f"; {self.left_out:,} images that could not be read are left out" if self.left_out else ""
        return "\n".join(
            [
                f"{self.name}: {len(self.mean):,} channels over {self.count:,} vectors{left_out}",
                f"  mean       {self.mean.min():.4g} to {self.mean.max():.4g}, median {np.median(self.mean):.4g}",
                f"  deviation  {deviation.min():.4g} to {deviation.max():.4g}, median {usual:.4g}",
                f"  widest     {', '.join(f'channel {channel} {deviation[channel]:.4g}' for channel in widest)}",
                f"  outliers   {len(wide):,} channels are more than {_WIDE} times as wide as the median one",
            ]
        )

    def save(self, path: Path) -> None:
        """Write an .npz of `mean`, `variance` and `count`, or a .json of all fields. Raises InputError for neither."""
        check_stats_name(path)
        if path.suffix == ".npz":
            with path.open("wb") as file:
                np.savez(file, mean=self.mean, variance=self.variance, count=self.count)
            return
        fields = {"name": self.name, "count": self.count, "left_out": self.left_out}
        write_file(path, to_json({**fields, "mean": self.mean.tolist(), "variance": self.variance.tolist()}))


def check_stats_name(path: Path) -> Path:
    """The path itself. Raises InputError for an ending that cannot be written, before an hour of work is lost."""
    if path.suffix not in (".npz", ".json"):
        raise InputError(f"{path}: statistics are written as .npz or .json, not {path.suffix!r}")
    return path


def channel_stats(cache: FeatureCache, name: str) -> ChannelStats:
    """Mean and variance of every channel of a feature set.

    Runs where dask is told to: in threads of this process, or on the cluster of an active `distributed.Client`.
    Raises InputError for a set that is not there or holds nothing, NotExtractedError while parts of it are pending.
    """
    from dask.base import compute  # half a second to import
    from dask.callbacks import Callback
    from dask.delayed import delayed

    parts = cache.dask(name).to_delayed().ravel().tolist()
    left_out = sum(len(cache.record(part, name).failures) for part in range(cache.n_parts))
    results = [delayed(moments)(part, dask_key_name=f"moments-{number}") for number, part in enumerate(parts)]
    while len(results) > 1:
        results = [delayed(joined)(results[at : at + _JOINED]) for at in range(0, len(results), _JOINED)]
    progress = Progress(cache.n_parts, "parts")
    with Callback(posttask=lambda key, *_: _count(key, progress)):
        whole: Moments = compute(results[0])[0]
    if not whole.count:
        raise InputError(f"{cache.path}: {name} holds no features: every image failed or has no region")
    return ChannelStats(name, whole.count, left_out, whole.mean, whole.squares / whole.count)


def _count(key: Any, progress: Progress) -> None:
    if str(key).startswith("moments-"):
        progress.step()


def moments(values: NDArray[Any]) -> Moments:
    """Of floating (..., D) values; rows of NaN, which are of images that could not be read, are left out."""
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _BLOCK_BYTES // (8 * rows.shape[1]))
    return joined([_moments(rows[at : at + step]) for at in range(0, max(len(rows), 1), step)])


def _moments(rows: NDArray[Any]) -> Moments:
    there = rows[~np.isnan(rows[:, 0])].astype(np.float64)
    if not len(there):
        return Moments(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
    mean = there.mean(axis=0)
    there -= mean
    return Moments(len(there), mean, np.einsum("nd,nd->d", there, there))


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows of several (Chan, Golub and LeVeque, 1979)."""
    whole = parts[0]
    for part in parts[1:]:
        if not part.count:
            continue
        count = whole.count + part.count
        apart = part.mean - whole.mean
        mean = whole.mean + apart * (part.count / count)
        squares = whole.squares + part.squares + apart**2 * (whole.count * part.count / count)
        whole = Moments(count, mean, squares)
    return whole
