"""The two phases and the loop: what may depend on what, and that every way to run them is the plain one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.errors import InputError
from fitformer.execution import checkpointed, plain
from fitformer.models import block_causal
from fitformer.models.block_causal import block_causal_attention
from fitformer.models.config import TrunkConfig
from fitformer.models.layers import DropPath
from fitformer.models.trunk import Trunk, parse_layers

T, N, M, C, D = 4, 5, 2, 8, 12
CAUSAL = ["none", "global", "all"]


def make_trunk(layers="(1)1(1)2(1)", **options):
    torch.manual_seed(0)
    of_role = {name: options.pop(name) for name in ("causal", "condition") if name in options}
    trunk = Trunk(TrunkConfig(layers, C, D, 2, 4, M, **options), T, N, **of_role)
    for parameter in trunk.parameters():  # away from zero biases, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk.eval()


def make_inputs(trunk, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, T, N, C, generator=generator), trunk.initial_latents(batch, T)


plans = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=5)


@given(plan=plans, last=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_layer_string_says_its_plan(plan, last):
    plan[-1] = (plan[-1][0], last or (0 if any(local for local, _ in plan) else 1))
    last = plan[-1][1]
    text = "".join(f"({local}){glob}" for local, glob in plan)
    assert parse_layers(text) == plan
    if last == 0:
        assert parse_layers(text[:-1]) == plan


UNREADABLE = ["", "4", "()4", "(4", "(4)8(", "4(4)", "(4) 8"]
UNREADABLE += ["(-1)2", "(1.5)2", "(2)4x", "(2)4\n", "[2]4", "((2))4", "(1)(1)"]


@pytest.mark.parametrize("layers", UNREADABLE)
def test_a_layer_string_that_does_not_parse(layers):
    with pytest.raises(InputError, match="does not parse; write") as error:
        parse_layers(layers)
    assert repr(layers) in str(error.value)


@pytest.mark.parametrize("layers", ["(1)0(1)2", "(1)0(1)", "(1)2(1)0(1)1"])
def test_a_block_before_the_last_needs_global_layers(layers):
    with pytest.raises(InputError, match=r"block \d of \d has 0 global layers") as error:
        parse_layers(layers)
    assert repr(layers) in str(error.value)


@pytest.mark.parametrize("causal", CAUSAL)
@given(groups=st.lists(st.sampled_from(range(T)), min_size=1, max_size=T, unique=True))
@settings(max_examples=10, deadline=None)
def test_group_phase_of_any_groups_is_that_of_all(causal, groups):
    trunk = make_trunk(causal=causal)
    x, latents = make_inputs(trunk)
    source = trunk.write_latents(latents)
    for block in trunk.blocks:
        whole = block.group_phase(x, latents, source)
        part = block.group_phase(x[:, groups], latents[:, groups], source[:, groups])
        for all_of_them, some in zip(whole, part, strict=True):
            torch.testing.assert_close(all_of_them[:, groups], some, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", CAUSAL)
def test_forward_is_the_two_phases_in_turn(causal):
    trunk = make_trunk(causal=causal, condition=True)
    (x, latents), condition = make_inputs(trunk), torch.randn(2, 3, D)
    expected = trunk(x, latents, condition)
    for block in trunk.blocks:
        x, latents = block.group_phase(x, latents, trunk.write_latents(latents))
        latents = block.global_phase(latents, condition)
    assert torch.equal(x, expected[0])
    assert torch.equal(latents, expected[1])


def reach(trunk, group):
    """Which groups' data tokens and latents change when the data tokens of one group do."""
    x, latents = make_inputs(trunk)
    changed = x.clone()
    changed[:, group] += torch.randn(N, C)  # the same for all channels, a norm would hide it
    with torch.no_grad():
        pairs = zip(trunk(x, latents), trunk(changed, latents), strict=True)
    return tuple([g for g in range(T) if (a - b)[:, g].abs().max() > 1e-5] for a, b in pairs)


@pytest.mark.parametrize("group", range(T))
def test_who_hears_of_a_group(group):
    everyone, later = list(range(T)), list(range(group, T))
    assert reach(make_trunk("(3)"), group) == ([group], [])
    assert reach(make_trunk("(1)1"), group) == ([group], everyone)
    assert reach(make_trunk(), group) == (everyone, everyone)
    assert reach(make_trunk(causal="global"), group) == (later, later)
    assert reach(make_trunk(causal="all"), group) == (later, later)


