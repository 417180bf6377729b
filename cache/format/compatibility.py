"""Which features may be used together: all that decides their numbers, compared by one function.

    extract    the cache that a run resumes     with what the run would write
    merge      every cache                      with the first
    train      every cache                      with the first
    evaluate   what the head was trained on     with the cache, or with the backbones that are loaded

All that a provenance states decides the numbers, except UNDECISIVE; so does the shape. How the numbers are stored
(encoding, compression) is compared only where one feature set is to be written by two runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regionspot.cache.errors import ProvenanceMismatchError
from regionspot.cache.format.schema import FeatureSet

# Recorded and never refused: another torch gives the same features up to rounding, and where weights were found says
# nothing that their SHA-256 does not.
UNDECISIVE = ("versions", "weights_origin")
# What every backbone of this package states, in the order in which differences are named, with the option of
# `regionspot extract` that asks for a value. A backbone may state more.
OPTIONS = {
    "model": "--preset",
    "weights_sha256": "--weights",
    "input_pixels": "--preset",
    "shape": "--preset",
    "preprocess": "--preprocess",
    "resize": "--preprocess",
    "exif": "--exif",
    "dtype": "--dtype",
}
# Not the shape and the resize rule, which follow from the others and which older heads do not record.
TOLD_WHEN_UNSTATED = ("model", "weights_sha256", "input_pixels", "preprocess", "exif", "dtype")
SHOWN = 4  # differences in one message; features of another model differ in everything


@dataclass(frozen=True)
class Difference:
    """One field of two descriptions of a feature set that is not the same in both."""

    field: str
    expected: Any
    found: Any

    def text(self, form: str) -> str:
        """`form` with {field}, {expected} and {found} filled in; a SHA-256 by its first 16 digits."""
        field = self.field.removesuffix("_sha256")
        return form.format(field=field, expected=_short(self.expected), found=_short(self.found))


@dataclass(frozen=True)
class Comparison:
    """What two descriptions of a feature set have not in common.

    deciding    fields that decide the numbers and differ
    unstated    fields that only one of them states: records of older versions and of imported tokens lack some
    undecisive  fields that differ and decide nothing
    """

    deciding: tuple[Difference, ...]
    unstated: tuple[str, ...]
    undecisive: tuple[Difference, ...]

    def text(self, form: str) -> str:
        """The deciding differences, each in the words of `form`, as in "{field} is {found}, there {expected}"."""
        shown = [each.text(form) for each in self.deciding[:SHOWN]]
        more = len(self.deciding) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more else "")

    def options(self) -> str:
        """The options of `regionspot extract` that ask for what was expected: `--preprocess reference`."""
        asked: dict[str, str] = {}
        for each in self.deciding:
            option = OPTIONS.get(each.field)
            if option in ("--preprocess", "--exif", "--dtype") and each.field != "resize":
                asked[option] = str(each.expected)
            elif option:
                asked.setdefault(option, "...")
        return " ".join(f"{option} {value}" for option, value in asked.items())


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Comparison:
    """Hold two descriptions of a feature set, as `description` gives them, against each other."""
    was, now = _flat(expected), _flat(found)
    shared = was.keys() & now.keys()
    differing = [Difference(name, was[name], now[name]) for name in shared if _plain(was[name]) != _plain(now[name])]
    deciding = [each for each in differing if not _is_undecisive(each.field)]
    fields = {each.field for each in deciding}
    if fields & {"model", "input_pixels", "preprocess"}:  # the resize rule follows from these, in a long sentence
        deciding = [each for each in deciding if each.field != "resize"]
    return Comparison(
        tuple(sorted(deciding, key=_order)),
        tuple(field for field in TOLD_WHEN_UNSTATED if (field in was) != (field in now)),
        tuple(each for each in differing if _is_undecisive(each.field)),
    )


def description(feature_set: FeatureSet) -> dict[str, Any]:
    """All that decides the numbers of a feature set, and what is only recorded: its shape and its provenance."""
    return {"shape": list(feature_set.shape), **feature_set.provenance}


def require_same_features(cache: str, stored: FeatureSet, asked: FeatureSet) -> list[str]:
    """Undecisive differences, as text, when a feature set may be written on by whoever would write `asked`.

    Here a field that only one of them states is a difference too, and so is the encoding. Statistics are not compared:
    they are a sample's, and whoever resumes a cache takes those that it has. Raises ProvenanceMismatchError naming
    every field that differs, what is stored and what was asked for.
    """
    was, now = (_flat({**asdict(each), "statistics": None}) for each in (stored, asked))
    refused: list[str] = []
    told: list[str] = []
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            kept = told if _is_undecisive(name.removeprefix("provenance.")) else refused
            kept.append(f"{name} is {was.get(name)!r}, asked for {now.get(name)!r}")
    if refused:
        raise ProvenanceMismatchError(
            f"{cache}: feature set {stored.name} was made otherwise than asked for: {'; '.join(refused)}; "
            "ask for the same, or give another cache folder"
        )
    return told


def _is_undecisive(field: str) -> bool:
    return field.partition(".")[0] in UNDECISIVE


def _order(difference: Difference) -> tuple[int, str]:
    names = list(OPTIONS)
    return (names.index(difference.field) if difference.field in OPTIONS else len(names), difference.field)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that is no mapping under its dotted name."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from walk(f"{name}.{key}" if name else key, inner)
        else:
            yield name, value

    return dict(walk("", fields))


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON: a provenance in memory may hold tuples where a stored one has lists."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:16]
    return text if len(text) <= 60 else f"{text[:57]}..."
