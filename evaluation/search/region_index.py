"""The region index: an embedding of every region of a cache in one file, searched by exact products.

    val.zarr.regions/
      embeddings.npy   float16 (P, E) of unit length, in the order of the manifest's regions; NaN for images that could
                       not be read
      index.json       what the embeddings were computed from, and which parts are done

An exact search reads every embedding once, so its time is that of reading memory: no graph to build, no second copy,
nothing missed (docs/search.md has the measurement).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import NO_CATEGORY
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import from_json, is_sealed, seal, to_json, write_file
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.cache_vocabulary import EncoderOnDemand
from regionspot.evaluation.search.region_embeddings import RegionEmbedder
from regionspot.fusion.vocabulary import TextEncoder, embed_texts

KIND, FORMAT = "region index", 1
EMBEDDINGS, DOCUMENT = "embeddings.npy", "index.json"
AGAIN = "delete the folder and write the index again"
# Rows converted to float32 at a time: with 256 channels, 4 MB, which stay in a processor's cache. CPU seconds for a
# million random rows on one core: 0.10 at 2,048, 0.10 at 4,096, 0.13 at 8,192, 0.23 at 16,384.
CHUNK = 4_096


@dataclass(frozen=True)
class Hit:
    """A region that was found.

    similarity  cosine of its embedding and the query's
    number      of the region in its image, from 0
    name        of its category; None if it has none
    box_xyxy    in pixels of the image
    """

    similarity: float
    row: int
    image_id: int
    number: int
    name: str | None
    box_xyxy: tuple[float, float, float, float]
    path: str

    def as_json(self) -> dict[str, Any]:
        return {
            "similarity": self.similarity,
            "image_id": self.image_id,
            "region": self.number,
            "name": self.name,
            "box": list(self.box_xyxy),
            "path": self.path,
        }


def index_folder(cache: FeatureCache, folder: Path | None = None) -> Path:
    """The folder of a cache's index: `folder`, or one beside the cache. Raises InputError for a remote cache."""
    if folder is not None:
        return folder
    if not isinstance(cache.path, Path):
        raise InputError(f"{cache.path}: an index is a local folder; name one with --index")
    return cache.path.with_name(f"{cache.path.name}.regions")


def build_index(cache: FeatureCache, embedder: RegionEmbedder, folder: Path) -> RegionIndex:
    """Compute what is missing in `folder`, and open the index. Parts that are not extracted yet are left out.

    Raises ProvenanceMismatchError if `folder` has the index of other regions or by another method, InputError for a
    cache without regions.
    """
    regions = cache.manifest.offsets
    if not regions[-1]:
        raise InputError(f"{cache.path}: has no regions to search")
    document = {
        "kind": KIND,
        "format": FORMAT,
        "cache": cache.manifest.digest(),
        "method": embedder.method,
        "identity": embedder.identity,
        "encoder": list(embedder.encoder),
        "templates": list(embedder.templates),
    }
    folder.mkdir(parents=True, exist_ok=True)
    done, file = _resume(folder, document), folder / EMBEDDINGS
    shape = (int(regions[-1]), embedder.width)
    embeddings = _open(file, "r+") if done else open_memmap(file, "w+", np.dtype("<f2"), shape)
    valid, pending = cache.valid_rows(embedder.feature_sets), set(cache.pending_parts(embedder.feature_sets))
    readable = {
        part: valid[(valid >= rows.start) & (valid < rows.stop)]
        for part in range(cache.n_parts)
        if part not in pending and (rows := cache.part_rows(part))
    }
    # A part that has more readable images than before was extracted again.
    missing = [part for part, rows in readable.items() if done.get(str(part)) != len(rows)]
    progress = Progress(sum(int(cache.manifest.region_count[readable[part]].sum()) for part in missing), "regions")
    for part in missing:
        rows = cache.part_rows(part)
        embeddings[regions[rows.start] : regions[rows.stop]] = np.nan
        for row, embedded in embedder.embed(readable[part]) if len(readable[part]) else ():
            embeddings[regions[row] : regions[row + 1]] = embedded.cpu().numpy()
            progress.step(len(embedded))
        embeddings.flush()
        done[str(part)] = len(readable[part])  # last: a part counts once its embeddings are on the disk
        write_file(folder / DOCUMENT, to_json(seal({**document, "parts": done})))
    return RegionIndex(cache, folder)


