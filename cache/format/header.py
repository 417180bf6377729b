"""The header of a cache: two attributes of the root group's `zarr.json`, beside which Zarr tools may add their own.

regionspot_schema   1
regionspot          dataset, split, counts, manifest digest and source, categories, feature sets with provenance,
                    the crc32c of each file that was written with the cache, and a crc32c of the whole document
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

_EMPTY: tuple[Any, ...] = (None, (), [])  # category fields with these values are not written


@dataclass(frozen=True)
class Header:
    """What is known of a cache before any of its arrays is opened.

    files   crc32c of each file that is written once, when the cache is created or a feature set added: the manifest's
            chunks and all metadata except the root's, which holds this header
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
            raise InputError(f"manifest {manifest.dataset}/{manifest.split} holds no image; there is nothing to cache")
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
        """The header with more feature sets and the files created for them."""
        return replace(self, feature_sets={**self.feature_sets, **by_name(feature_sets)}, files={**self.files, **files})

    def folders(self) -> list[str]:
        """Folders that files are written into after the cache was created."""
        folders = ["", "features"]
        for feature_set in self.feature_sets.values():
            folders += [feature_set.array, feature_set.scales, feature_set.checksums, f"parts/{feature_set.name}"]
        return folders

    def damage(self, storage: Storage, name: str) -> str | None:
        """What is wrong with one of `files`; None if it is unchanged. Raises OSError when it cannot be read."""
        try:
            unchanged = file_crc(storage.read(name)) == self.files[name]
        except FileNotFoundError:
            return "is missing"
        return None if unchanged else "is not what was written when the cache was created"

    def save(self, storage: Storage) -> None:
        """Write the attributes into the root's zarr.json, atomically."""
        document = json.loads(storage.read("zarr.json"))
        document["attributes"] |= {"regionspot_schema": SCHEMA_VERSION, "regionspot": seal(self._to_json())}
        document.pop("consolidated_metadata", None)  # out of date now
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
    """Read the header of a cache.

    Raises NotACacheError when the folder is missing, damaged or something else, SchemaVersionError for another schema.
    """
    cache, attributes = storage.address, _attributes(storage)
    version = attributes.get("regionspot_schema")
    if version is None:
        raise NotACacheError(f"{cache}: is a Zarr group, but not a feature cache; give another folder")
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{cache}: has schema version {version}, this regionspot reads version {SCHEMA_VERSION}; "
            "use the version that wrote it, or extract into another folder"
        )
    document = attributes.get("regionspot")
    if not isinstance(document, dict) or not is_sealed(document):
        raise NotACacheError(
            f"{cache}/zarr.json: does not match its own checksum: it was damaged or edited; restore it from a copy"
        )
    try:
        return _from_json(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotACacheError(
            f"{cache}/zarr.json: lacks fields of a header ({error!r}): another program wrote it; restore the file from "
            "a copy"
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
        raise NotACacheError(f"{cache}/zarr.json: cannot be read: {error.strerror}; fix its permissions") from None
    except (ValueError, KeyError, TypeError):
        raise NotACacheError(f"{cache}/zarr.json: is not a Zarr v3 group's metadata; give another folder") from None
    return attributes if isinstance(attributes, dict) else {}


def _why_missing(storage: Storage) -> str:
    if storage.exists(""):
        return "is not a feature cache: it holds no zarr.json; give another folder"
    if isinstance(storage, LocalStorage) and swapped_out_path(storage.folder).exists():
        return (
            f"a run that extended it was killed and left it in {swapped_out_path(storage.folder)}; run the same "
            "`regionspot cache extend` or `regionspot extract` again to restore it"
        )
    return "no such cache; `regionspot extract` creates one"


def _from_json(document: dict[str, Any]) -> Header:
    return Header(
        dataset=document["dataset"],
        split=document["split"],
        regions=document["regions"],
        geometry=Geometry(document[IMAGES_KEY], document["part_size"], document["capacity"]),
        digest=document["manifest"]["digest"],
        source=document["manifest"]["source"],
        report=document["manifest"]["report"],
        categories=tuple(_category_from_json(category) for category in document["categories"]),
        feature_sets=by_name(FeatureSet.from_json(entry) for entry in document["feature_sets"]),
        files=document["files"],
    )


def _category_to_json(category: Category) -> dict[str, Any]:
    return {key: value for key, value in asdict(category).items() if value not in _EMPTY}


def _category_from_json(document: dict[str, Any]) -> Category:
    return Category(**{**document, "synonyms": tuple(document.get("synonyms", ()))})


def by_name(feature_sets: Iterable[FeatureSet]) -> dict[str, FeatureSet]:
    """Feature sets by name. Raises InputError when two have the same name."""
    sets: dict[str, FeatureSet] = {}
    for feature_set in feature_sets:
        if feature_set.name in sets:
            raise InputError(f"feature set {feature_set.name} is given twice; names must be unique")
        sets[feature_set.name] = feature_set
    return sets


def require_same_manifest(cache: str, stored: Header, requested: Header) -> None:
    """Raises ProvenanceMismatchError, naming the differences, when a cache was made from other images or boxes."""
    if stored.digest == requested.digest:
        return
    differences = [
        f"{name} {old!r}, not {new!r}"
        for name, old, new in (
            ("dataset", stored.dataset, requested.dataset),
            ("split", stored.split, requested.split),
            ("images", stored.geometry.images, requested.geometry.images),
            ("regions", stored.regions, requested.regions),
            ("categories", len(stored.categories), len(requested.categories)),
        )
        if old != new
    ]
    raise ProvenanceMismatchError(
        f"{cache}: was made from other annotations than requested: it holds "
        f"{', '.join(differences) or 'the same numbers of other boxes, sizes, paths, ids or class names'}; "
        "give the annotations that it was made from, or another cache folder; if images were only added, use "
        "`regionspot cache extend`"
    )


def require_same_sets(cache: str, stored: Mapping[str, FeatureSet], requested: Mapping[str, FeatureSet]) -> None:
    """Raises ProvenanceMismatchError where a set in both was made differently; other software only gives a warning."""
    for name in stored.keys() & requested.keys():
        for difference in require_same_features(cache, stored[name], requested[name]):
            log.warning("%s: resuming %s with other software: %s", cache, name, difference)


def require_arrays(storage: Storage, header: Header) -> None:
    """Raises NotACacheError when an array named in the header is missing."""
    for feature_set in header.feature_sets.values():
        for name in (f"{feature_set.array}/zarr.json", f"{feature_set.checksums}/zarr.json"):
            if not storage.exists(name):
                raise NotACacheError(
                    f"{storage.address}: {name} is missing; restore the folder, or extract into another one"
                )
