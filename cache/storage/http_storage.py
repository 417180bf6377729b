"""A cache behind a plain web server: `https://lab.example/features/o365.zarr`, to read.

Files are read as from any object store. What is there is read off the server's index pages, as Apache, nginx and
`python -m http.server` make them; a server without them cannot tell which parts are written.
"""

from __future__ import annotations

import errno
import re
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from regionspot.cache.errors import CacheError
from regionspot.cache.storage.object_store import ObjectStorage
from regionspot.cache.storage.obstore_errors import trouble_of
from regionspot.cache.storage.remote import Trouble, Version

_LINK = re.compile(r"href=[\"']?([^\"'?#> ]+)", re.IGNORECASE)
_SILENCE = 30.0  # seconds without an answer


class HttpStorage(ObjectStorage):
    """A folder of a web server. It is never written to."""

    writable = False

    def version(self, name: str) -> Version:
        return super().version(name or "zarr.json")  # a folder has no size of its own

    def listing(self, folder: str) -> dict[str, Version | None]:
        try:
            page = self.with_retries(folder, lambda: self._page(folder))
        except FileNotFoundError:
            if not folder:
                raise OSError(
                    errno.ENOTSUP,
                    "the server shows no index of its folders, so nobody knows what is there",
                    self.address,
                ) from None
            self.listing("")  # where this works, the folder is just not there yet
            return {}
        links = (unquote(link) for link in _LINK.findall(page))
        names = (link.removeprefix("./") for link in links)
        return {name: None for name in names if "/" not in name}

    def check_writable(self) -> None:
        raise CacheError(
            f"{self.address}: a web server is only read; `regionspot cache copy` makes a copy that can be written"
        )

    def repair_hint(self, part: int) -> str:
        return "have it repaired where it is written, or read a copy"

    def _page(self, folder: str) -> str:
        with urlopen(f"{self.address}/{folder}/" if folder else f"{self.address}/", timeout=_SILENCE) as answer:
            return str(answer.read(), "utf-8", "replace")

    def _trouble(self, name: str, error: Exception) -> Trouble:
        where, host = f"{self.address}/{name}", urlsplit(self.address).netloc
        if isinstance(error, HTTPError):
            number = {403: errno.ENOENT, 404: errno.ENOENT}.get(error.code, errno.EIO)
            return Trouble(OSError(number, f"{host} answers {error.code} {error.reason}", where), error.code >= 500)
        if isinstance(error, URLError):
            return Trouble(OSError(errno.EIO, f"{host} does not answer: {error.reason}", where), True)
        return trouble_of(error, self.address, name)
