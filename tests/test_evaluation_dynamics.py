# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Dynamics of the loop, against attention maps, states and logits computed by hand."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_model

from loopmdm.evaluation import Dynamics, measure_dynamics

IDS = torch.randint(1, 22, (1, 10), generator=torch.Generator().manual_seed(3))


def identity_mid(**overrides):
    """A model whose mid returns its input."""
    model = tiny_model(**overrides)
    with torch.no_grad():
        for layer in model.model.layers[model.config.loop_start : model.config.loop_end]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def masked_input(result: Dynamics, ids: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a run with one mask, and where it is masked."""
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[0, torch.from_numpy(result.token_position)] = True
    return ids.masked_fill(masked, mask_token_id), masked


@torch.no_grad()
def test_attention_is_that_of_the_model():
    model = tiny_model().double()
    result = measure_dynamics(model, IDS, num_loops=3, timesteps=[0.4], masks_per_text=1)
    inputs, masked = masked_input(result, IDS, 22)
    assert masked.sum() == 4
    model.set_attn_implementation("eager")
    maps = model(inputs, num_loops=3, output_attentions=True).attentions
    assert result.attention.shape == (1, len(maps), 2, 2)
    assert result.layer.tolist() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert result.loop.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    kinds = (masked[0], ~masked[0])
    for executed, probabilities in enumerate(maps):
        for a, queries in enumerate(kinds):
            for b, keys in enumerate(kinds):
                places = queries.nonzero().flatten()
                rows = [probabilities[0, head, i][keys].sum() for head in range(4) for i in places]
                expected = torch.stack(rows).mean().item()
                assert result.attention[0, executed, a, b] == pytest.approx(expected, rel=1e-6)
    assert result.uniform_attention[0].tolist() == [pytest.approx([0.4, 0.6])] * 2
    of_mid = result.attention_of_mid()
    assert of_mid.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(of_mid[:, 1], result.attention[:, 3:5].mean(1))


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": 4}, {"num_key_value_heads": 2}], ids=str)
def test_attention_adds_up_to_one(overrides):
    ids = torch.cat((IDS, IDS.flip(1)))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    result = measure_dynamics(tiny_model(**overrides), ids, mask, num_loops=2, timesteps=[0.2, 0.6, 1.0])
    rows = result.attention.sum(-1)
    seen = ~np.isnan(rows)
    np.testing.assert_allclose(rows[seen], 1, rtol=1e-5)
    assert seen[:, :, 0].all() and seen[:2].all()
    even = result.uniform_attention.sum(-1)
    np.testing.assert_allclose(even[~np.isnan(even)], 1)


def test_with_everything_masked_there_is_no_visible_token():
    result = measure_dynamics(tiny_model(), IDS, num_loops=2, timesteps=[1.0])
    np.testing.assert_allclose(result.attention[0, :, 0], [[1, 0]] * 6, rtol=1e-6)
    assert np.isnan(result.attention[0, :, 1]).all() and np.isnan(result.change[0, :, 1]).all()


@torch.no_grad()
@pytest.mark.parametrize("loop_start", [0, 1])
def test_states_are_those_of_the_loop(loop_start):
    model = tiny_model(loop_start=loop_start).double()
    result = measure_dynamics(model, IDS, num_loops=6, timesteps=[0.3], masks_per_text=1)
    inputs, masked = masked_input(result, IDS, 22)
    state, context = model.model.prelude(inputs)
    states = [state]
    for _ in range(6):
        states.append(model.model.loop(states[-1], context))
    for kind, where in enumerate((masked[0], ~masked[0], torch.ones(10, dtype=torch.bool))):
        parts = [one[0, where] for one in states]
        for s in range(1, 7):
            change = ((parts[s] - parts[s - 1]).norm() / parts[s - 1].norm()).item()
            left = ((parts[s] - parts[6]).norm() / parts[6].norm()).item()
            assert result.change[0, s - 1, kind] == pytest.approx(change)
            assert result.distance[0, s - 1, kind] == pytest.approx(left)
    for s in range(1, 7):
        for period in range(1, 5):
            if period > s:
                assert math.isnan(result.recurrence[0, s - 1, period - 1])
            else:
                back = ((states[s] - states[s - period]).norm() / states[s].norm()).item()
                assert result.recurrence[0, s - 1, period - 1] == pytest.approx(back)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True}, {"loop_end": 4}], ids=str)
def test_reading_out_after_a_loop_is_a_forward_pass_of_so_many(overrides):
    model = tiny_model(**overrides).double()
    result = measure_dynamics(model, IDS, num_loops=4, timesteps=[0.5], masks_per_text=1)
    inputs, masked = masked_input(result, IDS, 22)
    predictions = []
    for s in range(1, 5):
        log_probs = model(inputs, num_loops=s).logits[masked].log_softmax(-1)
        targets = IDS[masked]
        assert result.loss[0, s - 1] == pytest.approx(-log_probs[range(5), targets].mean().item())
        assert result.accuracy[0, s - 1] == pytest.approx((log_probs.argmax(-1) == targets).double().mean().item())
        predictions.append(log_probs.argmax(-1))
    assert result.token_predictions.tolist() == torch.stack(predictions, 1).tolist()
    assert result.token_target.tolist() == IDS[masked].tolist()
    for s in range(1, 4):
        old, new, truth = predictions[s - 1], predictions[s], IDS[masked]
        changed = old != new
        assert result.changed[0, s] == pytest.approx(changed.double().mean().item())
        assert result.corrected[0, s] == pytest.approx((changed & (new == truth)).double().mean().item())
        assert result.spoiled[0, s] == pytest.approx((changed & (old == truth)).double().mean().item())
    assert math.isnan(result.changed[0, 0])


def test_where_mid_is_the_identity_nothing_changes():
    result = measure_dynamics(identity_mid(), IDS, num_loops=5, timesteps=[0.3, 0.8])
    for values in (result.change, result.distance, result.changed[:, 1:], result.corrected[:, 1:]):
        assert not values.any()
    assert not np.nan_to_num(result.recurrence).any()
    np.testing.assert_allclose(result.loss, result.loss[:, :1].repeat(5, 1))
    # Every loop pays attention alike, too.
    np.testing.assert_allclose(result.attention_of_mid(), result.attention_of_mid()[:, :1].repeat(5, 1), rtol=1e-5)


def test_a_cycle_shows_in_the_distance_to_earlier_states(monkeypatch):
    model = identity_mid()
    # mid that swaps the sign of the state has a cycle of two loops
    monkeypatch.setattr(type(model.model), "loop", lambda self, states, *args: -states)
    result = measure_dynamics(model, IDS, num_loops=4, timesteps=[0.5], attention=False, lens=False)
    np.testing.assert_allclose(result.recurrence[0, 3], [2, 0, 2, 0], atol=1e-6)
    np.testing.assert_allclose(result.change[0, :, 2], 2, rtol=1e-6)
    assert result.attention is None and result.loss is None


def test_block_causal_models_are_masked_in_one_block():
    model = tiny_model(attention_block_size=4).double()
    result = measure_dynamics(model, IDS, num_loops=2, timesteps=[0.5], masks_per_text=6, batch_size=1)
    parts = np.split(result.token_position, np.flatnonzero(np.diff(result.token_position) < 0) + 1)
    assert len(set(result.token_position // 4)) > 1
    # What comes after the block makes no difference.
    other = IDS.clone()
    last = int(parts[0].max() // 4)
    other[0, 4 * (last + 1) :] = 1
    changed = measure_dynamics(model, other, num_loops=2, timesteps=[0.5], masks_per_text=1, batch_size=1)
    first = measure_dynamics(model, IDS, num_loops=2, timesteps=[0.5], masks_per_text=1, batch_size=1)
    np.testing.assert_allclose(changed.loss, first.loss)
    np.testing.assert_allclose(changed.attention, first.attention)
    np.testing.assert_allclose(changed.change, first.change)


def test_results_depend_on_the_seed_alone():
    model, ids = tiny_model(), torch.cat((IDS, IDS.flip(1), IDS.roll(3)))
    first = measure_dynamics(model, ids, num_loops=2, timesteps=[0.2, 0.5], batch_size=5)
    torch.manual_seed(5)
    again = measure_dynamics(model, ids, num_loops=2, timesteps=[0.2, 0.5], batch_size=2)
    np.testing.assert_array_equal(first.token_predictions, again.token_predictions)
    np.testing.assert_allclose(first.attention, again.attention, rtol=1e-5)
    np.testing.assert_allclose(first.loss, again.loss, rtol=1e-5)
    assert first.num_masks == 6 and first.loss_error.shape == (2, 2)
    other = measure_dynamics(model, ids, num_loops=2, timesteps=[0.2, 0.5], seed=1)
    assert other.token_position.tolist() != first.token_position.tolist()


def test_the_error_of_the_loss_is_the_spread_between_masks():
    model = tiny_model()
    result = measure_dynamics(model, IDS, num_loops=1, timesteps=[0.5], masks_per_text=8, batch_size=8)
    alone = []
    for start in range(0, 40, 5):
        inputs, where = IDS.clone(), torch.from_numpy(result.token_position[start : start + 5])
        inputs[0, where] = 22
        logits = model(inputs, num_loops=1).logits[0, where]
        alone.append(-logits.log_softmax(-1)[range(5), IDS[0, where]].mean().item())
    assert result.loss[0, 0] == pytest.approx(np.mean(alone), rel=1e-5)
    assert result.loss_error[0, 0] == pytest.approx(np.std(alone, ddof=1) / 8**0.5, rel=1e-4)


def test_only_maskable_tokens_are_masked_and_the_model_is_put_back():
    model = tiny_model().train()
    maskable = torch.zeros_like(IDS, dtype=torch.bool)
    maskable[0, 6:] = True
    before = model.config._attn_implementation
    result = measure_dynamics(model, IDS, maskable=maskable, num_loops=1, timesteps=[0.01, 1.0], masks_per_text=1)
    assert set(result.token_position) <= {6, 7, 8, 9}
    assert np.bincount(result.token_timestep).tolist() == [1, 4]  # one at least
    assert model.training and model.config._attn_implementation == before != "eager"


def test_saved_arrays_and_pictures(tmp_path):
    result = measure_dynamics(tiny_model(), IDS, num_loops=3, timesteps=[0.5, 1.0])
    result.save(tmp_path / "d.npz")
    loaded = Dynamics.load(tmp_path / "d.npz")
    assert loaded.num_masks == result.num_masks == 2
    for name in ("attention", "change", "recurrence", "token_predictions", "layer"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
    loaded.plot(tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    summary = result.summary()
    assert [row["loop"] for row in summary] == [1, 2, 3]
    assert summary[2]["loss"] == pytest.approx(result.loss[:, 2].mean())
    bare = measure_dynamics(tiny_model(), IDS, num_loops=1, attention=False, lens=False)
    bare.save(tmp_path / "bare.npz")
    assert Dynamics.load(tmp_path / "bare.npz").attention is None
    result.save(tmp_path / "no suffix")
    assert Dynamics.load(tmp_path / "no suffix").num_masks == result.num_masks
    bare.plot(tmp_path / "bare.png")
    assert set(bare.summary()[0]) == {"loop", "change", "distance"}


def test_damped_models_have_states_but_no_lens():
    model = tiny_model(loop_update="damped").double()
    with pytest.raises(ValueError, match="not the result of fewer loops"):
        measure_dynamics(model, IDS, num_loops=3)
    result = measure_dynamics(model, IDS, num_loops=3, timesteps=[1.0], masks_per_text=1, lens=False)
    with torch.no_grad():
        state, context = model.model.prelude(torch.full_like(IDS, 22))
        after = model.model.loop(state, context, step_size=1 / 3)
    assert result.change[0, 0, 2] == pytest.approx(((after - state).norm() / state.norm()).item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_loops": 0}, "`num_loops` is 0"),
        ({"timesteps": []}, r"`timesteps` is \[\]"),
        ({"timesteps": [0.0, 0.5]}, "above 0 and at most 1"),
        ({"timesteps": [1.5]}, "above 0 and at most 1"),
        ({"masks_per_text": 0}, "`masks_per_text` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"input_ids": torch.tensor([1, 2])}, r"has shape \(2,\)"),
        ({"input_ids": torch.tensor([[1, 22]])}, r"holds the mask token \(22\)"),
        ({"maskable": torch.zeros(1, 10, dtype=torch.bool)}, "no maskable token"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_dynamics(tiny_model(), **{"input_ids": IDS, **arguments})
