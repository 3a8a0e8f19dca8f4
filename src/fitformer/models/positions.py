"""Where a token is: learned tables and fixed sin-cos codes (spec section 4)."""

import math

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError

KINDS = ("learned", "sin_cos", "sin_cos2d", "none")
INIT_STD = 0.02


def sin_cos_1d(position: Tensor, width: int) -> Tensor:
    """Sinusoidal code of scalar positions `(...)` as `(..., width)`: all sines, then all cosines.

    Angle i is `position / 10000^(2*(i//2)/width)`; even ones give the sines, odd ones the cosines.
    """
    index = torch.arange(width, device=position.device)
    # Angles reach 1000, where float32 leaves 3e-5: dividing in the reference's order keeps its very rounding.
    rates = 1 / 10000.0 ** (2 * (index // 2) / width)
    angles = position[..., None].float() * rates
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)


def _scaled(code: Tensor) -> Tensor:
    """A sinusoidal code with the deviation of learned tables: a sine's is the root of one half."""
    return code * INIT_STD * 2**0.5


def line_code(length: int, width: int) -> Tensor:
    """Code `(length, width)` of the places on a line, spread over the span 0 to 1000."""
    return sin_cos_1d(torch.arange(length) / max(length - 1, 1) * 1000, width)


def grid_code(rows: int, columns: int, width: int) -> Tensor:
    """Code `(rows * columns, width)` of the cells of a grid, row by row: half the width is the row, half the column.

    A grid of one row or one column is a line.

    Raises:
        InputError: `width` is odd and the grid is not a line.
    """
    if rows == 1 or columns == 1:
        return line_code(rows * columns, width)
    if width % 2:
        raise InputError(f"a 2D sin-cos code needs an even width, not {width}; {width + 1} would do")
    row = line_code(rows, width // 2)[:, None].expand(rows, columns, -1)
    column = line_code(columns, width // 2)[None].expand(rows, columns, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Queries or keys `(r, h, k, e)`, turned by their positions: rotary position embeddings (arXiv 2104.09864, eq. 34).

    Channels i and i + e/2 are a pair, which is turned by the angle `position / 10000^(2i/e)`: the product of a query
    and a key then depends on the difference of their positions alone.

    Args:
        x: e is even. positions: whole numbers `(k,)`, or `(r, k)` for each row its own.
    """
    return turn(x, rotation(positions, x.shape[-1]))


def rotation(positions: Tensor, width: int) -> Tensor:
    """Cosines and sines `(2, k, e/2)`, or `(2, r, 1, k, e/2)`, float64, of the angles that `rotate` turns by."""
    # In float32 an angle would be off by a 20th of a radian at position 1,000,000.
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None] * 10000.0 ** (-pairs / width)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys `(r, h, k, e)`, turned by a `rotation`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = rotation.to(wide.dtype).unbind(0)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _learned(*shape: int) -> nn.Parameter:
    table = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(table, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    return table


class PositionTable(nn.Module):
    """A code for each of `rows * columns` places, `(rows * columns, width)`, learned or fixed.

    `learned` is a parameter drawn from a normal of deviation 0.02 cut at two deviations; `sin_cos` the code of the
    grid (`sin_cos2d` likewise); `none` zeros. Fixed codes are not part of the state: they are made anew with the model.
    """

    weight: Tensor

    @checked
    def __init__(self, kind: str, rows: int, columns: int, width: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"unknown positions {kind!r}; known are {', '.join(KINDS)}")
        check_room(f"a table of {rows} x {columns} positions", rows * columns * width)
        if kind == "learned":
            self.weight = _learned(rows * columns, width)
        else:
            code = torch.zeros(rows * columns, width) if kind == "none" else grid_code(rows, columns, width)
            self.register_buffer("weight", code, persistent=False)

    def forward(self) -> Tensor:
        """The whole table `(rows * columns, width)`."""
        return self.weight

    def at(self, start: int = 0, count: int | None = None) -> Tensor:
        """`count` places of the table `(count, width)` from `start` on, all that are left by default.

        No module call: hooks on modules would meet the parameter itself as an output.
        """
        whole = start == 0 and count in (None, len(self.weight))
        return self.weight if whole else self.weight[start : None if count is None else start + count]


def token_positions(kind: str, tokens_per_group: int, width: int) -> PositionTable:
    """Table `(n, c)` of the places inside a group: a line, or a square for `sin_cos2d`.

    Raises:
        InputError: `sin_cos2d` with a number of tokens that is no square.
    """
    side = math.isqrt(tokens_per_group)
    if kind != "sin_cos2d":
        return PositionTable(kind, 1, tokens_per_group, width)
    if side * side != tokens_per_group:
        near = round(math.sqrt(tokens_per_group)) ** 2
        raise InputError(
            f"sin_cos2d needs a square number of tokens in a group, not {tokens_per_group}; the nearest is {near}"
        )
    return PositionTable(kind, side, side, width)


class GridPositions(nn.Module):
    """Positions of latents whose groups stand at any row and column: images of any size in one model.

    A latent's is the sin-cos code of its group's row and column, half the width each, plus a learned vector for its
    place among the m latents of the group. The code is scaled down to the deviation of learned tables. A group in row
    -1 is a glimpse of the whole: a learned vector takes the place of its row.

    Raises:
        InputError: an odd width.
    """

    @checked
    def __init__(self, latents_per_group: int, width: int) -> None:
        super().__init__()
        if width % 2:
            raise InputError(f"row_column positions need an even latent_dim, not {width}; {width + 1} would do")
        self.slots, self.glimpse = _learned(latents_per_group, width), _learned(width // 2)

    def forward(self, coords: Tensor) -> Tensor:
        """Positions `(..., m, d)` of the latents of groups at `places (..., 2)`, int64 rows and columns."""
        row, column = (_scaled(code) for code in sin_cos_1d(coords, len(self.glimpse)).unbind(-2))
        row = torch.where(coords[..., :1] < 0, self.glimpse, row.to(self.slots.dtype))
        return torch.cat([row, column.to(self.slots.dtype)], dim=-1)[..., None, :] + self.slots


class SharedPositions(nn.Module):
    """Positions of latents that are the same for every group: a learned vector for each of the m in it.

    What a group is, global layers tell by `rotary`, or not at all.
    """

    @checked
    def __init__(self, latents_per_group: int, width: int) -> None:
        super().__init__()
        check_room(f"{latents_per_group} latents of width {width}", latents_per_group * width)
        self.slots = _learned(latents_per_group, width)

    def forward(self, places: Tensor) -> Tensor:
        """Positions `(..., m, d)` of the latents of groups at `places (...)`, int64."""
        return self.slots.expand(*places.shape, -1, -1)


class IndexPositions(SharedPositions):
    """Positions of latents in a sequence of any number of groups.

    A latent's is the sin-cos code of its group's number, scaled down to the deviation of learned tables, plus the
    learned vector of its place in the group.
    """

    def forward(self, places: Tensor) -> Tensor:
        """Positions `(..., m, d)` of the latents of groups at `places (...)`, int64."""
        code = _scaled(sin_cos_1d(places, self.slots.shape[-1]))
        return code.to(self.slots.dtype)[..., None, :] + self.slots


LatentPositions = PositionTable | GridPositions | SharedPositions


def latent_positions(kind: str, num_groups: int | None, latents_per_group: int, width: int) -> LatentPositions:
    """Positions of the latents, which are also their initial values: a table `(t*m, d)`, or codes for any groups.

    Raises:
        InputError: a table for no number of groups, or a kind that latents do not know.
    """
    if kind == "row_column":
        return GridPositions(latents_per_group, width)
    if kind in ("index", "shared"):
        return (IndexPositions if kind == "index" else SharedPositions)(latents_per_group, width)
    if kind not in ("learned", "sin_cos"):
        raise InputError(
            "latents know 'learned', 'sin_cos' (the 2D code of groups x latents), 'row_column', 'index' and 'shared' "
            f"positions, not {kind!r}"
        )
    if num_groups is None:
        raise InputError(
            f"latent_position={kind!r} is a table: give num_groups (or image_size), or take 'row_column' for images, "
            "'index' or 'shared' for sequences"
        )
    return PositionTable(kind, num_groups, latents_per_group, width)
