"""Training from a cache: batches, results, resuming after a kill, and errors."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import ForkedCommand
from makers import files_under
from safetensors.torch import load_file
from small_training import CLASSES, CONFIG, IMAGES, feature_sets, make_cache, make_vocabulary, small_manifest

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.format.encodings import decode
from regionspot.cache.store import FeatureCache
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.head import HEADS
from regionspot.fusion.tensor_file import read_document, read_tensor_file, write_tensor_file
from regionspot.fusion.training.batches import DeviceDecoder, batch_shares, read_batches, set_of_steps
from regionspot.fusion.training.config import TRAIN_PRESETS, train_config
from regionspot.fusion.training.metrics import read_metrics
from regionspot.fusion.training.run_folder import RunFolder
from regionspot.fusion.training.stop_signals import StopSignals
from regionspot.fusion.training.train import train
from regionspot.fusion.training.training_sets import TrainingSet, head_info, open_training_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "a.zarr")


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train([cache], [make_vocabulary()], out, CONFIG, preset="toy", checkpoint_every=10, log_every=4)
    return out


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def numbers(metrics_path) -> list[dict]:
    """The lines of a metrics file without the times."""
    return [{name: line[name] for name in ("step", "loss", "lr", "grad_norm")} for line in read_metrics(metrics_path)]


# Batches


def rows_of_steps(training_sets, first_step, end_step, **options):
    """(index of the training set, rows of the batch) of each step."""
    config = replace(CONFIG, batch_size=4, seed=1)
    batches = read_batches(training_sets, batch_shares(training_sets), config, CPU, first_step, end_step, **options)
    return [(batch.set_index, batch.rows.tolist()) for batch in batches]


def test_an_epoch_holds_every_usable_image_once_and_is_shuffled_again(cache):
    training_set = open_training_set(cache)
    batches = rows_of_steps([training_set], 0, 10)
    first, second = ([row for _, rows in batches[start : start + 5] for row in rows] for start in (0, 5))
    assert sorted(first) == sorted(second) == training_set.rows.tolist()
    assert first != second


def test_a_resumed_run_reads_the_batches_of_an_uninterrupted_one(cache, tmp_path):
    training_sets = [open_training_set(cache), open_training_set(make_cache(tmp_path / "b.zarr", seed=1, images=9))]
    assert rows_of_steps(training_sets, 23, 40) == rows_of_steps(training_sets, 0, 40)[23:]


def test_at_most_so_many_regions_of_an_image_are_chosen_anew_in_every_epoch(cache):
    training_set = open_training_set(cache)
    config = replace(CONFIG, batch_size=18, max_regions=2)
    chosen = []
    for batch in read_batches([training_set], np.ones(1), config, CPU, 0, 12):
        assert batch.region_mask.shape == (18, 2)
        counts = np.diff(cache.manifest.offsets)[batch.rows]
        assert batch.region_mask.sum(dim=1).tolist() == counts.clip(max=2).tolist()
        for row, tokens, boxes, categories in zip(batch.rows, batch.tokens, batch.boxes, batch.categories, strict=True):
            stored = cache.read([row])
            sides = np.array([cache.manifest.widths[row], cache.manifest.heights[row]] * 2)
            for token, box, category in zip(tokens[: counts.max()], boxes, categories, strict=True):
                if category < 0:
                    continue
                (region,) = np.flatnonzero((stored.tokens[0] == token.numpy()).all(axis=1))
                assert stored.categories[0, region] == category
                assert stored.boxes_xyxy[0, region] / sides == pytest.approx(box.numpy(), rel=1e-6)
        most = training_set.rows[np.diff(cache.manifest.offsets)[training_set.rows].argmax()]
        chosen.append(batch.tokens[batch.rows.tolist().index(most)].numpy().tobytes())
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("ratios", [None, (3, 1), (1, 9)])
def test_the_ratios_of_the_caches_hold_over_short_intervals_too(ratios):
    training_sets = [TrainingSet(None, None, None, np.arange(size)) for size in (100, 300)]
    set_indices = set_of_steps(batch_shares(training_sets, ratios), 1000)
    expected = {None: 0.75, (3, 1): 0.25, (1, 9): 0.9}[ratios]
    for interval in (set_indices, set_indices[:100], set_indices[417:517]):
        assert interval.mean() == pytest.approx(expected, abs=2 / len(interval) ** 0.5 / 4)


@pytest.mark.parametrize("ratios", [(1,), (1, 0), (1, float("nan"))])
def test_invalid_ratios_are_refused(ratios):
    with pytest.raises(InputError, match="2 numbers above 0"):
        batch_shares([TrainingSet(None, None, None, np.arange(5))] * 2, ratios)


def test_only_usable_images_are_read(cache):
    rows = open_training_set(cache).rows
    assert not {3, 5, 7} & set(rows.tolist())
    assert len(rows) == IMAGES - 3


def test_a_damaged_cache_stops_the_run_with_the_error_of_the_cache(cache, tmp_path):
    damaged = make_cache(tmp_path / "damaged.zarr", seed=3)
    (shard, *_) = sorted(damaged.path.glob("features/maps/feature_map/c.1*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RuntimeError, match=r"damaged\.zarr"):
        train([damaged], [make_vocabulary()], tmp_path / "run", CONFIG)


# Schedule


def test_the_learning_rate_of_the_paper_warms_up_and_falls_twice():
    paper = TRAIN_PRESETS["paper"]
    # The mean over 8 GPUs of the sums over 2 images is clipped at 1.
    assert paper.clip_norm == paper.batch_size / 2
    assert (paper.iterations, paper.batch_size, paper.milestone_steps) == (450_000, 16, (350_000, 420_000))
    rates = [paper.learning_rate(step) for step in (0, 500, 1000, 349_999, 350_000, 420_000)]
    assert rates == pytest.approx([2.5e-7, 2.5e-5 * 0.505, 2.5e-5, 2.5e-5, 2.5e-6, 2.5e-7])


def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    short = replace(TRAIN_PRESETS["paper"], iterations=900)
    assert (short.milestone_steps, short.warmup_steps) == ((700, 840), 90)


def test_overrides_of_none_keep_the_value_of_the_preset():
    assert train_config("toy", lr=0.5, seed=None) == replace(TRAIN_PRESETS["toy"], lr=0.5)
    with pytest.raises(InputError, match="expected one of paper, stage2, fast, toy"):
        train_config("quick")


def test_the_fast_schedule_sees_as_many_images_as_the_paper():
    paper, fast = TRAIN_PRESETS["paper"], TRAIN_PRESETS["fast"]
    assert fast.iterations * fast.batch_size == pytest.approx(paper.iterations * paper.batch_size, rel=1e-4)
    assert fast.lr == pytest.approx(paper.lr * 32**0.5)


def test_stage_2_gives_every_cache_the_same_share(cache, tmp_path):
    smaller = make_cache(tmp_path / "b.zarr", seed=1, images=9)
    for ratio, share in (("size", 18 / 24), ("equal", 0.5)):
        config = replace(CONFIG, iterations=1, ratio=ratio)
        train([cache, smaller], [make_vocabulary()] * 2, tmp_path / ratio, config)
        saved = json.loads((tmp_path / ratio / "run.json").read_text())
        assert saved["caches"][0]["share"] == pytest.approx(share)
    assert TRAIN_PRESETS["stage2"] == replace(TRAIN_PRESETS["paper"], ratio="equal")


def test_a_second_stage_starts_from_the_head_of_the_first(cache, uninterrupted, tmp_path):
    config = replace(CONFIG, iterations=1, lr=1e-9, weight_decay=0.0)
    train([cache], [make_vocabulary()], tmp_path / "second", config, init=uninterrupted / "head.safetensors")
    first, second = (load_file(folder / "head.safetensors") for folder in (uninterrupted, tmp_path / "second"))
    assert all(torch.allclose(second[name], first[name], atol=1e-7) for name in first)
    with pytest.raises(InputError, match="its init is"):
        train([cache], [make_vocabulary()], tmp_path / "second", config, resume=True)


@pytest.mark.parametrize(
    ("config", "sets", "message"),
    [
        ({"ffn": 64}, {}, "the ffn of its head is 32, of these features and options 64"),
        ({}, {"weights": "v" * 64}, "start from a head of the same weights"),
    ],
)
def test_a_head_that_does_not_fit_cannot_be_started_from(cache, uninterrupted, tmp_path, config, sets, message):
    other = make_cache(tmp_path / "other.zarr", **sets) if sets else cache
    vocabulary = make_vocabulary(encoder_sha256=sets.get("weights", "w" * 64))
    with pytest.raises(InputError, match=message):
        train(
            [other], [vocabulary], tmp_path / "run", replace(CONFIG, **config), init=uninterrupted / "head.safetensors"
        )
    assert not (tmp_path / "run").exists()


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
def test_an_invalid_configuration_is_refused(field, value):
    with pytest.raises(InputError, match=f"training: {field} (is|are)"):
        replace(CONFIG, **{field: value})


# Runs


def test_the_classes_of_a_head_are_those_with_regions_of_all_its_trainings(cache):
    index = cache.manifest.category_index
    rare = replace(cache.manifest, category_index=np.where(index == 2, 2, -1).astype(np.int32))
    few = replace(open_training_set(cache), cache=SimpleNamespace(manifest=rare))
    identity = {"preset": "toy", "caches": []}

    def classes(*initial):
        return head_info([few], [make_vocabulary()], identity, *initial).classes

    assert classes(None) == ("class 2",)
    assert classes(HeadInfo(classes=("dog", "class 1"))) == ("class 1", "class 2", "dog")
    assert classes(HeadInfo()) == ()  # a released head does not state its classes


def test_the_loss_falls_and_the_checkpoint_describes_the_training(uninterrupted, cache):
    losses = [line["loss"] for line in read_metrics(uninterrupted / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]
    checkpoint = load_checkpoint(uninterrupted / "head.safetensors")
    assert (checkpoint.info.preset, checkpoint.info.step) == ("toy", CONFIG.iterations)
    assert (checkpoint.info.localizer, checkpoint.info.encoder) == ("tokens", "maps")
    assert checkpoint.info.weights_sha256 == {"maps": "w" * 64, "tokens": "t" * 64}
    seen = {cache.categories[index].name for index in cache.manifest.category_index.tolist() if index >= 0}
    assert checkpoint.info.classes == tuple(sorted(seen))
    (record,) = checkpoint.info.caches
    assert record["manifest"] == cache.manifest.digest()
    assert record["map"] == {"name": "maps", "encoding": "float16", "shape": [5, 16], "weights_sha256": "w" * 64}
    assert record["token"] == {"name": "tokens", "encoding": "float16", "shape": [8], "weights_sha256": "t" * 64}
    assert (uninterrupted / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_written_every_interval_and_at_every_checkpoint(uninterrupted):
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    assert all(line["pictures_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert [line["lr"] for line in lines] == [CONFIG.learning_rate(line["step"] - 1) for line in lines]


# Sends itself a signal inside step 24, before the update, or while waiting for batch 25.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from regionspot.cache.store import FeatureCache
from regionspot.fusion.training.train import train
from small_training import CONFIG, make_vocabulary
module, step = sys.modules["regionspot.fusion.training.train"], sys.modules["regionspot.fusion.training.step"]
number, while_waiting, seconds = int(sys.argv[3]), sys.argv[4] == "waiting", float(sys.argv[5])
original_loss, original_batches, calls = step.region_loss, module.read_batches, []

def region_loss(*arguments, **options):
    calls.append(1)
    if len(calls) == 24 and not while_waiting:
        os.kill(os.getpid(), number)
    return original_loss(*arguments, **options)

def read_batches(*arguments, **options):
    for batch in original_batches(*arguments, **options):
        if batch.step == 24 and while_waiting:
            os.kill(os.getpid(), number)
            time.sleep(100)
        yield batch

step.region_loss, module.read_batches = region_loss, read_batches
try:
    train([FeatureCache.open(sys.argv[1])], [make_vocabulary()], Path(sys.argv[2]), CONFIG, preset="toy",
          checkpoint_every=10, checkpoint_seconds=seconds, log_every=4)
except KeyboardInterrupt:  # as Python's main program ends by it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
"""


