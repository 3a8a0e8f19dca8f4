"""What a classifier saw in an image of any size: where its latents looked and what moved its decision, for viewers.

`relevance` computes both, a value a patch; `HeatMap` lays one out; `write_overlay`, `write_geojson` and `write_tiff`
write it; `Slides` does all that for a folder of images, and goes on where it was stopped.
"""

from fitformer.seeing.heatmap import HeatMap
from fitformer.seeing.overlay import write_overlay
from fitformer.seeing.raster import write_tiff
from fitformer.seeing.relevance import Seen, relevance
from fitformer.seeing.shapes import write_geojson

__all__ = ["HeatMap", "Seen", "relevance", "write_geojson", "write_overlay", "write_tiff"]
