"""What obstore's errors mean to somebody who wants his features: one short line, and whether waiting may help.

obstore tells most of what happens in text only: `Server returned non-2xx status code: 503 ...`, `HTTP error: ...`, the
store's own answer in XML or JSON, and below it the chain of causes. The words looked for here are those of obstore 0.12
(object_store 0.14); what none of them fits is told in obstore's own first line.
"""

from __future__ import annotations

import errno
import re
from urllib.parse import urlsplit

from regionspot.cache.storage.remote import Trouble

_STATUS = re.compile(r"status code: (\d{3})([ \w-]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")  # S3's and Azure's own name of what is wrong
_URL = re.compile(r"Error performing \w+ (\S+) in")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_UNDECIDED = re.compile(r"ConditionalRequestConflict|OperationAborted")  # S3: others write it now, ask again
_ASKING_FOR_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google|performing token request")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public container",
}


def trouble_of(error: Exception, address: str, name: str) -> Trouble:
    """What an error of obstore means for a file `name` of the cache at `address`."""
    where, text, kind = f"{address}/{name}", str(error), type(error).__name__
    lasting = _lasting(address, kind, text)
    if lasting is not None:
        return Trouble(OSError(*lasting, where), False)  # of the class that its number stands for
    status = _STATUS.search(text)
    if status is not None:
        code = int(status[1])
        told = f"{_host(text)} answers {code}{status[2].rstrip()}{_own_word(text)}"
        return Trouble(OSError(errno.EIO, told, where), code >= 500 or code in (408, 409, 425, 429))
    if "HTTP error" in text:
        return Trouble(OSError(errno.EIO, f"{_host(text)} {_connection(text)}", where), True)
    if isinstance(error, OSError):
        return Trouble(error, False)
    return Trouble(OSError(errno.EIO, text.strip().partition("\n")[0][:200], where), False)


def _lasting(address: str, kind: str, text: str) -> tuple[int, str] | None:
    """Number and text of what no waiting mends."""
    if _NO_BUCKET.search(text):
        return errno.ENXIO, f"there is no bucket {urlsplit(address).netloc!r}"
    if _ASKING_FOR_CREDENTIALS.search(text):
        return errno.EACCES, f"no credentials were found: {_credentials(address)}"
    if "without LOCATION" in text:
        return errno.ENXIO, "the bucket is in another region; set AWS_REGION to it"
    if kind == "AlreadyExistsError" and not _UNDECIDED.search(text):
        return errno.EEXIST, "exists already"
    if kind == "PreconditionError":
        return errno.ESTALE, "was replaced while it was read"
    if kind == "FileNotFoundError":
        return errno.ENOENT, "no such file in the store"
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or re.search(r"status code: 40[13]", text):
        return errno.EACCES, f"the store refuses access{_own_word(text)}: {_credentials(address)}"
    if "status code: 416" in text:
        return errno.ERANGE, "ends before what was asked for"
    if kind == "NotSupportedError" or "status code: 501" in text:
        return errno.ENOTSUP, f"{_host(text)} does not know how to do that"
    if "non-partial response" in text:
        return errno.ENOTSUP, "the server knows no byte ranges; give one that does, or copy the cache from it"
    return None


def _own_word(text: str) -> str:
    code = _CODE.search(text)
    return f" ({code[1]})" if code else ""


def _credentials(address: str) -> str:
    scheme = urlsplit(address).scheme
    return _CREDENTIALS.get(scheme[:2], _CREDENTIALS["az"] if scheme.startswith("a") else "check the address")


def _host(text: str) -> str:
    url = _URL.search(text)
    return urlsplit(url[1]).netloc if url else "the store"


def _connection(text: str) -> str:
    """What happened to a connection, from the causes that obstore prints below its first line."""
    for words, told in (
        ("ConnectionRefused", "refuses the connection"),
        ("dns error", "is not known to the network: no such host"),
        ("Timeout", "does not answer"),
        ("TimedOut", "does not answer"),
        ("body error", "broke off the connection"),
        ("IncompleteMessage", "broke off the connection"),
        ("ConnectionReset", "broke off the connection"),
    ):
        if words in text:
            return told
    return "cannot be reached"
