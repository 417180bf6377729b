"""A cache whose manifest grew: the images it holds stay where they are, new ones come behind them.

Nothing is changed in place. A new folder is made beside the old one, from the grown manifest; the files of every full
part are linked into it, and then the two exchange their names. So whoever opens the cache, also after a run that was
killed anywhere, finds the old one or the new one, whole. A last part that was not full has more images now: the next
extract makes it anew, as it makes those that came.

Who has the cache open meanwhile goes on reading full parts, but not a last one that was not full, nor tokens where the
largest part has more regions than before; opened again, the cache has everything.
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
from regionspot.cache.tools.copy_parts import Place, take_part
from regionspot.cache.writing.claim_files import FOLDER as CLAIMS
from regionspot.cache.writing.claims import Claims

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # between two looks whether another run has extended the cache
_GROWTH = "growth"  # what is claimed while a cache is extended


@dataclass(frozen=True)
class Extended:
    """What `extend` did: the images and regions that came, the parts that are done and those to be extracted."""

    images: int
    regions: int
    done: int
    pending: int

    def text(self) -> str:
        """One line for people."""
        came = f"{self.images:,} images with {self.regions:,} regions" if self.images else "no image"
        pending = f", {self.pending:,} pending: `regionspot extract` makes them" if self.pending else ""
        return f"{came} came; {self.done:,} parts are done{pending}"


def extend(path: str | Path, grown: Manifest, *, part_size: int = PART_SIZE, take_over: bool = False) -> Extended:
    """Give the cache the images of `grown` that it does not hold yet, behind those that it holds.

    The images it holds have to be in `grown`, in any order and with nothing about them changed; categories may have
    been added at the end. The result equals, to the byte, a cache that is made at once from the images it held and
    then the new ones in their order.

    part_size   for a cache that is a single part, which may have been small; others keep their own
    take_over   do it although another run has claims here, which is known to be gone

    Raises ProvenanceMismatchError, saying what differs first, for a manifest that is not what the cache holds and
    more; InputError for a cache that is not in a folder; CacheError when another run is at work on it or the disk
    refuses.
    """
    storage = open_storage(path)
    if not isinstance(storage, LocalStorage):
        raise InputError(
            f"{storage.address}: only a cache in a folder can grow; `regionspot cache copy` brings it there and back"
        )
    storage = LocalStorage(storage.folder.resolve())  # where a link leads to: the link itself stays
    try:
        recover_swap(storage.folder)
        return _extend(storage, grown, part_size, take_over)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: could not be extended: {error.strerror or error}; it is as it was: mend that and run "
            "this again"
        ) from error


def _extend(storage: LocalStorage, grown: Manifest, part_size: int, take_over: bool) -> Extended:
    cache = FeatureCache.open(storage.folder)
    manifest = _grown(cache, grown)
    came = len(manifest) - len(cache), len(manifest.boxes_xyxy) - len(cache.manifest.boxes_xyxy)
    n_parts, pending = cache.n_parts, len(cache.pending_parts())
    if manifest.digest() != cache.manifest.digest():
        storage.check_writable()
        remove_abandoned(storage.folder.parent, f"{storage.folder.name}.")
        with Claims(storage, take_over=take_over) as claims:
            claims.claim(_GROWTH)
            _require_alone(storage, claims)
            n_parts, pending = _replace(cache, storage, manifest, part_size, claims)
    return Extended(*came, n_parts - pending, pending)


def _grown(cache: FeatureCache, grown: Manifest) -> Manifest:
    """The grown manifest with the cache's own images first, in its order."""
    stored = cache.manifest
    refused = f"{cache.path}: cannot take in {grown.dataset}/{grown.split}"
    if (stored.dataset, stored.split) != (grown.dataset, grown.split):
        raise ProvenanceMismatchError(
            f"{refused}: it holds {stored.dataset}/{stored.split}; `regionspot cache merge` puts two into a new one"
        )
    if not same_categories(stored, grown):
        raise ProvenanceMismatchError(
            f"{refused}: its {len(grown.categories):,} categories do not begin with the {len(stored.categories):,} "
            "that are there, so an index would mean another one; new categories can only come at the end"
        )
    ordered = order_like(stored, grown)
    if ordered is None:
        lacking = stored.image_ids[rows_by_id(grown, stored.image_ids) < 0]
        raise ProvenanceMismatchError(
            f"{refused}: {len(lacking):,} images that it holds are not there, the first has id {lacking[0]}; "
            "`regionspot cache subset` leaves images out"
        )
    if difference := first_difference(stored, ordered.head(len(stored))):
        raise ProvenanceMismatchError(f"{refused}: {difference}; its features were made from what it holds")
    return ordered


