# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests with the libraries around: offloading, compilation, export, pipelines, PEFT, quantisation, embeddings."""

import copy

import pytest
import torch
from accelerate import disk_offload
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import ARCHITECTURES, MASK, PAD, random_ids, scores, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedTokenizerFast, pipeline

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig


def assert_same(model, reference, atol=0.0):
    """The same logits and generated tokens at any number of loops."""
    ids = random_ids(2, 8)
    for num_loops in (1, 3):
        with torch.no_grad():
            found, expected = model(ids, num_loops=num_loops).logits, reference(ids, num_loops=num_loops).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        arguments = {"max_new_tokens": 4, "num_loops": num_loops}
        assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments))


# Modules are called, and nothing of them is read


@pytest.mark.parametrize(
    "overrides",
    [*ARCHITECTURES.values(), {"vocab_size": 9000, "tie_word_embeddings": False}, {"attention_block_size": 4}],
    ids=str,
)
def test_every_module_may_hold_its_weights_elsewhere(overrides):
    """As under offloading, quantisation and adapters: `forward` is patched, and the parameters are placeholders."""
    model, reference = tiny_model(eos_token_id=6, **overrides), tiny_model(eos_token_id=6, **overrides)
    for module in list(model.modules()):
        if not list(module.children()):
            module.forward = copy.deepcopy(module).forward
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    empty = None if tensor is None else torch.empty_like(tensor, device="meta")
                    tensors[name] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_same(model, reference)
    ids = random_ids(2, 8)
    keep, labels = torch.tensor([[3, 0], [5, 5]]), ids.masked_fill(ids == MASK, 3)
    for arguments in ({"logits_to_keep": keep}, {"visible_loops": 1}, {"labels": labels}):
        found, expected = model(ids, **arguments), reference(ids, **arguments)
        assert torch.equal(found.logits, expected.logits)
        assert found.loss is None or torch.equal(found.loss, expected.loss)


MODULES = ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", *(f"model.layers.{i}" for i in range(4))]
CPU = dict.fromkeys(MODULES, "cpu")


@pytest.mark.parametrize(
    ("overrides", "placement", "num_on_disk"),
    [
        ({}, {"device_map": {"": "cpu"}}, 0),
        ({}, {"device_map": CPU | {"model.layers.1": "disk", "model.layers.2": "disk"}}, 2 * 9),
        ({}, {"device_map": CPU | {"lm_head": "disk", "model.embed_tokens": "disk"}}, 1),
        ({"tie_word_embeddings": False}, {"device_map": CPU | {"lm_head": "disk", "model.norm": "disk"}}, 2),
        ({}, {"device_map": {"": "disk"}}, 4 * 9 + 2),
        (
            {"vocab_size": 9000, "tie_word_embeddings": False},
            {"device_map": "auto", "max_memory": {"cpu": "1MB"}},
            4 * 9 + 3,
        ),
    ],
    ids=["none", "mid", "tied ends", "untied ends", "all", "large vocabulary"],
)
def test_device_map_and_disk_offload(tmp_path, overrides, placement, num_on_disk):
    reference = tiny_model(**overrides)
    reference.save_pretrained(tmp_path)
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path, offload_folder=tmp_path / "offload", **placement)
    assert sum(parameter.device.type == "meta" for parameter in model.parameters()) == num_on_disk
    assert_same(model, reference)


def test_end_tokens_end_offloaded_models_too(tmp_path):
    reference, ids = tiny_model(eos_token_id=10), random_ids(4, 8)
    model = disk_offload(copy.deepcopy(reference), tmp_path, execution_device="cpu")
    expected = reference.generate(ids, max_new_tokens=12)
    assert 0 < (expected[:, -1] == PAD).sum() < 4, "some rows end before the others"
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


