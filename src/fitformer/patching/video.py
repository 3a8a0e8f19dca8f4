"""Video as space-time groups of space-time patches, and back: groups and patches stand frame by frame, row by row."""

from einops import rearrange
from torch import Tensor

from fitformer._support.checks import checked
from fitformer.patching.sizes import Size, axis_lengths, check_axes, check_groups, inverse_pattern

VIDEO = "b (gf f pf) (gh h ph) (gw w pw) ch -> b (gf gh gw) (f h w) (pf ph pw ch)"


@checked
def video_to_groups(video: Tensor, group_size: Size, patch_size: Size) -> Tensor:
    """Cut video `(b, T, H, W, ch)` into space-time groups of space-time patches: `(b, t, n, pt * ph * pw * ch)`.

    Raises:
        InputError: not five axes; sizes that do not divide.
    """
    check_axes(video, "video (b, frames, H, W, channels)", 5)
    return rearrange(video, VIDEO, **axis_lengths(video.shape[1:4], group_size, patch_size, "fhw"))


@checked
def groups_to_video(x: Tensor, video_size: Size, group_size: Size, patch_size: Size) -> Tensor:
    """Put space-time groups back into video `(b, T, H, W, ch)`: the inverse of `video_to_groups`.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide.
    """
    lengths = axis_lengths(video_size, group_size, patch_size, "fhw")
    check_groups(x, lengths)
    return rearrange(x, inverse_pattern(VIDEO), **lengths)
