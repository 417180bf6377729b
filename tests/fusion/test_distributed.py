"""Training by several processes, as torchrun starts them: two of gloo on the CPU."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from makers import fork
from safetensors.torch import load_file
from small_training import CONFIG, make_cache, make_vocabulary

from regionspot.fusion.tensor_file import read_document
from regionspot.fusion.training import step
from regionspot.fusion.training.metrics import read_metrics
from regionspot.fusion.training.train import train

# Without dropout, whose random numbers depend on the process. 21 images - 3 = 18: the last batch of an epoch has two.
WITHOUT_DROPOUT = replace(CONFIG, dropout=0.0, iterations=16)

SCRIPT = """
import os, sys
from pathlib import Path
sys.path[:0] = map(str, Path(sys.argv[1]).parents[:2])
import torch
torch.set_num_threads(1)
from test_distributed import WITHOUT_DROPOUT, make_vocabulary, train
from regionspot.cache.store import FeatureCache
result = train([FeatureCache.open(sys.argv[2])], [make_vocabulary()], Path(sys.argv[3]), WITHOUT_DROPOUT,
               checkpoint_every=8, log_every=4)
assert (result is None) == (os.environ["RANK"] == "1")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "a.zarr")


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train([cache], [make_vocabulary()], out, WITHOUT_DROPOUT, checkpoint_every=8, log_every=4)
    return out


def require_equal(one: Path, other: Path) -> None:
    """Equal up to rounding: the gradients of two halves are added in another order.

    Attention does not depend on the bias of its keys, whose gradient is rounding only, which AdamW magnifies.
    """
    first, second = load_file(one / "head.safetensors"), load_file(other / "head.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if name.endswith("in_proj_bias"):
            continue
        assert (tensor - second[name]).abs().max() < 2e-5, name
    for ours, theirs in zip(read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_two_processes_of_torchrun_train_the_head_of_one_with_the_same_batches(cache, one, tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / "two.py", __file__, cache.path, tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 0, result.stderr
    require_equal(one, tmp_path / "two")


def test_a_signal_to_one_process_stops_all_and_one_process_finishes_the_run(cache, one, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def train_rank(rank: int) -> None:
        of_torchrun = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in of_torchrun.items()})
        original_loss, calls = step.region_loss, []

        def region_loss(*arguments, **options):
            calls.append(1)
            if len(calls) == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original_loss(*arguments, **options)

        step.region_loss = region_loss
        train([cache], [make_vocabulary()], tmp_path / "two", WITHOUT_DROPOUT, checkpoint_every=8, log_every=4)

    processes = [fork(partial(train_rank, rank)) for rank in (0, 1)]
    assert all(os.waitpid(process, 0)[1] for process in processes)
    assert read_document(tmp_path / "two/last.state.safetensors")["step"] == 8
    train([cache], [make_vocabulary()], tmp_path / "two", WITHOUT_DROPOUT, resume=True, checkpoint_every=8, log_every=4)
    require_equal(one, tmp_path / "two")
