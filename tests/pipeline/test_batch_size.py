"""The batch size fits into the free memory, and a batch that runs out of memory is halved."""

import logging

import pytest
import torch

from regionspot.pipeline.backbones import batch_size
from regionspot.pipeline.backbones.batch_size import MAX_BATCH, Halving, batch_size_of, largest_batch

GB = 10**9


@pytest.mark.parametrize(
    ("one", "two", "free", "expected"),
    [
        (3 * GB, 5 * GB, 17 * GB, 8),  # 1 + 2 n
        (3 * GB, 5 * GB, 16 * GB, 4),  # 7 would fit
        (3 * GB, 5 * GB, 2 * GB, 1),  # not even one, but one is the minimum
        (1 * GB, 1 * GB, 2 * GB, MAX_BATCH),  # a model that reuses its buffers
        (1 * GB, 2 * GB, 10_000 * GB, MAX_BATCH),
    ],
)
def test_the_largest_batch_follows_from_the_peaks_of_one_and_two_images(one, two, free, expected):
    assert largest_batch(one, two, free) == expected


class FakeModel:
    """A model whose batch of n images takes (1 + 2 n) GB."""

    def __init__(self, device="cuda", size=8):
        self.device, self.batch_size, self.peak = torch.device(device), size, 0

    def preprocess(self, image):
        return torch.zeros(3, 4, 4)

    def encode(self, images):
        self.peak = (1 + 2 * len(images)) * GB


def test_the_batch_size_of_a_gpu_follows_from_its_free_memory(monkeypatch):
    model = FakeModel()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GB)  # 4 of them cached but unused
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GB + model.peak)
    assert batch_size_of([model]) == 8  # 17 of 19.2 GB


def test_on_other_devices_the_smallest_batch_size_is_used():
    assert batch_size_of([FakeModel("cpu", 8), FakeModel("cpu", 1)]) == 1


class LimitedMemory:
    """Encodes at most `holds` images at a time."""

    def __init__(self, holds):
        self.holds, self.tried = holds, []

    def encode(self, images):
        self.tried.append(len(images))
        if len(images) > self.holds:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        return torch.stack([image * 2 for image in images])


@pytest.mark.parametrize("count", [1, 3, 7, 16])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_batch_that_does_not_fit_is_split_with_the_same_result(count, as_list):
    batch, memory = torch.arange(count * 2.0).view(count, 2), LimitedMemory(holds=3)
    result = Halving()(memory.encode, list(batch) if as_list else batch)
    assert torch.equal(result, batch * 2)


def test_the_reduced_size_is_kept_and_logged_once(caplog):
    memory, encode = LimitedMemory(holds=3), Halving()
    with caplog.at_level(logging.WARNING, batch_size.__name__):
        for _ in range(3):
            encode(memory.encode, torch.zeros(8, 2))
    assert memory.tried == [8, 4, 2, 2, 2, 2] + 2 * [2, 2, 2, 2]
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]


def test_a_single_image_that_does_not_fit_raises():
    with pytest.raises(torch.OutOfMemoryError, match="1 images"):
        Halving()(LimitedMemory(holds=0).encode, torch.zeros(4, 2))


def test_other_errors_are_not_caught():
    def encode(images):
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        Halving()(encode, torch.zeros(4, 2))
