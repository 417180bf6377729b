"""`regionspot cache ...`: inspect, check, extend and copy an existing cache.

PATH, like `--cache` of the other commands, is a folder, the URL of a folder in an object store, or an .h5 file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop

cache_app = typer.Typer(help="Inspect, check, extend and copy a cache.", no_args_is_help=True)

CachePath = Annotated[str, typer.Argument(metavar="PATH", help="the cache: a folder, a URL such as s3://..., or .h5")]
NewCache = Annotated[str, typer.Argument(metavar="OUT", help="the new cache: a folder or a URL")]
PartSize = Annotated[
    int | None, typer.Option(min=1, max=options.MAX_IMAGES, help="images per part; default: as before")
]


@cache_app.command()
def info(path: CachePath, as_json: options.AsJson = False) -> None:
    """Show feature sets, sizes, provenance, written and pending parts, and failed images of a cache.

    Example: regionspot cache info o365.zarr
    """
    from regionspot.cache.store import FeatureCache
    from regionspot.cache.tools.info import describe_cache

    info = describe_cache(FeatureCache.open(path))
    typer.echo(json.dumps(info.as_json(), indent=1, allow_nan=False) if as_json else info.text())


@cache_app.command()
def ls(
    path: CachePath,
    failed: Annotated[bool, typer.Option("--failed", help="images that could not be read, and why")] = False,
    pending: Annotated[bool, typer.Option("--pending", help="images that are not extracted yet")] = False,
    done: Annotated[bool, typer.Option("--done", help="images that every feature set contains")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="maximum number of lines")] = None,
) -> None:
    """List the images, one per line: row, id, size, regions, path, state.

    Example: regionspot cache ls o365.zarr --failed
    """
    from regionspot.cache.store import FeatureCache
    from regionspot.cache.tools.info import STATES, list_images

    states = [state for state, selected in zip(STATES, (done, failed, pending), strict=True) if selected]
    for line in list_images(FeatureCache.open(path), states or STATES, limit):
        typer.echo(line)


@cache_app.command()
def show(
    path: CachePath,
    image_id: Annotated[int, typer.Argument(help="the dataset's id of the image, as `ls` lists it")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the image file to write")],
    image_folder: Annotated[
        Path | None,
        typer.Option(
            "--photos", exists=True, file_okay=False, help="folder of the images; without it, regions are drawn on grey"
        ),
    ] = None,
    region: Annotated[
        int | None, typer.Option(min=0, help="index of the region to compare; default: a large one")
    ] = None,
    map_set: Annotated[str | None, typer.Option(help="feature set to show; default: the only map")] = None,
) -> None:
    """Draw one image: its regions, its feature map as colours, and the similarity of each patch to a region.

    Example: regionspot cache show o365.zarr 420 -o image.png
    """
    from regionspot.cache.outputs import check_output_file
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.report.cache_view import show_image
    from regionspot.evaluation.report.drawing import check_image_name, save_image

    check_output_file(check_image_name(out), (path, image_folder))
    save_image(show_image(FeatureCache.open(path), image_id, image_folder, region, map_set), out)
    typer.echo(f"{out}")


@cache_app.command("import-tokens")
def import_tokens(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the authors' token files, <image id>.pth")],
    cache: Annotated[str, typer.Option(help="the cache of the same images and regions")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="record images without a usable file as failed")
    ] = False,
) -> None:
    """Import location tokens from the files that the authors published, instead of running SAM.

    Example: regionspot cache import-tokens tokens --cache o365.zarr
    """
    from regionspot.cache.tools.import_tokens import import_tokens as run

    typer.echo(f"{cache}: {run(folder, cache, allow_missing).text()}")


@cache_app.command()
def stats(
    path: CachePath,
    feature_set: Annotated[str, typer.Argument(help="a feature set, as `info` names it")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="mean and variance as .npz or .json")] = None,
) -> None:
    """Mean and variance of every channel of a feature set, over the whole cache in one pass.

    Example: regionspot cache stats o365.zarr clip_vit_l_14 -o stats.json
    """
    from regionspot.cache.outputs import check_output_file
    from regionspot.cache.store import FeatureCache
    from regionspot.cache.tools.channel_stats import channel_stats, check_stats_suffix

    if out:
        check_output_file(check_stats_suffix(out), [path])
    result = channel_stats(FeatureCache.open(path), feature_set)
    typer.echo(result.text())
    if out:
        result.save(out)


@cache_app.command()
def verify(
    path: CachePath,
    quick: Annotated[bool, typer.Option("--quick", help="do not read the features themselves")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=options.MAX_THREADS, help="parts to check in parallel; default: by storage")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check every byte and count of a cache; exit code 1 and a list of problems if there are any.

    Example: regionspot cache verify o365.zarr
    """
    from regionspot.cache.tools.verify import verify as run

    report = run(path, quick=quick, threads=threads)
    typer.echo(options.json_text(report) if as_json else report.text())
    raise typer.Exit(0 if report.sound else 1)


