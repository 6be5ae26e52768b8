# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A training pass: gradients through the last loops, loops computed again, packed documents, operations counted."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_runs import gradients, training_batch

from loopmdm.training import training_flops

EXACT = {"rtol": 0, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


# Gradients through the last loops


def reference_gradients(model, batch, num_loops: int, gradient_loops: int) -> dict[str, torch.Tensor]:
    """Loops cut in two: the first without gradient, the last with; what reaches their input goes to head as it is."""
    model.zero_grad()
    transformer = model.model
    step_size = 1 / num_loops if model.config.loop_update == "damped" else 1.0
    start, context = transformer.prelude(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        states = start.detach()
        for index in range(num_loops - gradient_loops):
            states = transformer.loop(states, context, index, step_size)
    cut = states = states.clone().requires_grad_()
    for index in range(num_loops - gradient_loops, num_loops):
        states = transformer.loop(states, context, index, step_size)
    logits = model.logits(transformer.readout(states, context))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    loss = (losses * batch["loss_weights"]).sum() / (batch["labels"] != -100).sum()
    loss.backward()
    start.backward(cut.grad)
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("overrides", [{}, {"loop_update": "damped"}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize(("num_loops", "gradient_loops"), [(5, 1), (5, 2), (3, 2), (2, 2), (1, 1), (2, 4)])
def test_gradient_loops_equal_the_reference(num_loops, gradient_loops, overrides):
    batch = training_batch()
    model = tiny_model(**overrides).double().train()
    expected = reference_gradients(model, batch, num_loops, min(num_loops, gradient_loops))
    full = tiny_model(**overrides).double().train()
    full_loss = full(**batch, num_loops=num_loops).loss
    full_loss.backward()

    model.zero_grad()
    model.model.gradient_loops = gradient_loops
    loss = model(**batch, num_loops=num_loops).loss
    loss.backward()
    assert torch.equal(loss, full_loss), "the values are those of all loops, bit for bit"
    found = gradients(model)
    assert found.keys() == expected.keys() - {"loss"} == gradients(full).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)
        assert gradient.abs().max() > 0, name
        if num_loops <= gradient_loops:
            assert torch.equal(gradient, gradients(full)[name]), name
    if num_loops > gradient_loops:
        mid = "model.layers.1.mlp.up_proj.weight"
        assert not torch.allclose(found[mid], gradients(full)[mid]), "and it does cut"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_loops_change_no_value_and_nothing_in_eval_mode(dtype):
    batch = training_batch()
    rest = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = tiny_model().to(dtype)
    for mode in (model.eval(), model.train()):
        mode.model.gradient_loops = None
        expected = mode(**rest, num_loops=4).logits
        mode.model.gradient_loops = 1
        assert torch.equal(mode(**rest, num_loops=4).logits, expected)
    # in eval mode the gradient is whole
    found = []
    for gradient_loops in (None, 1):
        model.eval().zero_grad()
        model.model.gradient_loops = gradient_loops
        model(**batch, num_loops=4).loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# Loops computed again


@pytest.mark.parametrize("num_loops", [1, 2, 5])
@pytest.mark.parametrize("gradient_loops", [None, 2])
@pytest.mark.parametrize("layers_too", [False, True])
def test_checkpointed_loops_have_the_same_gradients(num_loops, gradient_loops, layers_too):
    batch, results = training_batch(), []
    for checkpointed in (False, True):
        model = tiny_model(loop_update="damped" if layers_too else "replace").double().train()
        model.model.gradient_loops, model.model.checkpoint_loops = gradient_loops, checkpointed
        if layers_too and checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch, num_loops=num_loops).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **EXACT)


@pytest.mark.parametrize("layers_too", [False, True])
def test_checkpointed_loops_with_an_adapter(layers_too):
    batch, results = training_batch(), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model(), config).double().train()
        model.base_model.model.model.checkpoint_loops = checkpointed
        if layers_too and checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**batch, num_loops=3).loss.backward()
        results.append(gradients(model))
    assert len(results[0]) == 2 * 7 * 4
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **EXACT)


def saved_bytes(model, batch, num_loops: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, every storage counted once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)  # alive, or its address would be used again
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, num_loops=num_loops).loss
    assert loss.requires_grad
    return sum(sizes.values())


def test_checkpointed_loops_keep_memory_flat():
    model = tiny_model(num_hidden_layers=12).train()
    batch = training_batch(length=64, rows=2)
    once, plain = saved_bytes(model, batch, 1), saved_bytes(model, batch, 12)
    model.model.checkpoint_loops = True
    checkpointed = saved_bytes(model, batch, 12)
    assert plain > 2.3 * once, "34 layers run instead of 12"
    assert checkpointed <= 1.3 * once
    model.model.checkpoint_loops, model.model.gradient_loops = False, 1
    assert saved_bytes(model, batch, 12) <= 1.01 * once, "loops without gradient keep nothing"


# Packed documents

PACKED = [
    # tokens, document ids, real
    ([3, 22, 5, 9, 22, 22, 7, 8, 2], [4, 4, 4, 0, 9, 9, 9, 9, 9], 9),
    ([22, 11, 4, 22, 6, 13, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1], 6),
    ([5, 6, 22, 1, 2, 3, 22, 9, 0], [2, 2, 3, 3, 3, 3, 3, 3, 8], 8),
]