def test_in_all_causal_a_token_hears_the_earlier_ones_of_its_group_only():
    trunk = make_trunk(causal="all")
    x, latents = make_inputs(trunk)
    changed = x.clone()
    changed[:, 1, 2] += torch.randn(C)
    difference = (trunk(x, latents)[0] - trunk(changed, latents)[0]).abs().amax(dim=(0, 3)) > 1e-5
    assert difference.tolist() == [[False] * N, [False, False, True, True, True], [True] * N, [True] * N]


@pytest.mark.parametrize("most", [1, 30, 10**6])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_block_causal_attention_in_chunks_is_that_of_the_dense_mask(most, dropout, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(block_causal, "MOST_MASK", most)
    given = [torch.randn(2, 3, 14, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.manual_seed(1)
    ours = block_causal_attention(*given, 2, dropout)
    after = torch.rand(())
    gradients = torch.autograd.grad(ours.sin().sum(), given)
    block = torch.arange(14) // 2
    mask = block[:, None] >= block[None]
    dense = torch.nn.functional.scaled_dot_product_attention(*given, mask)
    if not dropout:
        torch.testing.assert_close(ours, dense)
        for gradient, wanted in zip(gradients, torch.autograd.grad(dense.sin().sum(), given), strict=True):
            torch.testing.assert_close(gradient, wanted)
        return
    # The backward pass drops what the forward pass dropped, by finite differences, and leaves the random state alone.
    assert not torch.allclose(ours, dense)
    torch.manual_seed(1)
    block_causal_attention(*given, 2, dropout)
    assert torch.equal(torch.rand(()), after)

    def value(step):
        torch.manual_seed(1)
        moved = given[2].detach().clone()
        moved[0, 1, 3, 2] += step
        return block_causal_attention(given[0], given[1], moved, 2, dropout).sin().sum().item()

    assert (value(1e-6) - value(-1e-6)) / 2e-6 == pytest.approx(gradients[2][0, 1, 3, 2].item(), rel=1e-5, abs=1e-8)


def test_block_causal_attention_never_holds_a_mask_of_all_tokens(monkeypatch):
    monkeypatch.setattr(block_causal, "MOST_MASK", 64)
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, mask, *rest):
        masks.append(mask.numel())
        return real(query, key, value, mask, *rest)

    monkeypatch.setattr(block_causal.F, "scaled_dot_product_attention", watched)
    given = [torch.randn(1, 1, 32, 4, requires_grad=True) for _ in range(3)]
    block_causal_attention(*given, 2).sum().backward()
    assert max(masks) <= 64 < 32 * 32
    assert len(masks) == 2 * 16


def test_write_latents_of_the_autoregressive_role_is_one_group_behind():
    trunk, latents = make_trunk(causal="all"), torch.randn(2, T, M, D)
    source = trunk.write_latents(latents)
    assert torch.equal(source[:, 1:], latents[:, :-1])
    assert not source[:, 0].any()
    assert make_trunk().write_latents(latents) is latents


def test_drop_path_is_drawn_per_group_in_local_layers_and_per_example_in_global_ones():
    trunk, rows = make_trunk("(1)1", drop_path=0.5).train(), []
    for module in trunk.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    trunk(*make_inputs(trunk, batch=3))
    assert rows == [3 * T, 3 * T, 3, 3]


@pytest.mark.parametrize(
    "options", [{}, {"condition": True, "causal": "global"}, {"causal": "all", "xattn_with_mlp": True}]
)
def test_checkpointed_is_bit_equal_to_plain_with_dropout_on(options):
    trunk = make_trunk(drop_path=0.2, drop_units=0.1, drop_att=0.1, **options).train()
    condition = torch.randn(2, 3, D) if options.get("condition") else None
    results = []
    for run in (plain, checkpointed):
        trunk.zero_grad()
        torch.manual_seed(7)
        x, latents = make_inputs(trunk)
        x.requires_grad_()
        out = run(trunk, x, latents, condition)
        sum(part.sin().sum() for part in out).backward()
        results.append([*out, x.grad, *(p.grad for p in trunk.parameters())])
    for ours, other in zip(*results, strict=True):
        assert (ours is None and other is None) or torch.equal(ours, other)


def test_checkpointed_keeps_less_for_the_backward_pass():
    trunk, kept = make_trunk("(4)4(4)").train(), []
    for run in (plain, checkpointed):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            run(trunk, *make_inputs(trunk))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 4


def test_layers_are_all_of_them():
    trunk = make_trunk("(2)3(1)1(1)", condition=True)
    assert len(list(trunk.layers())) == (2 + 3) + (1 + 1) + 1 + 2 + 2 + 2  # stacks, reads, conditions, writes
    covered = {id(p) for layer in trunk.layers() for p in layer.parameters()}
    tables = {id(trunk.position.weight), id(trunk.latent_position.weight)}
    assert covered | tables == {id(p) for p in trunk.parameters()}


def test_initial_latents_of_fewer_groups_are_the_first_ones():
    trunk = make_trunk()
    assert torch.equal(trunk.initial_latents(2, 3), trunk.initial_latents(2, T)[:, :3])
    with pytest.raises(InputError, match="5 groups, the model positions for 4"):
        trunk.initial_latents(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "3 heads do not divide the width 8 of local layers, dim; the nearest, 2 or 4 heads do"),
        ({"latent_heads": 5}, "5 heads do not divide the width 12 of global layers, latent_dim; the nearest, 4 or 6"),
        ({"heads": 8, "latent_heads": 6}, "6 heads do not divide the width 8 of read and write"),
        ({"heads": 0}, "heads is 0"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"tokens_per_group": -1}, "tokens_per_group is -1"),
        ({"latents_per_group": 1.5}, "latents_per_group is 1.5"),
        ({"dim": 0}, "dim is 0"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"drop_units": -0.5}, "drop_units is -0.5"),
        ({"drop_att": 2}, "drop_att is 2"),
        ({"layers": "(1)0(1)"}, "0 global layers"),
        ({"position": "none"}, "position is 'none'"),
    ],
)
def test_what_a_trunk_refuses(options, message):
    geometry = {"num_groups": T, "tokens_per_group": N}
    geometry |= {name: options.pop(name) for name in tuple(geometry) if name in options}
    sizes = {"layers": "(1)1(1)", "latents_per_group": M, "dim": C, "latent_dim": D, "heads": 2, "latent_heads": 4}
    with pytest.raises(InputError, match=message):
        Trunk(TrunkConfig(**{**sizes, **options}), **geometry)


