"""How large a pixel is, in microns, as slides and microscope images say it in their several ways."""

import html
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

AT_MAGNIFICATION_1 = 10.0
"""Microns of a pixel at a magnification of 1, by convention: 0.25 at 40, 0.5 at 20."""

# What a magnification is called for pixels below so many microns, as TRIDENT and others have it.
_CALLED = {0.16: 80, 0.2: 60, 0.3: 40, 0.6: 20, 1.2: 10, 2.4: 5}
_UNITS = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
}
# Values of TIFF's tag ResolutionUnit, in microns: inch and centimetre.
_TIFF_UNITS = {2: 25_400.0, 3: 10_000.0}
# Larger pixels are those of printing, such as 85 microns for 300 in an inch, which say nothing of the object.
_LARGEST = 20.0


def magnification_of(microns: float) -> int | None:
    """What pixels of this size are called, such as 40 for 0.25 microns; None of pixels of 2.4 microns and more."""
    return next((power for below, power in _CALLED.items() if microns < below), None)


def of_openslide(properties: Mapping[str, str]) -> float | None:
    """Microns of a pixel by OpenSlide's properties; by the objective alone what is usual for it."""
    said = _number(properties.get("openslide.mpp-x"))
    if said is None and (power := _number(properties.get("openslide.objective-power"))) is not None:
        return AT_MAGNIFICATION_1 / power
    return said


def of_tiff(file: Any, page: Any) -> float | None:
    """Microns of a pixel by OME-XML, by Aperio's description, or by the resolution if it is one of a microscope."""
    if file.is_ome:
        return _of_ome(str(file.ome_metadata))
    if found := re.search(r"^Aperio.*\bMPP ?= ?([\d.eE+-]+)", str(page.description), re.DOTALL):
        return _number(found[1])
    try:
        pixels, of = page.tags.valueof("XResolution")
        microns = _number(_TIFF_UNITS[page.tags.valueof("ResolutionUnit")] * of / pixels)
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        return None
    return microns if microns is not None and microns < _LARGEST else None


def of_ome_zarr(image: Mapping[str, Any], axes: Sequence[str]) -> float | None:
    """Microns of a pixel by the axes and scales of an image of OME-Zarr's `multiscales`."""
    try:
        place = [name.lower() for name in axes].index("x")
        scales = [
            each["scale"][place]
            for said in (image["datasets"][0], image)
            for each in said.get("coordinateTransformations", ())
            if each.get("type") == "scale"
        ]
        unit, scale = _UNITS[image["axes"][place]["unit"].lower()], 1.0
        for each in scales:
            scale *= float(each)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    return _number(unit * scale) if scales else None


def _of_ome(text: str) -> float | None:
    said = re.search(r'\bPhysicalSizeX="([^"]*)"', text)
    unit = re.search(r'\bPhysicalSizeXUnit="([^"]*)"', text)
    size = _number(said[1]) if said else None
    known = _UNITS.get(html.unescape(unit[1])) if unit else 1.0
    return None if size is None or known is None else size * known


def _number(said: Any) -> float | None:
    """A finite number above 0; None of anything else."""
    try:
        found = float(said)
    except (TypeError, ValueError):
        return None
    return found if isfinite(found) and found > 0 else None
