"""The words in a cache's `zarr.json`: what it was made from and what it may be used with.

They lie under two attributes of the root group, so that any Zarr tool can read them and add its own beside:

    regionspot_schema   1
    regionspot          dataset, split, counts, manifest digest and source, categories, feature sets with
                        provenance, the crc32c of every file that was made with the cache, and of all that
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from regionspot.cache.errors import InputError, NotACacheError, ProvenanceMismatchError, SchemaVersionError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.cache.format.schema import MAX_PART_SIZE, SCHEMA_VERSION, FeatureSet, Geometry
from regionspot.cache.storage.atomic_files import IMAGES_KEY, file_crc, from_json, is_sealed, seal, to_json
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.folder_swap import swapped_out_path
from regionspot.cache.storage.local import LocalStorage

log = logging.getLogger(__name__)

_UNNAMED: tuple[Any, ...] = (None, (), [])  # what a category does not state is not written


@dataclass(frozen=True)
class Header:
    """All that is known of a cache before an array of it is opened.

    files   crc32c of every file that is written once, when the cache is made or a feature set added: the manifest's
            chunks and all metadata but the root's, in which this stands
    """

    dataset: str
    split: str
    regions: int
    geometry: Geometry
    digest: str
    source: dict[str, Any]
    report: dict[str, int]
    categories: tuple[Category, ...]
    feature_sets: dict[str, FeatureSet]
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, feature_sets: Iterable[FeatureSet], part_size: int) -> Header:
        if not len(manifest):
            raise InputError(f"manifest {manifest.dataset}/{manifest.split} holds no image: there is nothing to cache")
        if not 1 <= part_size <= MAX_PART_SIZE:
            raise InputError(f"part_size is {part_size}, expected 1 to {MAX_PART_SIZE} images")
        return cls(
            dataset=manifest.dataset,
            split=manifest.split,
            regions=len(manifest.boxes_xyxy),
            geometry=Geometry.of(manifest.offsets, part_size),
            digest=manifest.digest(),
            source=manifest.source,
            report=manifest.report,
            categories=manifest.categories,
            feature_sets=by_name(feature_sets),
        )

    def adding(self, feature_sets: Iterable[FeatureSet], files: Mapping[str, int]) -> Header:
        """The header with further feature sets and the files that were made for them."""
        return replace(self, feature_sets={**self.feature_sets, **by_name(feature_sets)}, files={**self.files, **files})

    def damage(self, storage: Storage, name: str) -> str | None:
        """What is wrong with one of `files`; None where it is as it was made. Raises OSError when it cannot be read."""
        try:
            same = file_crc(storage.read(name)) == self.files[name]
        except FileNotFoundError:
            return "is missing"
        return None if same else "is not what was written when it was made"

    def save(self, storage: Storage) -> None:
        """Write the attributes into the group's zarr.json, whole or not at all."""
        document = json.loads(storage.read("zarr.json"))
        document["attributes"] |= {"regionspot_schema": SCHEMA_VERSION, "regionspot": seal(self._to_json())}
        document.pop("consolidated_metadata", None)  # of what the cache held before
        storage.write("zarr.json", to_json(document))

    def _to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            IMAGES_KEY: self.geometry.images,
            "regions": self.regions,
            "part_size": self.geometry.part_size,
            "capacity": self.geometry.capacity,
            "manifest": {"digest": self.digest, "source": self.source, "report": self.report},
            "categories": [_category_to_json(category) for category in self.categories],
            "feature_sets": [feature_set.to_json() for feature_set in self.feature_sets.values()],
            "files": self.files,
        }


def load_header(storage: Storage) -> Header:
    """Read what a cache says of itself.

    Raises NotACacheError when the folder is missing, something else or damaged, SchemaVersionError when another
    version of this package wrote it.
    """
    cache, attributes = storage.address, _attributes(storage)
    version = attributes.get("regionspot_schema")
    if version is None:
        raise NotACacheError(f"{cache}: is a Zarr group of something else, not a feature cache; give another folder")
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{cache}: has schema version {version}, this regionspot reads version {SCHEMA_VERSION}; "
            "use the version that wrote it, or extract into another folder"
        )
    words = attributes.get("regionspot")
    if not isinstance(words, dict) or not is_sealed(words):
        raise NotACacheError(
            f"{cache}/zarr.json: does not match its own checksum, it was damaged or edited; "
            "put back the file as it was written"
        )
    try:
        return _from_json(words)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotACacheError(
            f"{cache}/zarr.json: is sealed but lacks what a header holds ({error!r}): another program wrote it; "
            "put back the file as it was written"
        ) from None


