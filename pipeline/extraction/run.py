"""One extraction as a user asks for it: what is checked before the first image, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.clip import warn_of_unknown_names
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.dry_run import DryRun, dry_run
from regionspot.pipeline.extraction.extract import extract, open_for_extraction
from regionspot.pipeline.extraction.plan import ExtractionPlan, held_sets, outstanding, require_room
from regionspot.pipeline.extraction.retry import RetrySummary, retry
from regionspot.pipeline.reporting.run_summary import ExtractSummary


@dataclass(frozen=True)
class Extraction:
    """An extraction whose annotations are read and whose models are loaded."""

    config: ExtractConfig
    manifest: Manifest
    images: Path
    backbones: Backbones

    @classmethod
    def load(cls, config: ExtractConfig, backbones: Backbones | None = None) -> Extraction:
        """Read the annotations and load the models, unless these are given.

        Raises what reading a dataset, loading models and opening a cache raise.
        """
        manifest = config.read_manifest()
        loaded = backbones or config.load_backbones(held_sets(config.cache))
        return cls(config, manifest, config.image_folder(manifest), loaded)

    def plan(self) -> DryRun:
        """What a run would do, measured on a few images. Writes nothing."""
        self._warn_of_unknown_names()
        return dry_run(self._outstanding(), self.manifest, self.images, self.backbones, self.config)

    def run(self) -> ExtractSummary:
        """Extract what is missing, unless the disk is too small for it."""
        cache, backbones = self.prepare()
        return extract(cache, self.images, backbones, self.config)

    def prepare(self) -> tuple[FeatureCache, Backbones]:
        """The cache, made where there is none, unless the disk is too small for what is missing; and its models.

        These are `backbones`, or the same in another dtype: where that was left to choose, it is the cache's, also when
        another run has made the cache since `backbones` were loaded.
        """
        if self.config.check_room:
            require_room(self.config.cache, self._outstanding())
        self._warn_of_unknown_names()
        return self._open()

    def retry(self) -> RetrySummary:
        """Try the images again that could not be read. Raises InputError where there is no cache."""
        address = self.config.cache
        if not open_storage(address).exists(""):
            raise InputError(f"{address}: there is no cache to try failed images of; extract without --retry-failed")
        cache, backbones = self._open(may_grow=False)  # only images that the cache holds can have failed
        return retry(cache, self.images, backbones, self.config)

    def _warn_of_unknown_names(self) -> None:
        warn_of_unknown_names(self.backbones.encoders, [category.name for category in self.manifest.categories])

    def _open(self, may_grow: bool = True) -> tuple[FeatureCache, Backbones]:
        try:
            return self._opened_for(self.backbones, may_grow), self.backbones
        except ProvenanceMismatchError:
            following = self.backbones.following(held_sets(self.config.cache))
            if following is self.backbones:
                raise
        return self._opened_for(following, may_grow), following

    def _opened_for(self, backbones: Backbones, may_grow: bool) -> FeatureCache:
        return open_for_extraction(self.config.cache, self.manifest, self.images, backbones, self.config, may_grow)

    def _outstanding(self) -> ExtractionPlan:
        config = self.config
        sets = config.feature_sets(self.backbones)
        return outstanding(config.cache, self.manifest, sets, config.part_size, config.chosen_parts)
