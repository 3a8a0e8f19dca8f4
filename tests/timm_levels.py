"""timm's own tests of levels over FIT's, which timm runs by name over models of its own modules alone.

test_timm.py runs this file in another process, beside timm's tests.
"""

import pytest
from tests import test_models as theirs

OPTIONS = ({}, {"layers": "(1)1(1)1(1)"}, {"group_size": 16})


@pytest.mark.parametrize("options", OPTIONS, ids=["fit", "fit ends local", "fit of small groups"])
@pytest.mark.parametrize(
    ("test", "more"),
    [
        (theirs.test_model_forward_intermediates, (1,)),
        (theirs.test_model_forward_intermediates_features, (1,)),
        (theirs.test_prune_intermediate_layers_contract, ()),
        (theirs.test_prune_intermediate_layers_params_used, ()),
        (theirs.test_reset_classifier_keeps_pool, ()),
    ],
)
def test_levels(monkeypatch, test, more, options):
    create = theirs.create_model
    monkeypatch.setattr(theirs, "create_model", lambda name, **given: create(name, **{**options, **given}))
    test("fit_tiny", *more)
