# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities with gradients: those of a trace against the sampler's own, and estimates against the NELBO."""

from dataclasses import replace

import pytest
import torch
from generation_reference import ROWS, batch_of, double_model, run, seeded
from peft import LoraConfig, get_peft_model
from tiny import MASK, tiny_model

from loopmdm import LoopMDMGenerationConfig
from loopmdm.loop_policies import RowTolerance, VisibleLoops
from loopmdm.objective import nelbo, nelbo_log_probs, trace_log_probs

CALLS = [
    ({}, {}),
    ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}),
    ({}, {"do_sample": True, "top_k": 4, "min_p": 0.01, "num_loops": [4, 1, 2]}),
    ({}, {"remask_probability": 0.4, "max_denoising_steps": 9}),
    ({}, {"unmasking": "ancestral", "max_denoising_steps": 6}),
    ({}, {"loop_tolerance": 0.4, "num_loops": 4, "confidence_threshold": 0.3}),
    ({}, {"suppress_tokens": [4, 5, 6], "do_sample": True, "temperature": 3.0, "top_k": 12}),
    ({"shift_logits": True}, {"block_length": 3}),
    ({"attention_block_size": 4}, {"do_sample": True}),
    ({"attention_block_size": 4, "shift_logits": True}, {"eos_token_id": list(range(8, 14))}),
    ({"loop_update": "damped"}, {"num_loops": 3}),
]


@pytest.mark.parametrize(
    ("overrides", "arguments", "batch_size"), [(*call, (1, 7)[i % 2]) for i, call in enumerate(CALLS)], ids=str
)
def test_a_trace_has_the_samplers_own_log_probabilities(overrides, arguments, batch_size):
    model, (ids, mask) = double_model(**overrides), batch_of(ROWS)
    generators = [seeded(row) for row in range(len(ROWS))]
    output = run(model, ids, mask, max_new_tokens=6, generator=generators, output_trace=True, **arguments)
    config = LoopMDMGenerationConfig(**arguments)
    with torch.no_grad():
        found = trace_log_probs(model, output, config, batch_size=batch_size)
    assert found.shape == (len(output.trace), *output.sequences.shape)
    for step, log_probs in zip(output.trace, found, strict=True):
        assert torch.equal(log_probs != 0, step.committed & (step.log_probs != 0))
        expected = step.log_probs.masked_fill(~step.committed, 0.0).to(log_probs.dtype)
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        part = trace_log_probs(model, output, config, steps=[2, 0])
    torch.testing.assert_close(part, found[[2, 0]])


def test_padding_of_a_trace_is_that_of_the_call():
    """A mask that hides a [MASK], and a row that a criterion ends before given tokens."""
    model, ids = double_model(), torch.tensor([[5, MASK, MASK, 9, 3, MASK], [4, 8, MASK, MASK, MASK, 7]])
    stop = [lambda ids, scores, **kwargs: torch.tensor([len(row) > 2 for row in ids])]
    hidden = torch.ones_like(ids).index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor(0))
    for mask, arguments in ((hidden, {}), (None, {"stopping_criteria": stop, "block_length": 2})):
        output = run(model, ids, mask, max_new_tokens=2, **arguments)
        with torch.no_grad():
            found = trace_log_probs(model, output, LoopMDMGenerationConfig(), steps=range(len(output.trace)))
        for step, log_probs in zip(output.trace, found, strict=True):
            expected = step.log_probs.masked_fill(~step.committed, 0.0).to(log_probs.dtype)
            torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_a_part_of_a_trace_needs_its_padding():
    """As where groups without advantage are dropped: every field of a step is to be cut."""
    model = double_model()
    ids = torch.tensor([[0, 5, MASK, MASK], [4, 8, MASK, MASK], [0, 0, 6, MASK]])
    output = run(model, ids, (ids != 0).long())
    whole = trace_log_probs(model, output, LoopMDMGenerationConfig())
    names = ("tokens", "committed", "log_probs", "real")
    for cut in (names, names[:-1]):
        steps = [replace(step, **{name: getattr(step, name)[1:] for name in cut}) for step in output.trace]
        part = replace(output, trace=steps)
        if cut == names:
            torch.testing.assert_close(trace_log_probs(model, part, LoopMDMGenerationConfig()), whole[:, 1:])
            continue
        with pytest.raises(ValueError, match=r"`real` of the trace is of shape \(3, 4\); it must be \(2, 4\)"):
            trace_log_probs(model, part, LoopMDMGenerationConfig())


def test_steps_that_committed_nothing_have_zeros():
    model, config = double_model(), LoopMDMGenerationConfig(unmasking="ancestral", max_denoising_steps=24)
    generator = torch.Generator().manual_seed(0)
    output = run(model, torch.tensor([[5, 9, 3]]), max_new_tokens=4, generation_config=config, generator=generator)
    idle = [index for index, step in enumerate(output.trace) if not step.committed.any()]
    assert idle and not trace_log_probs(model, output, generation_config=config, steps=idle).any()


