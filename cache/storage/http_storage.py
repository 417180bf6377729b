"""Read-only storage on a plain web server: `https://lab.example/features/o365.zarr`.

Files are read like those of an object store. Folders are listed from the server's index pages, as Apache, nginx and
`python -m http.server` produce them; a server without index pages is refused.
"""

from __future__ import annotations

import errno
import re
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from regionspot.cache.errors import CacheError
from regionspot.cache.storage.object_store import ObjectStorage
from regionspot.cache.storage.obstore_errors import classify_obstore_error
from regionspot.cache.storage.remote import ClassifiedError, Version

_LINK = re.compile(r"href=[\"']?([^\"'?#> ]+)", re.IGNORECASE)
_TIMEOUT = 30.0  # seconds


class HttpStorage(ObjectStorage):
    """A folder of a web server, read-only."""

    writable = False

    def version(self, name: str) -> Version:
        return super().version(name or "zarr.json")  # a folder has no size

    def list_versions(self, folder: str) -> dict[str, Version | None]:
        try:
            page = self.with_retries(folder, lambda: self._page(folder))
        except FileNotFoundError:
            if not folder:
                raise OSError(
                    errno.ENOTSUP,
                    "the server has no index pages, so its files cannot be listed",
                    self.address,
                ) from None
            self.list_versions("")  # raises if the server has no index pages; else the folder does not exist yet
            return {}
        links = (unquote(link) for link in _LINK.findall(page))
        names = (link.removeprefix("./") for link in links)
        return {name: None for name in names if "/" not in name}

    def check_writable(self) -> None:
        raise CacheError(
            f"{self.address}: a web server is read-only; make a writable copy with `regionspot cache copy`"
        )

    def repair_hint(self, part: int) -> str:
        return "repair it on the machine that writes it, or read a copy"

    def _page(self, folder: str) -> str:
        with urlopen(f"{self.address}/{folder}/" if folder else f"{self.address}/", timeout=_TIMEOUT) as response:
            return str(response.read(), "utf-8", "replace")

    def _classify(self, name: str, error: Exception) -> ClassifiedError:
        where, host = f"{self.address}/{name}", urlsplit(self.address).netloc
        if isinstance(error, HTTPError):
            code = errno.ENOENT if error.code in (403, 404) else errno.EIO
            message = f"{host} answers {error.code} {error.reason}"
            return ClassifiedError(OSError(code, message, where), error.code >= 500)
        if isinstance(error, URLError):
            return ClassifiedError(OSError(errno.EIO, f"{host} does not answer: {error.reason}", where), True)
        return classify_obstore_error(error, self.address, name)
