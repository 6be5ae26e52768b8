# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Runs PEFT's own tests of decoder models, and of adapters on modules of any name, on a tiny LoopMDM.

    python tests/peft_tests.py [pytest arguments]

It loops once and three times. PEFT does not know the architecture, so it gets Llama's default targets. The tests are
in PEFT's source distribution only, see source_distributions.py.
"""

import importlib.util
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import datasets
import peft
import pytest
from peft.utils import constants
from source_distributions import source_distribution
from tiny import MASK, PAD, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopmdm import LoopMDMForMaskedLM

NUM_LOOPS = 1, 3

# Adapters that cannot apply: prefix tuning hands in the keys and values of a causal model's layers, CPT and ShadowPEFT
# compute a causal model's loss.
NOT_FOR_LOOPMDM = (peft.CartridgeConfig, peft.CPTConfig, peft.PrefixTuningConfig, peft.ShadowConfig)

# Tests that have to fail, by a pattern of their names, and why
EXPECTED_FAILURES = {
    r"^test_(generate|generate_pos_args|generate_half_prec|disable_adapter)\[Prompt": "`generate` has no soft prompts",
    r"^test_(generate|generate_pos_args|generate_half_prec|disable_adapter|mixed_adapter_batches)"
    r"\[LoraConfig-config_kwargs1[78]": "`generate` refuses activated LoRA",
    r"^test_generate_with_mixed_adapter_batches\[LoraConfig": "masked diffusion has no beams",
    r"^test_training_decoders_gradient_checkpointing\[False-LoraConfig-config_kwargs17-.*loops-3": (
        "PEFT forgets where an activated LoRA begins after the first backward pass through a layer; a loop has several"
    ),
}

# Tests of one model or adapter alone, by a pattern of their names
LEFT_OUT = (
    r"^test_prefix_tuning_",
    r"^test_lora_embed_scale_is_applied",  # Gemma's embeddings
    r"^test_lora_layer_replication$",  # wants two layers
    r"^test_merge_and_unload_fixes_tie_word_embeddings_config$",  # a checkpoint of two tensors that a config ties
    r"^test_prompt_tuning_(text_tokenizer_kwargs|trust_remote_code)$",  # a tokenizer of the Hub
    r"^test_forward_b?float16",  # sets `dtype`, which transformers' models compute
    r"^test_only_params_are_updated",  # rates and inputs made for its own modules
    r"^test_(merge_layers|save_load_roundtrip)\[LNTuning",  # want other logits of a fresh copy of the norms
)


class Expectations:
    """A plugin of pytest that leaves tests out and expects others to fail."""

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if self.leaves_out(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        for item in items:
            for pattern, reason in EXPECTED_FAILURES.items():
                if re.search(pattern, item.name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    def leaves_out(self, item) -> bool:
        adapter = item.callspec.params.get("config_cls") if hasattr(item, "callspec") else None
        return adapter in NOT_FOR_LOOPMDM or any(re.search(pattern, item.name) for pattern in LEFT_OUT)


def save_models(folder: Path) -> None:
    """Models with one loop and with three, and a tokenizer."""
    vocabulary = {"[PAD]": PAD, "[MASK]": MASK, "[EOS]": 1} | {chr(95 + token): token for token in range(2, MASK)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]", eos_token="[EOS]"
    )
    for num_loops in NUM_LOOPS:
        for name, tied in (("tied", True), ("untied", False)):
            # Biases for the adapters that train them
            sizes = {"intermediate_size": 64, "attention_bias": True, "tie_word_embeddings": tied}
            model = tiny_model(num_loops=num_loops, initializer_range=0.1, **sizes)
            model.save_pretrained(folder / f"{name}-loops-{num_loops}")
            tokenizer.save_pretrained(folder / f"{name}-loops-{num_loops}")


def main() -> int:
    with source_distribution("peft") as sdist, tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        os.environ |= {"PEFT_SDIST": str(sdist), "LOOPMDM_FOLDER": folder, "HF_HUB_OFFLINE": "1"}
        # Many adapters warn of settings that the tests choose.
        return pytest.main([__file__, "-p", "no:warnings", *sys.argv[1:]], plugins=[Expectations()])


if __name__ == "__main__":
    sys.exit(main())


FOLDER = Path(os.environ["LOOPMDM_FOLDER"])


class Loader:
    """In place of a transformers class; a test that names a model of the Hub gets a LoopMDM."""

    @staticmethod
    def from_pretrained(name, **kwargs):
        return LoopMDMForMaskedLM.from_pretrained(name if Path(name).is_dir() else FOLDER / "tied-loops-3", **kwargs)


class LogitsModel(LoopMDMForMaskedLM):
    """A module that returns a matrix, as the tests of custom models expect: the finite logits of the last position."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).logits[:, -1, :MASK]


