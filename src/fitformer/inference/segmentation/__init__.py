"""Label maps of images: the class of every pixel, by a trained segmenter.

`labels_of` gives the map of an image; `Segmentations` writes those of a folder of images, and goes on where it was
stopped.
"""
