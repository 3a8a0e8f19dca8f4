"""transformers' own common tests over FITForCausalLM; test_transformers_common.py runs this file in another process.

The source distribution leaves out what its test files take from folders below theirs: three modules. The mixins of
export and of generation among them are empty here, the options of configurations are ours.
"""

import sys
import types
import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fitformer.interop.transformers import FITConfig, FITForCausalLM


def left_out(name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


CONFIG_OPTIONS = {
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["FITForCausalLM"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
left_out("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
left_out("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
left_out("tests.utils.test_configuration_utils", config_common_kwargs=CONFIG_OPTIONS)

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin  # noqa: E402

# As for transformers' own models: the common tests then give labels, and look at the loss.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fitformer"] = "FITForCausalLM"

OPTIONS = {
    "layers": "(1)1(1)",
    "num_groups": 8,
    "tokens_per_group": 4,
    "vocab_size": 99,
    "dim": 32,
    "latent_dim": 48,
    "heads": 2,
    "latent_heads": 4,
    "latents_per_group": 2,
    "position": "sin_cos",
}


CHECKPOINTS = "the decoder is run checkpointed, without layers of transformers' kind"


class FITModelTester:
    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2

    def get_config(self):
        return FITConfig(**OPTIONS)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(0, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FITModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (FITForCausalLM,)
    has_attentions = False

    def setUp(self):
        self.model_tester = FITModelTester()

    def test_config(self):
        ConfigTester(self, config_class=FITConfig, **OPTIONS).run_common_tests()

    # docs/transformers.md says why, and names the tests in their place.
    def test_gradient_checkpointing_enable_disable(self):
        self.skipTest(CHECKPOINTS)

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        self.skipTest(CHECKPOINTS)

    def test_retain_grad_hidden_states_attentions(self):
        self.skipTest("hidden states are copies of what the decoder holds in groups")
