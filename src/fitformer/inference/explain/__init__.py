"""Attention and relevance of a classifier on an image of any size, written for viewers.

`attribute` computes both, a value a patch; `HeatMap` lays one out; `write_overlay`, `write_geojson` and `write_tiff`
write it; `Slides` does all that for a folder of images, and goes on where it was stopped.
"""

from fitformer.inference.explain.attribution import Attribution, attribute
from fitformer.inference.explain.geojson import write_geojson
from fitformer.inference.explain.geotiff import write_tiff
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.inference.explain.overlay import write_overlay

__all__ = ["Attribution", "HeatMap", "attribute", "write_geojson", "write_overlay", "write_tiff"]
