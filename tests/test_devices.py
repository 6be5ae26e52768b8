# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Nothing mixes the CPU with the device that the model and its inputs are on; see device.py."""

import pytest
import torch
from device import Far, on_device, to_device
from tiny import MASK, random_ids, tiny_model

from loopmdm.objective import nelbo, nelbo_log_probs

GENERATE = {
    "greedy": {},
    "dual": {"cache_implementation": "dual"},
    "sampled": {"do_sample": True, "top_p": 0.9},
    "bounded": {"entropy_bound": 0.5, "suppress_tokens": [3], "eos_token_id": 5},
    "tolerance": {"loop_tolerance": 0.3},
    "visible": {"visible_loops": 1, "guidance_scale": 1.5},
    "report": {"output_trace": True, "output_scores": True, "return_dict_in_generate": True},
}


def same(run, **overrides) -> None:
    """What `run` returns for a model, its input and its mask is the same on both."""
    model, ids = tiny_model(**overrides), random_ids(2, 6).clamp(max=21)
    ids[0, 3] = MASK
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = run(model, ids, mask)
    with on_device():
        found = run(to_device(model), Far(ids), Far(mask))
    found = found.near if isinstance(found, Far) else found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_device_refuses_tensors_of_the_cpu():
    with on_device(), pytest.raises(RuntimeError, match="same device"):
        Far(torch.ones(2)) + torch.ones(2)


@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True, "attention_block_size": 4}], ids=str)
def test_passes(overrides):
    clean = lambda ids: ids.masked_fill(ids == MASK, 3)  # noqa: E731
    same(lambda model, ids, mask: model(ids, attention_mask=mask).logits.detach(), **overrides)
    same(lambda model, ids, mask: nelbo(model, clean(ids), mask, num_samples=2).nats, **overrides)
    same(lambda model, ids, mask: nelbo_log_probs(model, clean(ids), mask).detach(), **overrides)


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True, "attention_block_size": 4}], ids=["whole", "block"])
def test_generate(name, overrides):
    if overrides and name == "dual":
        pytest.skip("block-causal models have an exact cache")

    def run(model, ids, mask):
        generators = [torch.Generator().manual_seed(row) for row in range(len(ids))]
        steps = {"max_new_tokens": 4, "max_denoising_steps": 2, "generator": generators}
        output = model.generate(ids, mask, **steps, **GENERATE[name])
        return getattr(output, "sequences", output)

    same(run, **overrides)