@cache_app.command()
def repair(
    path: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be done")] = False,
) -> None:
    """Verify a cache and delete its bad parts, so that the next extract writes them again; 1 if problems remain.

    Example: regionspot cache repair o365.zarr --dry-run
    """
    from regionspot.cache.tools.repair import repair as run
    from regionspot.cache.tools.verify import verify as look

    summary = run(path, look(path), dry_run=dry_run)
    typer.echo(summary.text())
    raise typer.Exit(1 if summary.left else 0)


@cache_app.command()
def export(path: CachePath, out: Annotated[Path, typer.Argument(metavar="OUT.h5", help="the file to write")]) -> None:
    """Write a whole cache into one HDF5 file, which can be used like the folder; for clusters with file quotas.

    Example: regionspot cache export o365.zarr o365.h5
    """
    from regionspot.cache.store import FeatureCache
    from regionspot.cache.tools.hdf5_export import export_hdf5

    typer.echo(f"{export_hdf5(FeatureCache.open(path), out)}")


@cache_app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE.h5", help="what `export` wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to create")],
) -> None:
    """Convert an HDF5 file back into a cache folder, byte for byte.

    Example: regionspot cache import o365.h5 o365.zarr
    """
    from regionspot.cache.tools.hdf5_export import import_hdf5

    typer.echo(f"{import_hdf5(file, out)}")


@cache_app.command()
def extend(
    path: CachePath,
    name: options.DatasetName,
    data: options.Data,
    split: options.Split = "train",
    annotations: options.Annotations = None,
    boxes: options.Boxes = "gt",
    limit: options.Limit = None,
    part_size: Annotated[
        int, typer.Option(min=1, max=options.MAX_IMAGES, help="images per part, if the cache has only one part")
    ] = 512,
    max_failures: options.MaxFailures = options.EXTRACTION_FAILURES,
    take_over: options.TakeOver = False,
) -> None:
    """Add new images of grown annotations at the end of a cache, for the next `extract`.

    Example: regionspot cache extend my.zarr coco --data my_images --annotations my.json
    """
    from regionspot.cache.tools.extend import extend as run
    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.datasets.registry import read_split

    failures = FailureLimit.parse(max_failures)
    manifest = read_split(name, data, split, annotations, boxes, limit, max_failures=failures, may_be_empty=True)
    typer.echo(f"{path}: {run(path, manifest, part_size=part_size, take_over=take_over).text()}")


@cache_app.command()
def merge(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="caches of the same feature sets and classes")],
    out: Annotated[str, typer.Option("--out", "-o", help="the new cache: a folder or a URL")],
    part_size: PartSize = None,
) -> None:
    """Concatenate caches into a new one. Run it again to resume.

    Example: regionspot cache merge a.zarr b.zarr -o both.zarr
    """
    from regionspot.cache.tools.merge_subset_convert import merge as run

    on_stop(AGAIN)
    typer.echo(f"{out}: {run(paths, out, part_size).text()}")


@cache_app.command()
def subset(
    path: CachePath,
    out: NewCache,
    ids: Annotated[Path | None, typer.Option(help="file of image ids, one per line; their order is kept")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="only images with a region of this class; can be repeated")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="every n-th of those images")] = 1,
    first: Annotated[int | None, typer.Option(min=1, help="the first n of those images")] = None,
    part_size: PartSize = None,
) -> None:
    """Copy some images into a new cache. Run it again to resume.

    Example: regionspot cache subset o365.zarr small.zarr --every 100
    """
    from regionspot.cache.store import FeatureCache
    from regionspot.cache.tools.merge_subset_convert import subset as run
    from regionspot.cache.tools.select_rows import read_ids, select_rows

    on_stop(AGAIN)
    cache = FeatureCache.open(path)
    image_ids = read_ids(ids) if ids else None
    rows = select_rows(cache.manifest, ids=image_ids, categories=category or [], every=every, first=first)
    typer.echo(f"{out}: {run(path, out, rows, part_size).text()}")


@cache_app.command()
def convert(
    path: CachePath,
    out: NewCache,
    to: Annotated[
        list[str],
        typer.Option(metavar="SET=ENCODING", help="clip_vit_l_14=int8: float16, float32, bfloat16 or int8, or +zstd"),
    ],
) -> None:
    """Copy a cache with feature sets in another encoding. Run it again to resume.

    Example: regionspot cache convert o365.zarr small.zarr --to clip_vit_l_14=int8
    """
    from regionspot.cache.tools.merge_subset_convert import convert as run
    from regionspot.cache.tools.merge_subset_convert import parse_encodings

    on_stop(AGAIN)
    typer.echo(f"{out}: {run(path, out, parse_encodings(to)).text()}")


@cache_app.command()
def copy(path: CachePath, out: NewCache) -> None:
    """Copy a cache, also to or from an object store, and verify the checksums. Run it again to resume.

    Example: regionspot cache copy o365.zarr s3://bucket/o365.zarr
    """
    from regionspot.cache.tools.merge_subset_convert import copy as run

    on_stop(AGAIN)
    typer.echo(f"{out}: {run(path, out).text()}")
