"""Images, videos and sequences as groups of data tokens, and back (spec section 6).

Each way into groups is one einops pattern, and its inverse is the same pattern read backwards: round trips are exact,
of any dtype, by construction. In the patterns an axis X of the input is cut into gX groups of X patches of pX pixels.
A size is one number for all axes or one number an axis: `(rows, columns)`, for video `(frames, rows, columns)`.
Images of any size, read when they are needed, are in `any_size`.
"""

from fitformer.patching.documents import (
    PackedDocuments,
    pack_documents,
    pack_rows,
    places_in_documents,
    unpack_documents,
)
from fitformer.patching.glimpse import glimpses, glimpses_to_image
from fitformer.patching.grid import PatchGrid
from fitformer.patching.image import (
    extract_patches,
    groups_to_image,
    groups_to_map,
    image_to_groups,
    map_to_groups,
    merge_patches,
)
from fitformer.patching.sequence import (
    bytes_to_tokens,
    groups_to_sequence,
    image_to_pixels,
    pad_to_groups,
    pixels_to_image,
    sequence_to_groups,
    shift_right,
    tokens_to_bytes,
)
from fitformer.patching.video import groups_to_video, video_to_groups

__all__ = [
    "PackedDocuments",
    "PatchGrid",
    "bytes_to_tokens",
    "extract_patches",
    "glimpses",
    "glimpses_to_image",
    "groups_to_image",
    "groups_to_map",
    "groups_to_sequence",
    "groups_to_video",
    "image_to_groups",
    "image_to_pixels",
    "map_to_groups",
    "merge_patches",
    "pack_documents",
    "pack_rows",
    "pad_to_groups",
    "pixels_to_image",
    "places_in_documents",
    "sequence_to_groups",
    "shift_right",
    "tokens_to_bytes",
    "unpack_documents",
    "video_to_groups",
]
