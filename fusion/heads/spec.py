"""A head's type, shapes and options: what is needed to build it, and what a checkpoint says about it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regionspot.cache.errors import InputError, unknown_name
from regionspot.fusion.head import FusionHead, HeadConfig
from regionspot.fusion.heads.attention_loss import AttentionLossHead
from regionspot.fusion.heads.guided import GuidedHead
from regionspot.fusion.heads.pooled import LinearHead, MlpHead, RoiPoolHead
from regionspot.fusion.heads.prototypes import PrototypeHead


def _fusion(token_dim: int, width: int, text_dim: int, attention_loss: float = 0.0, **options: Any) -> FusionHead:
    config = HeadConfig(token_dim=token_dim, width=width, text_dim=text_dim, **options)
    return AttentionLossHead(config, attention_loss) if attention_loss else FusionHead(config)


HEAD_TYPES: Mapping[str, Callable[..., nn.Module]] = {
    "fusion": _fusion,
    "guided": GuidedHead,
    "linear": LinearHead,
    "mlp": MlpHead,
    "roi_pool": RoiPoolHead,
    "prototypes": PrototypeHead,
}


LARGEST = 2**16  # of the numbers in a checkpoint: a damaged one could ask for a billion layers


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options from `name=value` texts; a value is a JSON number or boolean, or a text. Raises InputError."""
    options: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise InputError(f"head option {text!r}: expected name=value, for example hidden=512")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a head is built from.

    type       one of HEAD_TYPES, or the user's own class: `file.py:Class` or `package.module:Class`
    token_dim  of the location tokens
    width      of the feature map
    text_dim   of the text embeddings
    options    other arguments of the class; JSON values
    """

    type: str = "fusion"
    token_dim: int
    width: int
    text_dim: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own_class(self) -> bool:
        """Whether the head is the user's own class, whose code is imported."""
        return ":" in self.type

    def build(self) -> nn.Module:
        """The head with random weights. Imports the code of the user's own class.

        Raises InputError for an unknown type, code that cannot be imported, and options that the class refuses.
        """
        builder = _own_class(self.type) if self.own_class else HEAD_TYPES.get(self.type)
        if builder is None:
            raise unknown_name("head", self.type, [*HEAD_TYPES, "file.py:Class", "package.module:Class"])
        try:
            head: Any = builder(
                token_dim=self.token_dim, width=self.width, text_dim=self.text_dim, **dict(self.options)
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"head {self.type}: cannot be built with token_dim={self.token_dim}, width={self.width}, "
                f"text_dim={self.text_dim} and the options {dict(self.options)} ({_first_line(error)}); correct "
                f"--head-option, or the class: {_parameters(builder)}"
            ) from error
        if not isinstance(head, nn.Module):
            raise InputError(f"head {self.type}: is a {type(head).__name__}, expected a class of torch modules")
        return head

    def as_json(self) -> dict[str, Any]:
        """Flat, as the files of earlier versions, whose heads all are of type "fusion"; so that is left out."""
        shapes = {"token_dim": self.token_dim, "width": self.width, "text_dim": self.text_dim}
        kind = {} if self.type == "fusion" else {"type": without_folder(self.type)}
        return {**kind, **shapes, **self.options}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> HeadSpec:
        """Raises KeyError for a document without the shapes, TypeError or ValueError for one with other values."""
        options = dict(document)
        kind = str(options.pop("type", "fusion"))
        shapes = {name: options.pop(name) for name in ("token_dim", "width", "text_dim")}
        for name, value in (*shapes.items(), *options.items()):
            if name in shapes and type(value) is not int:
                raise TypeError(f"{name} is {value!r}, expected an integer")
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is {value:.3g}, expected at most {LARGEST:,}")
        return cls(type=kind, **shapes, options=options)


def check_head(spec: HeadSpec, map_tokens: int) -> None:
    """Build a head, and run one of the user's own class on an image of two regions, before a run writes anything.

    `map_tokens` is T of the feature map. Raises InputError as `build` does, and for a class without weights, one that
    fails, or one that returns anything but a vector for each region.
    """
    if not spec.own_class:
        with torch.device("meta"):
            spec.build()
        return
    with torch.random.fork_rng(devices=[]):
        head = spec.build().eval()
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise InputError(f"head {spec.type}: has no weights to train; make them parameters or submodules of the class")
    tokens, boxes = (
        torch.zeros(1, 2, spec.token_dim).half(),
        torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.4, 0.4]]]),
    )
    feature_map = torch.zeros(1, map_tokens, spec.width).half()
    try:
        with torch.no_grad():
            vectors = head(tokens, torch.ones(1, 2, dtype=torch.bool), feature_map, boxes)
    except Exception as error:  # the code is the user's: it may raise anything
        raise InputError(
            f"head {spec.type}: fails on float16 tokens {tuple(tokens.shape)} and map {tuple(feature_map.shape)} "
            f"({_first_line(error)}); --debug shows where"
        ) from error
    expected, shape = (1, 2, spec.text_dim), tuple(getattr(vectors, "shape", ()))
    if shape != expected:
        found = shape or f"a {type(vectors).__name__}"
        raise InputError(
            f"head {spec.type}: returns {found} for tokens {tuple(tokens.shape)}, expected {expected}: a vector for "
            "each region, as wide as the text embeddings"
        )


def without_folder(own_class: str) -> str:
    """`my_head.py:MyHead` for `folder/my_head.py:MyHead`: a file may be moved."""
    source, separator, name = own_class.rpartition(":")
    return f"{Path(source).name}{separator}{name}"


def _own_class(path: str) -> Callable[..., Any]:
    """The class `file.py:Class` or `package.module:Class`. Raises InputError if it cannot be imported."""
    source, _, name = path.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            if spec is None or spec.loader is None:
                raise ImportError(source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        own_class: Callable[..., Any] = getattr(module, name)
    except Exception as error:  # the code is the user's: it may raise anything
        raise InputError(
            f"head {path}: cannot be imported ({_first_line(error)}); expected file.py:Class or package.module:Class"
        ) from error
    return own_class


def _parameters(builder: Callable[..., Any]) -> str:
    names = [*inspect.signature(HeadConfig if builder is _fusion else builder).parameters]
    if builder is _fusion:
        names.append("attention_loss")
    return f"its arguments are {', '.join(names)}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