def extended_part_size(geometry: Geometry, asked: int) -> int:
    """Images of a part of a cache that grows: a single part may have been small for want of images."""
    return geometry.part_size if geometry.n_parts > 1 else max(geometry.part_size, asked)


def extend_to(path: str | Path, whole: Manifest, part_size: int) -> None:
    """`extend` a cache that was made with a limit, or wait until another run of the same command has done so.

    Raises what `extend` raises.
    """
    storage = open_storage(path)
    if not isinstance(storage, LocalStorage):
        raise InputError(
            f"{storage.address}: was made with --limit and holds {load_header(storage).geometry.images:,} of the "
            f"{len(whole):,} images asked for, and only a cache in a folder can grow; give that limit or another cache"
        )
    wanted = whole.digest()
    while load_header(storage).digest != wanted:
        try:
            log.info("%s: was made with --limit, and grows to %d images", storage.address, len(whole))
            extend(path, whole, part_size=part_size)
            return
        except CacheError:
            if Claims(storage).holder(_GROWTH) is None and load_header(storage).digest != wanted:
                raise  # what is in the way is no run that extends it
            time.sleep(_LOOK_SECONDS)


def _require_alone(storage: LocalStorage, claims: Claims) -> None:
    """Raises CacheError when another run is at work here: what it writes now would be lost."""
    for what, process in claims.claims_of_others().items():
        work = f"part {what}" if isinstance(what, int) else f"its {what}"
        raise CacheError(
            f"{storage.address}: {process} is at work on {work}; extend it when that run has ended, or with "
            "--take-over if you know that it is gone"
        )
    claims.require_owned(_GROWTH)


def _replace(
    cache: FeatureCache, storage: LocalStorage, manifest: Manifest, part_size: int, claims: Claims
) -> tuple[int, int]:
    """Make the grown cache beside the old one and put it in its place; its parts, and those that are pending."""
    from regionspot.cache.format.create import build_cache  # zarr takes a second to import

    size = extended_part_size(cache.geometry, part_size)
    building = partial_path(storage.folder)
    try:
        build_cache(building, manifest, Header.of(manifest, cache.feature_sets.values(), size))
        grown = FeatureCache.open(building, "a")
        _take_full_parts(cache, grown)
        _take_along(cache, storage.folder, building)
        sync_tree(building)
        _require_alone(storage, claims)
        found = grown.n_parts, len(grown.pending_parts())
        replace_folder(building, storage.folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return found


def _take_full_parts(old: FeatureCache, new: FeatureCache) -> None:
    """Give the new cache all parts of the old one whose images it has in a part of the same number."""
    full = [part for part in range(old.n_parts) if old.part_rows(part) == new.part_rows(part)]
    progress = Progress(len(full), "parts")
    for part in full:
        lacking = old.missing_sets(part)
        for name in old.feature_sets:
            if name not in lacking:
                _take(Place(old, name, part), Place(new, name, part))
        progress.step()


def _take(source: Place, target: Place) -> None:
    record = take_part(source, target)
    path, new_path = (place.storage.local_path(place.record) for place in (source, target))
    if path and new_path and record == source.cache.record(source.part, source.name):
        _link(path, new_path)
    else:  # where the largest part has grown, an index is longer, and so are the files
        record.save(target.storage, target.record)


def _take_along(cache: FeatureCache, old: Path, new: Path) -> None:
    """What somebody else has put into the folder: files, and attributes of the root group."""
    ours = {"zarr.json", *load_header(cache.storage).files}
    arrays = {name for each in cache.feature_sets.values() for name in (each.array, each.scales, each.checksums)}
    for path in old.rglob("*"):
        name = path.relative_to(old)
        part_of_ours = name.parts[0] in ("parts", CLAIMS) or name.parent.as_posix() in arrays
        if path.is_file() and not (part_of_ours or name.as_posix() in ours or path.suffix == ".partial"):
            _link(path, new / name)
    theirs, made = (json.loads((folder / "zarr.json").read_bytes()) for folder in (old, new))
    made["attributes"] = {**theirs["attributes"], **made["attributes"]}
    (new / "zarr.json").write_bytes(to_json(made))


def _link(path: Path, new_path: Path) -> None:
    new_path.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, new_path)
