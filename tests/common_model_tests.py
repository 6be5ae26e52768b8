# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' own common model and configuration tests on LoopMDM, with one loop and with three.

    python tests/common_model_tests.py [pytest arguments]

The tests are in the source distribution of transformers only, see source_distributions.py.
"""

import importlib
import os
import subprocess
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from source_distributions import source_distribution
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMModel
from loopmdm.modeling_loopmdm import LoopMDMPreTrainedModel


def main() -> int:
    """Downloads the tests if need be and runs pytest on this file."""
    no_mark_warnings = "-Wignore::pytest.PytestUnknownMarkWarning"
    command = [sys.executable, "-m", "pytest", no_mark_warnings, __file__, *sys.argv[1:]]
    with source_distribution("transformers") as sdist:
        return subprocess.call(command, env={**os.environ, "TRANSFORMERS_SDIST": str(sdist)})


if __name__ == "__main__":
    sys.exit(main())


def import_common_tests(sdist: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """
    Imports the modules of the model tests and of the configuration tests as parts of a package `transformers_tests`.
    """

    def add_module(name: str, **attributes):
        module = sys.modules[f"transformers_tests{name}"] = types.ModuleType(f"transformers_tests{name}")
        vars(module).update(attributes)

    # The source distribution has the files in tests/ but not its sub-folders. Those of the two mixins test export and
    # transformers' own `generate`, which a LoopMDM replaces.
    add_module("", __path__=[str(sdist / "tests")])
    add_module(".exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add_module(".generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add_module(
        ".utils.test_configuration_utils",
        # Arguments of every config, with values other than the defaults; and `mask_token_id`, which ours requires.
        config_common_kwargs={
            "mask_token_id": 5,
            "architectures": ["LoopMDMForMaskedLM"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "label"},
            "is_encoder_decoder": True,
            "label2id": {"label": 0},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        },
    )
    (sdist / "tests/__init__.py").touch()  # a file that the configuration tests look for
    names = "transformers_tests.test_modeling_common", "transformers_tests.test_configuration_common"
    return tuple(importlib.import_module(name) for name in names)


modeling_tests, configuration_tests = import_common_tests(Path(os.environ["TRANSFORMERS_SDIST"]))

# The tests look here for what a class is, above all whether it takes labels.
MODEL_MAPPING_NAMES["loopmdm"] = "LoopMDMModel"
MODEL_FOR_MASKED_LM_MAPPING_NAMES["loopmdm"] = "LoopMDMForMaskedLM"
# The original writes an epsilon under the names of all models; LoopMDM refuses those that look like its own misspelt.
modeling_tests.set_config_for_less_flaky_test = lambda config: setattr(config, "rms_norm_eps", 1.0)


class LoopMDMConfigTester(configuration_tests.ConfigTester):
    def check_config_can_be_init_without_params(self):
        with self.parent.assertRaisesRegex(StrictDataclassError, "`mask_token_id` is missing"):
            self.config_class()


class LoopMDMModelTester:
    """What the common tests ask for: sizes, a small config and inputs."""

    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_attention_heads = 4
    is_training = True

    def __init__(self, num_loops: int):
        self.num_loops = num_loops
        self.attn_implementation = None
        # The number of hidden states and attentions that the tests expect.
        self.num_hidden_layers = self.get_config().num_executed_layers(num_loops)

    def get_config(self) -> LoopMDMConfig:
        return LoopMDMConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=4,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            loop_start=1,
            loop_end=3,
            num_loops=self.num_loops,
            attn_implementation=self.attn_implementation,
            pad_token_id=0,
            mask_token_id=1,  # a low one, as the tests shrink the vocabulary
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LoopMDMConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        shape = self.batch_size, self.seq_length
        attention_mask = torch.ones(shape, dtype=torch.long)
        attention_mask[:, -2:] = 0
        return config, {"input_ids": torch.randint(1, config.vocab_size, shape), "attention_mask": attention_mask}


# LoopMDM refuses a checkpoint that lacks tensors. The tests of how those are initialised need it to go on.
without_checkpoint_check = mock.patch.object(
    LoopMDMPreTrainedModel, "from_pretrained", classmethod(transformers.PreTrainedModel.from_pretrained.__func__)
)


class OneLoopTest(modeling_tests.ModelTesterMixin, unittest.TestCase):
    num_loops = 1
    all_model_classes = (LoopMDMModel, LoopMDMForMaskedLM)
    all_generative_model_classes = ()  # see `GenerationTesterMixin` above
    test_torch_exportable = False

    def setUp(self):
        self.model_tester = LoopMDMModelTester(self.num_loops)
        self.config_tester = LoopMDMConfigTester(self, LoopMDMConfig, mask_token_id=5, num_loops=self.num_loops)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_num_layers_is_small(self):
        # Overrides a limit of 2: head, mid and tail all have layers here.
        self.assertEqual(self.model_tester.get_config().num_hidden_layers, 4)

    # These two ask for attentions without asking for eager attention, which LoopMDM needs for it.
    def test_capture_outputs_decorator(self):
        self.model_tester.attn_implementation = "eager"
        super().test_capture_outputs_decorator()

    def test_model_outputs_equivalence(self):
        self.model_tester.attn_implementation = "eager"
        super().test_model_outputs_equivalence()

    @without_checkpoint_check
    def test_can_init_all_missing_weights(self):
        super().test_can_init_all_missing_weights()

    @without_checkpoint_check
    def test_model_weights_reload_no_missing_tied_weights(self):
        super().test_model_weights_reload_no_missing_tied_weights()

    def test_batching_equivalence(self, **tolerances):
        # The mask token's score is -inf; +inf is still wrong.
        with mock.patch.object(torch, "isinf", torch.isposinf):
            super().test_batching_equivalence(**tolerances)

    def test_can_capture_specific_layers_hidden_states(self):
        # transformers drops indices beyond `num_hidden_layers`, and a loop has more states than that.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), self.assertRaisesRegex(ValueError, "must be True or False"):
                model_class(config).eval()(**inputs, output_hidden_states=[0, 2])

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self):
        with self.assertRaisesRegex(ValueError, "needs eager attention"):
            super().test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions()


class ThreeLoopsTest(OneLoopTest):
    num_loops = 3
