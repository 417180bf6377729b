"""Comparison of evaluations, and the report: in a real browser, opened from disk."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from browser import chromium_page

from regionspot.cache.errors import InputError
from regionspot.evaluation.inference.scoring import RegionScores
from regionspot.evaluation.metrics.detections import Masks
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.report.comparison import Difference, compare, comparison_text
from regionspot.evaluation.report.page import write_report
from regionspot.evaluation.report.protocol import Protocol
from regionspot.evaluation.report.results import evaluate_method
from regionspot.evaluation.report.runs import read_run, read_split_of
from regionspot.pipeline.datasets.registry import read_dataset


class Scores:
    """Scores without models: the right class is the best one of a share of the regions; the mask is the box."""

    name, device = "random scores", torch.device("cpu")

    def __init__(self, manifest, share, seed):
        self.manifest, self.share, self.seed, self.identity = manifest, share, seed, {"masks": True}
        self.features = {"toy_clip": {"preprocess": "direct", "dtype": "float32", "exif": "auto"}}

    def score(self, parts, stats):
        for row in [row for part in parts for row in part]:
            rng, regions = np.random.default_rng([row, self.seed]), self.manifest.regions(row)
            classes = self.manifest.category_index[regions]
            probabilities = rng.uniform(0, 0.4, (len(classes), len(self.manifest.categories)))
            probabilities[np.arange(len(classes)), classes] += np.where(rng.random(len(classes)) < self.share, 0.5, 0)
            yield RegionScores(probabilities.astype(np.float32), lambda kept, row=row: self.masks(row, kept))

    def masks(self, row, kept):
        masks = np.zeros((len(kept), self.manifest.heights[row], self.manifest.widths[row]), bool)
        boxes = self.manifest.boxes_xyxy[self.manifest.regions(row)][kept].astype(int)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = True
        return Masks.encode(masks)


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory):
    """`run_of(share, seed)` evaluates on the 8 validation images of the toy world."""
    manifest, truth = read_dataset("toy", world, "val"), read_ground_truth(world / "toy_val.json")
    trained = tuple(category.name for category in manifest.categories[:60])

    def run(share, seed=0):
        out = tmp_path_factory.mktemp("results")
        protocol = Protocol(sha256=manifest.source["files"], trained_classes=trained)
        evaluate_method(Scores(manifest, share, seed), truth, out, protocol)
        return read_run(out)

    return run


@pytest.fixture(scope="module")
def good(run_of):
    return run_of(0.9)


@pytest.fixture(scope="module")
def bad(run_of):
    return run_of(0.2)


@pytest.fixture(scope="module")
def split(good, bad, world):
    return read_split_of([good, bad], world)


def test_a_real_difference_is_told_from_none(good, bad, split):
    comparison = compare([[bad], [good], [bad]], split, samples=8)
    ap = {iou_type: rows[0] for iou_type, rows in comparison.figures.items()}
    assert ap["bbox"].metric == "AP"
    assert [value.value for value in ap["bbox"].values] == pytest.approx(
        [run.results["bbox"]["AP"] for run in (bad, good, bad)]
    )
    for row in ap.values():
        assert [difference.verdict for difference in row.differences] == ["higher", "not distinguishable"]
    text = comparison_text(comparison)
    assert "B is" in text
    assert "not distinguishable" in text
    gains, no_changes = comparison.changes
    assert gains[0].after - gains[0].before == max(change.after - change.before for change in gains) > 0
    assert all(change.after == change.before for change in no_changes)


def test_an_interval_that_touches_no_difference_is_not_distinguishable():
    assert [Difference.of(value, 0.1).verdict for value in (0.2, 0.05, -0.2)] == [
        "higher",
        "not distinguishable",
        "lower",
    ]


def test_trainings_with_other_seeds_are_compared_by_their_mean_and_deviation(good, bad, split, run_of):
    groups = [[bad, run_of(0.2, 1), run_of(0.2, 2)], [good, run_of(0.9, 1), run_of(0.9, 2)]]
    comparison = compare(groups, split)
    row, samples = comparison.figures["bbox"][0], [[run.results["bbox"]["AP"] for run in group] for group in groups]
    assert [value.value for value in row.values] == pytest.approx(np.mean(samples, axis=1))
    assert [value.margin for value in row.values] == pytest.approx(np.std(samples, axis=1, ddof=1))
    half = 4.303 * np.sqrt(np.var(samples, axis=1, ddof=1).sum() / 3)  # Student's t, 2 degrees of freedom
    assert row.differences[0].high - row.differences[0].value == pytest.approx(half)
    with pytest.raises(InputError, match="at least two runs of each"):
        compare([[bad], groups[1]], split)


def test_other_images_and_other_annotations_are_refused(good, bad, world, tmp_path):
    fewer = replace(bad, results={**bad.results, "protocol": {**bad.results["protocol"], "images": 3}})
    with pytest.raises(InputError, match="images is 3, and 8 in"):
        read_split_of([good, fewer], world)
    changed = tmp_path / "toy_val.json"
    changed.write_text((world / "toy_val.json").read_text() + " ")
    with pytest.raises(InputError, match=r"is not the file that .* was evaluated with"):
        read_split_of([good], world, changed)
    with pytest.raises(InputError, match=r"has no results\.json; expected the --out folder"):
        read_run(tmp_path)


@pytest.fixture(scope="module")
def open_page(good, split, tmp_path_factory):
    """`open_page(other)` writes and opens the report of `good`, and returns its page and all that went wrong."""
    with chromium_page() as first:

        def open_report(*other):
            path = write_report(tmp_path_factory.mktemp("report"), split, good, *other, samples=4)
            page, problems = first.context.browser.new_page(viewport={"width": 400, "height": 800}), []
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
            page.goto(path.as_uri())
            return page, problems

        yield open_report


@pytest.fixture(scope="module")
def page(open_page):
    page, problems = open_page()
    yield page
    assert not problems


def column(page, index):
    script = """index => [...document.querySelectorAll("#table tbody tr")].filter(row => !row.hidden)
        .map(row => row.cells[index].textContent)"""
    return page.evaluate(script, index)


def test_the_page_holds_every_figure_of_the_results(page, good):
    text = page.inner_text("main")
    for value in (good.results["protocol"]["score"], *good.results["protocol"]["sha256"].values()):
        assert value in text
    for name, figures in (("Boxes", good.results["bbox"]), ("Masks", good.results["segm"])):
        table = page.locator("#figures .scroll", has_text=name).inner_text()
        assert all(metric in table for metric in figures)
        assert f"{100 * figures['AP']:.1f}" in table


def test_classes_are_sorted_and_searched(page, good):
    rows = list(csv.DictReader((good.folder / "classes.csv").open()))
    assert column(page, 0) == [row["name"] for row in rows]
    page.click("#table th:has-text('AP') >> nth=0")
    shown = column(page, 1)
    numbers = [float(value) for value in shown if value != "\N{EN DASH}"]
    assert numbers == sorted(numbers, reverse=True)
    assert shown[: len(numbers)] == [f"{value:.1f}" for value in numbers]
    page.click("#table th:has-text('AP') >> nth=0")
    assert column(page, 1)[: len(numbers)] == shown[: len(numbers)][::-1]
    page.fill("#search", "BLUE ring")
    assert sorted(column(page, 0)) == sorted(row["name"] for row in rows if "blue ring" in row["name"])
    page.select_option("#kind", "rare")
    assert len(column(page, 0)) == sum("blue ring" in row["name"] and row["frequency"] == "r" for row in rows)
    page.fill("#search", "")
    page.select_option("#kind", "not seen in training")
    assert page.inner_text("#count") == f"{sum(row['seen_in_training'] == 'no' for row in rows)} of {len(rows)} classes"


def test_images_load_and_are_enlarged_by_a_click(page):
    widths = page.evaluate("[...document.querySelectorAll('.gallery img')].map(image => image.naturalWidth)")
    assert len(widths) == 8  # all of this split
    assert min(widths) > 300
    page.click(".gallery img >> nth=0")
    assert page.is_visible("#large")
    page.click("#large img")
    assert not page.is_visible("#large")


def test_nothing_is_wider_than_a_telephone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_two_runs_are_side_by_side(open_page, bad):
    page, problems = open_page(bad)
    assert "A is higher than B" in page.inner_text("header")
    assert (
        page.locator("#images figure:first-child img").count() == 2 * page.locator("#images figure:first-child").count()
    )
    gains = [float(value.replace("\N{MINUS SIGN}", "-")) for value in column(page, 3) if value != "\N{EN DASH}"]
    assert max(gains) > 0
    assert not problems
