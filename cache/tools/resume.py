"""Open a cache to continue its extraction, or create it, after checking that the request matches what it holds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from regionspot.cache.errors import CacheError, CacheExistsError
from regionspot.cache.format.header import Header, by_name, load_header, require_same_manifest, require_same_sets
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_diff import differs_by_limit, needs_growth, select_stored
from regionspot.cache.format.schema import PART_SIZE, FeatureSet, Geometry
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.extend import extend_to
from regionspot.cache.writing.claims import Claims

log = logging.getLogger(__name__)


def open_or_create(
    path: str | Path,
    manifest: Manifest,
    feature_sets: Iterable[FeatureSet],
    part_size: int = PART_SIZE,
    may_grow: bool = True,
) -> FeatureCache:
    """Open a cache for writing, or create it. Feature sets that it lacks are added; existing ones are not touched.

    An existing cache keeps its part size (a warning names a different request) and its image order: annotations may
    list the images in another order, and a subset of a cache accepts the annotations of the whole. `--limit` belongs to
    a run: of the same annotation files, a cache may hold more images than requested, and one that holds fewer is
    extended if `may_grow`; its full parts are kept.

    Raises ProvenanceMismatchError, with the differences, when it was made from other annotations or backbones, and
    what `extend` raises.
    """
    storage, requested = open_storage(path), by_name(feature_sets)
    header = Header.of(manifest, requested.values(), part_size)
    if not storage.exists(""):
        try:
            return FeatureCache.create(path, manifest, requested.values(), part_size)
        except CacheExistsError:
            log.info("%s: another run has just created it; joining that run", path)
    stored = load_header(storage)
    if stored.digest != header.digest:
        stored_form, grows = _in_stored_form(storage, stored, manifest)
        header = Header.of(stored_form, requested.values(), part_size)
        if grows and may_grow:
            require_same_sets(storage.address, stored.feature_sets, requested)  # a mismatch must not extend the cache
            extend_to(path, manifest, part_size)
            stored = load_header(storage)
            header = Header.of(manifest, requested.values(), part_size)
    require_same_manifest(storage.address, stored, header)
    require_same_sets(storage.address, stored.feature_sets, requested)
    _warn_of_part_size(storage.address, stored.geometry, part_size)
    cache = FeatureCache.open(path, "a")
    return add_feature_sets(cache, requested) if requested.keys() - cache.feature_sets.keys() else cache


def add_feature_sets(cache: FeatureCache, requested: Mapping[str, FeatureSet]) -> FeatureCache:
    """Add the feature sets that the cache lacks, and return it with them. Safe among several processes.

    Raises ProvenanceMismatchError where the cache has a different set of that name, CacheError if the storage refuses.
    """
    from regionspot.cache.format.create import create_feature_set  # zarr takes a second to import

    with Claims(cache.storage) as claims:
        claims.wait_for("header")  # one process at a time reads, changes and writes it
        header = load_header(cache.storage)
        require_same_sets(cache.storage.address, header.feature_sets, requested)
        new = {name: requested[name] for name in requested if name not in header.feature_sets}
        try:
            files: dict[str, int] = {}
            for feature_set in new.values():
                files |= create_feature_set(cache.storage, feature_set, cache.geometry)
            header = header.adding(new.values(), files)
            header.save(cache.storage)
        except OSError as error:
            raise CacheError(
                f"{cache.path}: feature sets {', '.join(new)} could not be added: {error.strerror or error}; "
                "the cache is unchanged: fix this and run the same command again"
            ) from error
    return FeatureCache(cache.storage, header, cache.manifest, cache.mode, cache.check, cache.access)


def _in_stored_form(storage: Storage, header: Header, requested: Manifest) -> tuple[Manifest, bool]:
    """The requested images as the cache stores them, unchanged if it does not; and whether the cache has to grow.

    If the two differ by `--limit` only, that is the cache's own manifest.
    """
    from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

    stored = load_manifest(storage, header)
    reordered = select_stored(stored, requested)
    if reordered.digest() != header.digest:
        grows = needs_growth(stored, requested)
        if grows or differs_by_limit(requested, stored):
            return stored, grows
    return reordered, False


def _warn_of_part_size(address: str, geometry: Geometry, requested: int) -> None:
    # The default is indistinguishable from no request.
    if requested != PART_SIZE and min(requested, geometry.images) != geometry.part_size:
        log.warning(
            "%s: keeps its part size of %d images; a part size of %d applies to new caches only",
            address,
            geometry.part_size,
            requested,
        )
