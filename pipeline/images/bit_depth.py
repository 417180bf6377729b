"""Convert images of more than 8 bits per channel, or of floats, to 8 bits.

White is the value that the file states or that is usual for its format, if the image is at least a quarter as bright.
Otherwise white is guessed from the image's own values, with a warning: 12-bit values stored in 16 bits would become
nearly black. An image that would still be nearly black is refused.
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
MIN_BRIGHTNESS = 1 / 4  # of white: a darker image was probably stored with another white
PERCENTILES = (0.1, 99.9)  # the range without single dead or hot pixels
MAX_SAMPLED = 2**20  # values from which the range is computed
MIN_VISIBLE = 8  # median of 255
MIN_SHADES = 16  # shades in the upper 8 of 16 bits

_warned: set[str] = set()


class UnscalableError(ValueError):
    """The image cannot be shown in 8 bits; the message says why."""


def is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel with other values than 0 to 255."""
    return image.mode[0] in "IF" or (image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED)


def to_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert a loaded image for which `is_deep` is true to mode L. `name` is used in warnings.

    Raises UnscalableError if most of it would be nearly black, or if no value is finite.
    """
    values, whites = _values(image)
    finite, is_finite = values, np.isfinite(values)
    if not is_finite.any():
        raise UnscalableError("has no finite values")
    if not is_finite.all():
        finite = values[is_finite]
        _warn("not finite", f"{name}: {values.size - finite.size:,} of its values are not finite; NaN becomes black")
    black, white, guessed = _black_and_white(finite, whites)
    # Integers keep their upper 8 bits, as in Pillow's conversion of 16-bit channels.
    upper_bits = finite.dtype.kind != "f" and black == 0 and white >= 255
    scale = (256 / (white + 1), 0.0) if upper_bits else (255 / (white - black), 0.5)
    grey = _to_uint8(values, black, white, *scale)
    if guessed:
        span = f"{finite.min():g} to {finite.max():g}"
        above_black = grey[values > black]
        if above_black.size and np.median(above_black) < MIN_VISIBLE:
            raise UnscalableError(f"has values from {span}, of which 8 bits would show most as black")
        _warn("range", f"{name}: has values from {span} and does not state white; {white:g} is used")
    # Pillow inverts WhiteIsZero images of up to 8 bits only.
    return Image.fromarray(255 - grey if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO else grey)


def _black_and_white(values: NDArray[Any], whites: list[float]) -> tuple[float, float, bool]:
    """Black, white, and whether they are a guess, from the finite values."""
    least, most = values.min().item(), values.max().item()
    low, high = _range(values)
    if least >= 0:
        white = next((white for white in whites if most <= white), None)
        if white is not None and (high >= white * MIN_BRIGHTNESS or most == 0):
            return 0, white, False
        if values.dtype.kind != "f":
            white = 2 ** int(high).bit_length() - 1  # 10, 12 or 14 bits stored in 16
            if low < white / 2:
                return 0, white, True
    if low == high:
        low, high = min(least, 0), max(most, 0)
    return low, high, True


def loses_low_bits(image: Image.Image) -> bool:
    """Whether Pillow will keep only the upper 8 of 16 bits per channel when it loads this image."""
    return not is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def stretch_if_dark(image: Image.Image, name: str) -> Image.Image:
    """Stretch a dark RGB image, made of the upper 8 of 16 bits, to white. `name` is used in warnings.

    Raises UnscalableError if these bits hold too few shades.
    """
    pixels = np.asarray(image)
    _, high = _range(pixels)
    if high >= 256 * MIN_BRIGHTNESS:
        return image
    if high < MIN_SHADES:
        raise UnscalableError(
            f"has 16 bits a channel but no values above {256 * pixels.max().item() + 255:,}, and Pillow reads the "
            "upper 8 bits only; save it with 8 bits, or scaled up to 65,535"
        )
    _warn("16 bits", f"{name}: has dark 16-bit values and does not state white; {256 * high + 255:,} is used")
    return Image.fromarray(_to_uint8(pixels, 0, high, 255 / high, 0.5))


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """The smallest and the largest value, without outliers."""
    sample = values.reshape(-1)[:: max(1, values.size // MAX_SAMPLED)]
    low, high = np.percentile(sample, PERCENTILES, method="nearest")
    return low.item(), high.item()


def _values(image: Image.Image) -> tuple[NDArray[Any], list[float]]:
    """The image's values, and the candidates for white in ascending order."""
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
    """The (first) value of a TIFF tag; `default` for other formats."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _to_uint8(values: NDArray[Any], low: float, high: float, factor: float, offset: float) -> NDArray[np.uint8]:
    """(values - low) * factor + offset, rounded down and clipped to 0 to 255. NaN becomes `low`."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # a lookup table takes less memory than floats
        table = _to_uint8(np.arange(2**16, dtype=np.float32), low, high, factor, offset)
        return cast("NDArray[np.uint8]", table[values])
    floats = np.nan_to_num(values.astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
    floats -= low
    floats *= factor
    floats += offset
    return floats.clip(0, 255, out=floats).astype(np.uint8)


def _warn(kind: str, message: str) -> None:
    """Warn once per process and kind: a folder may contain a million such images."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning("%s; further images of this kind are converted without a warning", message)