FRACTIONS = ("mlp_ratio", "drop_path", "drop_units", "drop_att")
ODD = [None, "4", "x", 2.0, float("nan"), float("inf"), -1, 0, 10**30, True, [4], (), b"4", 1e300]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("option", TrunkConfig.names())
def test_an_odd_option_is_refused_by_its_name_or_means_something(option, value):
    try:
        config = TrunkConfig(**{option: value})
        Trunk(config, T, N)
    except InputError as error:
        assert option in str(error) or (option, value) == ("layers", "x") or "layer string" in str(error)  # noqa: PT017
    else:
        number, kind = getattr(config, option), type(getattr(TrunkConfig(), option))
        assert number == value
        assert isinstance(number, (int, float) if option in FRACTIONS else kind)


def test_numbers_of_numpy_are_plain_ones():
    config = TrunkConfig(dim=np.int64(8), mlp_ratio=np.float32(2), heads=np.int32(2))
    assert [type(each) for each in (config.dim, config.mlp_ratio, config.heads)] == [int, float, int]


@pytest.mark.parametrize("layers", ["(0)0", "(0)", "(1)999999", "(99999)1"])
def test_a_trunk_of_no_layers_or_of_too_many_is_refused(layers):
    with pytest.raises(InputError, match=r"layer string .* has \d+ layers; .*10000"):
        parse_layers(layers)


def test_a_layer_string_in_place_of_the_options_is_refused():
    with pytest.raises(InputError, match="TrunkConfig"):
        Trunk("(1)1(1)", T, N)


def test_heads_of_layers_that_are_not_there_do_not_matter():
    Trunk(TrunkConfig("(2)", C, D, 2, 5, M), T, N)


@pytest.mark.parametrize("kind", ["learned", "sin_cos"])
def test_positions_by_offset_are_those_of_the_table(kind):
    position = make_trunk(position=kind).position
    assert torch.equal(position.at(1, 3), position()[1:4])
    assert torch.equal(position.at(2), position()[2:])
