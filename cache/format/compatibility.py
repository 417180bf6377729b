"""Which features may be used together: one comparison of everything that determines their values.

    extract    the cache that a run resumes       with what the run would write
    merge      each cache                         with the first
    train      each cache                         with the first
    evaluate   the features a head was trained on with the cache, or with the loaded backbones

The shape and the provenance determine the values, except the fields in INFORMATIVE. How values are stored (encoding,
compression) is compared only where two runs would write into one feature set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regionspot.cache.errors import ProvenanceMismatchError
from regionspot.cache.format.schema import FeatureSet

# Recorded, never a reason to refuse: another torch gives the same features up to rounding, and the origin of weights
# and the logit scale, which is one of them, add nothing to their SHA-256.
INFORMATIVE = ("versions", "weights_origin", "logit_scale")
# Fields that every backbone of this package records, in the order in which differences are reported, with the option of
# `regionspot extract` that sets each. A backbone may record more.
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
# Without the shape and the resize rule, which follow from the others and are missing in older heads.
REPORTED_IF_MISSING = ("model", "weights_sha256", "input_pixels", "preprocess", "exif", "dtype")
SHOWN = 4  # differences in one message; features of another model differ in every field


@dataclass(frozen=True)
class Difference:
    """A field that differs between two descriptions of a feature set."""

    field: str
    expected: Any
    found: Any

    def text(self, template: str) -> str:
        """`template` with {field}, {expected} and {found} filled in; a SHA-256 is cut to 16 digits."""
        field = self.field.removesuffix("_sha256")
        return template.format(field=field, expected=_short(self.expected), found=_short(self.found))


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two descriptions of a feature set.

    differences  fields that determine the values and differ
    missing      fields that only one of them records: older versions and imported tokens lack some
    """

    differences: tuple[Difference, ...]
    missing: tuple[str, ...]

    def text(self, template: str) -> str:
        """The differences, each formatted by `template`, for example "{field} is {found}, there {expected}"."""
        shown = [difference.text(template) for difference in self.differences[:SHOWN]]
        more = len(self.differences) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more else "")

    def options(self) -> str:
        """The options of `regionspot extract` that give the expected values: `--preprocess reference`."""
        values: dict[str, str] = {}
        for difference in self.differences:
            option = OPTIONS.get(difference.field)
            if option in ("--preprocess", "--exif", "--dtype") and difference.field != "resize":
                values[option] = str(difference.expected)
            elif option:
                values.setdefault(option, "...")
        return " ".join(f"{option} {value}" for option, value in values.items())


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Comparison:
    """Compare two descriptions of a feature set, as returned by `description`."""
    before, now = _flat(expected), _flat(found)
    differences = [
        Difference(name, before[name], now[name])
        for name in before.keys() & now.keys()
        if _jsonable(before[name]) != _jsonable(now[name]) and not _is_informative(name)
    ]
    fields = {difference.field for difference in differences}
    if fields & {"model", "input_pixels", "preprocess"}:  # these determine the resize rule, which is a long sentence
        differences = [difference for difference in differences if difference.field != "resize"]
    return Comparison(
        tuple(sorted(differences, key=_order)),
        tuple(field for field in REPORTED_IF_MISSING if (field in before) != (field in now)),
    )


def description(feature_set: FeatureSet) -> dict[str, Any]:
    """The shape and provenance of a feature set."""
    return {"shape": list(feature_set.shape), **feature_set.provenance}


def require_same_features(cache: str, stored: FeatureSet, requested: FeatureSet) -> list[str]:
    """Check that a run that would write `requested` may continue `stored`; returns the informative differences.

    Here a field that only one of them records is a difference too, and so is the encoding. Statistics are not compared:
    they come from a sample, and a run that resumes uses the stored ones. Raises ProvenanceMismatchError with every
    differing field, the stored and the requested value.
    """
    before, now = (_flat({**asdict(feature_set), "statistics": None}) for feature_set in (stored, requested))
    refused: list[str] = []
    informative: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            differences = informative if _is_informative(name.removeprefix("provenance.")) else refused
            differences.append(f"{name} is {before.get(name)!r}, requested {now.get(name)!r}")
    if refused:
        raise ProvenanceMismatchError(
            f"{cache}: feature set {stored.name} differs from the requested one: {'; '.join(refused)}; "
            "use the same settings, or give another cache folder"
        )
    return informative


def _is_informative(field: str) -> bool:
    return field.partition(".")[0] in INFORMATIVE


def _order(difference: Difference) -> tuple[int, str]:
    names = list(OPTIONS)
    return (names.index(difference.field) if difference.field in OPTIONS else len(names), difference.field)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings flattened to dotted names."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from walk(f"{name}.{key}" if name else key, inner)
        else:
            yield name, value

    return dict(walk("", fields))


def _jsonable(value: Any) -> Any:
    """A value as JSON restores it: a provenance in memory may hold tuples where a stored one has lists."""
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:16]
    return text if len(text) <= 60 else f"{text[:57]}..."
