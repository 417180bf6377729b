"""ExtractConfig: every option of the command is in it, and it can be pickled."""

import ast
import inspect
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.schema import Geometry
from regionspot.commands import extract as cli_extract
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.extraction.config import ExtractConfig


def test_a_config_can_be_pickled():
    config = ExtractConfig("c.zarr", encoding=Encoding.parse("int8+zstd"), max_failures=FailureLimit(count=3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(pickle.loads(pickle.dumps(config))) == hash(config)


def test_the_command_line_sets_every_field_by_its_name():
    calls = [node for node in ast.walk(ast.parse(Path(cli_extract.__file__).read_text())) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "ExtractConfig"]
    assert {keyword.arg for keyword in call.keywords} == {field.name for field in fields(ExtractConfig)}


def test_the_options_have_the_defaults_of_the_config():
    options = inspect.signature(cli_extract.extract).parameters
    for field in fields(ExtractConfig):
        default = options[field.name].default if field.name in options else inspect.Parameter.empty
        if default not in (None, inspect.Parameter.empty):
            assert default == (str if isinstance(default, str) else type(default))(field.default), field.name


def test_a_config_does_not_import_torch():
    code = "import sys; from regionspot.pipeline.extraction.config import ExtractConfig; ExtractConfig()"
    assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"]).returncode == 0


@pytest.mark.parametrize("field", ["batch_size", "decode_threads"])
def test_a_number_below_one_is_refused(field):
    with pytest.raises(InputError, match=f"{field} is 0, expected at least 1"):
        ExtractConfig(**{field: 0})


def test_parts_and_a_shard_together_are_refused():
    with pytest.raises(InputError, match="give one of the two"):
        ExtractConfig(parts="0", shard="1/3").selected_parts(Geometry(10, 4, 64))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, [0, 1, 2]),
        ({"limit": 1}, [0]),
        ({"limit": 4}, [0]),
        ({"limit": 5}, [0, 1]),
        ({"limit": 1000}, [0, 1, 2]),
        ({"limit": 5, "parts": "1-2"}, [1]),
        ({"limit": 5, "shard": "2/2"}, [1]),
    ],
)
def test_a_limit_selects_the_whole_parts_that_contain_the_first_images(fields, parts):
    assert list(ExtractConfig(**fields).selected_parts(Geometry(10, 4, 64))) == parts
