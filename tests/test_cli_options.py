"""Invalid option values: one line that names the option, exit code 2, before anything is read or written."""

import inspect
import os
from typing import get_args

import pytest

from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.commands import options as cli_options
from regionspot.commands.train import pair_and_schedule, train
from regionspot.evaluation.inference.baselines import Baseline
from regionspot.evaluation.inference.cache_vocabulary import NamesFrom
from regionspot.evaluation.inference.zero_shot import ZeroShotMethod
from regionspot.evaluation.metrics.average_precision import Engine
from regionspot.evaluation.metrics.selection import Rule, Score
from regionspot.evaluation.report.predictions import Form
from regionspot.fusion.templates import TEMPLATES
from regionspot.fusion.training.config import CHECKPOINT_STEPS, TRAIN_PRESETS, Padding, TrainConfig
from regionspot.fusion.training.negatives import Unverified
from regionspot.fusion.training.run_folder import KEPT_CHECKPOINTS
from regionspot.fusion.training.trackers import TRACKERS
from regionspot.pipeline.backbones.builders import PRESETS
from regionspot.pipeline.backbones.dtypes import AUTO, DTYPES
from regionspot.pipeline.backbones.protocols import TOKENS, MaskThreshold
from regionspot.pipeline.images.decode import Exif
from regionspot.pipeline.images.preprocess import PREPROCESS
from regionspot.pipeline.toy.world import FEWEST_IMAGES

