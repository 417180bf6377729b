"""The files of a run: the last few checkpoints, the best one, and what a killed run leaves."""

import errno
import os
import shutil
import signal

import pytest
import torch
from makers import fork, was_killed
from torch.optim import AdamW

from regionspot.cache.errors import InputError
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.training.run_folder import RunFolder

SPEC = HeadSpec(type="linear", token_dim=4, width=6, text_dim=3)
IDENTITY = {"config": {"iterations": 100}}


class Run:
    """A run whose every weight equals the number of its steps."""

    def __init__(self, path, **options):
        self.folder, self.head = RunFolder(path, **options), SPEC.build()
        self.optimizer = AdamW(self.head.parameters())
        self.folder.claim(IDENTITY, resume=True)

    def go_to(self, step: int) -> None:
        self.step = step
        for parameter in self.head.parameters():
            torch.nn.init.constant_(parameter, step)

    def save(self, step: int) -> None:
        self.go_to(step)
        self.folder.save(SPEC, self.head, HeadInfo(step=step), self.optimizer, {})

    def validate(self, step: int, **scores: float) -> None:
        self.go_to(step)
        self.folder.keep_best(SPEC, self.head, HeadInfo(step=step), scores)


def step_of(path) -> int:
    """The step of a head, which its header and all its weights state."""
    checkpoint = load_checkpoint(path)
    assert all((parameter == checkpoint.info.step).all() for parameter in checkpoint.head.parameters())
    return checkpoint.info.step


def kept(folder: RunFolder) -> list[int]:
    paths = sorted(folder.checkpoints.iterdir())
    assert [step_of(path) for path in paths] == [int(path.stem) for path in paths]
    return [int(path.stem) for path in paths]


def test_the_last_checkpoints_are_kept_and_the_head_is_a_link_to_the_last(tmp_path):
    run = Run(tmp_path / "run", kept_checkpoints=2)
    for step in (8, 9, 10, 11):
        run.save(step)
        run.validate(100 * step, ap=step)  # not at the step of a checkpoint
    assert kept(run.folder) == [10, 11]
    assert step_of(run.folder.head) == run.folder.step_done() == 11
    assert os.path.samefile(run.folder.head, run.folder.checkpoints / "00000011.safetensors")


def test_the_best_head_stays_when_its_checkpoint_is_removed(tmp_path):
    run = Run(tmp_path / "run", kept_checkpoints=1)
    for step, ap in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.3), (5, float("nan"))):
        run.validate(step, ap=ap, apr=1 - ap)
        run.save(step)
    assert kept(run.folder) == [5]
    assert step_of(run.folder.best) == 2
    assert load_checkpoint(run.folder.best).info.validation == {"ap": 0.3, "apr": 0.7}


def test_one_file_is_the_last_and_the_best_head(tmp_path):
    run = Run(tmp_path / "run")
    run.validate(3, ap=0.5)
    run.save(3)
    run.save(3)
    assert os.path.samefile(run.folder.head, run.folder.best)
    assert sorted(path.name for path in run.folder.path.iterdir()) == [
        "best.safetensors",
        "checkpoints",
        "head.safetensors",
        "last.state.safetensors",
        "run.json",
        "run.lock",
    ]


def test_a_resumed_run_knows_the_best_score_so_far(tmp_path):
    first = Run(tmp_path / "run")
    first.validate(1, ap=0.3)
    first.folder.close()
    resumed = Run(tmp_path / "run")
    resumed.validate(2, ap=0.2)
    assert step_of(resumed.folder.best) == 1
    resumed.validate(3, ap=0.4)
    assert step_of(resumed.folder.best) == 3


def test_another_first_score_starts_a_new_best(tmp_path):
    run = Run(tmp_path / "run")
    run.validate(1, accuracy=0.9)
    run.validate(2, ap=0.2, accuracy=0.8)
    assert step_of(run.folder.best) == 2


def test_checkpoints_after_the_saved_state_are_removed(tmp_path):
    """A run that was killed between the head of step 9 and its state is at step 7."""
    run = Run(tmp_path / "run")
    run.save(7)
    shutil.copy(run.folder.head, run.folder.checkpoints / "00000009.safetensors")
    run.folder.close()
    Run(tmp_path / "run").save(8)
    assert kept(run.folder) == [7, 8]


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run = Run(tmp_path / "run", kept_checkpoints=1)
    for step in (1, 2):
        run.validate(step, ap=1 / step)
        run.save(step)
    assert (step_of(run.folder.head), step_of(run.folder.best)) == (2, 1)
    assert not os.path.samefile(run.folder.head, run.folder.checkpoints / "00000002.safetensors")


def kill_at_file_operation(number: int) -> None:
    """Kill this process at its operation of that number that makes a file visible or removes one."""
    left = number

    def counted(original):
        def operation(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return operation

    for name in ("link", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("number", range(9))
def test_a_killed_run_leaves_whole_files_and_can_be_resumed(tmp_path, number):
    def run_until_killed() -> None:
        run = Run(tmp_path / "run", kept_checkpoints=1)
        run.validate(1, ap=0.5)
        run.save(1)
        kill_at_file_operation(number)
        run.validate(2, ap=0.6)
        run.save(2)

    assert was_killed(fork(run_until_killed))
    folder = RunFolder(tmp_path / "run")
    assert step_of(folder.head) >= folder.step_done() >= 1
    assert step_of(folder.best) in (1, 2)
    resumed = Run(tmp_path / "run", kept_checkpoints=1)
    resumed.validate(2, ap=0.6)
    resumed.save(2)
    assert step_of(folder.best) == step_of(folder.head) == folder.step_done() == 2
    assert kept(folder) == [2]
    assert not [path for path in folder.path.rglob("*") if path.name.endswith(".partial")]


def test_one_process_trains_in_a_folder_at_a_time(tmp_path):
    first = Run(tmp_path / "run")
    first.save(1)
    assert RunFolder(tmp_path / "run").is_locked()
    with pytest.raises(InputError, match="another process trains in this folder"):
        Run(tmp_path / "run")
    first.folder.close()
    assert not RunFolder(tmp_path / "run").is_locked()
    Run(tmp_path / "run")


def test_a_resumed_run_keeps_its_id(tmp_path):
    first = Run(tmp_path / "run").folder
    first.close()
    assert first.run_id.startswith("run-2")
    assert Run(tmp_path / "run").folder.run_id == first.run_id
    assert Run(tmp_path / "other" / "run").folder.run_id != first.run_id