def test_bfloat16(tmp_path):
    reference = tiny_model()
    reference.save_pretrained(tmp_path)
    model, ids = LoopMDMForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16), random_ids(2, 8)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(model(ids).logits.float(), reference(ids).logits, rtol=0, atol=0.15)
    assert torch.equal(model.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    model.save_pretrained(tmp_path)
    assert LoopMDMForMaskedLM.from_pretrained(tmp_path).dtype == torch.bfloat16


# Graphs


@pytest.fixture
def compiled():
    """A model with compiled layers, and what counts their graphs."""
    torch.compiler.reset()  # graphs of other tests count towards the limit
    backend = CompileCounterWithBackend("eager")

    def build(dynamic=None, **overrides):
        model = tiny_model(**overrides)
        for layer in model.model.layers:
            layer.compile(backend=backend, dynamic=dynamic)
        return model, tiny_model(**overrides), backend

    yield build
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_layers_serve_every_number_of_loops_and_every_length(compiled):
    """One graph for the first shape and one for all others."""
    model, reference, backend = compiled()
    for length in (9, 8, 17):
        for num_loops in (1, 2, 3, 12):
            ids = random_ids(2, length)
            found = model(ids, num_loops=num_loops, loop_tolerance=0.0).logits
            torch.testing.assert_close(found, reference(ids, num_loops=num_loops).logits)
    assert backend.frame_count == 2


@pytest.mark.parametrize(
    ("overrides", "graphs"), [({}, 3), ({"attention_block_size": 4}, 8)], ids=["whole", "block-causal"]
)
def test_compiled_layers_generate_without_compiling_again(compiled, overrides, graphs):
    """There is a graph for one and for several positions, wanted logits, ...; then none for loops, steps, lengths."""
    model, reference, backend = compiled(dynamic=True, **overrides)

    def run(length, **arguments):
        ids = random_ids(1, length).clamp(max=21)
        assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments))

    with torch._dynamo.config.patch(recompile_limit=16):
        for length in (4, 7):
            run(length, max_new_tokens=6)
        assert backend.frame_count <= graphs
        count = backend.frame_count
        for length in (3, 12, 21):
            for num_loops in (1, 7):
                run(length, max_new_tokens=9, num_loops=num_loops)
                run(length, max_new_tokens=14, num_loops=num_loops, max_denoising_steps=3)
        assert backend.frame_count == count


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True, "attention_block_size": 4}], ids=str)
def test_export_with_dynamic_shapes(overrides):
    model, ids = tiny_model(**overrides), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    shape = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=3, max=64)}
    inputs = {"input_ids": ids, "attention_mask": mask}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape)).module()
    for batch_size, length in ((1, 5), (3, 17)):
        inputs = {"input_ids": random_ids(batch_size, length), "attention_mask": torch.ones(batch_size, length).long()}
        inputs["attention_mask"][0, 0] = 0
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)


# Pipelines


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 22)), "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


PROMPTS = ["w5 w6 [MASK] w7", "w9 w3"]


def test_fill_mask_pipeline(tokenizer):
    model = tiny_model()
    pipe = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu", top_k=22)
    for num_loops in (1, 3):
        model.config.num_loops = num_loops
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        expected = model(ids, num_loops=num_loops).logits[0, 2].softmax(-1).topk(22)
        answers = pipe(PROMPTS[0])
        assert [answer["token"] for answer in answers] == expected.indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist(), abs=1e-6)
        assert MASK not in [answer["token"] for answer in answers]


@pytest.mark.parametrize("num_loops", [1, 3])
def test_text_generation_pipeline(tokenizer, num_loops):
    model = tiny_model()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    generated, texts, arguments = [], [], {"max_new_tokens": 5, "num_loops": num_loops}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated.append(model.generate(ids, **arguments)[0].tolist())
        texts.append(tokenizer.decode(generated[-1][ids.shape[1] :], skip_special_tokens=True))
    whole = pipe(PROMPTS[1], **arguments)[0]["generated_text"]
    assert whole.replace(" ", "") == (PROMPTS[1] + texts[1]).replace(" ", "")
    for batch_size in (1, 2):
        answers = pipe(PROMPTS, batch_size=batch_size, return_full_text=False, **arguments)
        assert [answer["generated_text"] for (answer,) in answers] == texts
    # Tokens rather than text show how the masks of a prompt were filled.
    answers = pipe(PROMPTS, return_tensors=True, **arguments)
    assert [answer["generated_token_ids"] for (answer,) in answers] == generated


def test_infilling_pipeline(tokenizer):
    model = tiny_model()
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=0)[0].tolist()
    assert expected[2] != MASK
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for given in ({"max_new_tokens": 0}, {"generation_config": LoopMDMGenerationConfig(max_new_tokens=0)}):
        assert pipe(PROMPTS[0], return_tensors=True, **given)[0]["generated_token_ids"] == expected
    model.generation_config.max_new_tokens = 0
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert pipe(PROMPTS[0], return_tensors=True)[0]["generated_token_ids"] == expected
    assert pipe(PROMPTS[0], return_full_text=False) == [{"generated_text": ""}]
    with pytest.raises(ValueError, match="nothing to generate"):
        pipe(PROMPTS[1])


