"""Training from a cache: which batches, which numbers, resuming after a kill, and what is refused."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.format.encodings import Statistics, decode
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.fusion.batches import BatchPlan, read_ahead
from regionspot.fusion.checkpoint import load_checkpoint
from regionspot.fusion.config import TRAIN_PRESETS, TrainConfig, train_config
from regionspot.fusion.decoding import decode_on_device
from regionspot.fusion.head import HEADS
from regionspot.fusion.metrics import read_metrics
from regionspot.fusion.run_folder import RunFolder
from regionspot.fusion.sources import open_source
from regionspot.fusion.stop_signals import StopSignals
from regionspot.fusion.tensor_file import read_document
from regionspot.fusion.train import train
from regionspot.fusion.vocabulary import Vocabulary

CLASSES, IMAGES = 6, 21
CONFIG = TrainConfig(lr=2e-3, iterations=40, warmup=4, batch_size=4, layers=1, heads=4, ffn=32, dropout=0.1)


def make_manifest(images: int, seed: int) -> Manifest:
    """Scene 3 has no region and image 5 none of known class."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, images)
    counts[3] = 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    categories = rng.integers(0, CLASSES, offsets[-1]).astype(np.int32)
    categories[offsets[5] : offsets[6]] = -1
    return Manifest(
        dataset=f"small{seed}",
        split="train",
        image_ids=1000 + np.arange(images),
        paths=np.array([f"{row}.jpg" for row in range(images)], dtype=np.dtypes.StringDType()),
        heights=np.full(images, 50, np.int32),
        widths=np.full(images, 60, np.int32),
        offsets=offsets,
        boxes_xyxy=np.tile(np.array([1, 2, 30, 40], np.float32), (offsets[-1], 1)),
        category_index=categories,
        annotation_ids=np.arange(offsets[-1]),
        categories=tuple(Category(index + 1, f"class {index}") for index in range(CLASSES)),
    )


def feature_sets(width: int = 16, weights: str = "w" * 64, dtype: str = "float16") -> list[FeatureSet]:
    # About those of the numbers below; any would do.
    standard = [Statistics(np.zeros(each), np.ones(each)) if dtype == "int8" else None for each in (width, 8)]
    return [
        FeatureSet("maps", "map", (5, width), dtype, {"weights_sha256": weights}, statistics=standard[0]),
        FeatureSet("tokens", "token", (8,), dtype, {"weights_sha256": "t" * 64}, statistics=standard[1]),
    ]


def make_cache(path, seed=0, images=IMAGES, **sets) -> FeatureCache:
    """A region's token says its class, so there is something to learn. Scene 7 could not be read."""
    manifest = make_manifest(images, seed)
    cache = FeatureCache.create(path, manifest, feature_sets(**sets), part_size=8)
    rng = np.random.default_rng(seed)
    said = np.random.default_rng(99).standard_normal((CLASSES + 1, 8))

    def image(row):
        if row == 7:
            return ImageFeatures(row, {}, "broken JPEG")
        tokens = said[manifest.category_index[manifest.regions(row)]]
        tokens = tokens + 0.1 * rng.standard_normal(tokens.shape)
        maps = rng.standard_normal(cache.feature_sets["maps"].shape)
        return ImageFeatures(row, {"maps": maps, "tokens": tokens})

    for part in range(cache.n_parts):
        cache.write_part(part, (image(row) for row in cache.part_rows(part)), ["maps", "tokens"])
    return FeatureCache.open(path)


