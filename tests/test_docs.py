"""What README and docs/ say can be followed: links lead somewhere, commands and options exist, code is code."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("cache", "pipeline", "fusion", "evaluation", "commands")
ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"(?<!`)\[[^]]*\]\(([^)\s]+)\)")
PAGE = pytest.mark.parametrize("page", sorted(set(PAGES)), ids=lambda page: page.name)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The code blocks of a page: their language, "" where they are indented or name none, and their text."""
    language, lines, fenced = "", [], False
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("```"):
            if lines or fenced:
                yield language, "\n".join(lines)
            fenced, language, lines = not fenced, line.strip("`").strip() if not fenced else "", []
        elif fenced:
            lines.append(line)
        elif line.startswith("    "):
            lines.append(line[4:])
        elif lines:
            yield "", "\n".join(lines)
            lines = []


def commands(page: Path) -> list[str]:
    """The command lines of a page that run `regionspot` or `make`, without comments."""
    joined = [
        line
        for language, text in blocks(page)
        if language in ("", "bash", "sh", "console")
        for line in re.sub(r"\\\n\s*", " ", text).splitlines()
    ]
    inline = re.findall(r"`((?:regionspot|make) [^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    lines = [re.split(r"\s#\s|\s[|>&]|;\s", line)[0].strip() for line in [*joined, *inline]]
    return [line for line in lines if line.split(" ")[0] in ("regionspot", "make") and "..." not in line]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and site generators form them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@PAGE
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@PAGE
def test_commands_and_their_options_exist(page, regionspot):
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "make":
            targets = [word for word in words if "=" not in word and not word.startswith("-")]
            missing = [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)]
            assert not missing, line
        elif not {"COMMAND", "--help", "--install-completion", "--config"} & set(words):
            code, _, err = regionspot(*words, "--print-config")
            assert code == 0 or "Missing" in err, f"{line}: {err}"  # prose names commands without all they need


@PAGE
def test_code_is_code(page):
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)
        elif language == "toml":
            tomllib.loads(text)


def test_the_errors_that_troubleshooting_explains_exist():
    code = [node for package in PACKAGES for path in (ROOT / package).rglob("*.py") for node in walk(path)]
    texts = [ast.unparse(node) for node in code if isinstance(node, ast.JoinedStr)]
    texts += [node.value for node in code if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    explained = [part for row in re.findall(r"^\| (`.*?) \|", page, re.M) for part in re.findall(r"`([^`]+)`", row)]
    assert len(explained) > 20
    assert [part for part in explained if not any(part in text for text in texts)] == []


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def test_every_page_has_its_place_in_the_site_and_in_the_index():
    def files(entries: list) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else files(value)

    site = list(files(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(site) == sorted(pages)
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert linked >= pages - {"index.md"}


def test_the_site_is_built_without_a_warning(tmp_path):
    links = tmp_path / "names" / "regionspot"
    links.mkdir(parents=True)
    for package in (*PACKAGES, "__init__.py"):
        (links / package).symlink_to(ROOT / package)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    config = (ROOT / "zensical.toml").read_text().replace("build/typing", "names").replace("build/site", "site")
    (tmp_path / "zensical.toml").write_text(config)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    api = (tmp_path / "site" / "python_api.html").read_text()
    assert "FeatureCache" in api
    assert "float32" in api


def test_the_tour_can_be_followed(regionspot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    steps = 0
    for language, text in blocks(ROOT / "docs" / "tour.md"):
        if language == "python":
            exec(compile(text, "docs/tour.md", "exec"), names)
        for line in text.splitlines() if language == "bash" else ():
            command, _, remark = line.partition("  # exit code ")
            code, _, err = regionspot(*shlex.split(command)[1:])
            assert code == int(remark or 0), f"{line}: {err}"
        steps += 1
    assert steps == 7


def test_the_five_commands_for_your_own_images_can_be_followed(regionspot, world, tmp_path, monkeypatch, caplog, home):
    """On the toy world, in the least form of annotations that the page shows, with its small models."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for split in ("train", "val"):
        toy = json.loads((world / f"toy_{split}.json").read_text())
        images = toy["images"][: 8 if split == "train" else 3]
        names = [f"{split}/{image['coco_url'].rpartition('/')[2]}" for image in images]
        least = {
            "images": [
                {"id": image["id"], "file_name": name, "width": image["width"], "height": image["height"]}
                for image, name in zip(images, names, strict=True)
            ],
            "annotations": [
                {key: each[key] for key in ("id", "image_id", "category_id", "bbox")}
                for each in toy["annotations"]
                if each["image_id"] in {image["id"] for image in images}
            ],
            "categories": [{"id": each["id"], "name": each["name"]} for each in toy["categories"]],
        }
        Path(f"my_{split}.json").write_text(json.dumps(least))
    Path("my_images").symlink_to(world / "photos")
    changed = {
        "--preset bb": "--preset toy",
        "--iterations 5000": "--schedule toy --iterations 2 --templates plain",
        "my_images/street.jpg": f"my_images/{names[0]}",
        "210,80,330,400": "2,2,60,60",
        "dog,red umbrella": "red ring,dotted blue star",
    }
    printed = []
    lines = [text for language, text in blocks(ROOT / "docs" / "your_images.md") if language == "bash"]
    for line in lines:
        for words, others in changed.items():
            line = line.replace(words, others)
        code, out, err = regionspot(*shlex.split(line)[1:])
        assert code == 0, f"{line}: {err}"
        printed.append(out + err)
    looked, extracted, trained, evaluated, predicted = printed
    assert "coco train: 8 images" in looked
    assert "0 could not be read" in extracted
    assert "my_run/head.safetensors: 2 steps" in trained
    assert "my_val.json: has no masks; only boxes are evaluated" in caplog.text
    assert "right names of the " in evaluated
    assert Path("my_eval/classes.csv").is_file()
    assert json.loads(predicted)[0]["name"] in ("red ring", "dotted blue star")
    assert Path("named.png").stat().st_size