def packed_batch() -> dict[str, torch.Tensor]:
    ids, documents, real = (list(part) for part in zip(*PACKED, strict=True))
    mask = (torch.arange(9) < torch.tensor(real)[:, None]).long()
    return {"input_ids": torch.tensor(ids), "document_ids": torch.tensor(documents), "attention_mask": mask}


def pieces():
    """Row, first and last position of every document."""
    for row, (_, documents, real) in enumerate(PACKED):
        position = 0
        for _, group in itertools.groupby(documents[:real]):
            length = len(list(group))
            yield row, position, position + length
            position += length


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_block_size": 3, "shift_logits": True, "loop_update": "damped"},
        {"position_embedding_type": "learned", "attention_block_size": 2, "shift_logits": True},
    ],
    ids=str,
)
def test_packed_documents_equal_each_alone(overrides):
    """See test_architecture.py for other models."""
    model = tiny_model(**overrides).double()
    batch = packed_batch()
    logits = model(**batch).logits
    for row, start, end in pieces():
        alone = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(logits[row, start:end], alone, rtol=0, atol=1e-11)
    # an unpadded row needs no attention mask
    batch = {name: tensor[:1] for name, tensor in packed_batch().items()}
    masked = model(**batch).logits
    batch.pop("attention_mask")
    torch.testing.assert_close(model(**batch).logits, masked, rtol=0, atol=1e-11)
    batch["document_ids"] = torch.zeros_like(batch["document_ids"])
    one_document = model(**batch).logits
    batch.pop("document_ids")
    torch.testing.assert_close(model(**batch).logits, one_document, rtol=0, atol=1e-11)
    assert not torch.allclose(one_document, masked)


@pytest.mark.parametrize("shift_logits", [False, True])
def test_loss_and_gradients_of_packed_documents(shift_logits):
    batch = packed_batch()
    labels = torch.randint(1, 22, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    weights = torch.rand((3, 9), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed, alone = (tiny_model(shift_logits=shift_logits).double().train() for _ in range(2))
    loss = packed(**batch, labels=labels, loss_weights=weights, num_loops=2).loss
    loss.backward()
    total, count = 0.0, int((labels != -100).sum())
    for row, start, end in pieces():
        part = (slice(row, row + 1), slice(start, end))
        inputs = {"input_ids": batch["input_ids"][part], "labels": labels[part], "loss_weights": weights[part]}
        part_loss = alone(**inputs, num_items_in_batch=count, num_loops=2).loss
        part_loss.backward()
        total += part_loss.item()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, gradients(alone)[name], **EXACT)


# Operations


def measured_step(model, batch, num_loops: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch, num_loops=num_loops).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("num_loops", "gradient_loops", "checkpoint_loops", "layers"),
    [
        (1, None, False, False),
        (3, None, False, False),
        (4, 2, False, False),
        (3, None, True, False),
        (3, 2, False, True),
        (3, 2, True, True),
        (1, 2, True, True),
    ],
)
def test_training_flops_equal_the_measured_ones(num_loops, gradient_loops, checkpoint_loops, layers):
    """
    Exactly, but that torch stops to compute again as soon as it has what it needs: every checkpointed layer or loop
    spares its last product (the MLP's down projection), and a loop whose layers are checkpointed too, its last layer.
    """
    batch = training_batch(7, 3)
    num_logits = int(batch["loss_weights"].count_nonzero()) / 3
    model = tiny_model(attn_implementation="eager").train()
    model.model.gradient_loops, model.model.checkpoint_loops = gradient_loops, checkpoint_loops
    if layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counted = training_flops(model, 3, 7, num_loops, num_logits, gradient_loops, checkpoint_loops, layers)
    with_gradient = min(num_loops, gradient_loops or num_loops)
    down = 2 * 3 * 7 * 32 * 48
    layer = (model.flops(3, 7, 2, 0) - model.flops(3, 7, 1, 0)) // 2
    spared = with_gradient * down * checkpoint_loops
    if layers:
        spared = (4 + 2 * (with_gradient - 1)) * down + with_gradient * layer * checkpoint_loops
    assert measured_step(model, batch, num_loops) == counted - spared
    assert spared <= 0.13 * counted
    if spared:
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            assert measured_step(model, batch, num_loops) == counted


def test_training_flops_by_hand():
    model = tiny_model()
    forward = [model.flops(2, 10, loops, 4) for loops in (1, 2, 3, 4, 5)]
    mid = forward[1] - forward[0]
    for loops in (1, 3, 5):
        assert training_flops(model, 2, 10, loops, 4) == 3 * forward[loops - 1]
        assert training_flops(model, 2, 10, loops, 4, gradient_loops=7) == 3 * forward[loops - 1]
    assert training_flops(model, 2, 10, 5, 4, gradient_loops=2) == 3 * forward[4] - 2 * 3 * mid
    assert training_flops(model, 2, 10, 5, 4, checkpoint_loops=True) == 3 * forward[4] + 5 * mid
