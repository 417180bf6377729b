"""The folder of one training run, and resuming it.

    run.json               what the run is: its configuration, and which caches and vocabularies it learns from
    metrics.jsonl          one line an interval
    last.state.safetensors head, optimizer and step of the last checkpoint; all that resuming needs
    head.safetensors       the head at the same step, for evaluation
    curves.png             drawn at the end

A folder holds one run: resuming with another configuration or other caches is refused, for the result would be neither
run's. Only its number of steps may grow; `lengthened` in run.json then says at which step that was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.state_dicts import require_finite
from regionspot.cache.storage.atomic_files import to_json, write_file
from regionspot.fusion.head import FusionHead
from regionspot.fusion.metrics import Metrics
from regionspot.fusion.tensor_file import read_document, read_tensor_file, write_tensor_file

log = logging.getLogger(__name__)

KIND = "training state"
# Of a feature set in run.json: not every version wrote them all. Compared where both records have one.
OPTIONAL = ("shape", "encoding", "dtype")

Identity = Mapping[str, Any]


class RunFolder:
    """Paths of a run and its state on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "last.state.safetensors"
        self.head = path / "head.safetensors"
        self.curves = path / "curves.png"

    def claim(self, identity: Identity, resume: bool) -> None:
        """Make the folder this run's, or see that it already is; a longer run may resume a shorter one.

        Raises InputError when it holds something else, another run, or this run while `resume` is not asked for; and
        when it cannot be written. Nothing in it is touched then.
        """
        if self.record.exists():
            self._claim_again(identity, resume)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path}: is there already and holds no training run; name another folder")
        self._write_record(identity)

    def _claim_again(self, identity: Identity, resume: bool) -> None:
        try:
            held = json.loads(self.record.read_text())
            was, asked = held["config"]["iterations"], identity["config"]["iterations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.record}: cannot be read ({error}); name another folder") from None
        # Through JSON, as the stored one went: a tuple is a list there.
        differences = list(_differences(_comparable(held), _comparable(json.loads(to_json(dict(identity))))))
        if differences:
            more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise InputError(
                f"{self.path}: holds another run: {differences[0]}{more}; name another folder, or ask for the same run"
            )
        if asked < was:
            raise InputError(
                f"{self.path}: holds a run of {was:,} steps, asked for are {asked:,}; a run can be made longer and not "
                f"shorter: ask for {was:,} steps or more, or name another folder"
            )
        done = self.step_done()
        if not resume:
            longer = f" and make it one of {asked:,}" if asked > was else ""
            raise InputError(
                f"{self.path}: holds this run already, at step {done:,} of {was:,}; add --resume to resume it{longer}, "
                "or name another folder"
            )
        if asked > was:
            lengthened = [*held.get("lengthened", []), {"step": done, "from": was, "to": asked}]
            self._write_record({**identity, "lengthened": lengthened})
            log.info(
                "%s: a run of %s steps becomes one of %s; from step %s on with the learning rates of the longer run",
                self.path,
                f"{was:,}",
                f"{asked:,}",
                f"{done + 1:,}",
            )

    def step_done(self) -> int:
        """The step of the last checkpoint; 0 where there is none."""
        if not self.state.exists():
            return 0
        return int((read_document(self.state) or {}).get("step", 0))

    def _write_record(self, identity: Identity) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.record, to_json(dict(identity)))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); name another folder") from None

    def save(self, step: int, head: FusionHead, optimizer: Optimizer, interval: Metrics) -> None:
        """Write the state after `step` steps, whole or not at all; `interval` is the meter's open one."""
        tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
        write_tensor_file(self.state, tensors, {"kind": KIND, "step": step, "interval": interval})

    def restore(self, head: FusionHead, optimizer: Optimizer) -> tuple[int, Metrics | None]:
        """Put the last state into `head` and `optimizer`; its step and interval, 0 and None where none was written yet.

        Raises WeightsError for a state file that is damaged.
        """
        if not self.state.exists():
            return 0, None
        tensors, document = read_tensor_file(self.state)
        if document is None or document.get("kind") != KIND:
            raise WeightsError(f"{self.state}: is no training state; remove it to begin this run again")
        require_finite(self.state, tensors)
        weights, entries = {}, dict[int, dict[str, Any]]()
        for key, tensor in tensors.items():
            part, rest = key.split(".", 1)
            if part == "head":
                weights[rest] = tensor
            else:
                index, name = rest.split(".", 1)
                entries.setdefault(int(index), {})[name] = tensor
        head.load_state_dict(weights)
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(document["step"]), document.get("interval")


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same of two runs: all but their lengths."""
    config = {name: value for name, value in record["config"].items() if name != "iterations"}
    return {**{name: value for name, value in record.items() if name != "lengthened"}, "config": config}


def _differences(held: Any, asked: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON documents, in words, depth first."""
    if isinstance(held, dict) and isinstance(asked, dict):
        keys = held.keys() | asked.keys()
        for key in sorted(keys.difference(OPTIONAL) | (held.keys() & asked.keys())):
            yield from _differences(held.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif isinstance(held, list) and isinstance(asked, list) and len(held) == len(asked):
        for index, (one, other) in enumerate(zip(held, asked, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif held != asked:
        yield f"its {name} is {_short(held)}, asked for is {_short(asked)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
