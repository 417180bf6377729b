"""The doctor's checks of the machine and of the installed packages."""

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
from regionspot.pipeline.doctor.report import DoctorOptions, Finding
from regionspot.pipeline.reporting.environment import versions


def check_python(_: DoctorOptions) -> Iterator[Finding]:
    memory = size_text(available_memory())
    text = f"{platform.python_version()} on {platform.system()}, {processors()} cores, {memory} of memory free"
    yield Finding("python", "ok", text)


def check_packages(_: DoctorOptions) -> Iterator[Finding]:
    """Compare the installed packages with the requirements of regionspot."""
    from packaging.requirements import Requirement  # a dependency of dask

    requirements = [Requirement(text) for text in metadata.requires("regionspot") or ()]
    required = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    installed = versions(item.name for item in required)
    for item in required:
        version = installed.get(item.name)
        if version is None or not item.specifier.contains(version, prereleases=True):
            state = "is not installed" if version is None else f"is {version}"
            mend = f"pip install '{item.name}{item.specifier}'"
            yield Finding("packages", "fail", f"{item.name} {state}, required is {item.specifier}", mend)
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))


def check_torch(_: DoctorOptions) -> Iterator[Finding]:
    import torch
    import torchvision  # raises if it was built for another torch

    total = float(torch.ones(64, 64).matmul(torch.ones(64, 64)).sum())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if total != 64.0**3:
        yield Finding("torch", "fail", f"a product of ones gave {total}", "reinstall torch")
    text = f"{torch.__version__} ({build}), torchvision {torchvision.__version__}, {torch.get_num_threads()} threads"
    yield Finding("torch", "ok", text)


def check_gpus(_: DoctorOptions) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if any(Path("/dev").glob("nvidia[0-9]*")):
            mend = "install a torch built for CUDA and a matching driver (`nvidia-smi` shows the driver)"
            yield Finding("gpu", "fail", "this torch cannot use the GPU of this machine", mend)
        else:
            mend = "extraction runs on the CPU, seconds per image; --preset toy needs no GPU"
            yield Finding("gpu", "warn", "no GPU", mend)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(64, 64, device=f"cuda:{number}").matmul(torch.ones(64, 64, device=f"cuda:{number}")).sum().item()
        name = torch.cuda.get_device_name(number)
        yield Finding("gpu", "ok", f"cuda:{number} {name}, {size_text(free)} of {size_text(total)} free, computes")


def check_allocator(_: DoctorOptions) -> Iterator[Finding]:
    from regionspot.pipeline.extraction.malloc import ENVIRONMENT, keep_memory

    if keep_memory():
        yield Finding("allocator", "ok", "glibc keeps freed memory for reuse")
    elif platform.libc_ver()[0] == "glibc":
        yield Finding("allocator", "ok", f"configured by one of {', '.join(ENVIRONMENT)}")
    else:
        mend = "Linux with glibc is faster"
        yield Finding("allocator", "warn", "not glibc: large activations may cost page faults", mend)


def check_decoder(_: DoctorOptions) -> Iterator[Finding]:
    from PIL import features

    from regionspot.pipeline.images.jpeg import matches_pillow

    library = f"Pillow with libjpeg{'-turbo' * bool(features.check('libjpeg_turbo'))}"
    if matches_pillow():
        yield Finding("decoder", "ok", f"simplejpeg, with the same pixels as {library}")
    else:
        mend = "install a Pillow wheel from PyPI, whose library decodes as simplejpeg does"
        text = f"{library} only: simplejpeg decodes other pixels, so JPEGs are read slower"
        yield Finding("decoder", "warn", text, mend)


def check_metrics_port(options: DoctorOptions) -> Iterator[Finding]:
    port = options.metrics_port
    if port is None:
        return
    if find_spec("prometheus_client") is None:
        yield Finding("metrics", "fail", "prometheus_client is not installed", "pip install 'regionspot[metrics]'")
        return
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()
    except (OSError, OverflowError) as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error))
        yield Finding("metrics", "fail", f"cannot listen on port {port} ({reason})", "give another --metrics-port")
    else:
        yield Finding("metrics", "ok", f"port {port} is free")
