"""The frozen models: their interfaces, registry, weights, and every SAM and CLIP variant.

What a backbone of your own needs (docs/backbones.md) can be imported from here; torch is imported with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionspot.pipeline.backbones.builders import base_provenance
    from regionspot.pipeline.backbones.dtypes import autocast
    from regionspot.pipeline.backbones.protocols import BackboneConfig
    from regionspot.pipeline.backbones.registry import register_encoder, register_localizer
    from regionspot.pipeline.backbones.weights import OfficialFile, load_weights

_MODULES = {
    "BackboneConfig": "protocols",
    "OfficialFile": "weights",
    "autocast": "dtypes",
    "base_provenance": "builders",
    "load_weights": "weights",
    "register_encoder": "registry",
    "register_localizer": "registry",
}
__all__ = [
    "BackboneConfig",
    "OfficialFile",
    "autocast",
    "base_provenance",
    "load_weights",
    "register_encoder",
    "register_localizer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
