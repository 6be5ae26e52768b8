# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests with the libraries around: graphs, export, pipelines, embeddings. See test_wrappers.py for other wrappers."""

import pytest
import torch
from evaluation_models import word_tokenizer
from peft import PromptTuningConfig, get_peft_model
from tiny import MASK, SHALLOW, random_ids, scores, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import pipeline

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
        for length in (3, 21):
            for num_loops in (1, 4):
                run(length, max_new_tokens=9, num_loops=num_loops)
                run(length, max_new_tokens=14, num_loops=num_loops, max_denoising_steps=3)
        assert backend.frame_count == count


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True, "attention_block_size": 4}], ids=str)
def test_export_with_dynamic_shapes(overrides):
    model, ids = tiny_model(**SHALLOW, **overrides), random_ids(2, 9)
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
    return word_tokenizer(words, pad_token="[PAD]", eos_token=None, mask_token="[MASK]")


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


@pytest.mark.parametrize("num_loops", [1, 3])
def test_text_generation_pipeline_with_a_conversation(tokenizer, num_loops):
    model, question = tiny_model(), [{"role": "user", "content": PROMPTS[1]}]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' w1 ' }}{% endfor %}"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    arguments = {"max_new_tokens": 5, "num_loops": num_loops}
    ids = tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True).input_ids
    expected = tokenizer.decode(model.generate(ids, **arguments)[0, ids.shape[1] :], skip_special_tokens=True)
    answer = pipe(question, **arguments)[0]["generated_text"]
    assert answer[:1] == question and answer[1]["role"] == "assistant"
    assert answer[1]["content"].strip() == expected.strip() != ""


def test_pipelines_take_loops_when_they_load(tokenizer, tmp_path):
    """For `fill-mask`, whose call takes no arguments of the model."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    for num_loops in (1, 4):
        pipe = pipeline("fill-mask", model=str(tmp_path), model_kwargs={"num_loops": num_loops}, device="cpu")
        expected = tiny_model()(ids, num_loops=num_loops).logits[0, 2].argmax()
        assert pipe(PROMPTS[0])[0]["token"] == expected


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


def test_soft_prompts_leave_the_model_within_usable():
    model, ids = (
        get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        random_ids(2, 8),
    )
    with pytest.raises(ValueError, match="soft prompts"):
        model.generate(input_ids=ids, max_new_tokens=4)
    base = model.get_base_model()
    assert torch.equal(base.generate(ids, max_new_tokens=4), tiny_model().generate(ids, max_new_tokens=4))


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
    with pytest.raises(ValueError, match=r"22 tokens do not hold the mask token \(22\)"):
        model.resize_token_embeddings(22)


def test_set_embeddings():
    model, other = tiny_model(), tiny_model(seed=1)
    model.set_input_embeddings(other.get_input_embeddings())
    model.tie_weights()
    assert model.model.embed_tokens is other.model.embed_tokens
    assert model.lm_head.weight is other.model.embed_tokens.weight
    model.set_output_embeddings(other.get_output_embeddings())
    assert model.lm_head is other.lm_head
