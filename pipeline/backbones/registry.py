"""Localizers and encoders by name: ours, those of installed packages, those that a program registers.

A backbone is built by a class or function that takes a `protocols.BackboneConfig` and returns the model.
Ours are named by text and imported when they are asked for, so a name costs no import of the library behind it.
Other packages add theirs by an entry point in the group `regionspot.localizers` or `regionspot.encoders`, a program by
`register_localizer` and `register_encoder`, and what is only tried out goes by where it is, `package.module:Class`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from regionspot.cache.errors import InputError, unknown_name
from regionspot.pipeline.backbones.protocols import BackboneConfig

Builder = Callable[[BackboneConfig], Any]
PLACE = re.compile(r"([\w.]+):(\w+)")  # package.module:Class


@dataclass(frozen=True)
class BackboneEntry:
    """One backbone, or a family of them that share a beginning.

    builder   a Builder, or where one is
    needs     the package that it does not work without, if regionspot does not bring it
    extra     of regionspot, which brings that package
    """

    builder: Builder | str
    needs: str | None = None
    extra: str | None = None

    @property
    def missing(self) -> bool:
        return self.needs is not None and find_spec(self.needs) is None


@dataclass(frozen=True)
class Registry:
    """Names to entries. `families` maps a beginning, such as "open_clip", to the entry of all names that have it."""

    kind: str
    group: str
    entries: dict[str, BackboneEntry]
    families: Mapping[str, BackboneEntry] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """All names that can be asked for, whether or not their packages are there."""
        return tuple(dict.fromkeys([*self.entries, *self._of_packages()]))

    def register(self, name: str, builder: Builder) -> None:
        """Raises InputError for a name that is taken, or that no feature set can have."""
        if name in self.names():
            raise InputError(f"{self.kind} {name!r}: there is one of this name; take another")
        if name != stored_name(name) or not name:
            raise InputError(f"{self.kind} {name!r}: a name is letters, digits, '_', '-' and '.'")
        self.entries[name] = BackboneEntry(builder)

    def build(self, config: BackboneConfig) -> Any:
        """The model that was asked for. Raises InputError for a name that is unknown or whose package is missing."""
        return self.builder(config.name)(config)

    def builder(self, name: str) -> Builder:
        """What builds the model `name`. Raises InputError as `build` does."""
        entry = self.entries.get(name) or self.families.get(re.split("[:.]", name)[0])
        if entry is not None:
            if entry.missing:
                raise InputError(
                    f"{self.kind} {name!r}: needs the package {entry.needs}, which is not installed; "
                    f"pip install 'regionspot[{entry.extra}]'"
                )
            return _imported(entry.builder, self.kind, name) if isinstance(entry.builder, str) else entry.builder
        if name in (others := self._of_packages()):
            return _imported(others[name].value, self.kind, name)
        if PLACE.fullmatch(name):
            return _imported(name, self.kind, name)
        raise unknown_name(self.kind, name, self._choice())

    def _of_packages(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _choice(self) -> list[str]:
        known = [f"{name} (needs regionspot[{e.extra}])" if e.missing else name for name, e in self.entries.items()]
        families = [f"{beginning}:MODEL[:TAG]" for beginning in self.families]
        return [*known, *self._of_packages(), *families, "package.module:Class"]


def stored_name(name: str) -> str:
    """The name under which features are stored: one path component, so what divides a name becomes a dot."""
    return re.sub(r"[^A-Za-z0-9_.-]", ".", name)


def _imported(place: str, kind: str, name: str) -> Builder:
    module, _, attribute = place.partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{kind} {name!r}: {place} cannot be imported ({error}); install it or mend the name"
        ) from None
    return builder


_SAM = "regionspot.pipeline.backbones.sam:SamLocalizer"
_SAM2 = "regionspot.pipeline.backbones.sam2:Sam2Localizer"
_CLIP = "regionspot.pipeline.backbones.clip:ClipEncoder"

LOCALIZERS = Registry(
    "localizer",
    "regionspot.localizers",
    {name: BackboneEntry(_SAM) for name in ("sam_vit_b", "sam_vit_l", "sam_vit_h", "mobile_sam", "toy_sam")}
    | {
        f"{version}_hiera_{size}": BackboneEntry(_SAM2, needs="sam2", extra="sam2")
        for version in ("sam2", "sam2.1")
        for size in ("tiny", "small", "base_plus", "large")
    },
)
ENCODERS = Registry(
    "encoder",
    "regionspot.encoders",
    {name: BackboneEntry(_CLIP) for name in ("clip_vit_b_16", "clip_vit_l_14", "clip_vit_l_14_336", "toy_clip")},
    {"open_clip": BackboneEntry("regionspot.pipeline.backbones.open_clip_encoder:build")},
)


def register_localizer(name: str, builder: Builder) -> None:
    """Make `builder` what `load_localizer(name)` calls, in this process. Raises InputError for a name that is taken."""
    LOCALIZERS.register(name, builder)


def register_encoder(name: str, builder: Builder) -> None:
    """Make `builder` what `load_encoder(name)` calls, in this process. Raises InputError for a name that is taken."""
    ENCODERS.register(name, builder)
