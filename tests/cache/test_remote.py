"""Caches in object stores: a real S3-protocol server, real sockets that break, real killed writers."""

import contextlib
import http.client
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import makers
import numpy as np
import pytest
import zarr
from makers import fork, make_features, make_manifest, was_killed

from regionspot.cache import CacheError, FeatureCache, FeatureSet, ImageFeatures, InputError
from regionspot.cache.errors import CacheExistsError, NotACacheError
from regionspot.cache.format.create import upload_tree
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_remote, open_storage

MAPS = FeatureSet("clip", "map", (5, 8))
TOKENS = FeatureSet("sam", "token", (6,))


MANIFEST = make_manifest([2, 0, 70, 1, 3, 1])  # three parts of two images


def features_of(row):
    return ImageFeatures(row, {}, "truncated JPEG") if row == 3 else make_features(MANIFEST, [MAPS, TOKENS], row)


def fill(cache):
    return makers.fill(cache, failures={3: "truncated JPEG"})


def created(address):
    return FeatureCache.create(address, MANIFEST, [MAPS, TOKENS], part_size=2)


VALID = [0, 1, 2, 4, 5]


def digest(batch):
    return [batch.feature_map.tobytes(), batch.tokens.tobytes(), batch.region_mask.tobytes()]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same cache in a local folder."""
    return FeatureCache.open(fill(created(tmp_path_factory.mktemp("local") / "toy.zarr")).path)


@pytest.fixture(params=["s3", "memory"])
def address(request, s3):
    """Address without a cache, in each kind of writable store."""
    return f"{s3}/deep/toy.zarr" if request.param == "s3" else f"memory://{s3[5:]}/toy.zarr"


def files_of(storage, folder=""):
    """Content of all files of a cache, by name."""
    folders = ["", "images", "regions", "features", "parts/clip", "parts/sam"]
    folders += [f"features/{name}" for name in ("clip", "sam")]
    folders += [f"features/{name}" for name in ("clip/feature_map", "clip/crc32c", "sam/token", "sam/crc32c")]
    for column in ("id", "height", "width", "path", "region_count"):
        folders.append(f"images/{column}")
    folders += [f"regions/{column}" for column in ("box", "category", "annotation_id")]
    names = [f"{folder}/{name}".lstrip("/") for folder in folders for name in storage.list_files(folder)]
    return {name: storage.read(name) for name in names}


def test_a_remote_cache_has_the_same_files_and_features_as_a_local_one(address, local):
    fill(created(address))
    remote = FeatureCache.open(address)
    assert digest(remote.read(VALID)) == digest(local.read(VALID))
    assert remote.valid_rows().tolist() == VALID
    assert remote.failures() == local.failures()
    np.testing.assert_array_equal(remote.manifest.boxes_xyxy, MANIFEST.boxes_xyxy)
    actual, expected = files_of(remote.storage), files_of(local.storage)
    assert actual.keys() == expected.keys()
    timed = re.compile(r"^parts/.*json$")  # part records contain seconds
    assert [name for name in actual if not timed.match(name) and actual[name] != expected[name]] == []


def test_zarr_python_reads_a_remote_cache(address, local):
    remote = fill(created(address))
    theirs = zarr.open_group(remote.storage.zarr_store(), mode="r")
    np.testing.assert_array_equal(
        theirs["features/clip/feature_map"][:], zarr.open_group(local.path, mode="r")["features/clip/feature_map"][:]
    )


def test_a_file_appears_whole_when_it_is_published(address):
    storage, data = open_storage(address), os.urandom(20 << 20)
    file = storage.create("features/x/c.0")
    buffer = np.empty(3 << 20, np.uint8)
    for first in range(0, len(data), buffer.size):  # reused at once, as by writers
        piece = np.frombuffer(data, np.uint8)[first : first + buffer.size]
        buffer[: len(piece)] = piece
        file.write(buffer[: len(piece)])
    assert not storage.exists("features/x/c.0")
    file.finish()
    assert storage.list_files("features/x") == []
    file.publish()
    file.discard()
    assert storage.read("features/x/c.0") == data
    assert storage.size("features/x/c.0") == len(data)
    given_up = storage.create("features/x/c.1")
    given_up.write(data)
    given_up.discard()
    assert storage.list_files("features/x") == ["c.0"]


def test_many_threads_read_ranges_and_a_range_beyond_the_end_raises(address):
    storage, data = open_storage(address), os.urandom(1 << 20)
    storage.write("c.0", data)

    def read(start):
        out = bytearray(5000)
        storage.read_into("c.0", start, memoryview(out))
        return bytes(out)

    starts = range(0, len(data) - 5000, 20_011)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, starts)) == [data[start : start + 5000] for start in starts]
    for start in (len(data) - 4999, len(data), len(data) + 5):
        with pytest.raises(EOFError, match="ends before byte"):
            read(start)
    with pytest.raises(FileNotFoundError):
        storage.read_into("c.1", 0, memoryview(bytearray(1)))


def test_of_several_concurrent_write_new_one_wins(address):
    storage = open_storage(address)
    storage.write("claims/seen", b"")
    start = threading.Barrier(8)

    def claim(number):
        start.wait()
        return storage.write_new("claims/00001.json", b"worker %d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    assert storage.read("claims/00001.json") == b"worker %d" % won.index(True)
    storage.remove("claims/00001.json")
    storage.remove("claims/00001.json")
    assert storage.list_files("claims") == ["seen"]


SPAWNED = """
import pickle, sys
read = pickle.load(sys.stdin.buffer).read([0, 1, 2, 4, 5])
sys.stdout.buffer.write(pickle.dumps([read.feature_map.tobytes(), read.tokens.tobytes(), read.region_mask.tobytes()]))
"""


def test_forked_and_spawned_workers_read_a_cache_opened_by_the_parent(s3, local):
    cache = FeatureCache.open(fill(created(f"{s3}/toy.zarr")).path)
    expected = digest(cache.read(VALID))  # so that this process has connections and threads

    def read():
        assert digest(cache.read(VALID)) == expected

    assert not was_killed(fork(read))
    spawned = subprocess.run(
        [sys.executable, "-c", SPAWNED], input=pickle.dumps(cache), capture_output=True, check=True
    )
    assert pickle.loads(spawned.stdout) == expected
    assert digest(cache.read(VALID)) == expected


def test_a_grandchild_by_fork_reads(s3):
    storage = open_remote(s3)
    storage.write("a", b"1")

    def read():
        assert storage.read("a") == b"1"

    def read_and_fork():
        read()
        grandchild = get_context("fork").Process(target=read)
        grandchild.start()
        grandchild.join()
        assert grandchild.exitcode == 0

    assert not was_killed(fork(read_and_fork))


def test_a_writer_killed_inside_a_part_leaves_nothing_and_the_next_run_resumes(s3, local):
    cache = created(f"{s3}/toy.zarr")
    cache.write_part(0, [features_of(row) for row in (0, 1)])
    at_it, tell = os.pipe()

    def images():
        yield features_of(2)
        os.write(tell, b"at it")
        signal.pause()

    writer = fork(lambda: FeatureCache.open(cache.path, "a").write_part(1, images()))
    os.close(tell)
    assert os.read(at_it, 5) == b"at it"
    os.kill(writer, signal.SIGKILL)
    assert was_killed(writer)
    again = FeatureCache.open(cache.path, "a")
    assert again.pending_parts() == [1, 2]
    assert sorted(again.storage.list_files("features/clip/feature_map")) == ["c.0.0.0", "zarr.json"]
    assert digest(fill(again).read(VALID)) == digest(local.read(VALID))


def test_of_two_concurrent_creates_one_wins_and_the_other_raises(s3):
    start, won, errors = threading.Barrier(2), [], []

    def create(split):
        start.wait()
        try:
            FeatureCache.create(f"{s3}/toy.zarr", make_manifest([1, 2], split=split), [MAPS], part_size=2)
            won.append(split)
        except CacheError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=create, args=(split,)) for split in ("train", "val")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(errors)) == (1, 1)
    assert "\n" not in errors[0]
    assert FeatureCache.open(f"{s3}/toy.zarr").manifest.split == won[0]


def test_a_killed_create_is_resumed_and_files_of_others_are_refused(s3, local, tmp_path):
    storage, names = open_storage(f"{s3}/toy.zarr"), ["images/id/c.0", "images/zarr.json"]
    for name in names:
        storage.write(name, local.storage.read(name))
    assert FeatureCache.open(created(storage.address).path).manifest.split == "train"
    with pytest.raises(CacheExistsError, match="exists already"):
        created(storage.address)
    other = open_storage(f"{s3}/other.zarr")
    other.write("images/id/c.0", b"something else")
    with pytest.raises(CacheError, match=r"images/id/c\.0 exists with other content; remove"):
        created(other.address)
    assert not other.exists("zarr.json")


def test_create_reports_whether_another_run_was_first(s3, tmp_path):
    for name in ("zarr.json", "images/zarr.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    storage = open_storage(s3)
    assert upload_tree(tmp_path, storage, "zarr.json")
    (tmp_path / "zarr.json").write_text("another's")
    assert not upload_tree(tmp_path, storage, "zarr.json")
    assert storage.read("zarr.json") == b"zarr.json"


class FlakyProxy:
    """Forwards requests to a server, except those for which `plan` (by request number from 0) says otherwise."""

    def __init__(self, port, plan):
        self.target, self.plan, self.requests = port, plan, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.socket.accept()[0]
                number, self.requests = self.requests, self.requests + 1
                threading.Thread(target=self._serve, args=(client, self.plan(number)), daemon=True).start()

    def _serve(self, client, what):
        with client, contextlib.suppress(OSError):
            request = self._request(client)
            if what == "drop" or not request:
                return
            if what[:3].isdigit():
                status, _, body = what.partition(" ")
                head = f"HTTP/1.1 {status} Trouble\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                client.sendall((head + body).encode())
                return
            answer = self._answer(request)
            client.sendall(answer[: max(len(answer) - 10, 1)] if what == "cut" else answer)

    def _request(self, client):
        request = b""
        while b"\r\n\r\n" not in request:
            if not (data := client.recv(1 << 16)):
                return b""
            request += data
        head, _, body = request.partition(b"\r\n\r\n")
        size = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        while len(body) < (int(size[1]) if size else 0):
            body += client.recv(1 << 16)
        return head + b"\r\nConnection: close\r\n\r\n" + body

    def _answer(self, request):
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            server.sendall(request)
            answer = b""
            while data := server.recv(1 << 16):
                answer += data
        return answer


@pytest.fixture
def behind(s3, s3_server, monkeypatch):
    """`behind(plan)`: from now on requests go through a proxy with this plan."""
    proxies = []

    def start(plan):
        proxies.append(FlakyProxy(s3_server, plan))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxies[-1].port}")
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.socket.close()


def test_a_flaky_store_only_takes_longer(s3, behind, local, caplog):
    troubles = {3: "503", 7: "drop", 11: "cut", 13: "500"}
    proxy = behind(lambda number: troubles.get(number % 17, "pass"))
    with caplog.at_level(logging.WARNING):
        cache = fill(created(f"{s3}/toy.zarr"))
        assert digest(FeatureCache.open(cache.path).read(VALID)) == digest(local.read(VALID))
    assert proxy.requests > 60
    messages = [record.getMessage() for record in caplog.records]
    assert any(re.search(r"answers 503 .*; retry in 0\.\d s", line) for line in messages)
    assert any("closed the connection" in line for line in messages)


def test_a_store_that_is_down_for_a_while_is_retried(s3, behind):
    storage = open_storage(s3)
    storage.write("a", b"1")
    back = time.monotonic() + 1
    behind(lambda number: "pass" if time.monotonic() > back else "drop")
    assert open_storage(s3).read("a") == b"1"
    assert time.monotonic() >= back


def test_a_large_file_is_uploaded_to_a_flaky_store(s3, behind):
    behind(lambda number: ("500", "pass", "pass", "pass", "drop", "pass")[number % 6])
    storage, data = open_storage(s3), os.urandom(20 << 20)
    file = storage.create("features/x/c.0")
    file.write(data)
    file.finish()
    file.publish()
    assert storage.read("features/x/c.0") == data


@pytest.mark.parametrize(
    "trouble",
    [
        "409 <Error><Code>ConditionalRequestConflict</Code></Error>",  # S3's response to one of two concurrent puts
        "501 <Error><Code>NotImplemented</Code></Error>",  # a store without conditional puts
    ],
)
def test_write_new_retries_a_conflict(s3, behind, trouble):
    open_storage(s3).write("theirs", b"theirs")
    for name, is_won in (("ours", True), ("theirs", False)):
        behind(lambda number: trouble if number == 0 else "pass")
        assert open_storage(s3).write_new(name, b"ours") is is_won
        assert open_storage(s3).read(name) == name.encode()


def test_an_unreachable_server_raises_one_line_in_bounded_time(s3, monkeypatch):
    cache = FeatureCache.open(fill(created(f"{s3}/toy.zarr")).path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("REGIONSPOT_PATIENCE", "0.5")
    began = time.monotonic()
    for work in (
        lambda: FeatureCache.open(cache.path),
        lambda: created(cache.path),
        lambda: open_storage(cache.path).write("a", b"1"),
    ):
        with pytest.raises((CacheError, OSError)) as caught:
            work()
        message = getattr(caught.value, "strerror", None) or str(caught.value)
        assert re.search(rf"127\.0\.0\.1:{port} refuses the connection, after \d+ tries in \d+ s", message)
        assert "\n" not in message
    file = open_storage(cache.path).create("features/x")
    file.write(b"1")
    with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be reached"):
        file.publish()
    assert time.monotonic() - began < 8


def test_a_server_that_never_answers_times_out(s3, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(OSError, match="does not answer"):
            open_remote(s3, retry_seconds=0.5).read("a")
        assert time.monotonic() - began < 5


def test_a_missing_bucket_raises_at_once(s3):
    for work in (lambda address: FeatureCache.open(address), created):
        with pytest.raises(CacheError, match="there is no bucket 'nobodys-bucket'") as caught:
            work("s3://nobodys-bucket/toy.zarr")
        assert "\n" not in str(caught.value)


def test_an_address_without_a_cache_raises_like_a_folder_without_one(address):
    with pytest.raises(NotACacheError, match="no such cache"):
        FeatureCache.open(address)


def test_refused_credentials_raise_at_once(s3, s3_server, monkeypatch):
    storage = open_storage(s3)
    storage.write("a", b"1")
    _let_pass_without_credentials(s3_server, 0)
    try:
        began = time.monotonic()
        with pytest.raises(PermissionError) as caught:
            storage.read("a")
        with pytest.raises(CacheError, match="cannot be read: the store refuses access"):
            FeatureCache.open(f"{s3}/toy.zarr")
        assert time.monotonic() - began < 3
    finally:
        _let_pass_without_credentials(s3_server, 10**9)
    assert re.search(r"\(InvalidAccessKeyId\): set AWS_ACCESS_KEY_ID", caught.value.strerror)


def _let_pass_without_credentials(port, requests):
    _ask_server(port, "POST", "/moto-api/reset-auth", {}, str(requests))


def _ask_server(port, method, path, headers, body=None):
    signed = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {"Authorization": signed, **headers})
    assert connection.getresponse().status == 200
    connection.close()


def test_keys_are_read_from_amazons_configuration_files(s3, monkeypatch, tmp_path):
    open_storage(s3).write("a", b"1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "no-credentials").write_text("[lab]\naws_access_key_id = k\naws_secret_access_key = s\n")
    (tmp_path / "no-config").write_text("[profile lab]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert open_storage(s3).read("a") == b"1"


def test_a_public_file_is_read_without_keys(s3, s3_server, monkeypatch):
    storage = open_storage(s3)
    for name in ("private", "public"):
        storage.write(name, b"1")
    _ask_server(s3_server, "PUT", f"/{s3[5:]}/public?acl", {"x-amz-acl": "public-read"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_storage(s3).read("public") == b"1"
    with pytest.raises(PermissionError, match="the store refuses access"):
        open_storage(s3).read("private")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zzz://bucket/toy.zarr", "no installed library supports zzz://"),
        ("s3://", "is not a store's address"),
        ("az://container/toy.zarr", "Account must be specified"),
    ],
)
def test_an_invalid_address_is_refused_in_one_line(address, message, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match=message) as caught:
        open_storage(address)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r'pip install "regionspot\[remote\]"'):
        open_storage("s3://bucket/toy.zarr")


def test_file_urls_are_folders(tmp_path):
    storage = open_storage(f"file://{tmp_path}/toy.zarr/")
    assert isinstance(storage, LocalStorage)
    assert storage.folder == tmp_path / "toy.zarr"


class _Ranges(SimpleHTTPRequestHandler):
    """Byte ranges for Python's web server."""

    def do_GET(self):
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if byte_range is None:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        first, last = int(byte_range[1]), min(int(byte_range[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *args):
        pass


def test_a_cache_on_a_web_server_is_read_only(local):
    handler = type(
        "Handler",
        (_Ranges,),
        {
            "__init__": lambda self, *args: SimpleHTTPRequestHandler.__init__(
                self, *args, directory=str(local.path.parent)
            )
        },
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            cache = FeatureCache.open(f"http://127.0.0.1:{server.server_port}/toy.zarr")
            assert cache.valid_rows().tolist() == VALID
            assert digest(cache.read(VALID)) == digest(local.read(VALID))
            with pytest.raises(CacheError, match="a web server is read-only"):
                FeatureCache.open(cache.path, "a")
            with pytest.raises(NotACacheError, match="no such cache"):
                FeatureCache.open(f"http://127.0.0.1:{server.server_port}/none.zarr")
        finally:
            server.shutdown()


UPLOAD = """
import resource, sys
from regionspot.cache.storage import object_store as object_storage
from regionspot.cache.storage.open import open_storage
object_storage._PART_BYTES, object_storage._PARTS_AT_ONCE = 5 << 20, 1
storage, record = open_storage(sys.argv[1]), bytes(1 << 20)
storage.write("warm", record)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file = storage.create("c.0")
for _ in range(64):
    file.write(record)
file.finish()
file.publish()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, storage.size("c.0"))
"""


def test_a_writers_memory_does_not_grow_with_its_file(s3):
    out = subprocess.run([sys.executable, "-c", UPLOAD, s3], capture_output=True, text=True, check=True).stdout
    megabytes, size = map(int, out.split())
    assert size == 64 << 20
    assert megabytes < 40  # of 64: two parts of 5 MB and network buffers


@pytest.mark.parametrize("given", ["nan", "-1", "a while"])
def test_an_invalid_retry_time_is_refused(monkeypatch, given):
    monkeypatch.setenv("REGIONSPOT_PATIENCE", given)
    with pytest.raises(InputError, match=f"REGIONSPOT_PATIENCE is '{given}', expected a number of seconds, 0 or more"):
        open_storage("memory://somewhere")