def require_ends_by(cache, out, number, when="in a step", seconds=600.0) -> None:
    code, lines = ForkedCommand(cache.path, out, int(number), when.split()[-1], seconds, code=SCRIPT).end()
    assert code == -number, lines


def saved_step(out) -> int:
    return read_document(out / "last.state.safetensors")["step"]


def require_same_run(out, uninterrupted):
    for name in ("head.safetensors", "last.state.safetensors"):
        ours, theirs = load_file(out / name), load_file(uninterrupted / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert numbers(out / "metrics.jsonl") == numbers(uninterrupted / "metrics.jsonl")


def resume(cache, out, config=CONFIG):
    return train([cache], [make_vocabulary()], out, config, preset="toy", resume=True, checkpoint_every=10, log_every=4)


def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(cache, uninterrupted, tmp_path):
    out = tmp_path / "run"
    require_ends_by(cache, out, signal.SIGKILL)
    assert saved_step(out) == 20
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "loss": 1.0}\n{"step": 2')
    resume(cache, out)
    require_same_run(out, uninterrupted)


def test_checkpoints_by_time_do_not_change_the_results(cache, uninterrupted, tmp_path):
    """Here after every step. The run stops inside an interval of the metrics."""
    out = tmp_path / "run"
    require_ends_by(cache, out, signal.SIGKILL, seconds=1e-9)
    assert saved_step(out) == load_checkpoint(out / "head.safetensors").info.step == 23
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [4, 8, 10, 12, 16, 20]
    resume(cache, out)
    require_same_run(out, uninterrupted)


@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, "in a step"), (signal.SIGTERM, "while waiting")])
def test_a_signal_stops_a_run_with_a_checkpoint_of_the_current_step(cache, uninterrupted, tmp_path, number, when):
    out = tmp_path / "run"
    require_ends_by(cache, out, number, when)
    assert saved_step(out) == load_checkpoint(out / "head.safetensors").info.step == 24
    resume(cache, out)
    require_same_run(out, uninterrupted)