def import_tests(sdist: Path) -> list[types.ModuleType]:
    package = sys.modules["peft_tests"] = types.ModuleType("peft_tests")
    package.__path__ = [str(sdist / "tests")]
    if importlib.util.find_spec("diffusers") is None:  # they import one name of it
        pipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = types.SimpleNamespace(StableDiffusionPipeline=pipeline)
    return [importlib.import_module(f"peft_tests.{name}") for name in ("test_decoder_models", "test_custom_models")]


for mapping in vars(constants).values():
    if isinstance(mapping, dict) and "llama" in mapping:
        mapping["loopmdm"] = mapping["llama"]

decoder_tests, custom_tests = import_tests(Path(os.environ["PEFT_SDIST"]))
# The tests are parametrized with these lists themselves.
decoder_tests.PEFT_DECODER_MODELS_TO_TEST[:] = [str(FOLDER / f"tied-loops-{num_loops}") for num_loops in NUM_LOOPS]
decoder_tests.SMALL_GRID_MODELS[:] = decoder_tests.PEFT_DECODER_MODELS_TO_TEST
decoder_tests.AutoModelForCausalLM = Loader
quotes = datasets.Dataset.from_dict({"quote": ["a b c d", "e f g", "h i j k l", "m n"] * 4})
decoder_tests.load_dataset_english_quotes = lambda: datasets.DatasetDict(train=quotes)

# Adapters that the decoder tests do not have
CUSTOM_CASES = [
    (peft.LoHaConfig, {"target_modules": ["q_proj", "down_proj"]}),
    (peft.LoKrConfig, {"target_modules": ["q_proj", "down_proj"]}),
    (peft.LoraConfig, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    (peft.LoraConfig, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    (peft.LoraConfig, {"target_modules": ["embed_tokens", "v_proj"]}),
    (peft.LoraConfig, {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [0, 10]}}),
    (peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}),
    (
        peft.TrainableTokensConfig,
        {"target_modules": ["embed_tokens"], "token_indices": [0, 1, 3], "init_weights": False},
    ),
    (peft.LilyConfig, {"target_modules": ["up_proj"], "r": 2, "stride_A": 1, "num_B": 2}),
    (peft.PeanutConfig, {"target_modules": ["up_proj"], "r": 2, "depth": 1, "act_fn": "gelu"}),
    (peft.AdamssConfig, {"target_modules": ["up_proj"], "r": 8, "num_subspaces": 3}),
]
custom_tests.TEST_CASES[:] = [
    (f"{config_class.__name__} {number}", str(FOLDER / f"untied-loops-{num_loops}"), config_class, arguments)
    for num_loops in NUM_LOOPS
    for number, (config_class, arguments) in enumerate(CUSTOM_CASES)
]


class TestDecoderModels(decoder_tests.TestDecoderModels):
    transformers_class = Loader


class TestCustomModels(custom_tests.TestPeftCustomModel):
    transformers_class = LogitsModel

    def prepare_inputs_for_testing(self):
        return decoder_tests.TestDecoderModels.prepare_inputs_for_testing(self)


# Those that make a model of their own do not apply.
for name, method in vars(custom_tests.TestPeftCustomModel).items():
    marks = [mark.args for mark in getattr(method, "pytestmark", ()) if mark.name == "parametrize"]
    if name.startswith("test_") and not any(args[1] is custom_tests.TEST_CASES for args in marks):
        setattr(TestCustomModels, name, None)
