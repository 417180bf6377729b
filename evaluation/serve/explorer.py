"""The second tab: the images, regions and maps of a cache, and search in its regions."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from regionspot.cache.errors import ImageError, InputError
from regionspot.cache.format.manifest import NO_CATEGORY
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.report.cache_view import map_patches, map_set_of, pca_colours
from regionspot.evaluation.search.hits_sheet import BLANK, region_crop
from regionspot.evaluation.search.region_index import Hit, RegionIndex
from regionspot.evaluation.serve.named_images import NameEmbeddings, jpeg
from regionspot.pipeline.images.decode import read_image, stored_exif

PAGE = 60  # images listed at a time
MAX_HITS = 200
SUGGESTED = 10  # names for the first tab
PCA_SIDE = 640  # pixels


class CacheExplorer:
    """A cache for the page. Thread-safe.

    image_folder   root of the manifest's paths; None: images are grey
    index          of its regions; None: no search
    names          embeddings of the words of a search, by the encoder of the index
    """

    def __init__(
        self,
        cache: FeatureCache,
        image_folder: Path | None,
        index: RegionIndex | None = None,
        names: NameEmbeddings | None = None,
    ) -> None:
        self.cache, self.index, self._names = cache, index, names
        self._folder = None if image_folder is None else image_folder.resolve()
        self._exif = stored_exif(feature_set.provenance for feature_set in cache.feature_sets.values())
        self._lock = threading.Lock()

    def info(self) -> dict[str, Any]:
        manifest = self.cache.manifest
        maps = [feature_set.name for feature_set in self.cache.feature_sets.values() if feature_set.kind == "map"]
        used = list(dict.fromkeys(manifest.category_index[:1000].tolist()))
        return {
            "title": f"{manifest.dataset} {manifest.split}",
            "images": len(manifest),
            "regions": int(manifest.offsets[-1]),
            "maps": maps,
            "search": None if self.index is None else self.index.method,
            "index_command": f"regionspot index {self.cache.path}",
            "names": [self.cache.categories[index].name for index in used if index != NO_CATEGORY][:SUGGESTED],
        }

    def images(self, first: int) -> list[dict[str, Any]]:
        """PAGE images from row `first` on."""
        manifest = self.cache.manifest
        return [
            {
                "row": row,
                "image_id": int(manifest.image_ids[row]),
                "path": str(manifest.paths[row]),
                "regions": int(manifest.region_count[row]),
            }
            for row in range(first, min(first + PAGE, len(manifest)))
        ]

    def image(self, row: int) -> dict[str, Any]:
        """Size and regions of an image. Raises InputError for a row that does not exist."""
        manifest = self.cache.manifest
        self._check(row)
        regions = manifest.regions(row)
        names = [
            None if index == NO_CATEGORY else manifest.categories[index].name
            for index in manifest.category_index[regions].tolist()
        ]
        return {
            "row": row,
            "image_id": int(manifest.image_ids[row]),
            "path": str(manifest.paths[row]),
            "width": int(manifest.widths[row]),
            "height": int(manifest.heights[row]),
            "regions": [
                {"number": number, "name": name, "box": box}
                for number, (name, box) in enumerate(zip(names, manifest.boxes_xyxy[regions].tolist(), strict=True))
            ],
        }

    def photo(self, row: int, side: int) -> bytes:
        """The image as JPEG, grey if it cannot be read."""
        self._check(row)
        manifest = self.cache.manifest
        size = int(manifest.heights[row]), int(manifest.widths[row])
        try:
            image = read_image(self._file(row), size, self._exif)
        except ImageError:
            image = Image.new("RGB", size[::-1], BLANK)
        return jpeg(image, side)

    def pca(self, row: int, map_set: str) -> bytes:
        """The map of an image as colours, PNG. Raises InputError, NotExtractedError."""
        self._check(row)
        maps = map_set_of(self.cache, map_set)
        assert maps is not None  # a name was given
        with self._lock:
            colours, _ = pca_colours(map_patches(self.cache, row, maps))
        manifest = self.cache.manifest
        scale = PCA_SIDE / max(manifest.heights[row], manifest.widths[row])
        size = max(1, round(manifest.widths[row] * scale)), max(1, round(manifest.heights[row] * scale))
        content = io.BytesIO()
        Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(content, "PNG")
        return content.getvalue()

    def crop(self, row: int, number: int, side: int) -> bytes:
        """A region with what is around it, JPEG."""
        region = self.image(row)["regions"][number : number + 1]
        if not region:
            raise InputError(f"image row {row}: has no region {number}")
        try:
            image = region_crop(self.cache.manifest, self._file(row), row, region[0]["box"], self._exif, side)
        except ImageError:
            image = Image.new("RGB", (side, side), BLANK)
        return jpeg(image, side)

    def search(self, words: str, count: int) -> list[dict[str, Any]]:
        """The regions nearest to the words. Raises InputError without an index, for empty and unreadable words."""
        index = self._index()
        if not words.strip():
            raise InputError("search: the words are empty")
        assert self._names is not None  # comes with the index
        return _as_json(index.nearest(self._names.get([" ".join(words.split())])[0], min(count, MAX_HITS)))

    def like(self, row: int, number: int, count: int) -> list[dict[str, Any]]:
        """The regions nearest to another one. Raises InputError without an index, and for an unknown region."""
        index = self._index()
        self._check(row)
        region = index.region(int(self.cache.manifest.image_ids[row]), number)
        return _as_json(index.nearest(index.embedding(region), min(count, MAX_HITS), without=region))

    def _index(self) -> RegionIndex:
        if self.index is None:
            raise InputError(f"there is no index; write it with `regionspot index {self.cache.path}`")
        return self.index

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.cache):
            raise InputError(f"there is no image {row}; the cache has {len(self.cache)}")

    def _file(self, row: int) -> Path:
        """The file of an image. Raises ImageError for one outside of the image folder, also through links: a cache
        may come from anywhere."""
        path = str(self.cache.manifest.paths[row])
        if self._folder is None:
            raise ImageError(f"{path}: no folder of images is given")
        file = (self._folder / path).resolve()
        if not file.is_relative_to(self._folder):
            raise ImageError(f"{path}: is outside of the folder of images")
        return file


def _as_json(hits: list[Hit]) -> list[dict[str, Any]]:
    return [{"row": hit.row, **hit.as_json()} for hit in hits]
