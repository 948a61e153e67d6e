"""One colour per class, the same in images and plots."""

from __future__ import annotations

import colorsys

# The palette of Okabe and Ito (2008), distinguishable with all common kinds of colour vision; without its black.
_OKABE_ITO = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
)
_GOLDEN_RATIO = 0.618033988749895


def class_color(index: int) -> tuple[int, int, int]:
    """RGB 0..255 of a class index ≥ 0: first a palette for the colour-blind, then hues spaced by the golden ratio."""
    if index < len(_OKABE_ITO):
        return _OKABE_ITO[index]
    hue = (index * _GOLDEN_RATIO) % 1.0
    saturation, value = ((0.85, 0.95), (0.55, 0.85), (0.95, 0.65))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast to an RGB `background`."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
