"""Round trips over many sizes, an obvious twin made of slices, the reference's numbers, and each bad input."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer import patching as g
from fitformer.errors import InputError
from fitformer.patching.any_size import GroupedImage, PixelArray


def for_any(*strategies):
    thorough = settings(deadline=None, derandomize=True, max_examples=40, database=None)
    return lambda test: thorough(given(*strategies)(test))


DTYPES = [torch.float32, torch.uint8, torch.float16, torch.int64, torch.bool, torch.complex64]
ORDERS = ["raster", "snake"]
side = st.integers(1, 3)


def numbers(*shape, dtype=torch.int64):
    """All different where the type can tell them apart, so that no permutation goes unseen."""
    return torch.arange(int(np.prod(shape))).view(shape).to(dtype)


@st.composite
def cuts(draw, axes=2):
    """(whole, group, patch) sizes that divide, with different numbers along the axes."""
    groups, patches, pixels = (tuple(draw(side) for _ in range(axes)) for _ in range(3))
    group = tuple(n * p for n, p in zip(patches, pixels))
    return tuple(k * n for k, n in zip(groups, group)), group, pixels


def obvious_groups(images, group, patch, snake):
    """Sub-images and patches cut out one by one: slow, and plainly what the spec says."""
    (H, W), (gh, gw), (ph, pw) = images.shape[1:3], group, patch
    groups = []
    for top, left in product(range(0, H, gh), range(0, W, gw)):
        sub, tokens = images[:, top : top + gh, left : left + gw], []
        for i, y in enumerate(range(0, gh, ph)):
            row = [sub[:, y : y + ph, x : x + pw].flatten(1) for x in range(0, gw, pw)]
            tokens += row[::-1] if snake and i % 2 else row
        groups.append(torch.stack(tokens, 1))
    return torch.stack(groups, 1)


# --- images ---


@for_any(cuts(), st.integers(1, 5), st.sampled_from(ORDERS), st.sampled_from(DTYPES))
def test_images_are_grouped_as_by_hand_and_come_back(cut, channels, order, dtype):
    image, group, patch = cut
    images = numbers(2, *image, channels, dtype=dtype)
    x = g.image_to_groups(images, group, patch, order)
    assert torch.equal(x, obvious_groups(images, group, patch, order == "snake"))
    assert torch.equal(g.groups_to_image(x, image, group, patch, order), images)


@for_any(cuts(), st.integers(1, 5), st.sampled_from(ORDERS))
def test_patches_are_the_groups_of_one_group(cut, channels, order):
    image, _, patch = cut
    images = numbers(2, *image, channels)
    patches = g.extract_patches(images, patch, order)
    assert torch.equal(patches, obvious_groups(images, image, patch, order == "snake")[:, 0])
    assert torch.equal(g.merge_patches(patches, image, patch, order), images)


@for_any(cuts(), st.integers(1, 5), st.sampled_from(ORDERS))
def test_maps_put_each_token_where_its_patch_was(cut, width, order):
    image, group, patch = cut
    rows, columns = (i // p for i, p in zip(image, patch))
    maps = numbers(2, width, rows, columns)
    # Every pixel of a patch carries its patch's feature: the groups of that image are the groups of the map.
    pixels = maps.permute(0, 2, 3, 1).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    x = g.image_to_groups(pixels, group, patch, order)[..., :width]
    assert torch.equal(g.groups_to_map(x, image, group, patch, order), maps)
    assert torch.equal(g.map_to_groups(maps, image, group, patch, order), x)


def test_neighbours_in_snake_order_are_neighbours_in_the_image():
    y, x = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    coords = g.extract_patches(torch.stack([y, x], -1)[None], 1, "snake")[0]
    assert (coords.diff(dim=0).abs().sum(-1) == 1).all()


def test_one_number_and_numpy_numbers_are_sizes():
    images = numbers(1, 8, 8, 1)
    assert torch.equal(g.image_to_groups(images, 4, 2), g.image_to_groups(images, np.array([4, 4]).tolist(), (2, 2)))
    assert torch.equal(g.image_to_groups(images, np.int64(4), 2), g.image_to_groups(images, 4, 2))


@for_any(cuts(), st.integers(1, 4))
def test_a_grid_says_the_numbers_that_the_tensors_have(cut, channels):
    image, group, patch = cut
    grid = g.PatchGrid(image, group, patch, channels)
    images = numbers(2, *image, channels)
    x = grid.group(images)
    assert x.shape == (2, grid.num_groups, grid.tokens_per_group, grid.token_dim)
    assert grid.shape == (image[0] // group[0], image[1] // group[1])
    assert torch.equal(grid.ungroup(x), images)
    assert torch.equal(grid.map(x), g.groups_to_map(x, image, group, patch))


@for_any(cuts(), st.integers(1, 4))
def test_an_image_in_a_file_is_cut_as_one_in_memory_by_either_grid(cut, channels):
    image, group, patch = cut
    pixels = numbers(1, *image, channels)
    one, any_size = g.PatchGrid(image, group, patch, channels), g.PatchGrid(None, group, patch, channels)
    for grid in (one, any_size):
        x, mask = GroupedImage(PixelArray(pixels[0]), grid).read(slice(None))
        assert torch.equal(x, one.group(pixels))
        assert mask is None
    assert any_size.cover(*image) == one.shape
    assert (any_size.num_groups, any_size.shape, any_size.any_size, one.any_size) == (None, None, True, False)
    with pytest.raises(InputError, match=f"{image[0]} x {image[1]}.*{2 * image[0]} x {image[1]}"):
        GroupedImage(PixelArray(pixels[0]), g.PatchGrid((2 * image[0], image[1]), group, patch, channels))


def test_equal_cuts_are_equal_and_hash_alike():
    assert g.PatchGrid(16, [8, 8], 2) == g.PatchGrid((16, 16), 8, 2)
    assert hash(g.PatchGrid(16, [8, 8], 2)) == hash(g.PatchGrid((16, 16), 8, 2))


def test_gradients_flow_and_graphs_compile_whole():
    grid = g.PatchGrid((8, 12), 4, 2)
    there_and_back = lambda images: grid.ungroup(grid.group(images)) * 2  # noqa: E731
    images = torch.rand(2, 8, 12, 3, requires_grad=True)
    there_and_back(images).sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 2))
    compiled = torch.compile(there_and_back, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), there_and_back(images))


def test_grouping_exports_with_a_batch_of_any_size():
    class ThereAndBack(torch.nn.Module):
        def forward(self, images):
            x = g.image_to_groups(images, 4, 2, "snake")
            return x, g.groups_to_map(x, (8, 12), 4, 2, "snake")

    batch = {"images": {0: torch.export.Dim("b", min=2)}}
    program = torch.export.export(ThereAndBack(), (torch.rand(3, 8, 12, 3),), dynamic_shapes=batch)
    images = torch.rand(5, 8, 12, 3)
    for exported, plain in zip(program.module()(images), ThereAndBack()(images)):
        assert torch.equal(exported, plain)


# --- glimpses ---


@for_any(cuts(), st.integers(0, 3), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.uint8]))
def test_glimpses_come_back_as_the_image(cut, copies, shuffle, dtype):
    image, group, patch = cut
    images = (torch.rand(3, *image, 2, generator=torch.Generator().manual_seed(1)) * 255).to(dtype)
    x, y = g.glimpses(images, group, patch, copies, shuffle)
    assert x.dtype == dtype
    assert y.is_floating_point()
    assert torch.equal(g.glimpses_to_image(x, y, image, group, patch, copies), images)


def test_shuffled_glimpses_are_the_unshuffled_ones_where_the_index_says():
    images = torch.rand(4, 12, 8, 3)
    straight, order = g.glimpses(images, (6, 4), 2, copies=2)
    shuffled, y = g.glimpses(images, (6, 4), 2, copies=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order, torch.eye(6)[:, None].expand(4, 6, 1, 6))
    assert torch.equal(torch.einsum("bsit,btnc->bsnc", y, straight), shuffled)
    assert len({tuple(coords) for coords in y[:, :, 0].argmax(-1).tolist()}) > 1, "each example has its own order"
    assert torch.equal(y.sum(1), torch.ones(4, 1, 6)), "every group stands somewhere once"


def test_the_generator_alone_decides_the_shuffling():
    def shuffled(seed):
        return g.glimpses(torch.ones(4, 8, 8, 1), 2, 1, shuffle=True, generator=torch.Generator().manual_seed(seed))[1]

    assert torch.equal(shuffled(5), shuffled(5))
    assert not torch.equal(shuffled(5), shuffled(6))


@for_any(st.integers(1, 6), st.integers(1, 6))
def test_a_glimpse_samples_the_middles_of_the_blocks_it_shrinks(rows, columns):
    # Bilinear, no anti-aliasing: the middle pixel of a block of odd size, the mean of the middle two of an even one.
    images = torch.rand(1, 3 * rows, 2 * columns, 2)
    blocks = images.view(3, rows, 2, columns, 2)
    middle = lambda k: [(k - 1) // 2, k // 2]  # noqa: E731
    expected = blocks[:, middle(rows)].mean(1)[:, :, middle(columns)].mean(2)
    x, _ = g.glimpses(images, (3, 2), 1)
    torch.testing.assert_close(x[0, 0], expected.flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("value", [0, 1])
def test_a_flat_image_has_flat_glimpses(dtype, value):
    x, _ = g.glimpses(torch.full((1, 12, 8, 3), value, dtype=dtype), (3, 4), 1)
    assert (x == value).all()


# --- pixels, sequences, bytes ---


@for_any(cuts(), st.integers(1, 4), st.sampled_from(ORDERS))
def test_pixels_come_back(cut, channels, order):
    image, _, patch = cut
    images = numbers(2, *image, channels, dtype=torch.uint8)
    tokens = g.image_to_pixels(images, patch, order)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, g.extract_patches(images, patch, order).long())
    back = g.pixels_to_image(tokens, image, patch, channels, order)
    assert back.dtype == torch.uint8
    assert torch.equal(back, images)


@for_any(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (3,)]))
def test_sequences_come_back_in_order(b, t, n, rest):
    tokens = numbers(b, t * n, *rest)
    x = g.sequence_to_groups(tokens, n)
    assert torch.equal(x, tokens.view(b, t, n, *rest))
    assert torch.equal(g.groups_to_sequence(x), tokens)


@for_any(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_the_shift_runs_through_the_whole_sequence(b, t, n):
    targets = numbers(b, t, n) + 1
    inputs = g.shift_right(targets)
    assert inputs.shape == targets.shape
    for example, given_ in zip(targets.flatten(1).tolist(), inputs.flatten(1).tolist()):
        assert given_ == [0, *example[:-1]]


@for_any(st.binary(max_size=300))
def test_bytes_come_back(data):
    for buffer in (data, bytearray(data), memoryview(data)):
        tokens = g.bytes_to_tokens(buffer)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == list(data)
        assert g.tokens_to_bytes(tokens) == data


# --- video ---


@for_any(cuts(axes=3), st.integers(1, 3), st.sampled_from(DTYPES))
def test_video_comes_back(cut, channels, dtype):
    size, group, patch = cut
    video = numbers(2, *size, channels, dtype=dtype)
    x = g.video_to_groups(video, group, patch)
    assert x.shape[1:3] == (
        np.prod([s // k for s, k in zip(size, group)]),
        np.prod([k // p for k, p in zip(group, patch)]),
    )
    assert torch.equal(g.groups_to_video(x, size, group, patch), video)


@for_any(cuts(), st.integers(1, 3))
def test_video_cut_in_single_frames_is_its_images_one_after_the_other(cut, channels):
    image, group, patch = cut
    video = numbers(2, 3, *image, channels)
    frames = [g.image_to_groups(video[:, k], group, patch) for k in range(3)]
    assert torch.equal(g.video_to_groups(video, (1, *group), (1, *patch)), torch.cat(frames, dim=1))


def test_a_space_time_patch_holds_its_frames_one_after_the_other():
    video = numbers(1, 4, 6, 6, 2)
    x = g.video_to_groups(video, (4, 6, 6), (2, 3, 3))
    assert torch.equal(x[0, 0, 1], video[0, :2, :3, 3:].flatten())
    assert torch.equal(x[0, 0, 4], video[0, 2:, :3, :3].flatten())


# --- the reference's numbers (grouping.npz, computed by the authors' implementation) ---


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "conformance" / "grouping.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_patches_and_groups_are_the_references(reference):
    image, square = reference["image"], reference["square"]
    assert torch.equal(g.extract_patches(image, 2), reference["extract_patches/default/2x2"])
    assert torch.equal(g.extract_patches(image, 4, order="snake"), reference["extract_patches/snake/4x4"])
    assert torch.equal(g.image_to_groups(image, (6, 8), 2), reference["subimages/sub=6x8/patch=2x2"])
    assert torch.equal(g.image_to_groups(square, 8, 2), reference["square_tokens/sub=8x8/patch=2x2"])


def test_glimpses_are_the_references(reference):
    x, y = g.glimpses(reference["square"], 8, 2, copies=1)
    name = "glimpses/sub=8x8/patch=2x2/mini_x=1"
    torch.testing.assert_close(x, reference[f"{name}/tokens"], rtol=0, atol=1e-6)
    assert torch.equal(y, reference[f"{name}/index_onehot"])


def test_pixel_sequences_are_the_references(reference):
    targets = g.image_to_pixels(reference["uint8_image"], 4)
    assert torch.equal(targets, reference["pixel_sequence/snake/4x4/target"].long())
    assert torch.equal(g.shift_right(targets), reference["pixel_sequence/snake/4x4/input"].long())


# --- bad input: one clear error each ---

IMAGES, GROUPS, TOKENS = torch.zeros(2, 8, 12, 3), torch.zeros(2, 6, 4, 12), torch.zeros(2, 6, 48, dtype=torch.int64)

BAD = {
    "an image of 12 columns does not divide into groups of 5; 10 or 15 columns would do, or groups of 4 or 6": (
        lambda: g.image_to_groups(IMAGES, (4, 5), 1)
    ),
    "a group of 6 rows does not divide into patches of 4; 4 or 8 rows would do, or patches of 3 or 6": (
        lambda: g.PatchGrid(24, 6, 4)
    ),
    # Among groups only those are named that the patches divide too.
    "an image of 30 rows does not divide into groups of 8; 24 or 32 rows would do, or groups of 6 or 10 rows": (
        lambda: g.PatchGrid(30, 8, 2)
    ),
    "an image of 8 rows does not divide into groups of 16; 16 rows would do, or groups of 8 rows": (
        lambda: g.image_to_groups(IMAGES, 16, 2)
    ),
    "an image of 8 rows does not divide into patches of 3; 6 or 9 rows would do, or patches of 2 or 4 rows": (
        lambda: g.extract_patches(IMAGES, 3)
    ),
    "a video of 4 frames does not divide into groups of 3; 3 or 6 frames would do, or groups of 2 or 4 frames": (
        lambda: g.video_to_groups(torch.zeros(1, 4, 8, 8, 3), (3, 4, 4), (1, 2, 2))
    ),
    "a sequence of 10 tokens does not divide into groups of 4; 8 or 12 tokens would do, or groups of 2 or 5 tokens": (
        lambda: g.sequence_to_groups(torch.zeros(2, 10), 4)
    ),
    "group_size is (4, 4, 4); it must be one positive whole number or (rows, columns)": lambda: g.image_to_groups(
        IMAGES, (4, 4, 4), 2
    ),
    "patch_size is 0; it must be one positive whole number or (rows, columns)": lambda: g.image_to_groups(IMAGES, 4, 0),
    "group_size is 4.0; it must be a whole number or a sequence of whole numbers": lambda: g.image_to_groups(
        IMAGES, 4.0, 2
    ),
    "group_size is '4'; it must be a whole number or a sequence of whole numbers": lambda: g.image_to_groups(
        IMAGES, "4", 2
    ),
    "video_size is (4, 4); it must be one positive whole number or (frames, rows, columns)": (
        lambda: g.groups_to_video(GROUPS, (4, 4), (4, 4), 2)
    ),
    "images (b, H, W, channels) have 4 axes; got shape (8, 12, 3)": lambda: g.image_to_groups(IMAGES[0], 4, 2),
    "got shape (8, 12, 3)": lambda: g.extract_patches(IMAGES[0], 2),
    "video (b, frames, H, W, channels) have 5 axes; got shape (2, 8, 12, 3)": lambda: g.video_to_groups(IMAGES, 4, 2),
    "patches (b, N, patch rows * patch columns * channels) have 3 axes": lambda: g.merge_patches(GROUPS, (8, 12), 2),
    "unknown order of patches 'zigzag'; known are raster and snake": lambda: g.extract_patches(IMAGES, 2, "zigzag"),
    "groups of shape (2, 6, 4, 12) where these sizes make (b, 4, 4, a multiple of 4)": (
        lambda: g.groups_to_image(GROUPS, 8, 4, 2)
    ),
    "groups of shape (2, 6, 4, 11) where these sizes make (b, 6, 4, a multiple of 4)": (
        lambda: g.groups_to_image(GROUPS[..., 1:], (8, 12), 4, 2)
    ),
    "groups of shape (2, 6, 4, 12) where these sizes make (b, 4, 4, c)": lambda: g.groups_to_map(GROUPS, 8, 4, 2),
    "groups of shape (2, 6, 4, 12) where these sizes make (b, 8, 8, a multiple of 8)": (
        lambda: g.groups_to_video(GROUPS, 8, 4, 2)
    ),
    "a map of 4 x 6 does not belong to these sizes: the image has 4 x 4 patches": (
        lambda: g.map_to_groups(torch.zeros(2, 5, 4, 6), 8, 4, 2)
    ),
    "maps (b, channels, rows, columns) have 4 axes; got shape (4, 6)": lambda: g.map_to_groups(
        IMAGES[0, :4, :6, 0], 8, 4, 2
    ),
    "images of shape (2, 8, 12, 3) where (b, 8, 8, 3) is expected": lambda: g.PatchGrid(8, 4, 2).group(IMAGES),
    "images of shape (2, 8, 12, 3) where (b, 8, 12, 1) is expected": (
        lambda: g.PatchGrid((8, 12), 4, 2, channels=1).group(IMAGES)
    ),
    "(b, 8, 12, 3) is expected; channels come last: images.permute(0, 2, 3, 1)": (
        lambda: g.PatchGrid((8, 12), 4, 2).group(IMAGES.permute(0, 3, 1, 2))
    ),
    "channels is 0; it must be a whole number of at least 1": lambda: g.PatchGrid(8, 4, 2, channels=0),
    "tokens have width 12 where patches of 4 numbers are expected": (
        lambda: g.PatchGrid((8, 12), 4, 2, channels=1).ungroup(GROUPS)
    ),
    "copies is -1; it must be a whole number of at least 0, and at most 1024": lambda: g.glimpses(
        IMAGES, 4, 2, copies=-1
    ),
    "the one-hot index of groups (2, 6, 4, 12) is (2, 6, 1, 6), not (2, 6, 1, 7)": (
        lambda: g.glimpses_to_image(GROUPS, torch.zeros(2, 6, 1, 7), (8, 12), 4, 2)
    ),
    "groups of shape (2, 5, 4, 12) where these sizes make (b, 6, 4, a multiple of 4)": (
        lambda: g.glimpses_to_image(GROUPS, torch.eye(6)[:, None].expand(2, 6, 1, 6), (8, 12), 4, 2, copies=1)
    ),
    "pixel tokens are made of uint8 images, not torch.float32": lambda: g.image_to_pixels(IMAGES, 4),
    "a patch of 4 x 4 x 1 values has 16 tokens, not 48": lambda: g.pixels_to_image(TOKENS, (8, 12), 4, 1),
    "tokens (b, t, n) have 3 axes; got shape (6, 48)": lambda: g.pixels_to_image(TOKENS[0], (8, 12), 4, 3),
    "tokens from 0 to 300 are not all within 0..255": (
        lambda: g.pixels_to_image(TOKENS.index_fill(1, torch.tensor([2]), 300), (8, 12), 4, 3)
    ),
    "tokens from -1 to 7 are not all within 0..255": lambda: g.tokens_to_bytes(torch.tensor([7, -1])),
    "tokens are whole numbers, not torch.float32": lambda: g.tokens_to_bytes(torch.tensor([7.0])),
    "a batch of sequences (b, L) is expected, not shape (48,)": lambda: g.sequence_to_groups(TOKENS[0, 0], 4),
    "n is 0; it must be a whole number of at least 1": lambda: g.sequence_to_groups(TOKENS[0], 0),
    "groups (b, t, n) are expected, not shape (6, 48)": lambda: g.groups_to_sequence(TOKENS[0]),
    "tokens (b, t, n) have 3 axes; got shape (6, 47)": lambda: g.shift_right(TOKENS[0, :, 1:]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gives_one_clear_error(message):
    with pytest.raises(InputError) as error:
        BAD[message]()
    assert message in str(error.value)
    assert error.value.__cause__ is None
    assert "\n" not in str(error.value)


@for_any(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_the_sizes_that_an_error_names_do_divide(image, group, patch):
    try:
        g.PatchGrid(image, group * patch, patch)
    except InputError as error:
        ways = str(error).split("; ")[1]
        wholes, _, groups = ways.partition("or groups of ")
        for size in (int(word) for word in wholes.split() if word.isdigit()):
            g.PatchGrid(size, group * patch, patch)
        for size in (int(word) for word in groups.split() if word.isdigit()):
            g.PatchGrid(image, size, patch)


# ---- sequences that fill no group, and documents ----


@for_any(st.integers(1, 3), st.integers(0, 20), st.integers(1, 7), st.sampled_from([(), (2,)]))
def test_padding_to_groups_is_undone_by_the_length(b, length, n, more):
    x = numbers(b, length, *more) + 1
    padded = g.pad_to_groups(x, n)
    assert padded.shape[1] % n == 0
    assert 0 <= padded.shape[1] - length < n
    assert torch.equal(g.groups_to_sequence(g.sequence_to_groups(padded, n), length), x)
    assert not padded[:, length:].any()


def test_a_sequence_is_not_longer_than_its_groups():
    with pytest.raises(InputError, match=r"length is 7; .* at most 6"):
        g.groups_to_sequence(torch.zeros(1, 2, 3), 7)
    with pytest.raises(InputError, match=r"tokens \(6,\)"):
        g.pad_to_groups(torch.zeros(6), 2)


def documents_of(lengths):
    return [numbers(length) + 100 * k + 1 for k, length in enumerate(lengths)]


@for_any(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 5))
def test_packed_documents_come_back_and_never_share_a_group(lengths, n, spare):
    documents, groups = documents_of(lengths), -(-max(lengths) // n) + spare
    packed = g.pack_documents(documents, n, groups)
    assert packed.tokens.shape == packed.mask.shape == (*packed.documents.shape, n)
    assert packed.tokens.shape[1] == groups
    for back, document in zip(g.unpack_documents(*packed), documents, strict=True):
        assert torch.equal(back, document)
    assert torch.equal(packed.mask, packed.tokens > 0)
    assert torch.equal((packed.documents >= 0)[..., None] & packed.mask, packed.mask)
    # What belongs to tokens, of any width, comes back as well.
    wide = torch.stack([packed.tokens, -packed.tokens], dim=-1)
    assert all(
        torch.equal(back[:, 1], -document)
        for back, document in zip(g.unpack_documents(wide, packed.documents, packed.mask), documents)
    )
    # No two rows could be one.
    filled = (packed.documents >= 0).sum(1).sort().values
    assert len(filled) == 1 or filled[0] + filled[1] > groups


@for_any(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 20))
def test_rows_hold_every_document_once_within_their_groups(sizes, groups):
    rows = g.pack_rows(sizes, groups)
    assert sorted(k for row in rows for k in row) == list(range(len(sizes)))
    assert max(sum(sizes[k] for k in row) for row in rows) <= groups
    assert rows == sorted(sorted(row) for row in rows)
    assert len(rows) <= 2 * -(-sum(sizes) // groups)


def test_each_document_has_its_own_places_and_its_own_first_input():
    documents = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [4, 2, 2, 2, 4, 4, 0]])
    assert g.places_in_documents(documents).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 0, 1, 0]]
    tokens = numbers(2, 7, 2) + 1
    shifted, plain = g.shift_right(tokens, documents), g.shift_right(tokens)
    begins = g.places_in_documents(documents) == 0
    assert not shifted[begins][:, 0].any()
    assert torch.equal(shifted[~begins], plain[~begins])
    assert torch.equal(shifted[..., 1:], plain[..., 1:])
    assert torch.equal(g.shift_right(tokens, torch.zeros(2, 7, dtype=torch.int64)), plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.pack_documents(documents_of([4, 9]), 2, 4), "document 1 fills 5 groups, of a row's 4"),
        (lambda: g.pack_documents(documents_of([4, 0]), 2, 4), "document 1 fills 0 groups"),
        (lambda: g.pack_documents([], 2, 4), "no documents"),
        (lambda: g.pack_documents([torch.zeros(3)], 2, 4), r"documents\[0\] is no sequence"),
        (lambda: g.pack_documents(documents_of([4]), 0, 4), "n is 0"),
        (lambda: g.pack_documents(documents_of([4]), 2, 10**15), "groups=10"),
        (lambda: g.unpack_documents(*(3 * [torch.zeros(2, 3, 4)])), "do not belong"),
        (lambda: g.places_in_documents(torch.zeros(2, 3)), "documents are torch.float32"),
        (lambda: g.shift_right(numbers(1, 2, 3), numbers(1, 3)), r"documents \(1, 3\)"),
    ],
)
def test_documents_that_cannot_be(call, message):
    with pytest.raises(InputError, match=message):
        call()
