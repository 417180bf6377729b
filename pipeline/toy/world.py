"""The toy world: generated images with annotations in LVIS's own form, so that every stage runs with no download.

A class is a texture, a colour and a shape ("striped green star"), 4 x 6 x 8 = 192 in all. The 32 rare classes are never
in the training split, but each of their words occurs there in other classes; the validation split contains all of them.
A model that recognises rare classes therefore understands the words. LVIS defines its groups by counts of training
images; here they are fixed for each class:

    rare       32 classes, in no training image and not listed in the training annotations
    common     96 classes, in few training images
    frequent   64 classes, in up to ten times as many

    folder/toy_train.json  toy_val.json  photos/train/000000000001.jpg  photos/val/000000000801.jpg
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from regionspot.cache.errors import InputError
from regionspot.cache.machine import processors
from regionspot.cache.outputs import check_output_folder
from regionspot.pipeline.toy.rendering import COLOURS, SHAPES, TEXTURES, Look, draw_image

OBJECTS = (3, 6)  # objects in an image
VAL_SHARE, MOST_VAL = 0.2, 400  # share of the images for validation, and its maximum
FEWEST_IMAGES = 40  # their 8 validation images have room for all 32 rare classes
JPEG_QUALITY = 92
RARE, FREQUENT = 32, 64  # number of classes


@dataclass(frozen=True)
class ToyClass:
    """One class. `id` counts from 1; `weight` is its relative frequency in training."""

    id: int
    look: Look
    frequency: str  # r, c or f, as in LVIS
    weight: float  # 0 for rare classes


@dataclass(frozen=True)
class AnnotatedImage:
    """What the annotation file needs of an image after it is written."""

    image_id: int
    size_hw: tuple[int, ...]
    regions: list[dict[str, Any]]


@cache
def toy_classes() -> tuple[ToyClass, ...]:
    """All 192 classes in alphabetical order, as in LVIS."""
    looks = sorted((Look(t, c, s) for t in TEXTURES for c in COLOURS for s in SHAPES), key=lambda look: look.name)
    rare = {look for look in looks if _is_rare(look)}
    ranks = iter(np.random.default_rng(0).permutation(len(looks) - len(rare)).tolist())
    classes = []
    for number, look in enumerate(looks, start=1):
        rank = None if look in rare else next(ranks)
        frequency = "r" if rank is None else "f" if rank < FREQUENT else "c"
        classes.append(ToyClass(number, look, frequency, 0.0 if rank is None else 0.985**rank))
    return tuple(classes)


def _is_rare(look: Look) -> bool:
    """True for one class in six, spread as in a Latin square: every word and pair of words keeps other classes."""
    texture, colour, shape = TEXTURES.index(look.texture), list(COLOURS).index(look.colour), SHAPES.index(look.shape)
    return (colour + shape + 2 * texture) % 6 == 0


def make_toy_world(folder: Path | str, images: int = 1000, seed: int = 0) -> Path:
    """Write a world of `images` images, the last fifth (at most 400) for validation, and return its folder.

    The same `images` and `seed` give the same files, and replace an earlier world in the folder. Images are
    192 to 320 pixels a side and hold 3 to 6 objects. Raises InputError for fewer than 40 images, for a folder that
    holds other files, and for one that cannot be written.
    """
    folder = check_output_folder(Path(folder))
    if images < FEWEST_IMAGES:
        raise InputError(
            f"toy world: {images} images, expected at least {FEWEST_IMAGES}: "
            "fewer cannot show every rare class in validation"
        )
    _require_own(folder)
    train = images - min(round(VAL_SHARE * images), MOST_VAL)
    try:
        _write_split(folder, "train", range(1, train + 1), seed)
        _write_split(folder, "val", range(train + 1, images + 1), seed)
    except OSError as error:
        raise InputError(
            f"{folder}: the toy world cannot be written there ({error.strerror}); name another folder"
        ) from None
    return folder


def _require_own(folder: Path) -> None:
    """Raise InputError for a folder with other files, which the world could overwrite."""
    own = {"photos": {"train", "val"}, "toy_train.json": set(), "toy_val.json": set()}
    for inside, expected in ((folder, own.keys()), (folder / "photos", own["photos"])):
        others = sorted(path.name for path in inside.glob("*") if path.name not in expected)
        if others:
            raise InputError(f"{inside}: holds {others[0]}, which is not part of a toy world; give an empty folder")


def assign_classes(
    classes: Sequence[ToyClass], split: str, images: int, rng: np.random.Generator
) -> list[list[ToyClass]]:
    """The 3 to 6 classes that each image of a split shows.

    Training draws them by weight. Validation repeats random permutations of all classes, the first with the rare
    classes in front, so that a small split contains them all; the result is shuffled.
    """
    counts = rng.integers(OBJECTS[0], OBJECTS[1] + 1, images)
    while split == "val" and counts.sum() < RARE <= OBJECTS[1] * images:
        counts = rng.integers(OBJECTS[0], OBJECTS[1] + 1, images)
    total = int(counts.sum())
    weights = np.array([entry.weight for entry in classes])
    if split == "train":
        drawn = rng.choice(len(classes), total, p=weights / weights.sum())
    else:
        rounds = [rng.permutation(len(classes)) for _ in range(total // len(classes) + 1)]
        rounds[0] = rounds[0][np.argsort(weights[rounds[0]] > 0, kind="stable")]
        drawn = rng.permutation(np.concatenate(rounds)[:total])
    ends = np.cumsum(counts)
    return [[classes[k] for k in drawn[end - count : end]] for end, count in zip(ends, counts, strict=True)]


def _write_split(folder: Path, split: str, image_ids: Sequence[int], seed: int) -> None:
    """Write the images, with a thread per core, then the annotation file."""
    images = folder / "photos" / split
    images.mkdir(parents=True, exist_ok=True)
    is_val = int(split == "val")
    assigned = assign_classes(toy_classes(), split, len(image_ids), np.random.default_rng([seed, is_val]))

    def write(job: tuple[int, list[ToyClass]]) -> AnnotatedImage:
        image_id, shown = job
        # Seeded per image, because threads finish in any order.
        image = draw_image([entry.look for entry in shown], np.random.default_rng([seed, is_val, image_id]))
        Image.fromarray(image.pixels).save(images / _file_name(image_id), quality=JPEG_QUALITY)
        regions = [_region_entry(entry, image.owner == number) for number, entry in enumerate(shown)]
        return AnnotatedImage(image_id, image.owner.shape, regions)

    with ThreadPoolExecutor(processors()) as threads:
        annotations = _lvis_document(split, threads.map(write, zip(image_ids, assigned, strict=True)))
    (folder / f"toy_{split}.json").write_text(json.dumps(annotations, allow_nan=False))


def _file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _lvis_document(split: str, drawn: Iterable[AnnotatedImage]) -> dict[str, Any]:
    """The content of lvis_v1_{split}.json (https://www.lvisdataset.org/dataset)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    listed = [entry for entry in toy_classes() if split != "train" or entry.weight > 0]
    for image in drawn:
        present = {region["category_id"] for region in image.regions}
        images.append(_image_entry(split, image, [entry.id for entry in listed if entry.id not in present]))
        for region in image.regions:
            annotations.append({"id": len(annotations) + 1, "image_id": image.image_id, **region})
    return {
        "info": {"description": f"regionspot toy world, {split}", "version": "v1"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [_category_entry(entry, annotations) for entry in listed],
    }


def _image_entry(split: str, image: AnnotatedImage, absent: list[int]) -> dict[str, Any]:
    """An LVIS image. Every class that it does not show is listed as absent: the annotations are exhaustive."""
    return {
        "id": image.image_id,
        "width": image.size_hw[1],
        "height": image.size_hw[0],
        "coco_url": f"toy://photos/{split}/{_file_name(image.image_id)}",
        "neg_category_ids": absent,
        "not_exhaustive_category_ids": [],
    }


def _region_entry(entry: ToyClass, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The visible part of one object: box XYWH in pixels, area, mask as COCO's compressed RLE."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "category_id": entry.id,
        "bbox": rle.toBbox(code).tolist(),
        "area": int(rle.area(code)),
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
    }


def _category_entry(entry: ToyClass, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """An LVIS category, with the counts of this file."""
    found = [region["image_id"] for region in annotations if region["category_id"] == entry.id]
    return {
        "id": entry.id,
        "name": entry.look.name,
        "synset": entry.look.name.replace(" ", "_") + ".n.01",
        "synonyms": [entry.look.name],
        "def": f"a {entry.look.shape} that is {entry.look.colour} and {entry.look.texture}",
        "frequency": entry.frequency,
        "image_count": len(set(found)),
        "instance_count": len(found),
    }
