"""The web page, by HTTP and in a real browser: naming, exploring, and everything that a visitor may send."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import chromium_page
from PIL import Image

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.search.region_embeddings import map_embedder
from regionspot.evaluation.search.region_index import build_index
from regionspot.evaluation.serve import app as page_app
from regionspot.evaluation.serve import named_images
from regionspot.evaluation.serve.explorer import CacheExplorer
from regionspot.evaluation.serve.named_images import KEPT_IMAGES, NamedImages, NameEmbeddings

pytestmark = pytest.mark.usefixtures("module_home")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def cache(dense_cache):
    return FeatureCache.open(dense_cache)


@pytest.fixture(scope="module")
def images():
    loaded = RegionSpot.zero_shot("toy", device="cpu")
    return NamedImages(RegionSpot(None, loaded.localizer, loaded.encoder, ("{}.",)))  # one prompt a name is fast


@pytest.fixture(scope="module")
def explorer(cache, world, images, tmp_path_factory):
    index = build_index(cache, map_embedder(cache), tmp_path_factory.mktemp("index") / "regions")
    return CacheExplorer(cache, world / "photos", index, NameEmbeddings(images.spot.encoder, ("{}.",)))


@contextmanager
def served(page):
    """Yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(page, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(images, explorer):
    with served(page_app.make_app(images, explorer)) as port:
        yield port


@pytest.fixture
def ask(port):
    """`ask("GET", path, body, **headers)` returns the status, the type and the content."""

    def request(method, path, body=None, **headers) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        status, kind, content = response.status, response.headers["content-type"], response.read()
        connection.close()
        return status, kind, content

    return request


def first_image(cache, world) -> tuple[bytes, list[list[float]], list[str]]:
    """The file of the first image, its boxes and its names."""
    manifest = cache.manifest
    regions = manifest.regions(0)
    names = [cache.categories[index].name for index in manifest.category_index[regions]]
    return (world / "photos" / manifest.paths[0]).read_bytes(), manifest.boxes_xyxy[regions].tolist(), names


def test_both_tabs_in_a_browser(port, cache, world, images, monkeypatch):
    content, boxes, names = first_image(cache, world)
    encoded, encode = [], images.spot.encode
    monkeypatch.setattr(images.spot, "encode", lambda image: encoded.append(1) or encode(image))
    with chromium_page() as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("body[data-ready]")

        # An image, a box around an object, and its name.
        page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": content})
        page.wait_for_selector("#everywhere:enabled")
        page.fill("#names", "\n".join(names))
        canvas = page.locator("#canvas").bounding_box()
        scale = canvas["width"] / Image.open(BytesIO(content)).width

        def at(x, y):
            return canvas["x"] + x * scale, canvas["y"] + y * scale

        def drag(box):
            page.mouse.move(*at(*box[:2]))
            page.mouse.down()
            page.mouse.move(*at(*box[2:]), steps=3)
            page.mouse.up()

        drag(boxes[0])
        page.wait_for_selector("#regions li .bar")
        assert page.locator("#regions .best span").first.inner_text() in names

        # A small box inside of it wins the hover; clicks alternate between the two.
        x1, y1, x2, y2 = boxes[0]
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        drag([middle[0] - 6, middle[1] - 6, middle[0] + 6, middle[1] + 6])
        page.wait_for_selector("#regions li[data-number='1'] .bar")
        page.mouse.move(*at(x1 + 1, y1 + 1))
        assert page.locator("#regions li.hover").get_attribute("data-number") == "0"
        page.mouse.move(*at(*middle))
        assert page.locator("#regions li.hover").get_attribute("data-number") == "1"
        selected = []
        for _ in range(3):
            page.mouse.click(*at(*middle))
            selected.append(page.locator("#regions li.selected").get_attribute("data-number"))
        assert selected in (["0", "1", "0"], ["1", "0", "1"])

        # Names change while they are typed, and the image is not encoded again.
        page.locator("#names").press("Control+End")
        page.keyboard.type("\nzebra")
        page.wait_for_selector("#problem:has-text('zebra')")
        page.fill("#names", "plain red circle")
        page.wait_for_selector("#regions .best span:text-is('plain red circle')")
        assert len(encoded) == 1
        page.click("#clear")
        assert page.locator("#regions li").count() == 0

        # The cache: its images, its maps, search by words and by a click on a region.
        page.click("#tab-cache")
        page.wait_for_selector("#grid button >> nth=7")
        page.wait_for_selector("#cache-canvas:not([width='0'])")
        page.select_option("#show", "toy_clip")
        page.fill("#words", names[0])
        page.press("#words", "Enter")
        page.wait_for_selector("#found:has-text('nearest first')")
        assert page.locator("#grid button").count() == min(page_app.HITS, len(cache.manifest.boxes_xyxy))
        page.wait_for_selector("#similar:enabled")
        page.click("#similar")
        page.wait_for_selector("#found:has-text('regions like')")
        page.click("#grid button >> nth=1")
        page.click("#try")
        page.wait_for_selector("#name-tab #regions li")
        assert page.errors == []


def test_eight_clients_at_once_get_their_own_results(ask, cache, world, images):
    content, boxes, names = first_image(cache, world)
    expected = [region.name for region in images.spot.predict(content, boxes, names, with_masks=False)]

    def client(number: int) -> list[str]:
        key = json.loads(ask("POST", "/api/images", content)[2])["image"]
        own = boxes[number % len(boxes) :]
        status, _, answer = ask("POST", f"/api/images/{key}/regions", {"boxes": own})
        assert status == 200, answer
        assert all(region["mask"] for region in json.loads(answer)["regions"])
        regions = json.loads(ask("POST", f"/api/images/{key}/names", {"names": names})[2])["regions"]
        assert ask("GET", f"/api/images/{key}")[1] == "image/jpeg"
        return [region["name"] for region in regions]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(client, range(8)))
    assert answers == [expected[number % len(boxes) :] for number in range(8)]


