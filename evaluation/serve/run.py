"""Load what the page shows, and serve it until it is stopped."""

from __future__ import annotations

import logging
import socket
import webbrowser
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.search.region_index import DOCUMENT, RegionIndex, index_folder
from regionspot.evaluation.serve.app import LOOPBACK, make_app
from regionspot.evaluation.serve.explorer import CacheExplorer
from regionspot.evaluation.serve.named_images import NamedImages, NameEmbeddings
from regionspot.fusion.vocabulary import TextEncoder
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.datasets.registry import image_folder_of

log = logging.getLogger(__name__)


def load_page(
    checkpoint: Path | None,
    preset: str | None,
    cache: str | None,
    data: Path | None,
    index: Path | None,
    *,
    head_class: str | None = None,
    weights: str | None = None,
    sam_weights: str | None = None,
    clip_weights: str | None = None,
    device: str | None = None,
    dtype: str = AUTO,
    host: str = LOOPBACK[0],
) -> Starlette:
    """The page of a model, a cache, or both. The arguments are the options of `regionspot serve`.

    Raises InputError and its subclasses, with a message of one line, for what cannot be loaded.
    """
    images, explorer = None, None
    if checkpoint is not None:
        spot = RegionSpot.load(
            checkpoint,
            weights,
            device,
            preset=preset,
            head_class=head_class,
            sam_weights=sam_weights,
            clip_weights=clip_weights,
            dtype=dtype,
        )
        images = NamedImages(spot)
    elif preset is not None:
        spot = RegionSpot.zero_shot(
            preset, "dense", weights, device, sam_weights=sam_weights, clip_weights=clip_weights, dtype=dtype
        )
        images = NamedImages(spot)
    if cache is not None:
        encoder = None if images is None else images.spot.encoder
        explorer = _explorer(FeatureCache.open(cache), data, index, encoder, clip_weights or weights, device)
    return make_app(images, explorer, LOOPBACK if host in LOOPBACK else ("*",))


def _explorer(
    cache: FeatureCache,
    data: Path | None,
    folder: Path | None,
    encoder: TextEncoder | None,
    weights: str | None,
    device: str | None,
) -> CacheExplorer:
    manifest, index, names = cache.manifest, None, None
    images = None if data is None else image_folder_of(manifest.dataset, data, manifest.split, manifest)
    if images is None:
        log.info("%s: without --data its images are grey", cache.path)
    if folder is not None or (isinstance(cache.path, Path) and (index_folder(cache) / DOCUMENT).exists()):
        index = RegionIndex(cache, index_folder(cache, folder))
        loaded = encoder is not None and (encoder.name, encoder.weights_sha256) == index.encoder
        own = encoder if encoder is not None and loaded else index.text_encoder(weights, device)
        names = NameEmbeddings(own, index.templates)
    else:
        log.info(
            "%s: has no index, so the page has no search; `regionspot index %s` writes one", cache.path, cache.path
        )
    return CacheExplorer(cache, images, index, names)


def run_page(page: Starlette, host: str, port: int, browser: bool) -> None:
    """Serve until Ctrl-C. Raises InputError if the address cannot be used."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"{host}:{port}: cannot be listened on ({error.strerror or error}); give another --port or --host"
        ) from None
    with listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}/"
        log.info("serving %s until Ctrl-C", url)
        if host not in LOOPBACK:
            log.warning("every machine that reaches %s may use this page; it has no password", host)
        if browser:
            webbrowser.open(url)
        uvicorn.Server(uvicorn.Config(page, log_level="warning")).run(sockets=[listener])
