"""The registered datasets: their file names, image folders and readers.

`read_dataset` reads any of them into the same columnar manifest. `read_split` also replaces its boxes by a detector's
and logs warnings; all commands use it. Annotation files are searched in the data folder and in its `annotations/`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from regionspot.cache.errors import AnnotationError, InputError, unknown_name
from regionspot.cache.format.manifest import Manifest
from regionspot.pipeline.datasets.coco import read_coco, select_listed_images
from regionspot.pipeline.datasets.coco_image_table import CocoVariant
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit
from regionspot.pipeline.datasets.openimages import read_openimages
from regionspot.pipeline.datasets.openimages_labels import with_verified_labels
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH, with_boxes
from regionspot.pipeline.datasets.report import DatasetReport, describe

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetReport",
    "annotation_file_of",
    "describe",
    "image_folder_of",
    "read_dataset",
    "read_split",
    "require_regions",
]

log = logging.getLogger(__name__)

# The misspelt names of Objects365 v2. All but the last two are those that MMDetection corrects
# (tools/dataset_converters/zhiyuan_objv2_train_names_fix.csv, after Detic's Objects365_names_fix.csv).
O365V2_SPELLING = {
    "Moniter/TV": "Monitor/TV",
    "Bakset": "Basket",
    "Dinning Table": "Dining Table",
    "Tea pot": "Teapot",
    "Billards": "Billiards",
    "Extention Cord": "Extension Cord",
    "Hotair ballon": "Hot air balloon",
    "Hamimelon": "Hami melon",
    "Mushroon": "Mushroom",
    "Tape Measur/ Ruler": "Tape Measure/ Ruler",
    "Campel": "Camel",
    "Meat ball": "Meatball",
    "Buttefly": "Butterfly",
    "Table Teniis paddle": "Table Tennis paddle",
    "Ballon": "Balloon",
    "Noddles": "Noodles",
}
_LVIS = CocoVariant(path_field="coco_url", path_parts=2, federated=True)
_OPENIMAGES_CLASSES = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv")
# Verified labels of the images. The `boxable` files hold only the classes that have boxes, which is enough.
_OPENIMAGES_LABELS = {
    "train": (
        "oidv6-train-annotations-human-imagelabels.csv",
        "oidv7-train-annotations-human-imagelabels.csv",
        "train-annotations-human-imagelabels-boxable.csv",
    ),
    "val": (
        "validation-annotations-human-imagelabels.csv",
        "oidv7-val-annotations-human-imagelabels.csv",
        "validation-annotations-human-imagelabels-boxable.csv",
    ),
    "test": (
        "test-annotations-human-imagelabels.csv",
        "oidv7-test-annotations-human-imagelabels.csv",
        "test-annotations-human-imagelabels-boxable.csv",
    ),
}
_OPENIMAGES_HIERARCHY = ("bbox_labels_600_hierarchy.json",)
_MINIVAL = "lvis_v1_minival_inserted_image_name.json"
_SPLIT_ALIASES = {"validation": "val"}
_PATHS_TRIED = 16  # paths of a manifest that are searched in each possible image folder


@dataclass(frozen=True)
class Dataset:
    """The layout of one dataset under its data folder.

    files          possible names of the annotation file, by split
    image_folders  possible image folders, likeliest first; `{split}` is replaced
    subfolders     entries of the right image folder; the folder with most of them is used, the first of equals
    coco_variant   None for OpenImages' CSV files
    """

    summary: str
    files: dict[str, tuple[str, ...]]
    image_folders: tuple[str, ...]
    subfolders: tuple[str, ...] = (".",)
    coco_variant: CocoVariant | None = None


DATASETS = {
    "o365": Dataset(
        "Objects365 v1: objects365_{train,val}.json, images in train/, val/",
        {split: (f"objects365_{split}.json",) for split in ("train", "val")},
        image_folders=("{split}", "images/{split}"),
        coco_variant=CocoVariant(),
    ),
    "o365v2": Dataset(
        "Objects365 v2: zhiyuan_objv2_{train,val}.json, images in train/patch0/, ...",
        {split: (f"zhiyuan_objv2_{split}.json",) for split in ("train", "val")},
        image_folders=("{split}", "images/{split}"),
        coco_variant=CocoVariant(path_parts=2, spelling=O365V2_SPELLING),
    ),
    "openimages": Dataset(
        "OpenImages V6/V7: oidv6-train-annotations-bbox.csv and the class file, images in train/, val/, test/",
        {
            "train": ("oidv6-train-annotations-bbox.csv", "train-annotations-bbox.csv"),
            "val": ("validation-annotations-bbox.csv",),
            "test": ("test-annotations-bbox.csv",),
        },
        image_folders=("{split}", "images/{split}", "{split}idation", "images/{split}idation"),
    ),
    "v3det": Dataset(
        "V3Det: v3det_2023_v1_{train,val}.json, images in images/",
        {split: (f"v3det_2023_v1_{split}.json",) for split in ("train", "val")},
        image_folders=(".",),
        coco_variant=CocoVariant(),
    ),
    "lvis": Dataset(
        "LVIS v1: lvis_v1_{train,val}.json, COCO's images in train2017/, val2017/; split minival too",
        {"train": ("lvis_v1_train.json",), "val": ("lvis_v1_val.json",), "minival": ("lvis_v1_val.json",)},
        image_folders=(
            ".",
            "images",
            "coco",
            "{split}2017",
            "images/{split}2017",
        ),  # the last two: file_name
        subfolders=("train2017", "val2017"),
        coco_variant=_LVIS,
    ),
    "coco": Dataset(
        "COCO: instances_{train,val}2017.json, images in train2017/, val2017/; or any file in COCO format",
        {split: (f"instances_{split}2017.json", f"instances_{split}.json") for split in ("train", "val")},
        image_folders=("images/{split}2017", "{split}2017", "images/{split}", "{split}", "images", "."),
        coco_variant=CocoVariant(),
    ),
    "toy": Dataset(
        "the generated toy world: toy_{train,val}.json, images in photos/",
        {split: (f"toy_{split}.json",) for split in ("train", "val")},
        image_folders=("photos",),
        coco_variant=_LVIS,
    ),
}


def read_split(
    name: str,
    data: Path,
    split: str = "train",
    annotations: Path | None = None,
    boxes: str | Path = GROUND_TRUTH,
    limit: int | None = None,
    *,
    max_failures: FailureLimit = EXTRACTION_LIMIT,
    may_be_empty: bool = False,
) -> Manifest:
    """Read the first `limit` images (None: all) of a split, with annotated boxes ("gt") or those of a proposals file.

    Logs the manifest's remarks. Raises the errors of `read_dataset` and `read_proposals`, and InputError if no region
    is left, unless `may_be_empty`.
    """
    manifest = with_boxes(read_dataset(name, data, split, annotations, max_failures=max_failures), boxes, max_failures)
    if not may_be_empty:
        require_regions(manifest)
    for line in manifest.remarks:
        log.warning("%s", line)
    return manifest.head(limit)


def require_regions(manifest: Manifest) -> None:
    """Raises InputError, with the counts of dropped boxes, if the manifest has no region."""
    if len(manifest.boxes_xyxy):
        return
    counts = [f"{name.replace('_', ' ')}: {count:,}" for name, count in manifest.report.items()]
    files = " and ".join(manifest.source.get("files", {}))
    raise InputError(
        f"{manifest.dataset} {manifest.split}: {files} has no usable region ({', '.join(counts) or 'no boxes'})"
        f"{''.join(f'; {line}' for line in manifest.remarks)}; give boxes by --annotations or --boxes"
    )


def read_dataset(
    name: str,
    data: Path,
    split: str = "train",
    annotations: Path | None = None,
    keep_groups: bool = False,
    max_failures: FailureLimit = EXTRACTION_LIMIT,
) -> Manifest:
    """Read one split of the dataset `name` in the folder `data`.

    annotations   read instead of the dataset's own file; the split may then have any name
    keep_groups   keep OpenImages' boxes around a group of objects
    max_failures  of the records may be unreadable; they are skipped and counted in the manifest's report and remarks

    Raises InputError for an unknown name or split, AnnotationError for a missing or unusable file.
    """
    dataset, data, split = _dataset(name), Path(data), _SPLIT_ALIASES.get(split, split)
    path = Path(annotations) if annotations else _annotation_file(name, dataset, data, split)
    if dataset.coco_variant is None:
        classes = _find(name, data, _OPENIMAGES_CLASSES)
        manifest = read_openimages(path, classes, image_folder_of(name, data, split), split, keep_groups, max_failures)
        return _with_verified_labels(manifest, data, split, classes)
    manifest = read_coco(path, name, split, dataset.coco_variant, max_failures)
    if name == "lvis" and split == "minival" and annotations is None:
        return select_listed_images(manifest, _find(name, data, (_MINIVAL,)), split)
    return manifest


def _with_verified_labels(manifest: Manifest, data: Path, split: str, classes: Path) -> Manifest:
    names = (_OPENIMAGES_LABELS.get(split, ()), _OPENIMAGES_HIERARCHY)
    labels, hierarchy = (_find_if_present(data, some) for some in names)
    missing = [some[0] for some, path in zip(names, (labels, hierarchy), strict=True) if some and path is None]
    if split == "train" and missing:
        line = f"{data}: has no {' and no '.join(missing)}: in training, classes that an image may show count as absent"
        manifest = replace(manifest, remarks=(*manifest.remarks, line))
    return with_verified_labels(manifest, classes, labels, hierarchy)


def annotation_file_of(data: Path, manifest: Manifest) -> Path:
    """The annotation file that the manifest was read from: the first of its sources. Raises AnnotationError."""
    name: str = next(iter(manifest.source["files"]))
    for folder in (data, data / "annotations"):
        if (folder / name).is_file():
            return folder / name
    raise AnnotationError(f"{data}: {name} no longer exists; name it with --annotations")


def image_folder_of(name: str, data: Path, split: str = "train", manifest: Manifest | None = None) -> Path:
    """The folder to which the manifest's paths are relative.

    With a `manifest`, the possible folder that contains most of a sample of its images; otherwise the likeliest one
    that exists. If none exists, the likeliest one.
    """
    dataset, split = _dataset(name), _SPLIT_ALIASES.get(split, split)
    folders = [Path(data) / folder.format(split=split) for folder in dataset.image_folders]
    entries = dataset.subfolders if manifest is None else _sample_paths(manifest)
    return max(folders, key=lambda folder: (sum(os.path.exists(folder / path) for path in entries), folder.is_dir()))


def _sample_paths(manifest: Manifest) -> list[str]:
    """Paths from all over the manifest, because the first images may be missing."""
    paths: list[str] = manifest.paths[:: max(1, len(manifest) // _PATHS_TRIED)].tolist()
    return paths


def _dataset(name: str) -> Dataset:
    try:
        return DATASETS[name]
    except KeyError:
        raise unknown_name("dataset", name, DATASETS) from None


def _annotation_file(name: str, dataset: Dataset, data: Path, split: str) -> Path:
    if split not in dataset.files:
        raise unknown_name(f"{name} split", split, dataset.files, "; for other splits give --annotations")
    return _find(name, data, dataset.files[split])


def _find(name: str, data: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that exists in the data folder or in its `annotations/`."""
    if path := _find_if_present(data, names):
        return path
    raise AnnotationError(
        f"{data}: {name} needs {' or '.join(names)} here or in annotations/; "
        "put it there, or give another file by --annotations"
    )


def _find_if_present(data: Path, names: tuple[str, ...]) -> Path | None:
    paths = [folder / file for folder in (data, data / "annotations") for file in names]
    return next((path for path in paths if path.exists()), None)
