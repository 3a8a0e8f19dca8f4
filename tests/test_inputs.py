"""Images that do not go with the model: one error."""

import numpy as np
import pytest

from fitformer import FITImageEncoder
from fitformer.errors import InputError
from fitformer.tiling import PixelArray


def pixels_of(seed, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_what_is_no_image_is_said_in_a_line():
    encoder = FITImageEncoder.from_preset(
        "tiny", image_size=None, group_size=16, patch_size=8, num_classes=2, latent_position="row_column"
    )
    with pytest.raises(InputError, match="no images"):
        encoder([])
    with pytest.raises(InputError, match=r"given as ndarray: wrap an array as .*PixelArray\(\.\.\.\)"):
        encoder([pixels_of(0)])
    with pytest.raises(InputError, match=r"given as str: .*open_image"):
        encoder(["slide.tif"])
    assert encoder([PixelArray(pixels_of(0))]).shape == (1, 2)
