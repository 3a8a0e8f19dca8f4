"""What is remembered is not computed again, is as much as the plan says, and changes no number."""

import gc
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fitformer
from fitformer.errors import InputError
from fitformer.execution import Streamed, plain, selective_checkpoint
from fitformer.execution.selective_checkpoint import SAVE_POLICIES, checkpointing, contexts
from fitformer.models.layers import TransformerLayer
from fitformer.profiling import Geometry, StepConfig, memory
from fitformer.profiling.memory import _Step
from small_models import DROPS, check_equal, decoder, denoiser, encoder, outcome

CHOICES = ["full", "local", "selective", "light"]
WIDE = {"latents_per_group": 4, "dim": 32, "latent_dim": 48, "heads": 4, "latent_heads": 4}


def wide(**options):
    torch.manual_seed(0)
    return fitformer.FITEncoder.from_config(
        layers="(1)2(2)1", num_groups=6, tokens_per_group=24, in_channels=20, **WIDE, **options
    )


def step(model, way):
    model.set_execution(way)
    model.zero_grad()
    torch.manual_seed(1)
    x, latents = model(torch.randn(2, 6, 24, 20))
    (x.square().mean() + latents.square().mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def operations(model, way):
    # The counter knows the products that attention is made of, not the fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(model, way)
    return counter.get_total_flops()


def test_operations_fall_with_what_is_remembered():
    model = wide()
    least, *counts = (operations(model, way) for way in [plain, *(Streamed(2, recompute=each) for each in CHOICES)])
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert counts[-1] > least
    # Of a layer's forward pass, light computes alone the widening product again, 8 of 24 squares of its width (and
    # here, where attention is not fused, queries by keys).
    assert (counts[-1] - least) / (counts[0] - least) < 0.5


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_remembers_as_much_as_the_plan_says(choice, monkeypatch):
    """To the byte, at the end of the forward pass."""
    made = []
    real = selective_checkpoint.contexts
    for place in ("fitformer.execution.selective_checkpoint.contexts", "fitformer.execution._streamed_pass.contexts"):
        monkeypatch.setattr(place, lambda given: made.append(real(given)) or made[-1])
    for options in ({}, {"drop_att": 0.2, "drop_units": 0.1}):
        made.clear()
        model = wide(**options)
        model.set_execution(Streamed(2, recompute=choice))
        out = model(torch.randn(2, 6, 24, 20))[1]
        found = sum(bytes_in(remembering.results) for remembering, _ in made)
        at = _Step(model, StepConfig(execution="streamed", slice_groups=2, recompute=choice, batch=2))
        stages = [stage for i in range(2) for stage in (*at.group_phase(i, at.rows), *at.global_phase(i))]
        assert found == sum(stage.remembered for stage in stages)
        assert (found == 0) == (choice == "full")
        out.sum().backward()
        assert bytes_in([each for remembering, _ in made for each in remembering.results]) == 0


def bytes_in(results):
    parts = [each for _, result in results for each in (result if isinstance(result, tuple) else (result,))]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize("drops", [DROPS, {}, {"drop_units": 0.3}], ids=str)
def test_global_layers_that_drop_are_exact_too(choice, drops):
    """Layers of no slices draw from torch's generator: what is remembered must not change what is drawn."""
    torch.manual_seed(0)
    layer = TransformerLayer(16, 2, **drops)
    x = torch.randn(3, 40, 16, requires_grad=True)
    results = []
    for call in (lambda layer, x: layer(x), checkpointing(SAVE_POLICIES[choice].latents)):
        torch.manual_seed(5)
        out = call(layer, x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        results.append(([out.detach()], dict(enumerate(gradients))))
    check_equal(results[1], results[0])


def test_attention_that_draws_is_drawn_again():
    """On a GPU fused attention drops by itself: the place of its numbers must be taken again."""
    assert selective_checkpoint._dropped(FLASH, [None, None, None, 0.1], {}) == 0.1
    assert selective_checkpoint._dropped(FLASH, [None, None, None], {}) == 0
    assert selective_checkpoint._dropped(EFFICIENT, [None] * 5, {"dropout_p": 0.2}) == 0.2


FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


@pytest.mark.parametrize("choice", CHOICES[1:])
def test_mixed_precision_remembers(choice):
    """A weight's cast, which only the first slice makes, is none of what is remembered."""
    model, results = wide(), []
    for way in (plain, Streamed(2, recompute="full"), Streamed(2, recompute=choice)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, way))
    for name, wanted in results[1].items():
        torch.testing.assert_close(results[2][name], wanted, msg=name)
        torch.testing.assert_close(results[2][name], results[0][name], rtol=0.1, atol=0.1 * wanted.abs().max().item())


@pytest.mark.parametrize("build", [encoder, denoiser, decoder], ids=lambda build: build.__name__)
def test_frozen_layers_remember(build):
    model = build()
    model.trunk.blocks[0].requires_grad_(False)
    model.trunk.blocks[1].local_layers.requires_grad_(False)

    def call(model, x):
        if build is encoder:
            return model(x)
        if build is decoder:
            return (model((x[..., 0].detach().abs() * 3).long() % 11),)
        return model(x, torch.tensor([0.2, 0.9]), torch.ones(2, 3))

    check_equal(outcome(model, call, Streamed(2, recompute="light")), outcome(model, call, plain))


def test_what_is_remembered_of_a_pass_that_is_thrown_away_goes_with_it():
    model = wide()
    model.set_execution(Streamed(2, recompute="light"))
    gc.collect()
    before = count()
    model(torch.randn(2, 6, 24, 20))
    gc.collect()
    assert count() == before
    with torch.no_grad():
        model(torch.randn(2, 6, 24, 20))
    assert count() == before


def count():
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def test_results_come_back_once_and_in_their_order():
    remembering, recalling = contexts(frozenset({"square"}))
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with remembering:
        first, second = layer(x), layer(2 * x)
    assert isinstance(remembering.results, deque)
    with recalling:
        # Whatever it is given now: it is not computed.
        assert torch.equal(layer(0 * x), first)
        assert torch.equal(layer(0 * x), second)
    assert not remembering.results


def test_other_kernels_in_the_backward_pass_are_refused():
    model = wide()
    model.set_execution(Streamed(2, recompute="selective"))
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(torch.randn(2, 6, 24, 20))[1].sum()
    with pytest.raises(RuntimeError, match="same kernels of attention in both, or recompute='full'"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself, within torch
def test_compiled_layers_are_exact():
    model = wide()
    expected = step(model, plain)
    for layer in model.trunk.layers():
        layer.compile()
    for choice in ("full", "selective", "light"):
        found = step(model, Streamed(2, recompute=choice))
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_memory_grows_with_what_is_remembered():
    model = Geometry.of_preset("encoder", "small", 1600, group_size=320).model()
    setups = [StepConfig(num_groups=25, execution="streamed", slice_groups=1, recompute=choice) for choice in CHOICES]
    kept = [memory(model, setup).kept for setup in setups]
    # What is remembered of global layers is gone when the first block's slices, the peak here, have their turn.
    assert kept[0] == kept[1] < kept[2] < kept[3]
    plain_kept = memory(model, StepConfig(num_groups=25)).working
    assert kept[-1] < plain_kept / 2


def test_recomputation_that_cannot_be():
    with pytest.raises(InputError, match="recompute is 'some'; it must be one of full, local, selective, light"):
        Streamed(recompute="some")
    with pytest.raises(InputError, match="recompute is 'some'; it must be one of full"):
        StepConfig(recompute="some")
