"""Groups run without their absent tokens: outputs and gradients are those of whole groups, in every way to run."""

import pytest
import torch

from fitformer.execution import Streamed, checkpointed, plain
from fitformer.models import present as rule
from fitformer.models.config import TrunkConfig
from fitformer.models.present import present
from fitformer.models.trunk import Block, Trunk

N = 9
SIZES = {"latents_per_group": 2, "dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 3}


@pytest.fixture
def always(monkeypatch):
    """Leave out whatever is absent, also where it is not worth it."""
    monkeypatch.setattr(rule, "PIECE_TOKENS", {"cpu": 0})
    monkeypatch.setattr(rule, "WORTHWHILE", 0.0)


def masks(*shape, seed=0):
    """Random masks in which groups have from one to all of their tokens."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, N, generator=random) < torch.rand(*shape, 1, generator=random)
    mask[..., 0] |= ~mask.any(-1)
    mask[0, 0] = True
    return mask


def outcome(trunk, mask, way=plain, absent=False):
    """Data tokens, latents and all gradients, of one seed."""
    for block in trunk.blocks:
        block.runs_absent = absent
    torch.manual_seed(1)
    trunk.zero_grad()
    x, latents = (torch.randn(*mask.shape[:2], *size, dtype=torch.float64) for size in ((N, 8), (2, 12)))
    x.requires_grad_(), latents.requires_grad_()
    left, read = way(trunk, x, latents, mask=mask)
    ((left * mask[..., None]).sin().sum() + read.square().sum()).backward()
    return [left.detach(), read.detach(), x.grad, latents.grad, *(p.grad for p in trunk.parameters())]


OPTIONS = {
    "plain": {},
    "feed-forward in cross layers": {"xattn_with_mlp": True},
    "no local attention": {"x_self_attention": False},
    "dropped branches": {"drop_path": 0.4},
    "dropped units": {"drop_units": 0.3, "drop_att": 0.2},
    "rotary and causal": {"rotary": True, "latent_position": "index", "dim": 8},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_absent_is_left_out_exactly_in_every_way(name, seed, always):
    torch.manual_seed(0)
    config = TrunkConfig(layers="(1)1(2)1(1)", **(SIZES | OPTIONS[name]))
    trunk = Trunk(config, 7, N, causal="all" if "causal" in name else "none").double()
    mask = masks(2, 7, seed=seed)
    assert present(mask.flatten(0, 1)) is not None
    whole = outcome(trunk, mask, absent=True)
    for way in (plain, checkpointed, Streamed(2), Streamed(3, keep="disk"), Streamed(2, recompute="light")):
        for one, other in zip(outcome(trunk, mask, way), whole, strict=True):
            if other is None:
                assert one is None or not one.any()
            else:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_absent_tokens_stay_as_they_are_and_cost_nothing(always, monkeypatch):
    widths, run = [], Block._run
    monkeypatch.setattr(Block, "_run", lambda self, x, *rest: widths.append(tuple(x.shape[:2])) or run(self, x, *rest))
    trunk = Trunk(TrunkConfig(layers="(1)1", **SIZES), 8, N)
    mask = torch.arange(N) < torch.tensor([1, 1, 2, 2, 5, 5, 9, 9])[:, None]
    x = torch.randn(1, 8, N, 8)
    left, _ = trunk(x, torch.randn(1, 8, 2, 12), mask=mask[None])
    assert widths == [(2, 1), (2, 2), (2, 5), (2, 9)]
    assert torch.equal(left[0][~mask], x[0][~mask])
    assert not torch.isclose(left[0][mask], x[0][mask]).all(-1).any()


def test_pieces_hold_every_present_token_once_and_groups_in_order_of_their_number(always):
    mask = masks(1, 13, seed=5)[0]
    found = torch.zeros_like(mask, dtype=torch.int64)
    counts = []
    for piece in present(mask).pieces:
        held = torch.ones_like(piece.tokens, dtype=torch.bool) if piece.mask is None else piece.mask
        found[piece.groups[:, None].expand_as(held)[held], piece.tokens[held]] += 1
        # Causal layers rely on it.
        assert all((row[seen].diff() > 0).all() for row, seen in zip(piece.tokens, held))
        counts += held.sum(1).tolist()
    assert torch.equal(found, mask.long())
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        (torch.ones(500, 64, dtype=torch.bool), False),
        (torch.rand(500, 64) < 0.99, False),
        (torch.arange(64).expand(500, 64) < 20, True),
        # So few tokens that more pieces would take longer.
        (torch.arange(64).expand(5, 64) < 20, False),
    ],
)
def test_groups_run_whole_where_little_would_be_saved(mask, runs):
    assert (present(mask) is not None) == runs
