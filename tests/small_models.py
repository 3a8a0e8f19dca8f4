"""The three roles, small, and the question that every way to run answers: are outputs and gradients those of plain?"""

import torch

import fitformer

T, N = 7, 6
SIZES = {"latents_per_group": 2, "dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 3}
DROPS = {"drop_path": 0.3, "drop_units": 0.2, "drop_att": 0.25}


def encoder(**options):
    torch.manual_seed(0)
    return fitformer.FITEncoder.from_config(
        layers="(1)2(2)1", num_groups=T, tokens_per_group=N, in_channels=5, **SIZES, **options
    )


def denoiser(**options):
    torch.manual_seed(0)
    return fitformer.FITDenoiser.from_config(
        layers="(1)1(1)2(1)",
        num_groups=T,
        tokens_per_group=N,
        out_dim=5,
        cond_dim=3,
        self_cond="latent",
        xattn_with_mlp=True,
        **SIZES,
        **options,
    )


def decoder(**options):
    torch.manual_seed(0)
    return fitformer.FITDecoder.from_config(
        layers="(1)2(1)1(1)", num_groups=T, tokens_per_group=N, vocab_size=11, **SIZES, **options
    )


def encode(model, x):
    return model(x, mask=mask_of(x))


def denoise(model, x):
    time, cond = torch.tensor([0.2, 0.9]).to(x), torch.linspace(0, 1, 6).view(2, 3).to(x)
    return model(x, time, cond, torch.ones(2, T, 2, 12).to(x), mask=mask_of(x))


def decode(model, x):
    return (model((x[..., 0].detach().abs() * 3).long() % 11),)


def mask_of(x):
    mask = torch.ones(x.shape[:3], dtype=torch.bool)
    mask[0, 2, 4:] = mask[1, 5, 1:] = False
    return mask


ROLES = {"encoder": (encoder, encode), "denoiser": (denoiser, denoise), "decoder": (decoder, decode)}


def outcome(model, call, way, seed=3):
    """Outputs and gradients of inputs and parameters, under one random state, and what comes next of it."""
    model.set_execution(way)
    model.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, T, N, 5).to(next(model.parameters()).dtype).requires_grad_()
    torch.manual_seed(seed)
    outputs = call(model, x)
    sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs).backward()
    following = torch.rand(3)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [*outputs, following.to(x)], {"x": x.grad, **gradients}


def check_equal(ours, plainly):
    """To float64's accuracy where the model has it; else to 1e-5 of the largest gradient.

    (What a parameter's own gradient is compared with must not be that gradient: those of key biases are 0, but for
    rounding.)
    """
    rtol = 1e-10 if any(each.dtype == torch.float64 for each in ours[0]) else 1e-5
    for out, wanted in zip(ours[0], plainly[0], strict=True):
        torch.testing.assert_close(out, wanted, rtol=rtol, atol=rtol)
    assert ours[1].keys() == plainly[1].keys()
    largest = max(wanted.abs().max().item() for wanted in plainly[1].values() if wanted is not None)
    for name, wanted in plainly[1].items():
        assert (ours[1][name] is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(ours[1][name], wanted, rtol=rtol, atol=rtol * largest, msg=name)
