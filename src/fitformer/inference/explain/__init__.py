"""What a classifier's decision on an image rests on, written for viewers.

`explain` gives a label and its maps, a value a patch, by one of three methods: `leave_out`, which measures what each
group adds, `attribute` and attention. `HeatMap` lays a map out; `write_overlay`, `write_geojson` and `write_tiff` write
it; `Slides` does all that for a folder of images, and goes on where it was stopped.
"""

from fitformer.inference.explain.attribution import Attribution, attribute
from fitformer.inference.explain.explanation import Explanation, explain
from fitformer.inference.explain.geojson import write_geojson
from fitformer.inference.explain.geotiff import write_tiff
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.inference.explain.leave_out import LeftOut, leave_out
from fitformer.inference.explain.overlay import write_overlay

__all__ = [
    "Attribution", "Explanation", "HeatMap", "LeftOut", "attribute", "explain", "leave_out", "write_geojson",
    "write_overlay", "write_tiff",
]  # fmt: skip