def test_gradients_of_a_trace_are_those_of_its_likelihood():
    """One step of one row: the forward pass itself."""
    model = double_model()
    canvas = torch.tensor([[5, MASK, 9, MASK, 3]])
    output = run(model, canvas, max_denoising_steps=1, output_trace=True)
    found = trace_log_probs(model, output, generation_config=LoopMDMGenerationConfig()).sum()
    log_probs = model(canvas).logits.float().log_softmax(-1)
    expected = sum(log_probs[0, place, output.sequences[0, place]] for place in (1, 3))
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_adapters_get_the_gradient_and_copies_their_rows():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True}
    ids, mask = batch_of([[5, 9], [4, 8, 3]])
    output = model.generate(input_ids=ids, attention_mask=mask, output_trace=True, generator=seeded(0), **arguments)
    config = LoopMDMGenerationConfig(do_sample=True)
    found = trace_log_probs(model.train(), output, config)
    for step, log_probs in zip(output.trace, found, strict=True):
        torch.testing.assert_close(log_probs[step.committed], step.log_probs[step.committed], atol=1e-5, rtol=1e-5)
    found.sum().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_implementation": "dual"}, "`cache_implementation` cannot"),
        ({"guidance_scale": 2.0}, "`guidance_scale` cannot"),
        ({"visible_loops": 1}, "`visible_loops` cannot"),
        ({"loop_policy": VisibleLoops(1)}, "`loop_policy` cannot"),
    ],
)
def test_passes_that_cannot_be_repeated_are_refused(arguments, message):
    model = tiny_model()
    output = run(model, torch.tensor([[5, MASK]]), output_trace=True, **arguments)
    with pytest.raises(ValueError, match=message):
        trace_log_probs(model, output, generation_config=LoopMDMGenerationConfig(**arguments))
    with pytest.raises(ValueError, match="`steps` is empty"):
        trace_log_probs(model, output, steps=[])
    output.trace = None
    with pytest.raises(ValueError, match="output_trace=True"):
        trace_log_probs(model, output)


# Estimates


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": 3}, {"shift_logits": True}], ids=str)
def test_estimates_sum_to_the_nelbo(overrides):
    model = double_model(**overrides)
    ids = torch.tensor([[5, 9, 3, 8, 2], [4, 8, 7, 7, 0]])
    mask, maskable = torch.tensor([[1] * 5, [1] * 4 + [0]]), torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) != 0
    with torch.no_grad():
        found = nelbo_log_probs(model, ids, mask, maskable, num_loops=2, num_masks=400)
    expected = nelbo(model, ids, mask, maskable, num_loops=2, num_samples=800)
    assert torch.equal(found != 0, maskable & (mask != 0))
    assert ((found.sum(-1) + expected.nats[0]).abs() < 4 * expected.standard_error[0] + 1e-6).all()
    # A sequence's masks do not depend on the others, nor on the weights.
    alone = nelbo_log_probs(model, ids[1:], mask[1:], maskable[1:], num_loops=2, num_masks=3, indices=[1])
    torch.testing.assert_close(alone[0], nelbo_log_probs(model, ids, mask, maskable, 2, num_masks=3)[1])


def test_every_token_is_predicted_by_each_pair_of_masks():
    model, ids = tiny_model(), torch.tensor([[5, 9, 3, 8, 2, 6, 1]])
    for seed in range(5):
        assert (nelbo_log_probs(model, ids, seed=seed) < 0).all()


def test_gradients_of_estimates():
    """Differences of the same estimate, under weights that moved a little."""
    model, ids = double_model(), torch.tensor([[5, 9, 3, 8]])
    weight = model.model.layers[1].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(nelbo_log_probs(model, ids, num_masks=2).sum(), [weight])
    values = []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            weight[3, 4] += change
            values.append(nelbo_log_probs(model, ids, num_masks=2).sum())
            weight[3, 4] -= change
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, gradient[3, 4], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="`num_masks` is 0"):
        nelbo_log_probs(model, ids, num_masks=0)


def test_training_draws_do_not_change_the_loops_of_a_trace():
    model = double_model()
    output = run(model, torch.tensor([[5, MASK, 9, MASK]]), output_trace=True)
    model.train()
    model.model.num_train_loops = 1
    found = trace_log_probs(model, output)
    for step, log_probs in zip(output.trace, found, strict=True):
        expected = step.log_probs[step.committed].to(log_probs.dtype)
        torch.testing.assert_close(log_probs[step.committed], expected, atol=1e-5, rtol=1e-5)


def test_exits_of_single_blocks_are_refused():
    model = double_model(attention_block_size=4)
    for name, exit_rule in (("loop_tolerance", 0.4), ("loop_policy", RowTolerance(0.4))):
        arguments = {name: exit_rule, "num_loops": 6}
        output = run(model, torch.tensor([[5, 9, 3]]), max_new_tokens=6, output_trace=True, **arguments)
        with pytest.raises(ValueError, match=f"`{name}` cannot.*block-causal"):
            trace_log_probs(model, output, generation_config=LoopMDMGenerationConfig(**arguments))
    with pytest.raises(ValueError, match="`indices` has 2 entries for 1"):
        nelbo_log_probs(model, torch.tensor([[5, 9]]), indices=[0, 1])
