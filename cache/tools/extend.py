"""Appends images to a cache; the rows of existing images do not change.

Nothing is changed in place. A new folder is created next to the old one, the files of every full part are hard-linked
into it, and the two folders swap names. So the cache is always complete, the old or the new one, also after a kill. A
last part that was not full gets more images, so the next `extract` writes it again.

A process that has the cache open can still read full parts, but neither a last part that was not full, nor tokens if
the largest part has more regions than before; reopening the cache fixes that.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import CacheError, InputError, ProvenanceMismatchError
from regionspot.cache.format.header import Header, load_header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_diff import first_difference, order_like, rows_by_id, same_categories
from regionspot.cache.format.schema import PART_SIZE, Geometry
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import partial_path, remove_abandoned, sync_tree, to_json
from regionspot.cache.storage.folder_swap import recover_swap, replace_folder
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_parts import PartRef, copy_part_files
from regionspot.cache.writing.claim_files import FOLDER as CLAIMS
from regionspot.cache.writing.claims import Claims

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # while another run extends the cache
_CLAIM = "growth"  # the claim that `extend` holds


@dataclass(frozen=True)
class ExtendSummary:
    """Result of `extend`: images and regions added, parts that are done, and parts to be extracted."""

    images: int
    regions: int
    done: int
    pending: int

    def text(self) -> str:
        """A one-line summary."""
        added = f"{self.images:,} images with {self.regions:,} regions" if self.images else "no image"
        pending = f", {self.pending:,} pending: run `regionspot extract`" if self.pending else ""
        return f"{added} added; {self.done:,} parts are done{pending}"


def extend(path: str | Path, larger: Manifest, *, part_size: int = PART_SIZE, take_over: bool = False) -> ExtendSummary:
    """Append the images of `larger` that the cache does not have yet.

    `larger` must contain the cache's images, in any order and unchanged; new categories may follow the old ones. The
    result is byte-identical to a cache created from the old images followed by the new ones.

    part_size   for a cache with a single part, which may be small; other caches keep their part size
    take_over   ignore the claims of another run that is known to be gone

    Raises ProvenanceMismatchError, naming the first difference, if `larger` does not contain the cache's images;
    InputError for a cache that is not in a folder; CacheError when another run is working on it or the disk fails.
    """
    storage = open_storage(path)
    if not isinstance(storage, LocalStorage):
        raise InputError(
            f"{storage.address}: only a cache in a folder can be extended; copy it there and back "
            "with `regionspot cache copy`"
        )
    storage = LocalStorage(storage.folder.resolve())  # the target of a symbolic link, so that the link is kept
    try:
        recover_swap(storage.folder)
        return _extend(storage, larger, part_size, take_over)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: could not be extended: {error.strerror or error}; it is unchanged: fix that and run "
            "this again"
        ) from error


def _extend(storage: LocalStorage, larger: Manifest, part_size: int, take_over: bool) -> ExtendSummary:
    cache = FeatureCache.open(storage.folder)
    manifest = _appended(cache, larger)
    added = len(manifest) - len(cache), len(manifest.boxes_xyxy) - len(cache.manifest.boxes_xyxy)
    n_parts, pending = cache.n_parts, len(cache.pending_parts())
    if manifest.digest() != cache.manifest.digest():
        storage.check_writable()
        remove_abandoned(storage.folder.parent, f"{storage.folder.name}.")
        with Claims(storage, take_over=take_over) as claims:
            claims.claim(_CLAIM)
            _require_no_other_run(storage, claims)
            n_parts, pending = _replace(cache, storage, manifest, part_size, claims)
    return ExtendSummary(*added, n_parts - pending, pending)


def _appended(cache: FeatureCache, larger: Manifest) -> Manifest:
    """The larger manifest reordered: the cache's images first, in its order."""
    stored = cache.manifest
    prefix = f"{cache.path}: cannot be extended to {larger.dataset}/{larger.split}"
    if (stored.dataset, stored.split) != (larger.dataset, larger.split):
        raise ProvenanceMismatchError(
            f"{prefix}: it holds {stored.dataset}/{stored.split}; combine two datasets with `regionspot cache merge`"
        )
    if not same_categories(stored, larger):
        raise ProvenanceMismatchError(
            f"{prefix}: its {len(larger.categories):,} categories do not begin with the cache's "
            f"{len(stored.categories):,}, so indices would change; add new categories at the end only"
        )
    ordered = order_like(stored, larger)
    if ordered is None:
        missing = stored.image_ids[rows_by_id(larger, stored.image_ids) < 0]
        raise ProvenanceMismatchError(
            f"{prefix}: {len(missing):,} of its images are not there, the first has id {missing[0]}; "
            "remove images with `regionspot cache subset`"
        )
    if difference := first_difference(stored, ordered.head(len(stored))):
        raise ProvenanceMismatchError(f"{prefix}: {difference}; its features would not match")
    return ordered


