"""Without being told, each model computes in the fastest numbers that its device has and its accuracy bears."""

import pytest
import torch

from regionspot.cache.errors import InputError
from regionspot.pipeline.dtypes import DTYPES, resolve_dtype

KINDS = ("localizer", "encoder")


def cpu_with(monkeypatch, *instructions):
    found = {"avx512_f": True, "amx_tile": True, "architecture": "x86_64", **dict.fromkeys(instructions, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_that_multiplies_bfloat16_does(monkeypatch, instructions, kind):
    cpu_with(monkeypatch, instructions)
    assert resolve_dtype("auto", "cpu", kind) == "bfloat16"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_that_would_have_to_emulate_it_stays_exact(monkeypatch, kind):
    cpu_with(monkeypatch)
    assert resolve_dtype("auto", "cpu", kind) == "float32"


def test_a_torch_that_does_not_know_its_cpu_stays_exact(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_dtype("auto", "cpu", "localizer") == "float32"


@pytest.mark.parametrize(
    ("capability", "kind", "expected"),
    [
        ((9, 0), "localizer", "bfloat16"),
        ((8, 0), "localizer", "bfloat16"),
        ((7, 5), "localizer", "float16"),  # Turing has no bfloat16
        ((9, 0), "encoder", "float16"),
    ],
)
def test_a_gpu_computes_sam_in_bfloat16_and_clip_in_float16(monkeypatch, capability, kind, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", "cuda:1", kind) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_asked_for_by_name_is_what_it_is(dtype, device):
    assert resolve_dtype(dtype, torch.device(device), "localizer") == dtype


def test_other_devices_compute_in_float32():
    assert resolve_dtype("auto", "mps", "encoder") == "float32"


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(InputError, match="dtype 'fp16': unknown; expected one of auto, float32, bfloat16, float16"):
        resolve_dtype("fp16", "cpu", "encoder")