def test_a_second_signal_takes_effect_immediately():
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


def test_training_works_outside_the_main_thread(cache, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        config = replace(CONFIG, iterations=2)
        assert pool.submit(train, [cache], [make_vocabulary()], tmp_path / "run", config).result().step == 2


def test_a_lengthened_run_without_milestones_equals_a_run_of_the_longer_length(cache, tmp_path):
    short, long = (replace(CONFIG, iterations=count, warmup=1, milestones=()) for count in (15, 30))
    for out in ("lengthened", "whole"):
        train([cache], [make_vocabulary()], tmp_path / out, short if out == "lengthened" else long, preset="toy")
    assert resume(cache, tmp_path / "lengthened", long).step == 30
    heads = [load_file(tmp_path / out / "head.safetensors") for out in ("lengthened", "whole")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    record = json.loads((tmp_path / "lengthened" / "run.json").read_text())
    assert record["lengthened"] == [{"step": 15, "from": 15, "to": 30}]
    assert resume(cache, tmp_path / "lengthened", long).step == 30
    with pytest.raises(InputError, match=r"holds a run of 30 steps, more than 15; .*longer but not shorter"):
        resume(cache, tmp_path / "lengthened", short)


def test_a_lengthened_run_logs_and_uses_the_learning_rates_of_the_longer_one(cache, tmp_path, caplog):
    short, long = (replace(CONFIG, iterations=count) for count in (10, 40))
    train([cache], [make_vocabulary()], tmp_path / "run", short, preset="toy", log_every=1)
    with caplog.at_level("INFO"):
        train([cache], [make_vocabulary()], tmp_path / "run", long, preset="toy", resume=True, log_every=1)
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [(short if step < 10 else long).learning_rate(step) for step in range(40)]
    assert "a run of 10 steps becomes a run of 40; from step 11 on with the learning rates" in caplog.text


def test_resuming_a_finished_run_changes_nothing(cache, uninterrupted):
    before = files_under(uninterrupted, "curves.png")
    result = train([cache], [make_vocabulary()], uninterrupted, CONFIG, preset="toy", resume=True)
    assert result.step == CONFIG.iterations
    assert before == files_under(uninterrupted, "curves.png")


def test_resume_starts_a_run_without_a_checkpoint(cache, tmp_path):
    config = replace(CONFIG, iterations=3)
    assert train([cache], [make_vocabulary()], tmp_path / "run", config, resume=True).step == 3


def test_several_caches_train_one_head(cache, tmp_path):
    other = make_cache(tmp_path / "b.zarr", seed=1, images=9)
    config = replace(CONFIG, iterations=6)
    train([cache, other], [make_vocabulary()] * 2, tmp_path / "run", config, ratios=(1, 1))
    assert [record["share"] for record in load_checkpoint(tmp_path / "run/head.safetensors").info.caches] == [0.5, 0.5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_loss_is_similar_for_every_encoding(cache, tmp_path, dtype):
    encoded, config = make_cache(tmp_path / "encoded.zarr", dtype=dtype), replace(CONFIG, iterations=12)
    losses = []
    for name, training_cache in (("plain", cache), (dtype, encoded)):
        train([training_cache], [make_vocabulary()], tmp_path / name, config, log_every=1)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    with pytest.raises(InputError, match=r"its caches\[0\]\.map\.encoding is"):
        train([cache], [make_vocabulary()], tmp_path / dtype, config, resume=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_decoding_on_a_device_equals_decoding_with_numpy(tmp_path, dtype):
    encoded = make_cache(tmp_path / "encoded.zarr", dtype=dtype)
    batch, sets = encoded.read([0, 1, 2]), encoded.feature_sets
    for stored, scales, name in (
        (batch.feature_map, batch.map_scale, "maps"),
        (batch.tokens, batch.token_scale, "tokens"),
    ):
        decoded = DeviceDecoder(sets[name], CPU)(stored, scales)
        expected = decode(stored, sets[name], scales if dtype == "int8" else None)
        np.testing.assert_allclose(decoded.float().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_training_does_not_change_the_random_state_of_the_caller(cache, tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    train([cache], [make_vocabulary()], tmp_path / "run", replace(CONFIG, iterations=2))
    assert torch.equal(torch.randn(3), expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cache, tmp_path):
    """A learning rate of 1e30 leaves finite weights and an infinite loss."""
    config = replace(CONFIG, lr=1e30, warmup=0)
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], tmp_path / "run", config, checkpoint_every=1)
    (batch,) = read_batches([open_training_set(cache)], np.ones(1), config, CPU, 1, 2)
    ids = ", ".join(str(image_id) for image_id in cache.manifest.image_ids[batch.rows])
    assert "step 2: the loss is nan" in one_line(error)
    assert f"on images {ids} of {cache.path}" in one_line(error)
    state = load_file(tmp_path / "run/last.state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert load_checkpoint(tmp_path / "run/head.safetensors").info.step == 1


# Errors


@pytest.mark.parametrize(("iterations", "longer"), [(40, ""), (400, " and make it a run of 400")])
def test_the_error_for_a_folder_that_holds_this_run_suggests_resume(cache, uninterrupted, iterations, longer):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], uninterrupted, replace(CONFIG, iterations=iterations), preset="toy")
    assert one_line(error) == (
        f"{uninterrupted}: holds this run already, at step 40 of 40; add --resume to resume it{longer}, or name "
        "another folder"
    )


def test_a_run_without_a_checkpoint_suggests_resume_too(cache, tmp_path):
    RunFolder(tmp_path).claim({"config": {"iterations": 9}}, resume=False)
    with pytest.raises(InputError, match="holds this run already, at step 0 of 9; add --resume"):
        RunFolder(tmp_path).claim({"config": {"iterations": 9}}, resume=False)


@pytest.mark.parametrize(
    "option", [{"checkpoint_every": 0}, {"checkpoint_seconds": 0}, {"kept_checkpoints": 0}, {"log_every": -1}]
)
def test_an_interval_of_0_is_refused(cache, tmp_path, option):
    with pytest.raises(InputError, match=f"training: {next(iter(option))} is"):
        train([cache], [make_vocabulary()], tmp_path / "run", CONFIG, **option)
    assert not (tmp_path / "run").exists()


def test_infinite_weights_are_not_saved(cache, tmp_path):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], tmp_path / "run", replace(CONFIG, lr=1e39, warmup=0), checkpoint_every=1)
    assert "step 1: the update left weights that are not finite" in one_line(error)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".safetensors"] == []