def test_malformed_and_oversized_requests_have_one_line(ask, images, monkeypatch):
    monkeypatch.setattr(named_images, "MAX_PIXELS", 10_000)
    huge, content = BytesIO(), BytesIO()
    Image.new("RGB", (200, 100)).save(huge, "PNG")
    Image.new("RGB", (64, 48)).save(content, "PNG")
    key = json.loads(ask("POST", "/api/images", content.getvalue())[2])["image"]
    at = f"/api/images/{key}"
    requests = [
        ("/api/images", b"", 400, "is not an image"),
        ("/api/images", b"GIF89a", 400, "the image of 6 bytes: is"),
        ("/api/images", content.getvalue()[:60], 400, "is broken"),
        ("/api/images", huge.getvalue(), 400, "200 x 100 pixels"),
        ("/api/images", bytes(page_app.MAX_UPLOAD + 1), 413, "more than 20 MB"),
        (f"{at}/regions", b"[", 400, "is not JSON"),
        (f"{at}/regions", b"[]", 400, "expected an object"),
        (f"{at}/regions", b"[" * 60_000, 400, "is not JSON"),
        (f"{at}/regions", b" " * (page_app.MAX_JSON + 1), 413, "are not accepted"),
        (f"{at}/regions", {"boxes": [[5, 5, 1, 1]]}, 400, "expected x1 < x2"),
        (f"{at}/regions", {"boxes": "x"}, 400, "list of numbers"),
        (f"{at}/regions", {"boxes": [[1, 1, 9, 9]] * 301}, 400, "at most 300"),
        (f"{at}/regions", {"points": [[1, 9999]]}, 400, "64 wide"),
        (f"{at}/names", {"names": "dog"}, 400, "list of texts"),
        (f"{at}/names", {"names": [1]}, 400, "list of texts"),
        (f"{at}/names", {"names": ["a" * 201]}, 400, "longer than 200"),
        (f"{at}/names", {"names": [f"red {n}" for n in range(301)]}, 400, "at most 300"),
        ("/api/images/unknown/names", {"names": ["red star"]}, 404, "open it again"),
    ]
    for path, body, status, message in requests:
        answer = ask("POST", path, body)
        assert answer[0] == status, (path, answer)
        assert message in json.loads(answer[2])["error"], (path, answer)
    for path in ("?first=-1", "?first=x", "?first=99999999999", "/99", f"/{10**30}"):
        assert ask("GET", f"/api/cache/images{path}")[0] in (400, 404), path
    for query in ("words=", "words=zebra", "row=0&region=999", "row=99&region=0", "row=x"):
        assert ask("GET", f"/api/search?{query}")[0] == 400, query
    assert ask("GET", "/api/cache/images/0/pca?map=nothing")[0] == 400
    for _ in range(KEPT_IMAGES):
        assert ask("POST", "/api/images", content.getvalue())[0] == 200
    assert ask("GET", at)[0] == 404  # the oldest image is forgotten
    assert len(images._images) == KEPT_IMAGES


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/..%2f..%2fpyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page.js/../app.py",
        "/app.py",
        "/api/images/..%2f..%2fpyproject.toml",
        "/api/cache/images/..%2f0/photo",
        "/api/cache/images/%2fetc%2fpasswd/photo",
        "/api/cache/images/0/regions/../../../../etc/passwd",
        "/page.html%00",
    ],
)
def test_paths_lead_to_nothing_else(ask, path):
    status, _, content = ask("GET", path)
    assert status == 404
    assert b"root:" not in content
    assert b"import" not in content


