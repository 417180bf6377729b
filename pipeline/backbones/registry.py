"""Localizers and encoders by name: ours, those of installed packages, and those that a program registers.

A backbone is built by a class or function that takes a `protocols.BackboneConfig` and returns the model. Ours are
imported when they are built, so that looking up a name does not import their library. Other packages add theirs by an
entry point in the group `regionspot.localizers` or `regionspot.encoders`; a program calls `register_localizer` or
`register_encoder`; any importable class can be used as `package.module:Class`.
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
IMPORT_PATH = re.compile(r"([\w.]+):(\w+)")  # package.module:Class


@dataclass(frozen=True)
class BackboneEntry:
    """One backbone, or a family of backbones whose names have the same prefix.

    builder   a Builder or its import path
    needs     an optional package that it requires
    extra     the extra of regionspot that installs this package
    """

    builder: Builder | str
    needs: str | None = None
    extra: str | None = None

    @property
    def missing(self) -> bool:
        return self.needs is not None and find_spec(self.needs) is None


@dataclass(frozen=True)
class Registry:
    """Entries by name. `families`: entries by prefix of the name, such as "open_clip"."""

    kind: str
    group: str
    entries: dict[str, BackboneEntry]
    families: Mapping[str, BackboneEntry] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """All known names, whether or not their packages are installed."""
        return tuple(dict.fromkeys([*self.entries, *self._of_packages()]))

    def register(self, name: str, builder: Builder) -> None:
        """Raises InputError for a name that exists already or that a feature set cannot have."""
        if name in self.names():
            raise InputError(f"{self.kind} {name!r}: is registered already; choose another name")
        if name != stored_name(name) or not name:
            raise InputError(f"{self.kind} {name!r}: a name consists of letters, digits, '_', '-' and '.'")
        self.entries[name] = BackboneEntry(builder)

    def build(self, config: BackboneConfig) -> Any:
        """Build the model. Raises InputError for an unknown name or a missing package."""
        return self.builder(config.name)(config)

    def builder(self, name: str) -> Builder:
        """The builder of the model `name`. Raises InputError as `build` does."""
        entry = self.entries.get(name) or self.families.get(re.split("[:.]", name)[0])
        if entry is not None:
            if entry.missing:
                raise InputError(
                    f"{self.kind} {name!r}: needs the package {entry.needs}, which is not installed; "
                    f"pip install 'regionspot[{entry.extra}]'"
                )
            return _import(entry.builder, self.kind, name) if isinstance(entry.builder, str) else entry.builder
        if name in (others := self._of_packages()):
            return _import(others[name].value, self.kind, name)
        if IMPORT_PATH.fullmatch(name):
            return _import(name, self.kind, name)
        raise unknown_name(self.kind, name, self._choices())

    def _of_packages(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _choices(self) -> list[str]:
        own = [
            f"{name} (needs regionspot[{entry.extra}])" if entry.missing else name
            for name, entry in self.entries.items()
        ]
        families = [f"{prefix}:MODEL[:TAG]" for prefix in self.families]
        return [*own, *self._of_packages(), *families, "package.module:Class"]


def stored_name(name: str) -> str:
    """The name of the feature set: one path component, so all separators become dots."""
    return re.sub(r"[^A-Za-z0-9_.-]", ".", name)


def _import(path: str, kind: str, name: str) -> Builder:
    module, _, attribute = path.partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{kind} {name!r}: {path} cannot be imported ({error}); install it or correct the name"
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
    """Register a localizer's builder in this process. Raises InputError for a name that exists already."""
    LOCALIZERS.register(name, builder)


def register_encoder(name: str, builder: Builder) -> None:
    """Register an encoder's builder in this process. Raises InputError for a name that exists already."""
    ENCODERS.register(name, builder)
