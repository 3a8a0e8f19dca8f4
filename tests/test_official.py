"""What `official` refuses; that it is exact is the matter of test_conformance.py and test_reference.py."""

import numpy as np
import pytest
import torch
from torch import nn

from fitformer import FITDecoder, FITDenoiser, FITEncoder, official
from fitformer.errors import InputError

SIZES = {"x_dim": 8, "latent_dim": 12, "x_num_heads": 2, "latent_num_heads": 4, "layers": "(1)1(1)"}
KWARGS = {**SIZES, "x_size": 8, "num_groups": 2, "latents_per_group": 2}


def make_variables(**options):
    model = FITEncoder.from_config(
        layers="(1)1(1)",
        num_groups=2,
        tokens_per_group=4,
        latents_per_group=2,
        in_channels=3,
        dim=8,
        latent_dim=12,
        heads=2,
        latent_heads=4,
        **options,
    )
    return official.variables(model)


def refuses(message, kind="FIT", kwargs=KWARGS, variables=None):
    with pytest.raises(InputError, match=message) as error:
        official.build(kind, kwargs, make_variables() if variables is None else variables)
    return str(error.value)


def test_every_fault_of_the_variables_is_in_one_message():
    variables = make_variables()
    for name in ("fit/stem/bias:0", "fit/x_output_ln/gamma:0"):
        del variables[name]
    variables["fit/stem_ln/beta:0"] = np.zeros(9, np.float32)
    query = "fit/l_network/transformer_encoder/mha/query/kernel:0"
    variables[query] = variables[query].reshape(12, 12)  # the same numbers, the heads not cut
    variables["fit/stranger:0"] = np.zeros(1, np.float32)
    message = refuses("these variables are not those of this FIT", variables=variables)
    for words in (
        "2 missing: fit/stem/bias:0, fit/x_output_ln/gamma:0",
        "1 unknown: fit/stranger:0",
        "2 misshapen",
        "fit/stem_ln/beta:0 (9,) instead of (8,)",
        f"{query} (12, 12) instead of (12, 4, 3)",
    ):
        assert words in message


def test_a_kernel_of_any_shape_is_a_fault_and_no_crash():
    for shape in [(), (3,), (0, 8), (3, 8, 1)]:
        refuses("misshapen: fit/stem/kernel:0", variables={**make_variables(), "fit/stem/kernel:0": np.zeros(shape)})


def test_no_fault_is_left_out_however_many():
    message = refuses("missing", variables={})
    assert all(name in message for name in make_variables() if "stem" not in name)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("FITX", KWARGS, "unknown kind 'FITX'; there are FIT, FITDenoiser, FITAR"),
        ("FIT", {**KWARGS, "rotary": 1}, "unknown arguments of FIT: rotary; known are"),
        ("FIT", {**KWARGS, "vocab_size": 1}, "unknown arguments of FIT: vocab_size"),
        ("FITDenoiser", KWARGS, "arguments of FITDenoiser missing: out_dim"),
        ("FITAR", KWARGS, "arguments of FITAR missing: vocab_size"),
        ("FIT", {**KWARGS, "x_size": 9}, "x_size=9 tokens do not divide into num_groups=2 groups; 8 or 10 do"),
        ("FIT", {**KWARGS, "num_groups": 0}, "num_groups"),
        ("FIT", {**KWARGS, "layers": "(1)0(1)"}, "0 global layers"),
        ("FIT", {**KWARGS, "mask": "x"}, "unknown mask 'x'"),
    ],
)
def test_arguments_that_cannot_be(kind, kwargs, message):
    refuses(message, kind, kwargs)


@pytest.mark.parametrize("name", sorted(KWARGS))
def test_what_has_no_default_must_be_given(name):
    refuses(f"arguments of FIT missing: {name}", kwargs={key: value for key, value in KWARGS.items() if key != name})


def test_what_the_reference_takes_beside_the_architecture_is_ignored():
    model = official.build("FIT", {**KWARGS, "name": "fit", "drop_path": 0.1}, make_variables())
    assert not model.training
    assert model.config["drop_path"] == 0.1


def test_channels_are_read_off_the_shapes():
    assert official.build("FIT", KWARGS, make_variables(y_channels=5)).config["y_channels"] == 5
    assert official.build("FIT", KWARGS, make_variables()).config["in_channels"] == 3


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_arrays_of_any_float(dtype):
    variables = {name: array.astype(dtype) for name, array in make_variables().items()}
    back = official.variables(official.build("FIT", KWARGS, variables))
    for name, array in variables.items():
        np.testing.assert_allclose(back[name], array, rtol=1e-6)
        assert back[name].dtype == np.float32


def test_arrays_are_copies_both_ways():
    variables = make_variables()
    model = official.build("FIT", KWARGS, variables)
    name = "fit/x_output_ln/gamma:0"
    official.variables(model)[name][:] = 7
    variables[name][:] = 7
    assert not (official.variables(model)[name] == 7).any()


def test_names_are_one_for_each_parameter():
    models = [
        FITEncoder.from_preset("tiny", num_groups=2, tokens_per_group=4, in_channels=3, y_channels=2),
        FITDenoiser.from_preset("tiny", num_groups=2, tokens_per_group=4, out_dim=3, cond_dim=4, self_cond="latent"),
        FITDecoder.from_preset("tiny", num_groups=2, tokens_per_group=4, vocab_size=5, shared_embedding=False),
    ]
    for model in models:
        variables = official.variables(model)
        assert len(variables) == len(list(model.parameters()))
        assert sum(array.size for array in variables.values()) == sum(p.numel() for p in model.parameters())


def test_gradients_need_a_backward_pass_and_are_zero_where_nothing_flows():
    decoder = FITDecoder.from_config(
        layers="(1)1(1)1",
        num_groups=2,
        tokens_per_group=4,
        latents_per_group=2,
        vocab_size=5,
        dim=8,
        latent_dim=12,
        heads=2,
        latent_heads=4,
    )
    with pytest.raises(InputError, match="holds no gradients"):
        official.gradients(decoder)
    decoder(torch.zeros(1, 2, 4, dtype=torch.long)).sin().sum().backward()
    gradients = official.gradients(decoder)
    assert gradients.keys() == official.variables(decoder).keys()
    unreachable = [name for name in gradients if "l_network_1" in name or "l2x_cross_attn_1" in name]
    assert unreachable
    assert not any(gradients[name].any() for name in unreachable)
    assert gradients["fitar/token_embedding:0"].any()


def test_other_modules_are_not_of_the_reference():
    with pytest.raises(InputError, match="Linear is none of the reference's models"):
        official.variables(nn.Linear(2, 2))


def test_options_that_the_reference_lacks_are_refused():
    with pytest.raises(InputError, match="qk_norm"):
        make_variables(qk_norm=True)
