"""The dtype of a model: the requested one, that of stored features, or the device's default."""

import logging

import pytest
import torch

from regionspot.cache.errors import InputError
from regionspot.cache.machine import cpu_supports
from regionspot.pipeline.backbones import dtypes
from regionspot.pipeline.backbones.dtypes import DTYPES, resolve_dtype, stored_dtype

KINDS = ("localizer", "encoder")
EVERY_CPU = [(), ("avx512_bf16",), ("amx_bf16", "amx_fp16"), ("bf16", "fp16_arith")]


@pytest.fixture
def cpu(monkeypatch):
    """`cpu("avx512_bf16")` simulates a CPU with only these instructions for half precision."""
    monkeypatch.delenv("REGIONSPOT_CPU_DTYPES", raising=False)

    def with_instructions(*names):
        known = {"avx512_f": True, "amx_tile": True, "architecture": "x86_64", **dict.fromkeys(names, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    dtypes._warn_of_emulation.cache_clear()
    return with_instructions


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(7, 5)` simulates GPUs of this compute capability."""
    return lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


@pytest.mark.parametrize("instructions", EVERY_CPU)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_float32_on_every_cpu(cpu, instructions, kind):
    cpu(*instructions)
    assert resolve_dtype("auto", "cpu", kind) == "float32"


@pytest.mark.parametrize(
    ("capability", "kind", "expected"),
    [
        ((9, 0), "localizer", "bfloat16"),
        ((8, 0), "localizer", "bfloat16"),
        ((7, 5), "localizer", "float16"),  # Turing has no bfloat16
        ((9, 0), "encoder", "float16"),
    ],
)
def test_auto_on_a_gpu_is_bfloat16_for_sam_and_float16_for_clip(gpu, capability, kind, expected):
    gpu(*capability)
    assert resolve_dtype("auto", "cuda:1", kind) == expected


def test_auto_on_other_devices_is_float32():
    assert resolve_dtype("auto", "mps", "encoder") == "float32"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_named_dtype_is_used(gpu, dtype, device):
    gpu(8, 0)
    assert resolve_dtype(dtype, torch.device(device), "localizer") == dtype


@pytest.mark.parametrize("name", ["fp16", "AUTO"])
def test_an_unknown_dtype_is_refused_with_the_known_ones(name):
    expected = f"dtype '{name}': unknown; expected one of auto, float32, bfloat16, float16"
    with pytest.raises(InputError, match=expected):
        resolve_dtype(name, "cpu", "encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_refused_on_a_gpu_without_it(gpu, kind):
    gpu(7, 5)
    with pytest.raises(InputError, match=r"bfloat16: cuda:1 has compute capability 7.5, bfloat16 needs 8.0") as error:
        resolve_dtype("bfloat16", "cuda:1", kind)
    assert "\n" not in str(error.value)
    assert resolve_dtype("float16", "cuda:1", kind) == "float16"


def test_a_device_without_autocast_supports_float32_only():
    assert resolve_dtype("float32", "meta", "encoder") == "float32"
    with pytest.raises(InputError, match="dtype float16: torch does not compute in it on meta; use float32"):
        resolve_dtype("float16", "meta", "encoder")


@pytest.mark.parametrize(
    ("instructions", "emulated"),
    [((), ["bfloat16", "float16"]), (("avx512_bf16",), ["float16"]), (("bf16", "fp16_arith"), [])],
)
def test_emulating_a_dtype_is_warned_about_once(cpu, caplog, instructions, emulated):
    cpu(*instructions)
    with caplog.at_level(logging.WARNING, dtypes.__name__):
        for _ in range(2):
            for dtype in ("auto", *DTYPES):
                resolve_dtype(dtype, "cpu", "encoder")
    assert [record.args for record in caplog.records] == [(dtype,) for dtype in emulated]


def test_a_torch_without_cpu_capabilities_supports_float32_only(cpu, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert [cpu_supports(dtype) for dtype in DTYPES] == [True, False, False]


def test_the_environment_overrides_the_cpus_capabilities(cpu, monkeypatch):
    for instructions in EVERY_CPU:
        cpu(*instructions)
        monkeypatch.setenv("REGIONSPOT_CPU_DTYPES", "float32,bfloat16")
        assert [cpu_supports(dtype) for dtype in DTYPES] == [True, True, False]
        monkeypatch.setenv("REGIONSPOT_CPU_DTYPES", "")
        assert [cpu_supports(dtype) for dtype in DTYPES] == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_features_is_in_their_provenance(dtype):
    assert stored_dtype({"model": "sam_vit_b", "dtype": dtype}) == dtype


@pytest.mark.parametrize("provenance", [{}, {"dtype": None}, {"dtype": "float64"}, {"dtype": ["float32"]}])
def test_features_without_a_dtype_give_auto(provenance):
    assert stored_dtype(provenance) == "auto"