def test_other_web_sites_cannot_talk_to_the_page(ask, port):
    assert ask("GET", "/api/info", Host="attacker.example")[0] == 400
    assert ask("GET", "/api/info", Host=f"localhost:{port}")[0] == 200
    assert "default-src 'self'" in page_app.POLICY


def test_images_outside_of_the_folder_are_not_read(dense_cache, world, tmp_path):
    (tmp_path / "photos").mkdir()
    cache, inside = FeatureCache.open(dense_cache), Path(str(FeatureCache.open(dense_cache).manifest.paths[0]))
    secret = tmp_path / "secret.jpg"
    secret.write_bytes((world / "photos" / inside).read_bytes())
    (tmp_path / "photos" / "link.jpg").symlink_to(secret)
    (tmp_path / "photos" / "a.jpg").write_bytes(secret.read_bytes())
    explorer = CacheExplorer(cache, tmp_path / "photos")

    def colours(path: str) -> int:
        cache.manifest.paths[0] = path
        shown = [explorer.photo(0, 1600), explorer.crop(0, 0, 100)]
        return max(len(Image.open(BytesIO(content)).getcolors(10**6)) for content in shown)

    assert colours("a.jpg") > 100
    for path in ("../secret.jpg", str(secret), "link.jpg", "a/../../secret.jpg"):
        assert colours(path) == 1, path
    with pytest.raises(InputError, match="there is no index"):
        explorer.search("star", 3)


def test_a_page_of_a_cache_alone_and_of_a_model_alone(explorer, images):
    for page, present, absent in (
        (page_app.make_app(None, explorer), "/api/cache/images", "/api/images/x"),
        (page_app.make_app(images, None), "/api/info", "/api/search?words=" + quote("red star")),
    ):
        with served(page) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            for path, status in ((present, 200), (absent, 404)):
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                assert response.status == status


def test_the_command_says_what_is_missing(refused, dense_cache):
    refused("there is nothing to show", "serve")
    refused("--data: is the folder of a cache's images", "serve", "--preset", "toy", "--data", ".")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused("give another --port", "serve", "--cache", dense_cache, "--port", taken.getsockname()[1])
