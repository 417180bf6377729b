"""Classifies obstore's errors: a one-line OSError, and whether a retry may help.

obstore reports most details only as text: `Server returned non-2xx status code: 503 ...`, `HTTP error: ...`, the
store's response in XML or JSON, and the chain of causes. The patterns here are those of obstore 0.12 (object_store
0.14); any other error keeps obstore's first line.
"""

from __future__ import annotations

import errno
import re
from urllib.parse import urlsplit

from regionspot.cache.storage.remote import ClassifiedError

_STATUS = re.compile(r"status code: (\d{3})([ \w-]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")  # the error code of S3 and Azure
_URL = re.compile(r"Error performing \w+ (\S+) in")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_CONFLICT = re.compile(r"ConditionalRequestConflict|OperationAborted")  # S3: a concurrent write, retry
_CREDENTIALS_REQUEST = re.compile(r"169\.254\.169\.254|metadata\.google|performing token request")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public container",
}


def classify_obstore_error(error: Exception, address: str, name: str) -> ClassifiedError:
    """Classify an error of obstore for the file `name` of the cache at `address`."""
    where, text, kind = f"{address}/{name}", str(error), type(error).__name__
    permanent = _permanent(address, kind, text)
    if permanent is not None:
        return ClassifiedError(OSError(*permanent, where), False)  # OSError picks the subclass of its errno
    status = _STATUS.search(text)
    if status is not None:
        code = int(status[1])
        message = f"{_host(text)} answers {code}{status[2].rstrip()}{_store_code(text)}"
        return ClassifiedError(OSError(errno.EIO, message, where), code >= 500 or code in (408, 409, 425, 429))
    if "HTTP error" in text:
        return ClassifiedError(OSError(errno.EIO, f"{_host(text)} {_connection(text)}", where), True)
    if isinstance(error, OSError):
        return ClassifiedError(error, False)
    return ClassifiedError(OSError(errno.EIO, text.strip().partition("\n")[0][:200], where), False)


def _permanent(address: str, kind: str, text: str) -> tuple[int, str] | None:
    """errno and message of an error that no retry can fix; None for others."""
    if _NO_BUCKET.search(text):
        return errno.ENXIO, f"there is no bucket {urlsplit(address).netloc!r}"
    if _CREDENTIALS_REQUEST.search(text):
        return errno.EACCES, f"no credentials found: {_credentials(address)}"
    if "without LOCATION" in text:
        return errno.ENXIO, "the bucket is in another region; set AWS_REGION to it"
    if kind == "AlreadyExistsError" and not _CONFLICT.search(text):
        return errno.EEXIST, "exists already"
    if kind == "PreconditionError":
        return errno.ESTALE, "was replaced while it was being read"
    if kind == "FileNotFoundError":
        return errno.ENOENT, "no such file in the store"
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or re.search(r"status code: 40[13]", text):
        return errno.EACCES, f"the store refuses access{_store_code(text)}: {_credentials(address)}"
    if "status code: 416" in text:
        return errno.ERANGE, "is shorter than the requested range"
    if kind == "NotSupportedError" or "status code: 501" in text:
        return errno.ENOTSUP, f"{_host(text)} does not support this operation"
    if "non-partial response" in text:
        return errno.ENOTSUP, "the server does not support byte ranges; use another server, or download the cache first"
    return None


def _store_code(text: str) -> str:
    code = _CODE.search(text)
    return f" ({code[1]})" if code else ""


def _credentials(address: str) -> str:
    scheme = urlsplit(address).scheme
    return _CREDENTIALS.get(scheme[:2], _CREDENTIALS["az"] if scheme.startswith("a") else "check the address")


def _host(text: str) -> str:
    url = _URL.search(text)
    return urlsplit(url[1]).netloc if url else "the store"


def _connection(text: str) -> str:
    """What happened to a connection, from the causes below obstore's first line."""
    for pattern, message in (
        ("ConnectionRefused", "refuses the connection"),
        ("dns error", "is not found: no such host"),
        ("Timeout", "does not answer"),
        ("TimedOut", "does not answer"),
        ("body error", "closed the connection"),
        ("IncompleteMessage", "closed the connection"),
        ("ConnectionReset", "closed the connection"),
    ):
        if pattern in text:
            return message
    return "cannot be reached"