def extended_part_size(geometry: Geometry, part_size: int) -> int:
    """Part size of an extended cache: a single part may be small only because there were few images."""
    return geometry.part_size if geometry.n_parts > 1 else max(geometry.part_size, part_size)


def extend_to(path: str | Path, larger: Manifest, part_size: int) -> None:
    """`extend` a cache created with --limit, or wait until another run of the same command has done it.

    Raises what `extend` raises.
    """
    storage = open_storage(path)
    if not isinstance(storage, LocalStorage):
        raise InputError(
            f"{storage.address}: was created with --limit and holds {load_header(storage).geometry.images:,} of the "
            f"{len(larger):,} images; only a cache in a folder can be extended: give that limit or another cache"
        )
    digest = larger.digest()
    while load_header(storage).digest != digest:
        try:
            log.info("%s: was created with --limit; extending it to %d images", storage.address, len(larger))
            extend(path, larger, part_size=part_size)
            return
        except CacheError:
            if Claims(storage).owner(_CLAIM) is None and load_header(storage).digest != digest:
                raise  # the reason is not another run of `extend`
            time.sleep(_POLL_SECONDS)


def _require_no_other_run(storage: LocalStorage, claims: Claims) -> None:
    """Raises CacheError when another run is working on the cache: its writes would be lost."""
    for key, process in claims.claims_of_others().items():
        work = f"part {key}" if isinstance(key, int) else f"its {key}"
        raise CacheError(
            f"{storage.address}: {process} is working on {work}; extend it when that run has ended, or with "
            "--take-over if it is known to be gone"
        )
    claims.require_owned(_CLAIM)


def _replace(
    cache: FeatureCache, storage: LocalStorage, manifest: Manifest, part_size: int, claims: Claims
) -> tuple[int, int]:
    """Create the extended cache and replace the old one by it; its number of parts, and of pending ones."""
    from regionspot.cache.format.create import build_cache  # importing zarr takes a second

    size = extended_part_size(cache.geometry, part_size)
    building = partial_path(storage.folder)
    try:
        build_cache(building, manifest, Header.of(manifest, cache.feature_sets.values(), size))
        extended = FeatureCache.open(building, "a")
        _link_full_parts(cache, extended)
        _link_other_files(cache, storage.folder, building)
        sync_tree(building)
        _require_no_other_run(storage, claims)
        counts = extended.n_parts, len(extended.pending_parts())
        replace_folder(building, storage.folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return counts


def _link_full_parts(old: FeatureCache, new: FeatureCache) -> None:
    """Link the parts that have the same rows in both caches."""
    full = [part for part in range(old.n_parts) if old.part_rows(part) == new.part_rows(part)]
    progress = Progress(len(full), "parts")
    for part in full:
        missing = old.missing_sets(part)
        for name in old.feature_sets:
            if name not in missing:
                _link_part(PartRef(old, name, part), PartRef(new, name, part))
        progress.step()


def _link_part(source: PartRef, target: PartRef) -> None:
    record = copy_part_files(source, target)
    path, new_path = (part.storage.local_path(part.record_path) for part in (source, target))
    if path and new_path and record == source.cache.record(source.part, source.name):
        _link(path, new_path)
    else:  # the files differ: their indexes are longer if the largest part has grown
        record.save(target.storage, target.record_path)


def _link_other_files(cache: FeatureCache, old: Path, new: Path) -> None:
    """Keep what others have added: files in the folder, and attributes of the root group."""
    ours = {"zarr.json", *load_header(cache.storage).files}
    arrays = {name for one in cache.feature_sets.values() for name in (one.array, one.scales, one.checksums)}
    for path in old.rglob("*"):
        name = path.relative_to(old)
        is_ours = name.parts[0] in ("parts", CLAIMS) or name.parent.as_posix() in arrays
        if path.is_file() and not (is_ours or name.as_posix() in ours or path.suffix == ".partial"):
            _link(path, new / name)
    old_root, new_root = (json.loads((folder / "zarr.json").read_bytes()) for folder in (old, new))
    new_root["attributes"] = {**old_root["attributes"], **new_root["attributes"]}
    (new / "zarr.json").write_bytes(to_json(new_root))


def _link(path: Path, new_path: Path) -> None:
    new_path.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, new_path)
