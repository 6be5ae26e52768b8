# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests with the libraries around: device maps and offloading, torch.compile, pipelines, PEFT, embedding surgery."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig


def assert_same(model, reference, atol=0.0):
    """The same logits and generated tokens at any number of loops."""
    ids = random_ids(2, 8)
    for num_loops in (1, 3):
        with torch.no_grad():
            difference = (model(ids, num_loops=num_loops).logits - reference(ids, num_loops=num_loops).logits).abs()
        assert difference.max() <= atol
        arguments = {"max_new_tokens": 4, "num_loops": num_loops}
        assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments))


# Placement, precision, compilation


CPU = dict.fromkeys(
    ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", *(f"model.layers.{i}" for i in range(4))],
    "cpu",
)


@pytest.mark.parametrize(
    ("tied", "device_map", "num_on_disk"),
    [
        (True, {"": "cpu"}, 0),
        (True, CPU | {"model.layers.1": "disk", "model.layers.2": "disk"}, 2 * 9),
        (True, CPU | {"lm_head": "disk", "model.embed_tokens": "disk"}, 1),
        (False, CPU | {"lm_head": "disk", "model.norm": "disk"}, 2),
        (True, {"": "disk"}, 4 * 9 + 2),
    ],
    ids=["none", "mid", "tied ends", "untied ends", "all"],
)
def test_device_map_and_disk_offload(tmp_path, tied, device_map, num_on_disk):
    reference = tiny_model(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert sum(parameter.device.type == "meta" for parameter in model.parameters()) == num_on_disk
    assert_same(model, reference)


def test_bfloat16(tmp_path):
    reference = tiny_model()
    reference.save_pretrained(tmp_path)
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = random_ids(2, 8)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), reference(ids).logits, rtol=0, atol=0.15)
    assert torch.equal(model.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    model.save_pretrained(tmp_path)
    assert LoopMDMForMaskedLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_compiled_layers_serve_every_number_of_loops():
    """Compiled layer by layer, a graph serves all layers and loops; torch gives up after 8 recompilations."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()  # graphs of other tests count towards the limit
    model, reference, ids = tiny_model(), tiny_model(), random_ids(2, 4)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    compiled = None
    for num_loops in range(1, 12):
        generated = model.generate(ids, max_new_tokens=2, num_loops=num_loops)
        assert torch.equal(generated, reference.generate(ids, max_new_tokens=2, num_loops=num_loops))
        compiled = compiled or len(graphs)
    assert len(graphs) == compiled <= 2  # a graph for any shape may follow the one for the first shape
    schedule = model.generate(ids, max_new_tokens=2, num_loops=[1, 7])
    assert torch.equal(schedule, reference.generate(ids, max_new_tokens=2, num_loops=[1, 7]))
    assert len(graphs) == compiled


# Pipelines


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 22)), "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


PROMPTS = ["w5 w6 [MASK] w7", "w9 w3"]


def test_fill_mask_pipeline(tokenizer):
    model = tiny_model()
    pipe = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu", top_k=2)
    for num_loops in (1, 3):
        model.config.num_loops = num_loops
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(ids, num_loops=num_loops).logits[0, 2].softmax(-1).topk(2)
        answers = pipe(PROMPTS[0])
        assert [answer["token"] for answer in answers] == expected.indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("num_loops", [1, 3])
def test_text_generation_pipeline(tokenizer, num_loops):
    model = tiny_model()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    generated = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated.append(model.generate(ids, max_new_tokens=5, num_loops=num_loops)[0].tolist())
    arguments = {"max_new_tokens": 5, "num_loops": num_loops}
    texts = [
        tokenizer.decode(tokens[len(prompt.split()) :], skip_special_tokens=True)
        for tokens, prompt in zip(generated, PROMPTS, strict=True)
    ]
    assert pipe(PROMPTS[1], return_full_text=False, **arguments) == [{"generated_text": texts[1]}]
    assert pipe(PROMPTS[1], **arguments)[0]["generated_text"].replace(" ", "") == (PROMPTS[1] + texts[1]).replace(
        " ", ""
    )
    for batch_size in (1, 2):
        answers = pipe(PROMPTS, batch_size=batch_size, return_full_text=False, **arguments)
        assert [answer["generated_text"] for (answer,) in answers] == texts
    # Tokens rather than text show how the masks of a prompt were filled.
    for (answer,), tokens in zip(pipe(PROMPTS, return_tensors=True, **arguments), generated, strict=True):
        assert answer["generated_token_ids"] == tokens


def test_infilling_pipeline(tokenizer):
    model = tiny_model()
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=0)[0].tolist()
    assert expected[2] != model.config.mask_token_id
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for given in ({"max_new_tokens": 0}, {"generation_config": LoopMDMGenerationConfig(max_new_tokens=0)}):
        assert pipe(PROMPTS[0], return_tensors=True, **given)[0]["generated_token_ids"] == expected
    model.generation_config.max_new_tokens = 0
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert pipe(PROMPTS[0], return_tensors=True)[0]["generated_token_ids"] == expected
    assert pipe(PROMPTS[0], return_full_text=False) == [{"generated_text": ""}]
    with pytest.raises(ValueError, match="There is nothing to generate"):
        pipe(PROMPTS[1])


# PEFT


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
def test_lora(tmp_path, target_modules):
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    labels[labels == 22] = -100
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


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tmp_path, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 8)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings is model.model.embed_tokens
    assert head is model.lm_head
    assert (head.weight is embeddings.weight) == tied
    expected = model(ids).logits
    before = model.num_parameters()
    model.resize_token_embeddings(30)
    assert model.config.vocab_size == 30
    assert model.num_parameters() - before == 7 * 32 * (1 if tied else 2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(ids).logits[..., :23], expected, rtol=0, atol=1e-6)
    assert model.generate(torch.full((1, 4), 29), max_new_tokens=4).shape == (1, 8)
    model.save_pretrained(tmp_path)
    assert_same(LoopMDMForMaskedLM.from_pretrained(tmp_path), model)


def test_set_input_embeddings():
    model, other = tiny_model(), tiny_model(seed=1)
    model.set_input_embeddings(other.get_input_embeddings())
    model.tie_weights()
    assert model.model.embed_tokens is other.model.embed_tokens
    assert model.lm_head.weight is other.model.embed_tokens.weight
    model.set_output_embeddings(other.get_output_embeddings())
    assert model.lm_head is other.lm_head


def test_num_parameters():
    """Loops add none, and a tied head counts once."""
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    expected = 4 * layer + 32 + 23 * 32
    assert tiny_model().num_parameters() == tiny_model(num_loops=9).num_parameters() == expected
    assert tiny_model(tie_word_embeddings=False).num_parameters() == expected + 23 * 32


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
        loss = model(ids, labels=ids.masked_fill(ids == 22, 3), num_loops=3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.eval().generate(input_ids=ids, max_new_tokens=4, num_loops=2).shape == (2, 12)
