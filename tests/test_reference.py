"""The library equals the slow, obvious FIT of reference.py in every option that the conformance files do not show."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fitformer import official
from reference import run

FILES = sorted((Path(__file__).parent / "conformance").glob("[ade]*_*.npz"))
SIZES = {"x_dim": 16, "latent_dim": 24, "x_num_heads": 2, "latent_num_heads": 4, "layers": "(1)1(1)1(1)"}
GEOMETRY = {"x_size": 12, "num_groups": 3, "latents_per_group": 2}

# What differs from SIZES and GEOMETRY; a name that starts with `in_` shapes the input instead.
ANY_ROLE = {
    "plain": {},
    "layers-uneven": {"layers": "(2)1(1)2(1)"},
    "no-local-layers": {"layers": "(0)1(0)2(0)"},
    "ends-global": {"layers": "(1)1(1)2"},
    "one-block": {"layers": "(2)1"},
    "local-only": {"layers": "(2)"},
    "one-group": {"num_groups": 1, "x_size": 4},
    "rin": {"num_groups": 1, "x_size": 4, "layers": "(0)2(0)1"},
    "one-token": {"x_size": 3},
    "one-latent": {"latents_per_group": 1},
    "one-of-all": {"x_size": 1, "num_groups": 1, "latents_per_group": 1},
    "c-above-d": {"x_dim": 32, "latent_dim": 16, "x_num_heads": 4, "latent_num_heads": 2},
    "c-is-d": {"x_dim": 24, "x_num_heads": 3, "latent_num_heads": 6},
    "one-head": {"x_num_heads": 1, "latent_num_heads": 3},
    "more-local-heads": {"x_num_heads": 8, "latent_num_heads": 2},
    "mlp-ratio": {"mlp_ratio": 2},
    "sin-cos": {"x_pos_encoding": "sin_cos", "latent_pos_encoding": "sin_cos"},
    "sin-cos-lines": {
        "x_pos_encoding": "sin_cos",
        "latent_pos_encoding": "sin_cos",
        "latents_per_group": 1,
        "x_size": 9,
    },
    "sin-cos-one-group": {"latent_pos_encoding": "sin_cos", "num_groups": 1, "latents_per_group": 5},
    "sin-cos-odd-half": {"latent_pos_encoding": "sin_cos", "latent_dim": 30, "latent_num_heads": 3, "x_dim": 18},
}
CAUSAL = {
    "causal": {"mask": "causal"},
    "mask-none": {"mask": "none"},
    "causal-one-group": {"mask": "causal", "num_groups": 1},
    "causal-one-latent": {"mask": "causal", "latents_per_group": 1, "num_groups": 4, "layers": "(1)2(1)1"},
}
ENCODER = {
    **CAUSAL,
    "y": {"in_y": (1, 5)},
    "y-many": {"in_y": (3, 16), "mask": "causal", "layers": "(1)1(2)1"},
    "y-sin-cos": {"in_y": (2, 3), "x_pos_encoding": "sin_cos"},
    "sin-cos-2d": {"x_pos_encoding": "sin_cos2d"},
    "sin-cos-2d-one-token": {"x_pos_encoding": "sin_cos2d", "x_size": 3},
}
DENOISER = {
    "unconditional": {"in_cond": None},
    "cond-tokens": {"in_cond": (3, 10)},
    "cond-one-token": {"in_cond": (1, 10)},
    "cond-as-it-is": {"in_cond": (24,), "cond_proj": False},
    "cond-tokens-as-they-are": {"in_cond": (2, 24), "cond_proj": False},
    "extra-time": {"in_time": 3},
    "time-as-column": {"in_time": 1},
    "self-cond-absent": {"self_cond": "latent"},
    "self-cond-given": {"self_cond": "latent", "in_latents_prev": True},
    "self-cond-ratio": {"self_cond": "latent", "in_latents_prev": True, "mlp_ratio": 3},
    "no-self-attention": {"x_self_attention": False},
    "cross-mlp": {"xattn_with_mlp": True},
    "no-cross-norm": {"xattn_enc_ln": False},
    "all-at-once": {
        "x_self_attention": False,
        "xattn_with_mlp": True,
        "xattn_enc_ln": False,
        "self_cond": "latent",
        "in_latents_prev": True,
        "in_time": 2,
        "in_cond": (2, 7),
        "mlp_ratio": 2,
        "x_dim": 30,
        "x_num_heads": 5,
    },
}
DECODER = {
    "untied": {"shared_embedding": False},
    "no-bias": {"output_bias": False},
    "untied-no-bias": {"shared_embedding": False, "output_bias": False},
    "one-word": {"vocab_size": 1},
}
CASES = [
    pytest.param(kind, options, id=f"{kind}-{name}")
    for kind, table in (("FIT", ENCODER), ("FITDenoiser", DENOISER), ("FITAR", DECODER))
    for name, options in {**ANY_ROLE, **table}.items()
]
OF_ROLE = {"FIT": {}, "FITDenoiser": {"out_dim": 6}, "FITAR": {"vocab_size": 11}}


def make_inputs(kind, k, options, batch=2):
    generator = torch.Generator().manual_seed(1)
    t, n = k["num_groups"], k["x_size"] // k["num_groups"]

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "FITAR":
        return {"tokens": torch.randint(k["vocab_size"], (batch, t, n), generator=generator)}
    if kind == "FIT":
        y = {"y": randn(batch, t, *options["in_y"])} if "in_y" in options else {}
        return {"x": randn(batch, t, n, 6), **y}
    scalars = options.get("in_time")
    inputs = {
        "x": randn(batch, t, n, k["out_dim"]),
        "time": torch.rand((batch, scalars) if scalars else (batch,), generator=generator),
    }
    cond = options.get("in_cond", (10,))
    if cond is not None:
        inputs["cond"] = randn(batch, *cond)
    if options.get("in_latents_prev"):
        inputs["latents_prev"] = randn(batch, t, k["latents_per_group"], k["latent_dim"])
    return inputs


def check_gradients(given, expected):
    assert given.keys() == expected.keys()
    # A bias of keys moves every score of a query alike, and one key alone always weighs 1: true gradients of 0.
    noise = 2e-6 * max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        error = np.abs(given[name] - value).max()
        assert error <= max(1e-3 * np.abs(value).max(), noise), (name, error, np.abs(value).max())


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_equals_the_obvious_one(kind, options):
    kwargs = {**SIZES, **GEOMETRY, **OF_ROLE[kind]}
    kwargs |= {name: value for name, value in options.items() if not name.startswith("in_")}
    inputs = make_inputs(kind, kwargs, options)
    expected, loss, drawn = run(kind, kwargs, inputs)
    loss.backward()

    variables = {name: value.detach().float().numpy() for name, value in drawn.items()}
    model = official.build(kind, kwargs, variables)
    outputs = model(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output.detach().numpy(), value.detach().numpy(), rtol=0, atol=1e-4)
    sum(weight * out.sin().sum() for weight, out in zip((1.0, 0.5), outputs, strict=False)).backward()
    zero = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in drawn.items()}
    check_gradients(official.gradients(model), {name: value.numpy() for name, value in zero.items()})

    back = official.variables(model)
    assert back.keys() == variables.keys()
    for name, value in variables.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_obvious_one_equals_the_published_one(path):
    """The oracle is itself judged by the numbers that the authors' implementation computed."""
    archive = np.load(path)
    meta = json.loads(str(archive["meta"]))
    part = {
        prefix: {key.partition("/")[2]: archive[key] for key in archive.files if key.startswith(prefix + "/")}
        for prefix in ("input", "variable", "gradient", "output")
    }
    inputs = {name: torch.as_tensor(array) for name, array in part["input"].items()}
    outputs, loss, used = run(meta["kind"], meta["kwargs"], inputs, part["variable"])
    assert used.used == set(part["variable"])
    expected = [value for name, value in part["output"].items() if name != "loss"]
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output.detach().numpy(), value, rtol=0, atol=1e-4)
    loss.backward()
    check_gradients({name: used[name].grad.numpy() for name in part["gradient"]}, part["gradient"])
