"""Images of more than 8 bits a channel, or of floats, as 8 bits: which of their values is white?

It is what the file states, or what its kind usually means by white, if the image is at least a quarter as bright.
Otherwise white is guessed from the image's own values, with a warning: 12 bits that are stored in 16 would come out
nearly black. An image that not even this makes visible is refused.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

# TIFF 6.0, sections 8 and 19.
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT, S_MAX_SAMPLE_VALUE = 258, 262, 281, 339, 341
WHITE_IS_ZERO, SIGNED = 0, 2
FLOAT_WHITES = (1, 255, 65535)
BRIGHT = 1 / 4  # of white: an image whose values all stay below was probably stored with another white
TAILS = (0.1, 99.9)  # per cent; single dead or hot pixels do not decide the range
ENOUGH = 2**20  # values, to tell the range of all
VISIBLE = 8  # of 255
MIN_SHADES = 16  # left of a channel by the upper 8 of its 16 bits

_warned: set[str] = set()


class UnscalableError(ValueError):
    """No scale makes the image visible in 8 bits; the message says why."""


def is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel, of other values than 0 to 255."""
    return image.mode[0] in "IF" or (image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED)


def grey_of(image: Image.Image, name: str) -> Image.Image:
    """A loaded image for which `is_deep` holds, as mode L. Warnings call it `name`.

    Raises UnscalableError where most of it would be nearly black, and where no value is finite.
    """
    values, whites = _values(image)
    finite, known = values, np.isfinite(values)
    if not known.any():
        raise UnscalableError("has no finite values")
    if not known.all():
        finite = values[known]
        _warn("not finite", f"{name}: {values.size - finite.size:,} of its values are not finite; NaN becomes black")
    black, white, guessed = _black_and_white(finite, whites)
    # Of integers the upper 8 bits, as Pillow takes them of 16 bits a channel.
    whole = finite.dtype.kind != "f" and black == 0 and white >= 255
    scale = (256 / (white + 1), 0.0) if whole else (255 / (white - black), 0.5)
    grey = _bytes(values, black, white, *scale)
    if guessed:
        span = f"{finite.min():g} to {finite.max():g}"
        lit = grey[values > black]
        if lit.size and np.median(lit) < VISIBLE:
            raise UnscalableError(f"has values from {span}, of which 8 bits would show most as black")
        _warn("range", f"{name}: nothing says which of its values, {span}, is white; {white:g} is taken")
    # Pillow inverts such images of up to 8 bits only.
    return Image.fromarray(255 - grey if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO else grey)


def _black_and_white(values: NDArray[Any], whites: list[float]) -> tuple[float, float, bool]:
    """Which of the finite values become black and white, and whether that is a guess."""
    least, most = values.min().item(), values.max().item()
    low, high = _range(values)
    if least >= 0:
        white = next((white for white in whites if most <= white), None)
        if white is not None and (high >= white * BRIGHT or most == 0):
            return 0, white, False
        if values.dtype.kind != "f":
            white = 2 ** int(high).bit_length() - 1  # of 10, 12 or 14 bits that are kept in 16
            if low < white / 2:
                return 0, white, True
    if low == high:
        low, high = min(least, 0), max(most, 0)
    return low, high, True


def loses_low_bits(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has channels of 16 bits of which Pillow will keep the upper 8."""
    return not is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def rgb_of_upper_bits(image: Image.Image, name: str) -> Image.Image:
    """RGB of the upper 8 of 16 bits, stretched to its own range where that is dark. Warnings call it `name`.

    Raises UnscalableError where these bits hold too few shades.
    """
    pixels = np.asarray(image)
    _, high = _range(pixels)
    if high >= 256 * BRIGHT:
        return image
    if high < MIN_SHADES:
        raise UnscalableError(
            f"has 16 bits a channel but no values above {256 * pixels.max().item() + 255:,}, and Pillow reads the "
            "upper 8 bits only; save it with 8 bits, or scaled up to 65,535"
        )
    _warn("16 bits", f"{name}: nothing says which of its 16-bit values is white; {256 * high + 255:,} is taken")
    return Image.fromarray(_bytes(pixels, 0, high, 255 / high, 0.5))


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """The least and the largest value, a few outliers aside."""
    some = values.reshape(-1)[:: max(1, values.size // ENOUGH)]
    low, high = np.percentile(some, TAILS, method="nearest")
    return low.item(), high.item()


def _values(image: Image.Image) -> tuple[NDArray[Any], list[float]]:
    """The image's values, and what may be white, in ascending order."""
    values = np.asarray(image)
    signed = _tag(image, SAMPLE_FORMAT, SIGNED if image.mode == "I" else 1) == SIGNED
    if values.dtype.kind == "f":
        whites, full = set(FLOAT_WHITES), np.inf
    else:
        bits = _tag(image, BITS_PER_SAMPLE, 32 if image.mode == "I" else 16)
        full = 2 ** (bits - signed) - 1
        whites = {white for white in (255, 65535, full) if white <= full}
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and not signed:
        values = values.view(np.uint32)  # Pillow's integers are signed
    stated = _tag(image, S_MAX_SAMPLE_VALUE, _tag(image, MAX_SAMPLE_VALUE, 0))
    return values, sorted(whites | {stated} if 0 < stated < full else whites)


def _tag(image: Image.Image, tag: int, default: Any = None) -> Any:
    """A TIFF tag, of several values the first; `default` for other formats."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _bytes(values: NDArray[Any], low: float, high: float, factor: float, offset: float) -> NDArray[np.uint8]:
    """uint8 (values - low) * factor + offset, rounded down, from 0 to 255. NaN counts as `low`."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # a table takes less memory than floats do
        table = _bytes(np.arange(2**16, dtype=np.float32), low, high, factor, offset)
        return cast("NDArray[np.uint8]", table[values])
    floats = np.nan_to_num(values.astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
    floats -= low
    floats *= factor
    floats += offset
    return floats.clip(0, 255, out=floats).astype(np.uint8)


def _warn(kind: str, message: str) -> None:
    """Once a process for each kind: a folder may hold a million such images."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning("%s; further images of this kind are treated alike, without a warning", message)
