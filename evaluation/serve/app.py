"""The page as a Starlette application: one HTML file, one script with one canvas, and JSON.

Gradio with gradio-image-annotation was the alternative. What the page does at every move of the mouse and every key
(the smallest box under the mouse, a click that cycles through overlapping ones, scores while typing) happens in the
browser; there it would be a component of our own all the same, with a hundred packages and their page around it.

Nothing is read but the two files of the page, the cache with its index, and images in the given folder. Only this
machine is answered, unless another address is given; the Host header is checked, so that no other web site can talk to
the page through the visitor's browser.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from regionspot.cache.errors import InputError, RegionSpotError
from regionspot.cache.storage.atomic_files import from_json
from regionspot.evaluation.serve.explorer import CacheExplorer
from regionspot.evaluation.serve.named_images import NamedImages

log = logging.getLogger(__name__)

MAX_UPLOAD, MAX_JSON = 20 << 20, 64 << 10  # bytes
THUMBNAIL, PHOTO = 220, 1600  # pixels
HITS = 48
LOOPBACK = ("127.0.0.1", "localhost")
# The page runs no script but its own, whatever a name or a path in a cache contains.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


def make_app(
    images: NamedImages | None, explorer: CacheExplorer | None, hosts: tuple[str, ...] = LOOPBACK
) -> Starlette:
    """The application; without `images` there is no first tab, without `explorer` no second one.

    hosts   names by which browsers may address the page; "*" for any
    """

    def opened() -> NamedImages:
        if images is None:
            raise HTTPException(404, "there is no model; start the page with --checkpoint or --preset")
        return images

    def cache() -> CacheExplorer:
        if explorer is None:
            raise HTTPException(404, "there is no cache; start the page with --cache")
        return explorer

    async def info(_: Request) -> Response:
        method = None if images is None else images.spot.method
        limits = {"upload": MAX_UPLOAD}
        return JSONResponse({"method": method, "cache": explorer and explorer.info(), "limits": limits})

    async def open_image(request: Request) -> Response:
        content = await _body(request, MAX_UPLOAD)
        return JSONResponse(await run_in_threadpool(opened().open, content))

    async def view(request: Request) -> Response:
        return _image(await run_in_threadpool(opened().view, request.path_params["key"]))

    async def add_regions(request: Request) -> Response:
        document = await _json(request)
        regions = await run_in_threadpool(opened().add_regions, request.path_params["key"], document)
        return JSONResponse({"regions": regions})

    async def name(request: Request) -> Response:
        names = (await _json(request)).get("names")
        return JSONResponse(await run_in_threadpool(opened().name, request.path_params["key"], names))

    async def cache_images(request: Request) -> Response:
        return JSONResponse({"images": cache().images(_number(request, "first"))})

    async def cache_image(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(cache().image, request.path_params["row"]))

    async def photo(request: Request) -> Response:
        side = THUMBNAIL if "small" in request.query_params else PHOTO
        return _image(await run_in_threadpool(cache().photo, request.path_params["row"], side))

    async def pca(request: Request) -> Response:
        maps = request.query_params.get("map", "")
        return _image(await run_in_threadpool(cache().pca, request.path_params["row"], maps), "image/png")

    async def crop(request: Request) -> Response:
        row, number = request.path_params["row"], request.path_params["number"]
        return _image(await run_in_threadpool(cache().crop, row, number, THUMBNAIL))

    async def search(request: Request) -> Response:
        if "words" in request.query_params:
            words = request.query_params["words"]
            return JSONResponse({"hits": await run_in_threadpool(cache().search, words, HITS)})
        row, number = _number(request, "row"), _number(request, "region")
        return JSONResponse({"hits": await run_in_threadpool(cache().like, row, number, HITS)})

    return Starlette(
        routes=[
            Route("/", _file("page.html", "text/html; charset=utf-8")),
            Route("/page.js", _file("page.js", "text/javascript; charset=utf-8")),
            Route("/api/info", info),
            Route("/api/images", open_image, methods=["POST"]),
            Route("/api/images/{key}", view),
            Route("/api/images/{key}/regions", add_regions, methods=["POST"]),
            Route("/api/images/{key}/names", name, methods=["POST"]),
            Route("/api/cache/images", cache_images),
            Route("/api/cache/images/{row:int}", cache_image),
            Route("/api/cache/images/{row:int}/photo", photo),
            Route("/api/cache/images/{row:int}/pca", pca),
            Route("/api/cache/images/{row:int}/regions/{number:int}", crop),
            Route("/api/search", search),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={
            HTTPException: lambda _, error: _error(error.detail, error.status_code),
            RegionSpotError: lambda _, error: _error(str(error), 400),
            KeyError: lambda _, __: _error("this image is not kept any more; open it again", 404),
        },
    )


def _file(name: str, media_type: str) -> Callable[[Request], Any]:
    content = (Path(__file__).parent / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=media_type, headers={"Content-Security-Policy": POLICY})

    return endpoint


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": " ".join(message.split())}, status)


def _image(content: bytes, media_type: str = "image/jpeg") -> Response:
    return Response(content, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})


async def _body(request: Request, limit: int) -> bytes:
    """The body. Stops reading at `limit` bytes: what Content-Length says may be missing or wrong."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise HTTPException(413, f"more than {limit >> 20 or 1} MB are not accepted here")
    return bytes(content)


async def _json(request: Request) -> dict[str, Any]:
    try:
        document = from_json(await _body(request, MAX_JSON))
    except ValueError:
        raise InputError("the request is not JSON") from None
    if not isinstance(document, dict):
        raise InputError(f"the request is {json.dumps(document)[:40]}, expected an object")
    return document


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(f"{name} is {text[:20]!r}, expected a number")
    return int(text)
