"""The doctor's look at the machine and at what is installed on it."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from regionspot.cache.machine import available_memory, processors
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.doctor.run import Asked, Finding
from regionspot.pipeline.reporting.environment import versions


def python(_: Asked) -> Iterator[Finding]:
    memory = size_text(available_memory())
    text = f"{platform.python_version()} on {platform.system()}, {processors()} cores, {memory} of memory free"
    yield Finding("python", "ok", text)


def packages(_: Asked) -> Iterator[Finding]:
    """What regionspot says that it needs, held against what is installed."""
    from packaging.requirements import Requirement  # comes with dask

    needed = [Requirement(text) for text in metadata.requires("regionspot") or ()]
    always = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    found = versions(each.name for each in always)
    for each in always:
        version = found.get(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            state = "is not installed" if version is None else f"is {version}"
            mend = f"pip install '{each.name}{each.specifier}'"
            yield Finding("packages", "fail", f"{each.name} {state}, needed is {each.specifier}", mend)
    shown = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield Finding("packages", "ok", shown)


def torch_works(_: Asked) -> Iterator[Finding]:
    import torch
    import torchvision  # fails here where it was built for another torch

    total = float(torch.ones(64, 64).matmul(torch.ones(64, 64)).sum())
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if total != 64.0**3:
        yield Finding("torch", "fail", f"a product of ones gave {total}", "install torch anew")
    text = f"{torch.__version__} ({built}), torchvision {torchvision.__version__}, {torch.get_num_threads()} threads"
    yield Finding("torch", "ok", text)


def gpus_work(_: Asked) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if any(Path("/dev").glob("nvidia[0-9]*")):
            mend = "install a torch built for CUDA and a driver that fits it (`nvidia-smi` shows the driver)"
            yield Finding("gpu", "fail", "there is one, but this torch cannot use it", mend)
        else:
            mend = "extraction runs on the CPU, seconds an image; --preset toy does not mind"
            yield Finding("gpu", "warn", "none", mend)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(64, 64, device=f"cuda:{number}").matmul(torch.ones(64, 64, device=f"cuda:{number}")).sum().item()
        name = torch.cuda.get_device_name(number)
        yield Finding("gpu", "ok", f"cuda:{number} {name}, {size_text(free)} of {size_text(total)} free, computes")


def allocator(_: Asked) -> Iterator[Finding]:
    from regionspot.pipeline.extraction.malloc import ENVIRONMENT, keep_memory

    if keep_memory():
        yield Finding("allocator", "ok", "glibc keeps freed memory for the next layer")
    elif platform.libc_ver()[0] == "glibc":
        yield Finding("allocator", "ok", f"set up from outside, by one of {', '.join(ENVIRONMENT)}")
    else:
        yield Finding(
            "allocator", "warn", "not glibc: large layers may cost page faults", "a Linux with glibc is faster"
        )


def decoder(_: Asked) -> Iterator[Finding]:
    from PIL import features

    from regionspot.pipeline.images.jpeg import matches_pillow

    library = f"Pillow with libjpeg{'-turbo' * bool(features.check('libjpeg_turbo'))}"
    if matches_pillow():
        yield Finding("decoder", "ok", f"simplejpeg, pixel for pixel as {library}")
    else:
        mend = "a Pillow wheel from PyPI has the library that simplejpeg agrees with"
        yield Finding(
            "decoder", "warn", f"{library} alone: simplejpeg gives other pixels, so JPEGs are read slower", mend
        )


def metrics_port(asked: Asked) -> Iterator[Finding]:
    port = asked.metrics_port
    if port is None:
        return
    if find_spec("prometheus_client") is None:
        yield Finding("metrics", "fail", "prometheus_client is not installed", "pip install 'regionspot[metrics]'")
        return
    try:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("", port))
            listening.listen()
    except (OSError, OverflowError) as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error))
        yield Finding("metrics", "fail", f"port {port} cannot be listened on ({reason})", "give another --metrics-port")
    else:
        yield Finding("metrics", "ok", f"port {port} is free")
