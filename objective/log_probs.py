# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Log-probabilities of generated tokens with gradients, for reinforcement learning: exact ones of the sampler's own
decisions, and estimates for a whole answer under new masks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..generation_outputs import LoopMDMGenerationOutput
from .masking import clean_rows, draw_mask
from .nelbo import find_model, input_device, weighted_losses
from .seeds import seeded_generator


def trace_log_probs(
    model: nn.Module,
    output: LoopMDMGenerationOutput,
    generation_config: Any = None,
    steps: Sequence[int] | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """
    The log-probability of every token that `generate` committed, in the state in which it was committed and under the
    distribution that it was drawn from. With the weights that generated it equals `trace[i].log_probs`; with others
    the difference is the logarithm of the importance ratio. Gradients flow.

    Args:
        model: A [`LoopMDMForMaskedLM`], wrapped by PEFT or not, in the mode (train or eval) that it is in.
        output ([`LoopMDMGenerationOutput`]): Of a call with `output_trace=True`.
        generation_config ([`LoopMDMGenerationConfig`], *optional*):
            The call's arguments; by default the model's own generation config. Logits processors take no part.
        steps (`list[int]`, *optional*):
            Entries of the trace to compute; by default all. A few at a time bound the memory of a backward pass.
        batch_size (`int`, defaults to 16): States per forward pass.

    Returns:
        `torch.FloatTensor` of shape `(len(steps), num_rows, length)`, 0 where the step committed nothing. The sum over
        the first and last dimension is the log-probability of a row's trajectory, given which positions were chosen.

    Raises:
        ValueError: There is no trace, or the passes of the call cannot be repeated with gradients (approximate caches,
            guidance, `visible_loops`).
    """
    base = find_model(model)
    if not output.trace:
        raise ValueError("`output` has no trace; generate with `return_dict_in_generate=True, output_trace=True`.")
    config = base._prepare_generation_config(generation_config)[0]
    _check_repeatable(config, base.config)
    device, loops = input_device(model), config.num_loops or base.config.num_loops
    loops = loops if isinstance(loops, list | tuple) else [loops]
    chosen = range(len(output.trace)) if steps is None else steps
    if len(chosen) == 0:
        raise ValueError("`steps` is empty; name entries of the trace, or leave it out for all.")
    trace = [output.trace[index] for index in chosen]
    # (steps, num_rows, length): tokens after a step, what it committed, and the states before
    tokens, committed = (torch.stack([getattr(step, name) for step in trace]) for name in ("tokens", "committed"))
    tokens, committed = tokens.to(device), committed.to(device)
    # Nothing is remasked before it was committed, so this is the state before the first step.
    first = output.trace[0].tokens.masked_fill(output.trace[0].committed, base.config.mask_token_id)
    before = [first, *(step.tokens for step in output.trace[:-1])]
    states = torch.stack([before[index] for index in chosen]).to(device)
    real = output.trace[0].real
    if real is None or real.shape != tokens.shape[1:]:
        found = "missing" if real is None else f"of shape {tuple(real.shape)}"
        raise ValueError(f"`real` of the trace is {found}; it must be {tuple(tokens.shape[1:])}, as `tokens` are.")
    real = real.to(device)
    log_probs, warpers = torch.zeros(tokens.shape, device=device, dtype=torch.float32), config.warpers()
    by_loops: dict[int | None, list[int]] = {}
    for place, step in enumerate(trace):
        by_loops.setdefault(loops[min(step.step, len(loops) - 1)], []).append(place)
    for number, places in by_loops.items():
        group = torch.tensor(places, device=device)
        busy, rows = committed[group].any(-1).nonzero(as_tuple=True)
        for start in range(0, len(rows), batch_size):
            t, r = group[busy[start : start + batch_size]], rows[start : start + batch_size]
            # The committed positions of every state, padded with others
            order = committed[t, r].long().argsort(dim=-1, descending=True, stable=True)
            positions = order[:, : int(committed[t, r].sum(-1).max())]
            scores = model(
                input_ids=states[t, r],
                attention_mask=real[r].long(),
                num_loops=number,
                loop_tolerance=config.loop_tolerance,
                loop_policy=config.loop_policy,
                logits_to_keep=positions,
            ).logits.float()
            scores[..., list(config.suppress_tokens or ())] = -torch.inf
            if len(warpers) > 0:
                scores = warpers(None, scores.flatten(0, 1)).view(scores.shape)
            wanted = tokens[t, r].gather(1, positions)
            found = scores.log_softmax(-1).gather(-1, wanted[..., None]).squeeze(-1)
            i, j = committed[t, r].gather(1, positions).nonzero(as_tuple=True)
            log_probs = log_probs.index_put((t[i], r[i], positions[i, j]), found[i, j])
    return log_probs


def _check_repeatable(config: Any, model_config: Any) -> None:
    """Raises a ValueError for arguments of `generate` whose passes cannot be repeated with gradients."""
    is_causal, policy = model_config.attention_block_size is not None, config.loop_policy
    positions = "positions that stop looping pass no gradients on"
    blocks = "a block-causal model applies exits to single blocks"
    for name, is_wrong, why in (
        ("cache_implementation", config.cache_implementation is not None, "keys and values of earlier steps are gone"),
        ("guidance_scale", config.guidance_scale not in (None, 1), "it mixes two passes"),
        ("visible_loops", config.visible_loops is not None, positions),
        ("loop_policy", policy is not None and policy.per_position, positions),
        ("loop_policy", policy is not None and is_causal, blocks),
        ("loop_tolerance", config.loop_tolerance is not None and is_causal, blocks),
    ):
        if is_wrong:
            raise ValueError(f"`{name}` cannot be used in a call whose log-probabilities are computed again: {why}.")


def nelbo_log_probs(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    maskable: torch.Tensor | None = None,
    num_loops: int | None = None,
    num_masks: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> torch.Tensor:
    """
    Estimates a lower bound on the log-likelihood of sequences, token by token, under [`nelbo`]'s masks, with
    gradients. Each mask comes with its complement, so that every pair predicts every token once (coupled sampling,
    DiffuCoder, arXiv 2506.20639). With the weights of the NELBO, the sum over a row is an unbiased estimate of minus
    its NELBO. The same seed masks the same tokens for all models, so the error of the difference between two models
    (the importance ratio of d1, arXiv 2504.12216, and its successors) is far smaller than that of either.

    Args:
        model: A [`LoopMDMForMaskedLM`], wrapped by PEFT or not, in the mode that it is in.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): Clean tokens, prompt and answer.
        attention_mask (`torch.Tensor` of shape `(num_sequences, length)`, *optional*): 0 on padding.
        maskable (`torch.BoolTensor` of shape `(num_sequences, length)`, *optional*):
            The tokens to score, given all others (the answer). By default all real ones.
        num_loops (`int`, *optional*, defaults to `config.num_loops`): Applications of mid.
        num_masks (`int`, defaults to 1): Pairs of masks for each sequence.
        seed (`int`, defaults to 0): Seed of the masks. A sequence's masks depend only on the seed and its index.
        indices (`list[int]`, *optional*): Index of each sequence; by default its place in `input_ids`.

    Returns:
        `torch.DoubleTensor` of shape `(num_sequences, length)`, on the CPU; 0 where nothing is scored.
    """
    if num_masks < 1:
        raise ValueError(f"`num_masks` is {num_masks}; it must be at least 1.")
    config = find_model(model).config
    rows = clean_rows(config, input_ids, attention_mask, maskable)
    indices = range(len(input_ids)) if indices is None else indices
    if len(indices) != len(input_ids):
        raise ValueError(f"`indices` has {len(indices)} entries for {len(input_ids)} sequences; give one for each.")
    masks = []
    for row, index in enumerate(indices):
        generator, blocks = seeded_generator(seed, index), rows.split(row)
        for number in range(num_masks):
            uniform = (number + torch.rand((), generator=generator, dtype=torch.float64).item()) / num_masks
            mask = draw_mask(blocks, uniform, generator)
            masks += [(row, mask), (row, mask.complement())]
    loops = config.num_loops if num_loops is None else num_loops
    (losses,) = weighted_losses(model, rows, masks, [loops], by_parts=False)
    return -losses.unflatten(0, (len(rows.input_ids), 2 * num_masks)).mean(1)
