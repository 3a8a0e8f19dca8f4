import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITDecoder, FITDenoiser, FITEncoder, FITImageEncoder
from fitformer.errors import InputError
from fitformer.planning import count_parameters, flops, group_plan, on_meta, parts

SIZE = {"dim": 16, "latent_dim": 24, "heads": 2, "latent_heads": 3, "latents_per_group": 3}
GROUPS = {"num_groups": 4, "tokens_per_group": 6}

# Each: the model, how to call it on one example, and what `parts` must be told.
CASES = {
    "encoder": lambda: (
        FITEncoder("(2)1(1)2", **GROUPS, in_channels=5, **SIZE),
        (torch.rand(1, 4, 6, 5),),
        {},
    ),
    "encoder with y": lambda: (
        FITEncoder("(1)2", **GROUPS, in_channels=5, y_channels=7, mask="causal", **SIZE),
        (torch.rand(1, 4, 6, 5), torch.rand(1, 4, 2, 7)),
        {"extra_tokens": 2},
    ),
    "image encoder": lambda: (
        FITImageEncoder("(1)1(1)", 8, 4, 2, channels=1, num_classes=10, **SIZE),
        (torch.rand(1, 8, 8, 1),),
        {},
    ),
    "denoiser": lambda: (
        FITDenoiser("(1)2(1)", **GROUPS, out_dim=5, self_cond="latent", xattn_with_mlp=True, **SIZE),
        (torch.rand(1, 4, 6, 5), torch.rand(1)),
        {},
    ),
    "conditional denoiser": lambda: (
        FITDenoiser("(0)2(1)", **GROUPS, out_dim=5, cond_dim=10, extra_time=1, x_self_attention=False, **SIZE),
        (torch.rand(1, 4, 6, 5), torch.rand(1, 2), torch.rand(1, 3, 10)),
        {"condition_tokens": 3},
    ),
    "decoder": lambda: (
        FITDecoder("(1)2(1)", **GROUPS, vocab_size=17, **SIZE),
        (torch.zeros(1, 4, 6, dtype=torch.long),),
        {},
    ),
    "untied decoder": lambda: (
        FITDecoder("(1)2(1)", **GROUPS, vocab_size=17, shared_embedding=False, output_bias=False, **SIZE),
        (torch.zeros(1, 4, 6, dtype=torch.long),),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_torch_counts(name):
    model, inputs, told = CASES[name]()
    # The counter knows the products that plain attention is made of, not every fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.requires_grad_(False)(*inputs)
    assert flops(model, **told).total == counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_parts_hold_every_parameter_once(name):
    model, _, told = CASES[name]()
    assert sum(part.parameters for part in parts(model, **told)) == count_parameters(model)


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_memory_costs_the_same(name):
    model, _, told = CASES[name]()
    assert parts(on_meta(type(model).__name__, model.config), **told) == parts(model, **told)


def test_the_group_plan_says_how_the_input_is_cut():
    plan = group_plan(
        on_meta("FITImageEncoder", dict(layers="(2)1(2)", image_size=(8, 16), group_size=4, patch_size=2, **SIZE))
    )
    assert (plan.groups, plan.tokens_per_group, plan.latents_per_group) == (8, 4, 3)
    assert (plan.dim, plan.latent_dim, plan.layers) == (16, 24, "(2)1(2)")


def test_attention_of_local_layers_grows_linearly_and_of_global_ones_quadratically_with_the_image():
    def attention(side, kind):
        config = dict(layers="(1)1(1)", image_size=side, group_size=8, patch_size=2, **SIZE)
        model = on_meta("FITImageEncoder", config)
        return sum(part.flops.attention for part in parts(model) if kind in part.name)

    assert attention(32, "local") == 4 * attention(16, "local")
    assert attention(32, "global") == 16 * attention(16, "global")


def test_an_unknown_role_is_named():
    with pytest.raises(InputError, match=r"no role 'FITEncodr'.*FITEncoder"):
        on_meta("FITEncodr", {})
