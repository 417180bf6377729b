"""An evaluation has the same results whoever computes it: one process, several workers, a run that was killed and
resumed, or a float32 cache. Masks are computed for what is detected."""

import json
import re
import signal
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import LocalCluster
from forked import ForkedCommand

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.evaluate import EvaluationOptions, _load_method, evaluate
from regionspot.evaluation.inference import resumable
from regionspot.evaluation.inference.methods import HeadOnImages
from regionspot.evaluation.inference.on_workers import InferenceJob
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import infer
from regionspot.evaluation.metrics.selection import Selection
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads import HeadSpec
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract

pytestmark = pytest.mark.usefixtures("module_home", "parts_of_two")

WEIGHTS = "random:0"


@pytest.fixture(scope="module")
def parts_of_two():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "PART_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def options(world, tmp_path_factory) -> EvaluationOptions:
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    weights = {"toy_sam": WEIGHTS, "toy_clip": WEIGHTS}
    info = HeadInfo("toy", localizer="toy_sam", encoder="toy_clip", weights_sha256=weights, templates=("{}.",))
    folder = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(folder / "head.safetensors", spec, spec.build(), info)
    return EvaluationOptions(
        data=world,
        out=folder / "one process",
        checkpoint=folder / "head.safetensors",
        dataset="toy",
        weights=WEIGHTS,
        device="cpu",
        limit=6,
    )


def results(options):
    """The detections, with masks, and the figures of an evaluation."""
    evaluated = evaluate(options)
    figures = {key: value for key, value in evaluated.items() if not key.startswith("seconds")}
    return (options.out / "detections.json").read_bytes(), figures


@pytest.fixture(scope="module")
def expected(options):
    return results(options)


def test_a_killed_run_is_resumed_with_the_same_results(options, expected, tmp_path, caplog):
    other = replace(options, out=tmp_path / "killed")
    command = ["eval-lvis", "--dataset", "toy", "--data", options.data, "--checkpoint", options.checkpoint]
    command = ForkedCommand(*command, "--weights", WEIGHTS, "--device", "cpu", "--limit", 6, "--out", other.out)
    command.wait_until(lambda: list(other.out.glob("parts/*/00000.npz")))
    assert command.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    caplog.set_level("INFO")
    assert results(other) == expected
    done, total = map(int, re.search(r"(\d) of (\d) parts are done already", caplog.text).groups())
    assert 0 < done < total == 3
    assert re.search(r"(\d)/\1 images  [\d.]+/s  0s left  \(.*decode \d+%, encode \d+%", caplog.text)


def test_the_threshold_of_masks_changes_masks_alone_and_is_part_of_the_identity_and_the_protocol(
    options, expected, tmp_path
):
    changed, figures = results(replace(options, mask_threshold="reference", limit=2, out=tmp_path))  # a part
    by_authors, by_sam = json.loads(changed), json.loads(expected[0])[: figures["detections"]]
    masks = [[detection.pop("segmentation") for detection in found] for found in (by_authors, by_sam)]
    assert masks[0] != masks[1]
    assert by_authors == by_sam
    assert [each["identity"]["mask_threshold"] for each in (figures, expected[1])] == ["reference", "sam"]
    assert expected[1]["protocol"]["mask"].endswith("thresholded at the size of the image")
    assert figures["protocol"]["mask"].endswith("as the authors of RegionSpot")


def test_two_workers_give_the_results_of_one_process(options, expected, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from distributed.cli.dask_worker import main; main()"  # forked, because importing torch takes seconds
    arguments = (f"tcp://127.0.0.1:{port}", "--no-nanny", "--no-dashboard", "--nthreads", "1", "--death-timeout", "60")
    workers = [ForkedCommand(*arguments, code=code) for _ in range(2)]
    caplog.set_level("INFO")
    with LocalCluster(n_workers=0, host="127.0.0.1", scheduler_port=port, dashboard_address=None) as cluster:
        cluster.wait_for_workers(2)
        other = replace(options, out=tmp_path / "workers", scheduler=cluster.scheduler_address)
        assert results(other) == expected
    for worker in workers:
        worker.stop(signal.SIGKILL)
    assert "2 workers" in caplog.text
    assert not list(other.out.rglob("claims/[0-9]*"))  # heartbeats of live workers may be there


def test_a_worker_that_would_compute_other_scores_is_refused(options, tmp_path):
    files = resumable.PartFiles(tmp_path, _load_method(options), Selection())
    job = InferenceJob(_load_method, replace(options, dtype="bfloat16"), files.folder, Selection())
    with pytest.raises(InputError, match=r"identity\.json: this worker would compute other scores .*give --dtype"):
        job.open()


def test_a_float32_cache_gives_the_results_of_the_images(options, tmp_path):
    images = replace(options, masks=False, out=tmp_path / "images")
    manifest = read_dataset("toy", options.data, "val").head(6)
    spot = RegionSpot.load(options.checkpoint, WEIGHTS, "cpu")
    backbones = Backbones(spot.localizer, (spot.encoder,))
    encoding = Encoding("float32")
    sets = backbones.feature_sets(encoding=encoding, token_encoding=encoding)
    cache = FeatureCache.create(tmp_path / "val.zarr", manifest, sets, 2)
    extract(cache, image_folder_of("toy", options.data, "val", manifest), backbones)
    from_cache = results(replace(images, cache=cache.path, out=tmp_path / "cache"))
    from_images = results(images)
    assert from_cache[0] == from_images[0]
    assert from_cache[1]["bbox"] == from_images[1]["bbox"]


def test_masks_are_computed_for_detected_regions_only(options, tmp_path, monkeypatch):
    spot = RegionSpot.load(options.checkpoint, WEIGHTS, "cpu")
    manifest = read_dataset("toy", options.data, "val").head(2)
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    method = HeadOnImages(spot, manifest, image_folder_of("toy", options.data, "val", manifest), vocabulary)
    every = infer(method, tmp_path / "every").detections
    computed, tokens_and_masks = [], spot.localizer.tokens_and_masks
    monkeypatch.setattr(
        spot.localizer, "tokens_and_masks", lambda *image: computed.extend(image[1]) or tokens_and_masks(*image)
    )
    few = infer(method, tmp_path / "few", selection=Selection(limit=5)).detections
    boxes = {(image_id, *box) for image_id, box in zip(few.image_ids, few.boxes_xywh.tolist(), strict=True)}
    assert len(computed) == len(few.masks) == len(boxes) < len(manifest.boxes_xyxy)
    masks = {}
    for image_id, box, region in zip(every.image_ids, every.boxes_xywh.tolist(), every.regions, strict=True):
        masks[image_id, *box] = every.masks.decode(region)
    for image_id, box, region in zip(few.image_ids, few.boxes_xywh.tolist(), few.regions, strict=True):
        assert np.mean(few.masks.decode(region) != masks[image_id, *box]) < 1e-3