def _attributes(storage: Storage) -> dict[str, Any]:
    cache = storage.address
    try:
        attributes = from_json(storage.read("zarr.json"))["attributes"]
    except FileNotFoundError:
        raise NotACacheError(f"{cache}: {_why_missing(storage)}") from None
    except NotADirectoryError:
        raise NotACacheError(f"{cache}: is a file, not a feature cache; give another folder") from None
    except OSError as error:
        raise NotACacheError(f"{cache}/zarr.json: cannot be read: {error.strerror}; mend its permissions") from None
    except (ValueError, KeyError, TypeError):
        raise NotACacheError(f"{cache}/zarr.json: is not a Zarr v3 group's metadata; give another folder") from None
    return attributes if isinstance(attributes, dict) else {}


def _why_missing(storage: Storage) -> str:
    if storage.exists(""):
        return "holds no zarr.json, so it is no feature cache; give another folder"
    if isinstance(storage, LocalStorage) and swapped_out_path(storage.folder).exists():
        return (
            f"a killed run was extending it and left it in {swapped_out_path(storage.folder)}; run the same "
            "`regionspot cache extend` or `regionspot extract` again to recover it"
        )
    return "no such cache; `regionspot extract` makes one"


def _from_json(words: dict[str, Any]) -> Header:
    return Header(
        dataset=words["dataset"],
        split=words["split"],
        regions=words["regions"],
        geometry=Geometry(words[IMAGES_KEY], words["part_size"], words["capacity"]),
        digest=words["manifest"]["digest"],
        source=words["manifest"]["source"],
        report=words["manifest"]["report"],
        categories=tuple(_category_from_json(category) for category in words["categories"]),
        feature_sets=by_name(FeatureSet.from_json(entry) for entry in words["feature_sets"]),
        files=words["files"],
    )


def _category_to_json(category: Category) -> dict[str, Any]:
    return {key: value for key, value in asdict(category).items() if value not in _UNNAMED}


def _category_from_json(words: dict[str, Any]) -> Category:
    return Category(**{**words, "synonyms": tuple(words.get("synonyms", ()))})


def by_name(feature_sets: Iterable[FeatureSet]) -> dict[str, FeatureSet]:
    """Feature sets by name. Raises InputError where two have the same."""
    named: dict[str, FeatureSet] = {}
    for feature_set in feature_sets:
        if feature_set.name in named:
            raise InputError(f"feature set {feature_set.name} is given twice; give each one name of its own")
        named[feature_set.name] = feature_set
    return named


def require_same_manifest(cache: str, stored: Header, asked: Header) -> None:
    """Raises ProvenanceMismatchError, saying what differs, when a cache was made from other images or boxes."""
    if stored.digest == asked.digest:
        return
    differences = [
        f"{name} {was!r}, not {now!r}"
        for name, was, now in (
            ("dataset", stored.dataset, asked.dataset),
            ("split", stored.split, asked.split),
            (IMAGES_KEY, stored.geometry.images, asked.geometry.images),
            ("regions", stored.regions, asked.regions),
            ("categories", len(stored.categories), len(asked.categories)),
        )
        if was != now
    ]
    raise ProvenanceMismatchError(
        f"{cache}: was made from other annotations than asked for: it holds "
        f"{', '.join(differences) or 'other boxes, sizes, paths, ids or class names in the same numbers'}; "
        "give the annotations that it was made from, or another cache folder; images that only came are for "
        "`regionspot cache extend`"
    )


def require_same_sets(cache: str, stored: Header, asked: Header) -> None:
    """Raises ProvenanceMismatchError for a feature set of both that was made otherwise; other software is only said."""
    for name in stored.feature_sets.keys() & asked.feature_sets.keys():
        for difference in require_same_features(cache, stored.feature_sets[name], asked.feature_sets[name]):
            log.warning("%s: going on with other software for %s: %s", cache, name, difference)
