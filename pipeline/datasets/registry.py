"""The datasets that are known by name: where their files and images lie, and how they are read.

`read_dataset` gives the same columnar manifest whatever the dataset, `read_split` what a command works on: the boxes
asked for, and what is odd about the files said. Annotation files are looked for where people have them, in the data
folder itself or in its `annotations/`; `annotations` names another one.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import AnnotationError, InputError, unknown_name
from regionspot.cache.format.manifest import Manifest
from regionspot.pipeline.datasets.coco import read_coco, select_listed_images
from regionspot.pipeline.datasets.coco_image_table import CocoVariant
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit
from regionspot.pipeline.datasets.openimages import read_openimages
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH, with_boxes
from regionspot.pipeline.datasets.report import DatasetReport, describe

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetReport",
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
_LVIS_FORM = CocoVariant(path_field="coco_url", path_parts=2, federated=True)
_OPENIMAGES_CLASSES = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv")
_MINIVAL = "lvis_v1_minival_inserted_image_name.json"
_SPLIT_ALIASES = {"validation": "val"}
_PATHS_TRIED = 16  # of a manifest, to tell apart the folders where its images may lie


@dataclass(frozen=True)
class Dataset:
    """Where one dataset's parts lie under its data folder.

    files    the annotation file's possible names, by split
    images   the folders that may be the image folder, likeliest first; `{split}` is filled in
    holding  what is inside the right one: the folder that holds most of these is taken, the first of equals
    form     how its COCO-form file is read; None for OpenImages' tables
    """

    summary: str
    files: dict[str, tuple[str, ...]]
    images: tuple[str, ...]
    holding: tuple[str, ...] = (".",)
    form: CocoVariant | None = None


DATASETS = {
    "o365": Dataset(
        "Objects365 v1: objects365_{train,val}.json, images in train/, val/",
        {split: (f"objects365_{split}.json",) for split in ("train", "val")},
        images=("{split}", "images/{split}"),
        form=CocoVariant(),
    ),
    "o365v2": Dataset(
        "Objects365 v2: zhiyuan_objv2_{train,val}.json, images in train/patch0/, ...",
        {split: (f"zhiyuan_objv2_{split}.json",) for split in ("train", "val")},
        images=("{split}", "images/{split}"),
        form=CocoVariant(path_parts=2, spelling=O365V2_SPELLING),
    ),
    "openimages": Dataset(
        "OpenImages V6/V7: oidv6-train-annotations-bbox.csv and the class file, images in train/, val/, test/",
        {
            "train": ("oidv6-train-annotations-bbox.csv", "train-annotations-bbox.csv"),
            "val": ("validation-annotations-bbox.csv",),
            "test": ("test-annotations-bbox.csv",),
        },
        images=("{split}", "images/{split}", "{split}idation", "images/{split}idation"),
    ),
    "v3det": Dataset(
        "V3Det: v3det_2023_v1_{train,val}.json, images in images/",
        {split: (f"v3det_2023_v1_{split}.json",) for split in ("train", "val")},
        images=(".",),
        form=CocoVariant(),
    ),
    "lvis": Dataset(
        "LVIS v1: lvis_v1_{train,val}.json, COCO's images in train2017/, val2017/; split minival too",
        {"train": ("lvis_v1_train.json",), "val": ("lvis_v1_val.json",), "minival": ("lvis_v1_val.json",)},
        images=(".", "images", "coco", "{split}2017", "images/{split}2017"),  # the last two: paths by file_name
        holding=("train2017", "val2017"),
        form=_LVIS_FORM,
    ),
    "coco": Dataset(
        "COCO: instances_{train,val}2017.json, images in train2017/, val2017/; or any file of its form",
        {split: (f"instances_{split}2017.json", f"instances_{split}.json") for split in ("train", "val")},
        images=("images/{split}2017", "{split}2017", "images/{split}", "{split}", "images", "."),
        form=CocoVariant(),
    ),
    "toy": Dataset(
        "the generated world: toy_{train,val}.json, images in photos/",
        {split: (f"toy_{split}.json",) for split in ("train", "val")},
        images=("photos",),
        form=_LVIS_FORM,
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
    """The first `limit` images (None: all) of a split, with its annotated boxes ("gt") or those of a proposals file.

    What the files have that a user should know is logged. Raises what `read_dataset` and `read_proposals` raise, and
    InputError where no region is left, unless it `may_be_empty`.
    """
    manifest = with_boxes(read_dataset(name, data, split, annotations, max_failures=max_failures), boxes, max_failures)
    if not may_be_empty:
        require_regions(manifest)
    for line in manifest.remarks:
        log.warning("%s", line)
    return manifest.head(limit)


def require_regions(manifest: Manifest) -> None:
    """Raises InputError where there is no region to extract, saying what became of the boxes."""
    if len(manifest.boxes_xyxy):
        return
    counts = [f"{name.replace('_', ' ')}: {count:,}" for name, count in manifest.report.items()]
    files = " and ".join(manifest.source.get("files", {}))
    raise InputError(
        f"{manifest.dataset} {manifest.split}: no region is left to extract of {files} ("
        f"{', '.join(counts) or 'no boxes are listed'}){''.join(f'; {line}' for line in manifest.remarks)}; give boxes "
        "by --annotations or --boxes"
    )


def read_dataset(
    name: str,
    data: Path,
    split: str = "train",
    annotations: Path | None = None,
    keep_groups: bool = False,
    max_failures: FailureLimit = EXTRACTION_LIMIT,
) -> Manifest:
    """Read one split of the dataset `name` under the folder `data`.

    `annotations` is read instead of the file that the dataset's own names lead to; any split name will do then.
    `keep_groups` keeps OpenImages' boxes around a group of things. Of the records, `max_failures` may be unreadable;
    they are left out, counted in the manifest's report and told in its remarks.

    Raises InputError for an unknown name or split, AnnotationError for a file that is absent or not what it should be.
    """
    dataset, data, split = _dataset(name), Path(data), _SPLIT_ALIASES.get(split, split)
    path = Path(annotations) if annotations else _annotation_file(name, dataset, data, split)
    if dataset.form is None:
        classes = _find(name, data, _OPENIMAGES_CLASSES)
        return read_openimages(path, classes, image_folder_of(name, data, split), split, keep_groups, max_failures)
    manifest = read_coco(path, name, split, dataset.form, max_failures)
    if name == "lvis" and split == "minival" and annotations is None:
        return select_listed_images(manifest, _find(name, data, (_MINIVAL,)), split)
    return manifest


def image_folder_of(name: str, data: Path, split: str = "train", manifest: Manifest | None = None) -> Path:
    """The folder that the manifest's paths start from.

    Of the folders where this dataset's images may lie, the one that holds most of some images of `manifest`, where
    that is given; else the likeliest that is there. Where none is there, the place where it should be.
    """
    dataset, split = _dataset(name), _SPLIT_ALIASES.get(split, split)
    folders = [Path(data) / place.format(split=split) for place in dataset.images]
    holding = dataset.holding if manifest is None else _some_paths(manifest)
    return max(folders, key=lambda folder: (sum(os.path.exists(folder / path) for path in holding), folder.is_dir()))


def _some_paths(manifest: Manifest) -> list[str]:
    """Spread over the manifest, for the first images may be just those that are missing."""
    paths: list[str] = manifest.paths[:: max(1, len(manifest) // _PATHS_TRIED)].tolist()
    return paths


def _dataset(name: str) -> Dataset:
    try:
        return DATASETS[name]
    except KeyError:
        raise unknown_name("dataset", name, DATASETS) from None


def _annotation_file(name: str, dataset: Dataset, data: Path, split: str) -> Path:
    if split not in dataset.files:
        raise unknown_name(f"{name} split", split, dataset.files, "; any other with its file in --annotations")
    return _find(name, data, dataset.files[split])


def _find(name: str, data: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is in the data folder or in its `annotations/`."""
    for folder in (data, data / "annotations"):
        for file in names:
            if (folder / file).exists():
                return folder / file
    raise AnnotationError(
        f"{data}: {name} needs {' or '.join(names)} here or in annotations/; "
        "put it there, or name the annotation file that is to be read"
    )
