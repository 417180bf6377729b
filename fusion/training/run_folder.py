"""The folder of one training run, and resuming it.

    run.json               configuration, caches and vocabularies of the run, and the id by which trackers know it
    run.lock               locked while a process trains
    metrics.jsonl          one line per interval
    last.state.safetensors head, optimizer and step of the last checkpoint: everything that resuming needs
    head.safetensors       the head at the same step, for evaluation
    best.safetensors       the head with the best validation score, if the run is validated; its header holds the score
    checkpoints/           the heads of the last few checkpoints, named by their step: 00002000.safetensors
    curves.png             drawn at the end

Every file appears whole or not at all. The head of a step is one file with several hard links where the file system has
links, and several copies elsewhere. Only the last checkpoint keeps the optimizer, which is twice the size of a head.

A folder holds one run: resuming with another configuration or other caches is refused. Only the number of steps may
grow; `lengthened` in run.json then records at which step.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from torch import nn
from torch.optim import Optimizer

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.state_dicts import require_finite
from regionspot.cache.storage.atomic_files import partial_path, remove_abandoned, sync_folder, to_json, write_file
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.tensor_file import read_document, read_tensor_file, write_tensor_file
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.training.metrics import Metrics

log = logging.getLogger(__name__)

KIND = "training state"
SAMPLER = "cache loader"  # which sampler the batches of the saved steps came from
# Fields of a feature set in run.json that older versions did not write. Compared if both records have them.
OPTIONAL = ("shape", "encoding", "dtype")
KEPT_CHECKPOINTS = 3

Identity = Mapping[str, Any]


class RunFolder:
    """Paths of a run and its state on disk."""

    def __init__(self, path: Path, kept_checkpoints: int = KEPT_CHECKPOINTS) -> None:
        self.path, self._kept_checkpoints = path, kept_checkpoints
        self.record = path / "run.json"
        self.lock = path / "run.lock"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "last.state.safetensors"
        self.head = path / "head.safetensors"
        self.best = path / "best.safetensors"
        self.checkpoints = path / "checkpoints"
        self.curves = path / "curves.png"
        self.run_id = path.name  # of a run that an earlier version started
        self._lock: IO[bytes] | None = None
        self._best_step = -1  # that this process wrote

    def claim(self, identity: Identity, resume: bool) -> None:
        """Create the folder for this run, or check that it holds this run; a longer run may resume a shorter one.

        It is locked until `close`. Raises InputError if it holds something else or another run, if it holds this run
        and `resume` is False, if another process trains in it, and if it cannot be written. It is unchanged then.
        """
        if self.record.exists():
            self._check_same_run(identity, resume)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path}: exists and holds no training run; name another folder")
        self.run_id = f"{self.path.absolute().name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        self._write_record(identity)

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_locked(self) -> bool:
        """Whether some process trains in this folder."""
        try:
            with self.lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no such file, or the file system has no locks
            return False
        return False

    def _take_lock(self) -> None:
        """Two processes in one folder would each remove the other's files. A lock ends with its process."""
        if self._lock is not None:
            return
        self._lock = self.lock.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(
                f"{self.path}: another process trains in this folder; wait for it or stop it, or name another folder"
            ) from None
        except OSError:  # the file system has no locks
            log.debug("%s: cannot be locked", self.lock)

    def _check_same_run(self, identity: Identity, resume: bool) -> None:
        try:
            saved = json.loads(self.record.read_text())
            old_steps, new_steps = saved["config"]["iterations"], identity["config"]["iterations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.record}: cannot be read ({error}); name another folder") from None
        # Through JSON, like the saved record: a tuple is a list there.
        differences = list(_differences(_comparable(saved), _comparable(json.loads(to_json(dict(identity))))))
        if differences:
            more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise InputError(
                f"{self.path}: holds another run: {differences[0]}{more}; name another folder, or use the same options"
            )
        if new_steps < old_steps:
            raise InputError(
                f"{self.path}: holds a run of {old_steps:,} steps, more than {new_steps:,}; a run can be made longer "
                f"but not shorter: train for {old_steps:,} steps or more, or name another folder"
            )
        done = self.step_done()
        if not resume:
            longer = f" and make it a run of {new_steps:,}" if new_steps > old_steps else ""
            raise InputError(
                f"{self.path}: holds this run already, at step {done:,} of {old_steps:,}; add --resume to resume it"
                f"{longer}, or name another folder"
            )
        self.run_id = saved.get("id", self.run_id)
        self._take_lock()
        for folder in (self.path, self.checkpoints):
            remove_abandoned(folder)  # what a killed run was writing
        if new_steps > old_steps:
            lengthened = [*saved.get("lengthened", []), {"step": done, "from": old_steps, "to": new_steps}]
            self._write_record({**identity, "lengthened": lengthened})
            log.info(
                "%s: a run of %s steps becomes a run of %s; from step %s on with the learning rates of the longer run",
                self.path,
                f"{old_steps:,}",
                f"{new_steps:,}",
                f"{done + 1:,}",
            )

    def step_done(self) -> int:
        """The step of the last checkpoint; 0 if there is none."""
        if not self.state.exists():
            return 0
        return int((read_document(self.state) or {}).get("step", 0))

    def _write_record(self, identity: Identity) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            write_file(self.record, to_json({**identity, "id": self.run_id}))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); name another folder") from None

    def save(self, spec: HeadSpec, head: nn.Module, info: HeadInfo, optimizer: Optimizer, interval: Metrics) -> None:
        """Write the checkpoint of `info.step`; `interval` is the open interval of the meter.

        The head's older checkpoints are removed, up to the last few. Raises OSError if a file cannot be written.
        """
        self.checkpoints.mkdir(exist_ok=True)
        path = self.checkpoints / f"{info.step:08d}.safetensors"
        if self._best_step == info.step:
            _link(self.best, path)
        else:
            save_checkpoint(path, spec, head, info)
        _link(path, self.head)
        tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
        # After the head, because it marks the step as done.
        document = {"kind": KIND, "step": info.step, "interval": interval, "sampler": SAMPLER}
        write_tensor_file(self.state, tensors, document)
        self._remove_old_checkpoints(info.step)

    def keep_best(self, spec: HeadSpec, head: nn.Module, info: HeadInfo, scores: Mapping[str, float]) -> None:
        """Make this head, of `info.step`, the best one if its first score is higher than that of the best so far.

        The best so far may be of an earlier process: its file states its scores. One with another first score is
        replaced. Raises OSError if the file cannot be written.
        """
        name, score = next(iter(scores.items()))
        best = {}
        if self.best.exists():
            best = (read_document(self.best) or {}).get("info", {}).get("validation", {})
        if score > best.get(name, -math.inf):  # never if it is NaN
            save_checkpoint(self.best, spec, head, replace(info, validation=dict(scores)))
            self._best_step = info.step

    def _remove_old_checkpoints(self, step: int) -> None:
        by_step = {int(path.stem): path for path in self.checkpoints.glob("*.safetensors") if path.stem.isdecimal()}
        kept = sorted(done for done in by_step if done <= step)[-self._kept_checkpoints :]
        for done, path in by_step.items():
            if done not in kept:  # later ones are of a run that was killed before it saved the state
                path.unlink(missing_ok=True)

    def restore(self, head: nn.Module, optimizer: Optimizer) -> tuple[int, Metrics | None]:
        """Load the last state into `head` and `optimizer`. Returns its step and interval, or 0 and None without one.

        Raises WeightsError for a damaged state file.
        """
        if not self.state.exists():
            return 0, None
        tensors, document = read_tensor_file(self.state)
        if document is None or document.get("kind") != KIND:
            raise WeightsError(f"{self.state}: is no training state; remove it to start this run again")
        if document.get("sampler") != SAMPLER:
            log.warning(
                "%s: an earlier version saved it and shuffled the images differently; further steps read the images in "
                "this version's order",
                self.state,
            )
        require_finite(self.state, tensors)
        weights, entries = {}, dict[int, dict[str, Any]]()
        for key, tensor in tensors.items():
            prefix, name = key.split(".", 1)
            if prefix == "head":
                weights[name] = tensor
            else:
                index, entry = name.split(".", 1)
                entries.setdefault(int(index), {})[entry] = tensor
        head.load_state_dict(weights)
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(document["step"]), document.get("interval")


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, or a copy where the file system has no hard links."""
    partial = partial_path(target)
    try:
        os.link(source, partial)
    except OSError:
        write_file(target, source.read_bytes())
        return
    os.replace(partial, target)
    # os.replace does nothing if both are names of one file already.
    partial.unlink(missing_ok=True)
    sync_folder(target.parent)


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run record that must not change: all except its length.

    Earlier versions wrote fewer fields of the configuration; they trained as the defaults of the others do.
    """
    config = {**asdict(TrainConfig()), **record["config"]}
    del config["iterations"]
    return {**{name: value for name, value in record.items() if name not in ("lengthened", "id")}, "config": config}


def _differences(saved: Any, new: Any, name: str = "") -> Iterator[str]:
    """One sentence for each difference between two JSON documents, depth first."""
    if isinstance(saved, dict) and isinstance(new, dict):
        keys = saved.keys() | new.keys()
        for key in sorted(keys.difference(OPTIONAL) | (saved.keys() & new.keys())):
            yield from _differences(saved.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(saved, list) and isinstance(new, list) and len(saved) == len(new):
        for index, (saved_item, new_item) in enumerate(zip(saved, new, strict=True)):
            yield from _differences(saved_item, new_item, f"{name}[{index}]")
    elif saved != new:
        yield f"its {name} is {_short(saved)}, not {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
