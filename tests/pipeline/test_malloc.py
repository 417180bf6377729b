"""malloc: freed memory is reused without page faults, in every thread."""

import os
import platform
import subprocess
import sys

import pytest

from regionspot.pipeline.extraction import malloc

MEGABYTES = 48  # more than glibc takes from the heap by default
TIMES = 8

SCRIPT = f"""
import resource, sys, threading
from regionspot.pipeline.extraction.malloc import keep_memory

print(keep_memory() if sys.argv[1] == "keep" else None)

def work():
    for _ in range({TIMES}):
        b"x" * ({MEGABYTES} << 20)

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

print(faults(work), faults(in_a_thread))
"""
PAGES = (MEGABYTES << 20) // os.sysconf("SC_PAGE_SIZE")

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def run(how, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in malloc.ENVIRONMENT}
    command = [sys.executable, "-c", SCRIPT, how]
    process = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    applied, counts = process.stdout.splitlines()
    return applied, *(int(count) for count in counts.split())


@needs_glibc
def test_large_blocks_cause_page_faults_only_once():
    applied, here, in_thread = run("keep")
    _, by_default, _ = run("leave")
    assert applied == "True"
    assert by_default > TIMES * PAGES * 0.9
    assert here < 2 * PAGES
    assert in_thread < 0.1 * PAGES  # a thread reuses memory of the main thread


@needs_glibc
def test_variables_of_the_environment_have_priority():
    applied, here, _ = run("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert applied == "False"
    assert here > TIMES * PAGES * 0.9


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: pytest.fail("loaded the C library"))
    assert malloc.keep_memory.__wrapped__() is False