class RegionIndex:
    """The index of a cache, opened for searching.

    method     "head", "dense" or "pooled"
    encoder    name and SHA-256 of the weights of the text encoder
    templates  of the prompts
    missing    number of regions that are not in the index yet

    Raises InputError if there is no index, if it is damaged or belongs to another cache.
    """

    def __init__(self, cache: FeatureCache, folder: Path) -> None:
        self.cache, self.folder = cache, folder
        document = _document(folder)
        if document is None:
            raise InputError(f"{folder}: there is no index; write it with `regionspot index {cache.path}`")
        if document["cache"] != cache.manifest.digest():
            raise ProvenanceMismatchError(
                f"{folder}: is the index of other images or boxes than those of {cache.path}; delete it and write it "
                f"again with `regionspot index {cache.path}`"
            )
        self.method: str = document["method"]
        self.encoder: tuple[str, str] = tuple(document["encoder"])
        self.templates: tuple[str, ...] = tuple(document["templates"])
        self._embeddings = _open(folder / EMBEDDINGS, "c")  # "r" would make torch warn of a read-only array
        offsets = cache.manifest.offsets
        if len(self._embeddings) != offsets[-1]:
            raise InputError(
                f"{folder / EMBEDDINGS}: has {len(self._embeddings):,} rows, expected {offsets[-1]:,}; {AGAIN}"
            )
        rows = [cache.part_rows(int(part)) for part in sorted(document["parts"], key=int)]
        self._ranges = [(int(offsets[part.start]), int(offsets[part.stop])) for part in rows]
        self.missing = int(offsets[-1]) - sum(last - first for first, last in self._ranges)

    def text_encoder(self, weights: str | None = None, device: str | None = None) -> EncoderOnDemand:
        """The encoder of words, loaded when it is needed. `weights` as for `load_weights`."""
        return EncoderOnDemand(*self.encoder, weights, device)

    def embed_words(self, words: str, encoder: TextEncoder) -> Tensor:
        """float32 (E,) of unit length. Raises InputError for words that the encoder cannot read."""
        if not words.strip():
            raise InputError("search: the words are empty")
        return F.normalize(embed_texts([" ".join(words.split())], self.templates, encoder)[0], dim=-1)

    def region(self, image_id: int, number: int) -> int:
        """The index, over all images, of a region by its number in its image. Raises InputError if there is none."""
        manifest = self.cache.manifest
        regions = manifest.regions(manifest.row_of(image_id))
        if not 0 <= number < regions.stop - regions.start:
            raise InputError(f"{self.cache.path}: image {image_id} has no region {number}")
        return int(regions.start) + number

    def embedding(self, region: int) -> Tensor:
        """float32 (E,) of a region, by its index over all images. Raises InputError if it is not in the index."""
        inside = any(first <= region < last for first, last in self._ranges)
        values = torch.from_numpy(self._embeddings[region]).float()
        if not inside or values.isnan().any():
            raise InputError(f"{self.folder}: region {region} is not in it: its image is not extracted, or unreadable")
        return values

    def nearest(self, query: Tensor, count: int, without: int | None = None) -> list[Hit]:
        """The `count` regions with the largest cosine to `query` (E,) of unit length, best first.

        without   a region that is left out: the one that others are compared with
        """
        best = torch.full((0,), -torch.inf), torch.zeros(0, dtype=torch.int64)
        for first, last in self._ranges:
            for start in range(first, last, CHUNK):
                rows = torch.from_numpy(self._embeddings[start : min(start + CHUNK, last)])
                similarity = (rows.float() @ query).nan_to_num(nan=-torch.inf)
                if without is not None and start <= without < start + len(rows):
                    similarity[without - start] = -torch.inf
                values, indices = similarity.topk(min(count, len(rows)))
                merged = torch.cat([best[0], values]), torch.cat([best[1], indices + start])
                order = merged[0].argsort(descending=True, stable=True)[:count]
                best = merged[0][order], merged[1][order]
        return [
            self._hit(region, similarity)
            for similarity, region in zip(best[0].tolist(), best[1].tolist(), strict=True)
            if similarity > -np.inf
        ]

    def _hit(self, region: int, similarity: float) -> Hit:
        manifest = self.cache.manifest
        row = int(np.searchsorted(manifest.offsets, region, side="right")) - 1
        index = int(manifest.category_index[region])
        x1, y1, x2, y2 = manifest.boxes_xyxy[region].tolist()
        return Hit(
            similarity,
            row,
            int(manifest.image_ids[row]),
            region - int(manifest.offsets[row]),
            None if index == NO_CATEGORY else manifest.categories[index].name,
            (x1, y1, x2, y2),
            str(manifest.paths[row]),
        )


def _resume(folder: Path, document: dict[str, Any]) -> dict[str, int]:
    """The readable images of each part that is in the index already. Raises ProvenanceMismatchError."""
    stored = _document(folder)
    if stored is None:
        return {}
    expected = from_json(to_json(document))
    different = [key for key in document if stored.get(key) != expected[key]]
    if different:
        raise ProvenanceMismatchError(
            f"{folder}: is an index with another {', '.join(different)}; delete it, or name another folder with --index"
        )
    parts: dict[str, int] = stored["parts"]
    return parts


def _document(folder: Path) -> dict[str, Any] | None:
    """The content of index.json; None if there is none. Raises InputError if it is damaged."""
    path = folder / DOCUMENT
    if not path.exists():
        return None
    try:
        document = from_json(path.read_bytes())
    except ValueError:
        document = None
    if not is_sealed(document) or document.get("kind") != KIND or document.get("format") != FORMAT:
        raise InputError(f"{path}: is damaged or of another version; {AGAIN}")
    sealed: dict[str, Any] = document
    return sealed


def _open(path: Path, mode: Literal["c", "r+"]) -> np.memmap[Any, np.dtype[Any]]:
    try:
        embeddings = open_memmap(path, mode)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {AGAIN}") from None
    if embeddings.ndim != 2 or embeddings.dtype != np.float16:
        raise InputError(f"{path}: is {embeddings.dtype} of shape {embeddings.shape}, expected float16 (P, E); {AGAIN}")
    return embeddings