def make_vocabulary(classes: int = CLASSES, encoder_sha256: str = "w" * 64) -> Vocabulary:
    embeddings = F.normalize(torch.randn(classes, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    return Vocabulary(tuple(f"class {i}" for i in range(classes)), ("{}.",), embeddings, "d" * 64, encoder_sha256)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "a.zarr")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train([cache], [make_vocabulary()], out, CONFIG, preset="toy", checkpoint_every=10, log_every=4)
    return out


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def numbers(metrics_path) -> list[dict]:
    """What a metrics file says, less the times."""
    return [{name: line[name] for name in ("step", "loss", "lr", "grad_norm")} for line in read_metrics(metrics_path)]


# Batches


def test_an_epoch_holds_every_usable_image_once_and_each_epoch_is_shuffled_anew():
    plan = BatchPlan([10], batch_size=4, seed=1)
    row = np.concatenate([positions for _, positions in plan.steps(0, 5)])
    first, second = row[:10], row[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_the_batches_of_a_run_that_goes_on_are_those_it_would_have_had():
    def plan():
        return BatchPlan([10, 33], batch_size=4, seed=1)

    whole = [(source, list(positions)) for source, positions in plan().steps(0, 60)]
    rest = [(source, list(positions)) for source, positions in plan().steps(37, 60)]
    assert rest == whole[37:]


@pytest.mark.parametrize("ratios", [None, (3, 1), (1, 9)])
def test_caches_give_batches_in_the_stated_ratios_over_short_stretches_too(ratios):
    plan = BatchPlan([100, 300], batch_size=4, seed=0, ratios=ratios)
    source = np.array([source for source, _ in plan.steps(0, 1000)])
    expected = {None: 0.75, (3, 1): 0.25, (1, 9): 0.9}[ratios]
    for stretch in (source, source[:100], source[417:517]):
        assert stretch.mean() == pytest.approx(expected, abs=2 / len(stretch) ** 0.5 / 4)


@pytest.mark.parametrize("ratios", [(1,), (1, 0), (1, float("nan"))])
def test_ratios_that_are_none_are_refused(ratios):
    with pytest.raises(InputError, match="2 numbers above 0"):
        BatchPlan([5, 5], batch_size=4, seed=0, ratios=ratios)


def test_only_images_that_can_teach_something_are_read(cache):
    rows = open_source(cache).rows
    assert not {3, 5, 7} & set(rows.tolist())
    assert len(rows) == IMAGES - 3


def test_a_batch_read_ahead_stays_whole_while_it_is_in_use(cache):
    source = open_source(cache)
    plan = BatchPlan([len(source.rows)], batch_size=4, seed=0)
    for planned, (_, positions) in zip(read_ahead([source], plan, 3, 9), plan.steps(3, 9), strict=True):
        expected = cache.read(source.rows[positions])
        for name in ("rows", "tokens", "region_mask", "feature_map", "categories"):
            np.testing.assert_array_equal(getattr(planned.batch, name), getattr(expected, name))


def test_an_image_that_cannot_be_read_stops_the_run_with_the_caches_words(cache, tmp_path):
    damaged = make_cache(tmp_path / "damaged.zarr", seed=3)
    (shard, *_) = sorted(damaged.path.glob("features/maps/feature_map/c.1*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RuntimeError, match=r"damaged\.zarr"):
        train([damaged], [make_vocabulary()], tmp_path / "run", CONFIG)


# Schedule


def test_the_papers_rate_warms_up_and_falls_twice():
    paper = TRAIN_PRESETS["paper"]
    assert (paper.iterations, paper.batch_size, paper.milestone_steps) == (450_000, 16, (350_000, 420_000))
    rates = [paper.rate(step) for step in (0, 500, 1000, 349_999, 350_000, 420_000)]
    assert rates == pytest.approx([2.5e-7, 2.5e-5 * 0.505, 2.5e-5, 2.5e-5, 2.5e-6, 2.5e-7])


def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    short = replace(TRAIN_PRESETS["paper"], iterations=900)
    assert (short.milestone_steps, short.warmup_steps) == ((700, 840), 90)


def test_a_named_configuration_takes_only_the_overrides_that_are_given():
    assert train_config("toy", lr=0.5, seed=None) == replace(TRAIN_PRESETS["toy"], lr=0.5)
    with pytest.raises(InputError, match="expected one of paper, toy"):
        train_config("fast")


def test_the_toy_preset_trains_the_toy_head():
    config, head = TRAIN_PRESETS["toy"], HEADS["toy"]
    assert (config.layers, config.heads, config.ffn, config.dropout) == (
        head.layers,
        head.heads,
        head.ffn,
        head.dropout,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0), ("iterations", -1), ("milestones", (0.9, 0.5)), ("dropout", 1.0), ("precision", "half"), ("seed", -1)],
)
def test_a_configuration_that_cannot_train_is_refused(field, value):
    with pytest.raises(InputError, match=f"training: {field} (is|are)"):
        replace(CONFIG, **{field: value})


# Runs


def test_the_loss_falls_and_the_head_knows_what_it_was_trained_on(undisturbed, cache):
    losses = [line["loss"] for line in read_metrics(undisturbed / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]
    checkpoint = load_checkpoint(undisturbed / "head.safetensors")
    assert (checkpoint.info.preset, checkpoint.info.step) == ("toy", CONFIG.iterations)
    assert (checkpoint.info.localizer, checkpoint.info.encoder) == ("tokens", "maps")
    assert checkpoint.info.weights_sha256 == {"maps": "w" * 64, "tokens": "t" * 64}
    (record,) = checkpoint.info.caches
    assert record["manifest"] == cache.manifest.digest()
    assert record["map"] == {"name": "maps", "encoding": "float16", "shape": [5, 16], "weights_sha256": "w" * 64}
    assert record["token"] == {"name": "tokens", "encoding": "float16", "shape": [8], "weights_sha256": "t" * 64}
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_come_every_interval_and_at_every_checkpoint(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    assert all(line["pictures_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert [line["lr"] for line in lines] == [CONFIG.rate(line["step"] - 1) for line in lines]


# It sends itself a signal inside the 24th step, before the update, or while it waits for the 25th batch.
SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import torch
torch.set_num_threads(1)
from test_training import CONFIG, FeatureCache, make_vocabulary, train
module = sys.modules["regionspot.fusion.train"]
number, while_waiting, seconds = int(sys.argv[4]), sys.argv[5] == "waiting", float(sys.argv[6])
loss_of, batches_of, calls = module.region_loss, module.read_ahead, []

def region_loss(*arguments):
    calls.append(1)
    if len(calls) == 24 and not while_waiting:
        os.kill(os.getpid(), number)
    return loss_of(*arguments)

def read_ahead(*arguments):
    for planned in batches_of(*arguments):
        if planned.step == 24 and while_waiting:
            os.kill(os.getpid(), number)
            time.sleep(100)
        yield planned

module.region_loss, module.read_ahead = region_loss, read_ahead
train([FeatureCache.open(sys.argv[2])], [make_vocabulary()], Path(sys.argv[3]), CONFIG, preset="toy",
      checkpoint_every=10, checkpoint_seconds=seconds, log_every=4)
"""


def signalled(cache, out, number, when="in a step", seconds=600.0) -> subprocess.CompletedProcess:
    arguments = [__file__, cache.path, out, int(number), when.split()[-1], seconds]
    return subprocess.run([sys.executable, "-c", SIGNALLED, *map(str, arguments)], capture_output=True, text=True)


def step_saved(out) -> int:
    return read_document(out / "last.state.safetensors")["step"]


def require_same_run(out, undisturbed):
    for name in ("head.safetensors", "last.state.safetensors"):
        ours, theirs = load_file(out / name), load_file(undisturbed / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert numbers(out / "metrics.jsonl") == numbers(undisturbed / "metrics.jsonl")


def resume(cache, out, config=CONFIG):
    return train([cache], [make_vocabulary()], out, config, preset="toy", resume=True, checkpoint_every=10, log_every=4)


def test_a_run_killed_and_resumed_gives_the_very_numbers_of_one_never_stopped(cache, undisturbed, tmp_path):
    out = tmp_path / "run"
    killed = signalled(cache, out, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert step_saved(out) == 20
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "loss": 1.0}\n{"step": 2')
    resume(cache, out)
    require_same_run(out, undisturbed)


def test_checkpoints_come_by_time_too_and_change_no_number(cache, undisturbed, tmp_path):
    """Here after every step. The intervals of the metrics stay those of steps, though the run stopped inside one."""
    out = tmp_path / "run"
    killed = signalled(cache, out, signal.SIGKILL, seconds=1e-9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert step_saved(out) == load_checkpoint(out / "head.safetensors").info.step == 23
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [4, 8, 10, 12, 16, 20]
    resume(cache, out)
    require_same_run(out, undisturbed)


@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, "in a step"), (signal.SIGTERM, "while waiting")])
def test_a_signal_stops_a_run_with_a_checkpoint_of_the_step_under_way(cache, undisturbed, tmp_path, number, when):
    out = tmp_path / "run"
    stopped = signalled(cache, out, number, when)
    assert stopped.returncode == -number, stopped.stderr
    assert step_saved(out) == load_checkpoint(out / "head.safetensors").info.step == 24
    resume(cache, out)
    require_same_run(out, undisturbed)


def test_a_second_signal_takes_effect_at_once():
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.interruptible(lambda: 7) == 7
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_runs_in_another_thread_than_the_main_one(cache, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        config = replace(CONFIG, iterations=2)
        assert pool.submit(train, [cache], [make_vocabulary()], tmp_path / "run", config).result().step == 2


def test_a_longer_run_resumes_a_shorter_one_as_if_it_had_been_that_long(cache, tmp_path):
    """Up to the first milestone; here there is none."""
    short, long = (replace(CONFIG, iterations=count, warmup=1, milestones=()) for count in (15, 30))
    for out in ("lengthened", "whole"):
        train([cache], [make_vocabulary()], tmp_path / out, short if out == "lengthened" else long, preset="toy")
    assert resume(cache, tmp_path / "lengthened", long).step == 30
    heads = [load_file(tmp_path / out / "head.safetensors") for out in ("lengthened", "whole")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    record = json.loads((tmp_path / "lengthened" / "run.json").read_text())
    assert record["lengthened"] == [{"step": 15, "from": 15, "to": 30}]
    assert resume(cache, tmp_path / "lengthened", long).step == 30
    with pytest.raises(InputError, match=r"holds a run of 30 steps, asked for are 15; .*longer and not shorter"):
        resume(cache, tmp_path / "lengthened", short)


def test_a_lengthened_run_takes_the_learning_rates_of_the_longer_one_and_says_so(cache, tmp_path, caplog):
    short, long = (replace(CONFIG, iterations=count) for count in (10, 40))
    train([cache], [make_vocabulary()], tmp_path / "run", short, preset="toy", log_every=1)
    with caplog.at_level("INFO"):
        train([cache], [make_vocabulary()], tmp_path / "run", long, preset="toy", resume=True, log_every=1)
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [(short if step < 10 else long).rate(step) for step in range(40)]
    assert "a run of 10 steps becomes one of 40; from step 11 on with the learning rates" in caplog.text


def test_resuming_a_finished_run_changes_nothing(cache, undisturbed):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.name != "curves.png"}
    result = train([cache], [make_vocabulary()], undisturbed, CONFIG, preset="toy", resume=True)
    assert result.step == CONFIG.iterations
    assert before == {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.name != "curves.png"}


def test_resume_begins_where_there_is_nothing_to_resume(cache, tmp_path):
    config = replace(CONFIG, iterations=3)
    assert train([cache], [make_vocabulary()], tmp_path / "run", config, resume=True).step == 3


def test_several_caches_each_with_its_own_classes_train_one_head(cache, tmp_path):
    other = make_cache(tmp_path / "b.zarr", seed=1, images=9)
    config = replace(CONFIG, iterations=6)
    train([cache, other], [make_vocabulary()] * 2, tmp_path / "run", config, ratios=(1, 1))
    assert [part["share"] for part in load_checkpoint(tmp_path / "run/head.safetensors").info.caches] == [0.5, 0.5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_training_from_any_encoding_takes_the_same_course(cache, tmp_path, dtype):
    encoded, config = make_cache(tmp_path / "encoded.zarr", dtype=dtype), replace(CONFIG, iterations=12)
    courses = []
    for name, each in (("plain", cache), (dtype, encoded)):
        train([each], [make_vocabulary()], tmp_path / name, config, log_every=1)
        courses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert courses[0] != courses[1]
    assert courses[1] == pytest.approx(courses[0], rel=0.02)
    with pytest.raises(InputError, match=r"its caches\[0\]\.map\.encoding is"):
        train([cache], [make_vocabulary()], tmp_path / dtype, config, resume=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_a_device_decodes_to_the_numbers_that_numpy_does(tmp_path, dtype):
    made = make_cache(tmp_path / "encoded.zarr", dtype=dtype)
    batch, sets = made.read([0, 1, 2]), made.feature_sets
    for stored, scales, name in (
        (batch.feature_map, batch.map_scale, "maps"),
        (batch.tokens, batch.token_scale, "tokens"),
    ):
        decoded = decode_on_device(stored, scales, sets[name], torch.device("cpu"))
        expected = decode(stored, sets[name], scales if dtype == "int8" else None)
        np.testing.assert_allclose(decoded.float().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_training_leaves_the_callers_random_numbers_alone(cache, tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    train([cache], [make_vocabulary()], tmp_path / "run", replace(CONFIG, iterations=2))
    assert torch.equal(torch.randn(3), expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(cache, tmp_path):
    """A rate of 1e30 leaves weights that are finite and a loss that is not."""
    config = replace(CONFIG, lr=1e30, warmup=0)
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], tmp_path / "run", config, checkpoint_every=1)
    source = open_source(cache)
    _, (_, positions) = BatchPlan([len(source.rows)], config.batch_size, config.seed).steps(0, 2)
    ids = ", ".join(str(1000 + row) for row in source.rows[positions])
    assert "step 2: the loss is nan" in one_line(error)
    assert f"on images {ids} of {cache.path}" in one_line(error)
    state = load_file(tmp_path / "run/last.state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert load_checkpoint(tmp_path / "run/head.safetensors").info.step == 1


# Refusals


@pytest.mark.parametrize(("iterations", "longer"), [(40, ""), (400, " and make it one of 400")])
def test_a_folder_that_holds_this_run_offers_to_resume_it(cache, undisturbed, iterations, longer):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], undisturbed, replace(CONFIG, iterations=iterations), preset="toy")
    assert one_line(error) == (
        f"{undisturbed}: holds this run already, at step 40 of 40; add --resume to resume it{longer}, or name another "
        "folder"
    )


def test_a_folder_whose_run_saved_nothing_yet_offers_to_resume_it_too(cache, tmp_path):
    RunFolder(tmp_path).claim({"config": {"iterations": 9}}, resume=False)
    with pytest.raises(InputError, match="holds this run already, at step 0 of 9; add --resume"):
        RunFolder(tmp_path).claim({"config": {"iterations": 9}}, resume=False)


@pytest.mark.parametrize("option", [{"checkpoint_every": 0}, {"checkpoint_seconds": 0}, {"log_every": -1}])
def test_an_interval_of_nothing_is_refused(cache, tmp_path, option):
    with pytest.raises(InputError, match=f"training: {next(iter(option))} is"):
        train([cache], [make_vocabulary()], tmp_path / "run", CONFIG, **option)
    assert not (tmp_path / "run").exists()


def test_weights_that_an_update_made_infinite_are_not_saved(cache, tmp_path):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], tmp_path / "run", replace(CONFIG, lr=1e39, warmup=0), checkpoint_every=1)
    assert "step 1: the update left weights that are not finite" in one_line(error)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".safetensors"] == []


def test_a_folder_that_holds_another_run_says_what_differs(cache, undisturbed):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], undisturbed, replace(CONFIG, lr=0.5), preset="toy", resume=True)
    assert "its config.lr is 0.002, asked for is 0.5" in one_line(error)


def test_a_run_of_a_version_that_recorded_less_of_the_features_is_resumed(cache, tmp_path):
    config = replace(CONFIG, iterations=2)
    train([cache], [make_vocabulary()], tmp_path / "run", config)
    record = tmp_path / "run" / "run.json"
    held = json.loads(record.read_text())
    for each in (held["caches"][0]["map"], held["caches"][0]["token"]):
        del each["shape"]
        each["dtype"] = each.pop("encoding")
    record.write_text(json.dumps(held))
    assert train([cache], [make_vocabulary()], tmp_path / "run", config, resume=True).step == 2


def test_a_folder_that_holds_something_else_is_left_alone(cache, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no training run"):
        train([cache], [make_vocabulary()], tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(cache, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], tmp_path / "file" / "run", CONFIG)
    assert "cannot be written" in one_line(error)


def test_a_damaged_state_is_refused(cache, tmp_path):
    config = replace(CONFIG, iterations=2)
    train([cache], [make_vocabulary()], tmp_path / "run", config)
    state = tmp_path / "run/last.state.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(WeightsError, match=r"last\.state\.safetensors"):
        train([cache], [make_vocabulary()], tmp_path / "run", config, resume=True)


@pytest.mark.parametrize(
    ("sets", "message"),
    [({"weights": "x" * 64}, "train on features of the same backbones"), ({"width": 32}, r"maps \(5, 32\)")],
)
def test_caches_of_different_backbones_are_refused(cache, tmp_path, sets, message):
    other = make_cache(tmp_path / "b.zarr", seed=1, images=9, **sets)
    with pytest.raises(InputError, match=message):
        train([cache, other], [make_vocabulary(encoder_sha256="")] * 2, tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("vocabularies", "message"),
    [
        ([], "1 caches but 0 vocabularies"),
        ([make_vocabulary(CLASSES + 1)], "has 6 classes but its vocabulary 7"),
        ([make_vocabulary(encoder_sha256="y" * 64)], "take both from the same model"),
    ],
)
def test_vocabularies_that_do_not_fit_the_caches_are_refused(cache, tmp_path, vocabularies, message):
    with pytest.raises(InputError) as error:
        train([cache], vocabularies, tmp_path / "run", CONFIG)
    assert message in one_line(error)


def test_a_cache_with_nothing_to_learn_from_is_refused(tmp_path):
    FeatureCache.create(tmp_path / "empty.zarr", make_manifest(9, 0), feature_sets(), part_size=8)
    with pytest.raises(InputError, match="run `regionspot extract`"):
        open_source(FeatureCache.open(tmp_path / "empty.zarr"))


def test_an_unknown_feature_set_is_refused_with_those_there_are(cache):
    with pytest.raises(InputError, match="map feature sets are: maps; 'clip' was asked for"):
        open_source(cache, map_set="clip")


def test_run_record_is_plain_json(undisturbed):
    assert json.loads((undisturbed / "run.json").read_text())["config"]["lr"] == CONFIG.lr