# Each command with its required arguments. None of these files exists: an invalid option is refused before.
COMMANDS = {
    "dataset": ("coco", "--data", "data"),
    "extract": ("coco", "--data", "data", "--cache", "c.zarr"),
    "train": ("--cache", "c.zarr", "--out", "run"),
    "eval-lvis": ("--data", "data", "--out", "eval", "--checkpoint", "head.safetensors"),
    "predict": ("x.jpg", "--checkpoint", "head.safetensors", "--boxes", "1,2,3,4", "--names", "dog"),
    "index": ("c.zarr",),
    "search": ("c.zarr", "dog"),
    "serve": ("--cache", "c.zarr"),
    "doctor": (),
    "toy-world": ("world",),
    "demo": ("demo",),
    "runs": ("runs",),
    "cache ls": ("c.zarr",),
    "cache show": ("c.zarr", "1", "-o", "x.png"),
    "cache stats": ("c.zarr", "clip"),
    "cache verify": ("c.zarr",),
    "cache export": ("c.zarr", "c.h5"),
    "cache extend": ("c.zarr", "coco", "--data", "data"),
    "cache merge": ("c.zarr", "-o", "m.zarr"),
    "cache subset": ("c.zarr", "s.zarr"),
    "cache convert": ("c.zarr", "v.zarr", "--to", "clip=int8"),
}
WHOLE_NUMBERS = {
    "extract": ("limit", "part-size", "batch-size", "decode-threads", "metrics-port"),
    "train": ("iterations", "batch-size", "checkpoint-every", "keep-checkpoints", "val-every", "val-images"),
    "eval-lvis": ("limit",),
    "predict": ("top",),
    "search": ("count",),
    "doctor": ("metrics-port",),
    "toy-world": ("pictures",),
    "demo": ("pictures",),
    "cache ls": ("limit",),
    "cache verify": ("threads",),
    "cache extend": ("limit", "part-size"),
    "cache merge": ("part-size",),
    "cache subset": ("every", "first", "part-size"),
}
FROM_ZERO = {"train": ("seed",), "toy-world": ("seed",), "demo": ("seed",), "cache show": ("region",)}
UNBOUNDED = ("limit", "top", "every", "first", "region", "keep-checkpoints", "val-images")  # a larger number means all
CHOICES = {
    "extract": ("preset", "preprocess", "tokens", "exif", "dtype"),
    "train": ("preset", "schedule", "templates", "log-to"),
    "eval-lvis": ("preset", "baseline", "templates", "preprocess", "exif", "dtype"),
    "predict": ("preset", "templates", "dtype", "method", "format"),
    "doctor": ("preset",),
}
OTHERS = [
    ("dataset", "--split", "vall", "coco split 'vall': unknown; expected one of train, val"),
    ("extract", "--encoding", "int4", "encoding 'int4': unknown; expected one of float16"),
    ("extract", "--token-encoding", "int8+gzip", "encoding 'int8+gzip': unknown"),
    ("extract", "--parts", "3-", "parts '3-': '3-' is not a part"),
    ("extract", "--parts", "9-7", "did you mean 7-9?"),
    ("extract", "--parts", "9" * 5000, "is not a part"),
    ("extract", "--shard", "0/4", "shards are numbered from 1"),
    ("extract", "--shard", "5/4", "shards are numbered from 1"),
    ("extract", "--shard", "x", "shard 'x': expected a number and the number of shards"),
    ("extract", "--scheduler", "local:0", "scheduler 'local:0': expected none, local, local:8"),
    ("extract", "--max-failures", "120%", "max failures '120%'"),
    ("extract", "--localizer", "sam_vit_x", "did you mean 'sam_vit_"),
    ("extract", "--encoder", "clip_vit_l_15", "did you mean 'clip_vit_l_14'?"),
    ("extract", "--weights", "nowhere", "nowhere: is not a weights file or folder"),
    ("extract", "--weights", "random:x", "expected an integer after 'random:'"),
    ("extract", "--sam-weights", "/dev/zero", "/dev/zero: is not a weights file"),
    ("extract", "--device", "tpu", "--device tpu: torch knows no such device"),
    ("train", "--device", "tpu", "c.zarr: no such cache"),
    ("train", "--lr", "nan", "--lr"),
    ("train", "--lr", "0", "lr is 0.0, expected more than 0"),
    ("train", "--lr", "inf", "lr is inf, expected more than 0 and finite"),
    ("train", "--ratio", "-1", "'--ratio'"),
    ("train", "--val-annotations", "lvis.json", "needs a cache of these images; give --val-cache, too"),
    ("eval-lvis", "--max-failures", "many", "max failures 'many'"),
    ("predict", "-o", "x.psd", "cannot write an image with the suffix '.psd'"),
    ("predict", "-o", "nodir/x.png", "nodir/x.png: there is no folder nodir"),
    ("search", "-o", "x.png", "a sheet needs both, --out FILE and --data FOLDER"),
    ("search", "--like", "139:2", "give either words or --like IMAGE_ID:REGION"),
    ("serve", "--port", "70000", "'--port'"),
    ("cache show", "--photos", "nowhere", "'--photos'"),
    ("cache convert", "--to", "maps=int9", "did you mean 'int8'?"),
    ("cache stats", "-o", "x.txt", "written as .npz or .json"),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def refusal(regionspot, command: str, *more: str) -> str:
    """The line with which a command is refused."""
    code, out, err = regionspot(*command.split(), *COMMANDS[command], *more)
    assert (code, out) == (2, ""), err
    assert err.startswith("regionspot: ")
    assert len(err.splitlines()) == 1
    return err


def pairs(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(command, option) for command, options in table.items() for option in options]


@pytest.mark.parametrize(("command", "option"), pairs(WHOLE_NUMBERS) + pairs(FROM_ZERO))
def test_a_number_out_of_its_range_is_refused(regionspot, command, option):
    values = ["-1", "1.5"]
    values += ["0"] * ((command, option) in pairs(WHOLE_NUMBERS)) + ["9" * 30] * (option not in UNBOUNDED)
    for value in values:
        assert f"--{option}'" in refusal(regionspot, command, f"--{option}={value}")


@pytest.mark.parametrize(("command", "option"), pairs(CHOICES))
def test_an_unknown_choice_is_refused_with_the_known_ones(regionspot, command, option):
    assert f"'--{option}': 'other' is not one of '" in refusal(regionspot, command, f"--{option}", "other")


@pytest.mark.parametrize(("command", "option", "value", "message"), OTHERS, ids=lambda value: str(value)[:20])
def test_other_invalid_values_are_refused(regionspot, command, option, value, message):
    assert message in refusal(regionspot, command, option, value)


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_argument_is_refused_by_every_command(regionspot, empty):
    for command in COMMANDS:
        assert "empty" in refusal(regionspot, command, "--data", empty)
        assert "the argument of --out is empty" in refusal(regionspot, command, f"--out={empty}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--exact", "--dtype", "bfloat16"), "--exact means --dtype float32"),
        (("--dry-run", "--retry-failed"), "--dry-run and --retry-failed"),
        (("--scheduler", "local", "--dry-run"), "need a single process"),
    ],
)
def test_contradicting_options_are_refused(regionspot, more, message):
    assert message in refusal(regionspot, "extract", *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exract",), "No such command 'exract'. Did you mean 'extract'?"),
        (("extract", "coco", "--date", "d"), "No such option: --date"),
        (("extract", "coco"), "Missing option '--data'"),
        (("cache", "verify"), "Missing argument"),
        (("predict", "x.jpg", "--checkpoint"), "requires an argument"),
    ],
)
def test_an_invalid_command_line_is_refused_in_one_line(regionspot, arguments, message):
    code, _, err = regionspot(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message.lower() in err.lower()


@pytest.mark.parametrize(
    ("preset", "schedule", "expected"),
    [
        ("bl", None, ("bl", "paper")),
        ("toy", "toy", ("toy", "toy")),
        ("stage1-bb", None, ("bb", "paper")),
        ("stage2-bl336", None, ("bl336", "stage2")),
        ("fast-bl", None, ("bl", "fast")),
    ],
)
def test_a_preset_of_training_may_choose_the_schedule(preset, schedule, expected):
    assert pair_and_schedule(preset, schedule) == expected


def test_a_preset_and_a_schedule_that_both_choose_are_refused(regionspot, tmp_path):
    arguments = ("train", "--cache", tmp_path, "--out", tmp_path / "run", "--preset", "fast-bl", "--schedule", "toy")
    assert "--preset fast-bl: chooses the schedule; leave --schedule toy out" in refusal(regionspot, *arguments)


def test_the_choices_are_those_of_the_library():
    assert get_args(cli_options.PresetName) == tuple(PRESETS)
    assert get_args(cli_options.DtypeName) == (AUTO, *DTYPES)
    assert get_args(cli_options.PreprocessName) == tuple(PREPROCESS)
    assert get_args(cli_options.TemplatesName) == tuple(TEMPLATES)
    assert get_args(cli_options.NamesFromName) == get_args(NamesFrom)
    assert get_args(cli_options.PaddingName) == get_args(Padding)
    assert get_args(cli_options.UnverifiedName) == get_args(Unverified)
    assert get_args(cli_options.ScheduleName) == tuple(TRAIN_PRESETS)
    for preset in get_args(cli_options.TrainPresetName):
        pair, schedule = pair_and_schedule(preset, None)
        assert (pair in PRESETS, schedule in TRAIN_PRESETS) == (True, True), preset
    assert get_args(cli_options.TokensName) == tuple(TOKENS)
    assert get_args(cli_options.ExifName) == get_args(Exif)
    assert get_args(cli_options.BaselineName) == get_args(Baseline)
    assert get_args(cli_options.ZeroShotName) == get_args(ZeroShotMethod)
    assert get_args(cli_options.PredictionForm) == get_args(Form)
    assert get_args(cli_options.SelectionName) == get_args(Rule)
    assert get_args(cli_options.ScoreName) == get_args(Score)
    assert get_args(cli_options.EngineName) == get_args(Engine)
    assert get_args(cli_options.MaskThresholdName) == get_args(MaskThreshold)
    assert cli_options.WorldSize.__metadata__[0].min == FEWEST_IMAGES
    assert get_args(cli_options.TrackerName) == TRACKERS
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    assert defaults["checkpoint_every"] == CHECKPOINT_STEPS
    assert defaults["keep_checkpoints"] == KEPT_CHECKPOINTS
    TrainConfig(seed=cli_options.Seed.__metadata__[0].max, iterations=cli_options.MAX_STEPS)
    assert Encoding.parse("int8+zstd")
