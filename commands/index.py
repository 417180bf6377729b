"""`regionspot index` and `regionspot search`: find regions of a cache by words or by another region."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop

CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="the cache: a folder, a URL such as s3://..., or .h5")]
Index = Annotated[
    Path | None, typer.Option("--index", help="folder of the index; default: beside the cache, CACHE.regions")
]


def index(
    cache: CachePath,
    checkpoint: Annotated[
        Path | None, typer.Option(help="a trained head; without one, by CLIP's dense map if the cache has it")
    ] = None,
    head: options.HeadClass = None,
    preset: options.OptionalPreset = None,
    map_set: Annotated[
        str | None, typer.Option(help="without a checkpoint: this map; default: the cache's only one, dense first")
    ] = None,
    folder: Index = None,
    weights: options.Weights = None,
    device: options.Device = None,
) -> None:
    """Write an embedding of every region beside the cache, for `search`. A stopped run is resumed by the same command.

    Example: regionspot index o365.zarr --checkpoint runs/bl/head.safetensors
    """
    from regionspot.cache.errors import InputError
    from regionspot.cache.outputs import check_output_folder
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.search.region_embeddings import head_embedder, map_embedder
    from regionspot.evaluation.search.region_index import build_index, index_folder

    if checkpoint and map_set:
        raise InputError("--checkpoint and --map-set: give one of them; a head names its own maps")
    opened = FeatureCache.open(cache)
    target = check_output_folder(index_folder(opened, folder), (cache, checkpoint))
    if checkpoint:
        embedder = head_embedder(opened, checkpoint, preset, head, device)
    else:
        embedder = map_embedder(opened, map_set, weights, device)
    on_stop(AGAIN)
    built = build_index(opened, embedder, target)
    total = int(opened.manifest.offsets[-1])
    left = f"; {built.missing:,} are not extracted yet: run this again after `extract`" if built.missing else ""
    typer.echo(f"{target}: {total - built.missing:,} of {total:,} regions, by {embedder.method}{left}")


def search(
    cache: CachePath,
    words: Annotated[str | None, typer.Argument(help='what to find, such as "striped green star"')] = None,
    like: Annotated[
        str | None, typer.Option(metavar="IMAGE_ID:REGION", help="find regions like this one, numbered from 0")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="regions to find")] = 20,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="contact sheet of the regions; needs --data")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the dataset, for the images of the sheet")] = None,
    as_json: options.AsJson = False,
    folder: Index = None,
    weights: options.Weights = None,
    device: options.Device = None,
) -> None:
    """List the regions of a cache that are nearest to words, or to another region. `index` comes first.

    Example: regionspot search val.zarr "striped green star" -o found.png --data toy
    """
    from regionspot.cache.errors import InputError
    from regionspot.cache.outputs import check_output_file
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.report.drawing import check_image_name, save_image
    from regionspot.evaluation.search.hits_sheet import hits_sheet
    from regionspot.evaluation.search.region_index import RegionIndex, index_folder
    from regionspot.pipeline.datasets.registry import image_folder_of
    from regionspot.pipeline.images.decode import stored_exif

    if (words is None) == (like is None):
        raise InputError("search: give either words or --like IMAGE_ID:REGION")
    if (out is None) != (data is None):
        raise InputError("search: a sheet needs both, --out FILE and --data FOLDER")
    if out:
        check_output_file(check_image_name(out), (cache, data))
    opened = FeatureCache.open(cache)
    regions = RegionIndex(opened, index_folder(opened, folder))
    if like is not None:
        parsed = re.fullmatch(r"(-?\d{1,18}):(\d{1,9})", like)
        if not parsed:
            raise InputError(f"--like {like!r}: expected IMAGE_ID:REGION, such as 139:2")
        region = regions.region(int(parsed[1]), int(parsed[2]))
        hits = regions.nearest(regions.embedding(region), count, without=region)
    else:
        encoder = regions.text_encoder(weights, device)
        hits = regions.nearest(regions.embed_words(words or "", encoder), count)
    if regions.missing:
        typer.echo(f"{regions.folder}: {regions.missing:,} regions are not in the index", err=True)
    if as_json:
        typer.echo(json.dumps([hit.as_json() for hit in hits], indent=1, allow_nan=False))
    else:
        typer.echo("cosine  image:region  name, path")
        for hit in hits:
            typer.echo(f"{hit.similarity:6.3f}  {hit.image_id}:{hit.number:<4}  {hit.name or '-'}, {hit.path}")
    if out and data:
        manifest = opened.manifest
        images = image_folder_of(manifest.dataset, data, manifest.split, manifest)
        exif = stored_exif(feature_set.provenance for feature_set in opened.feature_sets.values())
        save_image(hits_sheet(manifest, images, hits, words or f"like region {like}", exif), out)