def test_the_error_for_a_folder_of_another_run_states_the_difference(cache, uninterrupted):
    with pytest.raises(InputError) as error:
        train([cache], [make_vocabulary()], uninterrupted, replace(CONFIG, lr=0.5), preset="toy", resume=True)
    assert "its config.lr is 0.002, not 0.5" in one_line(error)


def test_a_run_of_an_older_version_is_resumed(cache, tmp_path, caplog):
    config = replace(CONFIG, iterations=2)
    train([cache], [make_vocabulary()], tmp_path / "run", config)
    folder = RunFolder(tmp_path / "run")
    record = json.loads(folder.record.read_text())
    for features in (record["caches"][0]["map"], record["caches"][0]["token"]):
        del features["shape"]
        features["dtype"] = features.pop("encoding")
    folder.record.write_text(json.dumps(record))
    tensors, document = read_tensor_file(folder.state)
    del document["sampler"]
    write_tensor_file(folder.state, tensors, document)
    assert train([cache], [make_vocabulary()], folder.path, replace(config, iterations=4), resume=True).step == 4
    assert "shuffled the images differently" in caplog.text


def test_a_folder_with_other_files_is_not_changed(cache, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no training run"):
        train([cache], [make_vocabulary()], tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_created_is_refused_in_one_line(cache, tmp_path):
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
        ([make_vocabulary(CLASSES + 1)], "has 6 classes but its vocabulary has 7"),
        ([make_vocabulary(encoder_sha256="y" * 64)], "take both from the same model"),
    ],
)
def test_vocabularies_that_do_not_match_the_caches_are_refused(cache, tmp_path, vocabularies, message):
    with pytest.raises(InputError) as error:
        train([cache], vocabularies, tmp_path / "run", CONFIG)
    assert message in one_line(error)


def test_a_cache_without_usable_images_is_refused(tmp_path):
    FeatureCache.create(tmp_path / "empty.zarr", small_manifest(9, 0), feature_sets(), part_size=8)
    with pytest.raises(InputError, match="run `regionspot extract`"):
        open_training_set(FeatureCache.open(tmp_path / "empty.zarr"))


def test_the_error_for_an_unknown_feature_set_lists_the_sets(cache):
    with pytest.raises(InputError, match="map feature sets are: maps; 'clip' is not one of them"):
        open_training_set(cache, map_set="clip")


def test_the_run_record_is_plain_json(uninterrupted):
    assert json.loads((uninterrupted / "run.json").read_text())["config"]["lr"] == CONFIG.lr
