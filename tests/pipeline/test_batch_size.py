"""Batches are as large as the memory that is free, and smaller when it turns out to be less."""

import logging

import pytest
import torch

from regionspot.pipeline.backbones import batch_size
from regionspot.pipeline.backbones.batch_size import LARGEST, Halving, batch_size_of, fitting

GB = 10**9


@pytest.mark.parametrize(
    ("one", "two", "free", "expected"),
    [
        (3 * GB, 5 * GB, 17 * GB, 8),  # 1 + 2 n
        (3 * GB, 5 * GB, 16 * GB, 4),  # 7 would fit
        (3 * GB, 5 * GB, 2 * GB, 1),  # not even one, but one is tried
        (1 * GB, 1 * GB, 2 * GB, LARGEST),  # a model that reuses its buffers
        (1 * GB, 2 * GB, 10_000 * GB, LARGEST),
    ],
)
def test_as_many_images_as_fit_by_what_one_and_two_take(one, two, free, expected):
    assert fitting(one, two, free) == expected


class Fake:
    """A model whose batch of n images takes (1 + 2 n) GB."""

    def __init__(self, device="cuda", size=8):
        self.device, self.batch_size, self.peak = torch.device(device), size, 0

    def preprocess(self, image):
        return torch.zeros(3, 4, 4)

    def encode(self, images):
        self.peak = (1 + 2 * len(images)) * GB


def test_a_gpu_is_asked_what_it_has_free_and_the_largest_model_decides(monkeypatch):
    model = Fake()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GB)  # 4 of them free, but not given back
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GB + model.peak)
    assert batch_size_of([model]) == 8  # 17 of the 19.2 GB that are its share


def test_elsewhere_the_model_that_wants_the_fewest_decides():
    assert batch_size_of([Fake("cpu", 8), Fake("cpu", 1)]) == 1


class Memory:
    """Encodes `holds` images at a time and no more."""

    def __init__(self, holds):
        self.holds, self.tried = holds, []

    def encode(self, images):
        self.tried.append(len(images))
        if len(images) > self.holds:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        return torch.stack([image * 2 for image in images])


@pytest.mark.parametrize("count", [1, 3, 7, 16])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_batch_that_does_not_fit_is_done_in_pieces_with_the_same_result(count, as_list):
    batch, memory = torch.arange(count * 2.0).view(count, 2), Memory(holds=3)
    found = Halving()(memory.encode, list(batch) if as_list else batch)
    assert torch.equal(found, batch * 2)


def test_the_size_that_fitted_is_remembered_and_said_once(caplog):
    memory, encode = Memory(holds=3), Halving()
    with caplog.at_level(logging.WARNING, batch_size.__name__):
        for _ in range(3):
            encode(memory.encode, torch.zeros(8, 2))
    assert memory.tried == [8, 4, 2, 2, 2, 2] + 2 * [2, 2, 2, 2]
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]


def test_a_single_image_that_does_not_fit_stops_the_run():
    with pytest.raises(torch.OutOfMemoryError, match="1 images"):
        Halving()(Memory(holds=0).encode, torch.zeros(4, 2))


def test_other_errors_pass_through():
    def encode(images):
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        Halving()(encode, torch.zeros(4, 2))