# PEFT


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
def test_lora(tmp_path, target_modules):
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    labels[labels == MASK] = -100
    config = LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config)
    adapted = {name.split(".")[-2] for name, module in model.named_modules() if name.endswith("lora_A")}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == (every if target_modules == "all-linear" else set(target_modules))

    model.train()(ids, labels=labels, num_loops=3).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in gradients)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())

    model.eval().save_pretrained(tmp_path / "adapter")
    assert_same(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"), model)
    assert not torch.equal(model(ids).logits, tiny_model()(ids).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path / "merged")
    assert_same(loaded, merged)
    assert_same(loaded, PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrapped", [{"trainable_token_indices": [3]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_ends_that_peft_wraps(wrapped, tied):
    if tied and "modules_to_save" in wrapped:
        pytest.skip("PEFT unties them")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **wrapped)
    model, ids = get_peft_model(tiny_model(tie_word_embeddings=tied), config), random_ids(2, 8)
    assert_same(model.eval(), tiny_model(tie_word_embeddings=tied), atol=1e-6)
    ids[0, 0] = 3
    model.train()(ids, labels=ids.masked_fill(ids == MASK, 3)).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("embed_tokens" in name or "lm_head" in name for name in trained)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_soft_prompts_apply_or_are_refused(kind):
    """`generate` cannot put them before its canvas; a model that drops them would answer as its base model."""
    sizes = {"encoder_hidden_size": 32} if kind is PromptEncoderConfig else {}
    model = get_peft_model(tiny_model(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM", **sizes)).eval()
    ids = random_ids(2, 8)
    if kind is PrefixTuningConfig:
        with pytest.raises(ValueError, match="LoopMDMCache"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    else:
        prompts = model.get_prompt(2)
        embeddings = torch.cat((prompts, tiny_model().get_input_embeddings()(ids)), 1)
        expected = tiny_model()(inputs_embeds=embeddings).logits
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(scores(found), scores(expected))
    with pytest.raises(ValueError, match="soft prompts"):
        model.generate(input_ids=ids, max_new_tokens=4)
    base = model.get_base_model()
    assert torch.equal(base.generate(ids, max_new_tokens=4), tiny_model().generate(ids, max_new_tokens=4))


def test_activated_lora_is_refused_by_generate():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1])
    model, ids = get_peft_model(tiny_model(), config), torch.tensor([[3, 1, 5]])
    assert model(ids).logits.shape == (1, 3, 23)
    with pytest.raises(ValueError, match="`generate` cannot apply activated LoRA"):
        model.generate(ids, max_new_tokens=4)


def test_lora_on_a_base_in_four_bits(tmp_path):
    """Quantisers find plain linear layers under the usual names, and gradients flow past them through every loop."""
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    tiny_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    four_bits = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    base = LoopMDMForMaskedLM.from_pretrained(tmp_path, quantization_config=four_bits)
    low, high = base.model.layers[1].mlp.up_proj.weight.qdata.aminmax()
    assert -8 <= low < high <= 7
    ids = random_ids(2, 8)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids.masked_fill(ids == MASK, 3), num_loops=3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.eval().generate(input_ids=ids, max_new_tokens=4, num_loops=2).shape == (2, 12)


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_resize_token_embeddings(tmp_path, tied, bias):
    model, ids = tiny_model(tie_word_embeddings=tied, lm_head_bias=bias), random_ids(2, 8)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings is model.model.embed_tokens and head is model.lm_head
    assert (head.weight is embeddings.weight) == tied
    expected = scores(model(ids).logits)
    before = model.num_parameters()
    model.resize_token_embeddings(30)
    assert model.config.vocab_size == 30
    assert model.num_parameters() - before == 7 * 32 * (1 if tied else 2) + 7 * bias
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(scores(model(ids).logits)[..., :22], expected, rtol=0, atol=1e-6)
    assert model.generate(torch.full((1, 4), 29), max_new_tokens=4).shape == (1, 8)
    model.save_pretrained(tmp_path)
    assert_same(LoopMDMForMaskedLM.from_pretrained(tmp_path), model)


def test_set_embeddings():
    model, other = tiny_model(), tiny_model(seed=1)
    model.set_input_embeddings(other.get_input_embeddings())
    model.tie_weights()
    assert model.model.embed_tokens is other.model.embed_tokens
    assert model.lm_head.weight is other.model.embed_tokens.weight
    model.set_output_embeddings(other.get_output_embeddings())
    assert model.lm_head is other.lm_head
