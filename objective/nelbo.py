# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The negative evidence lower bound (NELBO) of a masked diffusion model: an upper bound on the negative log-likelihood of
sequences.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_loopmdm import check_num_loops
from .masking import CleanRows, Mask, clean_rows, draw_mask
from .seeds import seeded_generator

# Most numbers of logits in memory at a time
MAX_LOGITS = 2**26


@dataclass
class NelboEstimate:
    """
    Estimates by number of loops and sequence.

    Args:
        num_loops (`list[int]`): The numbers of loops, in the order asked for.
        nats (`torch.DoubleTensor` of shape `(len(num_loops), num_sequences)`): NELBO of each sequence in nats.
        standard_error (`torch.DoubleTensor`, same shape):
            Standard error of each, from the sampling of masks alone.
        num_tokens (`torch.LongTensor` of shape `(num_sequences,)`): Tokens that were predicted.
        samples (`torch.DoubleTensor` of shape `(len(num_loops), num_sequences, num_samples)`):
            The estimate from each mask; `nats` is their mean. All numbers of loops see the same masks.
        masked_share (`torch.DoubleTensor` of shape `(num_sequences, num_samples)`):
            The timestep of each mask: its share k/L of the maskable tokens (of its block, in a block-causal model).
        token_nats (`torch.DoubleTensor` of shape `(len(num_loops), num_sequences, length)`):
            The part of each token in `nats`: the mean over masks of its weight times -log p, 0 where it is visible.
    """

    num_loops: list[int]
    nats: torch.Tensor
    standard_error: torch.Tensor
    num_tokens: torch.Tensor
    samples: torch.Tensor
    masked_share: torch.Tensor
    token_nats: torch.Tensor

    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        NELBO in nats per token of all sequences together, and its standard error (from the sampling of masks), each
        `(len(num_loops),)`. `exp` of the NELBO is an upper bound on the perplexity.
        """
        total = self.num_tokens.sum()
        return self.nats.sum(-1) / total, self.standard_error.square().sum(-1).sqrt() / total

    def change(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Change of [`~NelboEstimate.per_token`] against the first number of loops, and its standard error, each
        `(len(num_loops),)`. Since the masks are the same, the error is far smaller than those of the two values.
        """
        total = self.num_tokens.sum()
        difference = self.samples - self.samples[:1]
        error = _standard_error(difference).square().sum(-1).sqrt()
        return difference.mean(-1).sum(-1) / total, error / total

    def by_timestep(self, num_bins: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Mean -log p of a masked token by timestep t, the share of masked tokens: bin b has the masks with
        `b / num_bins < t <= (b + 1) / num_bins`. Sequences are weighted by their length, so that the mean of a fine
        curve is [`~NelboEstimate.per_token`].

        Returns:
            Means and standard errors, each `(len(num_loops), num_bins)`, NaN in bins without a mask, and the number of
            masks in each bin, `(num_bins,)`. The errors come from the spread between sequences (and so hold for other
            texts of this kind), or, for a single sequence, from the spread between masks.
        """
        if num_bins < 1:
            raise ValueError(f"`num_bins` is {num_bins}; it must be at least 1.")
        # A sample is its weight B L/k times the sum of -log p over its k masked tokens: B L times the mean of a masked
        # token.
        tokens = self.num_tokens[:, None].expand(self.masked_share.shape).double()
        per_masked = self.samples / tokens
        index = (self.masked_share * num_bins - 1e-9).floor().long().clamp(0, num_bins - 1)
        mean = torch.full((len(self.num_loops), num_bins), math.nan, dtype=torch.float64)
        error, counts = mean.clone(), torch.bincount(index.flatten(), minlength=num_bins)
        for number in counts.nonzero().flatten().tolist():
            weights = tokens * (index == number)
            mean[:, number] = (per_masked * weights).sum((-1, -2)) / weights.sum()
            residuals = (per_masked - mean[:, number, None, None]) * weights
            by_sequence = residuals.sum(-1)[:, weights.sum(-1) > 0]
            groups = by_sequence if by_sequence.shape[-1] > 1 else residuals[:, weights > 0]
            num_groups = groups.shape[-1]
            if num_groups > 1:
                spread = groups.square().sum(-1) * num_groups / (num_groups - 1)
                error[:, number] = spread.sqrt() / weights.sum()
        return mean, error, counts


def _standard_error(samples: torch.Tensor) -> torch.Tensor:
    """
    Standard error of the mean over the last dimension. Each stratum has two samples; a quarter of their squared
    difference estimates the variance of their mean.
    """
    num_samples = samples.shape[-1]
    pairs = samples.unflatten(-1, (num_samples // 2, 2))
    return ((pairs[..., 0] - pairs[..., 1]).square().sum(-1) / num_samples**2).sqrt()


@torch.no_grad()
def nelbo(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    maskable: torch.Tensor | None = None,
    document_ids: torch.LongTensor | None = None,
    num_loops: int | Sequence[int] | None = None,
    num_samples: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    indices: Sequence[int | str] | None = None,
) -> NelboEstimate:
    """
    Estimates the NELBO of sequences. In a sequence with L maskable tokens, k of them are masked, with k uniform in
    1..L, and L/k times the sum of their -log p is an unbiased estimate (as in LLaDA's evaluation, with less variance
    than masking every token independently). The draws of k are stratified, two per stratum, which gives the standard
    error.

    A block-causal model (`config.attention_block_size`) is scored as it decodes, block by block: a sample masks tokens
    of one block, drawn uniformly; the model sees the earlier blocks clean, and does not see the later ones.

    Args:
        model: A [`LoopMDMForMaskedLM`], wrapped by PEFT or not. It runs in eval mode; its own mode is restored.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): Clean tokens.
        attention_mask (`torch.Tensor` of shape `(num_sequences, length)`, *optional*): 0 on padding.
        maskable (`torch.BoolTensor` of shape `(num_sequences, length)`, *optional*):
            The tokens to score, given all others (a prompt). By default all real ones.
        document_ids (`torch.LongTensor` of shape `(num_sequences, length)`, *optional*):
            Ids of documents packed into a row, which do not see each other.
        num_loops (`int` or `list[int]`, *optional*, defaults to `config.num_loops`): Numbers of loops to evaluate.
            With `loop_update="replace"` a list costs one pass with the most loops, and the tail once more for each of
            the others; with `"damped"` it costs one pass each.
        num_samples (`int`, defaults to 32): Masks per sequence; even, as they are drawn in pairs.
        batch_size (`int`, defaults to 16): Masked sequences per forward pass.
        seed (`int`, defaults to 0): Seed of the masks. A sequence's masks depend only on the seed and its index.
        indices (`list[int]` or `list[str]`, *optional*): Index of each sequence; by default its place in `input_ids`.

    Returns:
        [`NelboEstimate`], with tensors on the CPU.

    Raises:
        ValueError: Bad arguments, shapes that differ, or a sequence without a maskable token.
    """
    config = find_model(model).config
    wanted = config.num_loops if num_loops is None else num_loops
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    check_settings(wanted, num_samples)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    rows = clean_rows(config, input_ids, attention_mask, maskable, document_ids)
    indices = range(len(input_ids)) if indices is None else indices
    if len(indices) != len(input_ids):
        raise ValueError(f"`indices` has {len(indices)} entries for {len(input_ids)} sequences; give one for each.")
    masks = [_draw(rows.split(row), num_samples, seeded_generator(seed, index)) for row, index in enumerate(indices)]
    jobs = [(row, sample) for row in range(len(masks)) for sample in range(num_samples)]
    samples = torch.empty(len(wanted), len(masks), num_samples, dtype=torch.float64)
    token_nats = torch.zeros(len(wanted), *input_ids.shape, dtype=torch.float64)
    with evaluating(model):
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            losses = weighted_losses(model, rows, [(row, masks[row][sample]) for row, sample in batch], wanted)
            token_nats.index_add_(1, torch.tensor([row for row, _ in batch]), losses, alpha=1 / num_samples)
            for i, (row, sample) in enumerate(batch):
                samples[:, row, sample] = losses[:, i].sum(-1)
    shares = torch.tensor([[mask.share for mask in own] for own in masks], dtype=torch.float64)
    num_tokens, error = rows.maskable.sum(-1), _standard_error(samples)
    return NelboEstimate(wanted, samples.mean(-1), error, num_tokens, samples, shares, token_nats)


def check_settings(num_loops: Sequence[int], num_samples: int) -> None:
    """Raises a ValueError for numbers of loops or samples that [`nelbo`] does not take."""
    if len(num_loops) == 0:
        raise ValueError("`num_loops` is an empty list; give at least one number of loops.")
    for loops in num_loops:
        check_num_loops(loops)
    if num_samples < 2 or num_samples % 2 != 0:
        raise ValueError(f"`num_samples` is {num_samples}; it must be even, at least 2.")


def find_model(model: nn.Module) -> nn.Module:
    """
    The LoopMDMForMaskedLM inside the wrappers of PEFT, DDP and others. Raises a ValueError if there is none, or if a
    wrapper does something that the model inside does not know of, such as adding soft prompts.
    """
    for module in model.modules():
        soft = getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False)
        if soft and not module._adapters_disabled:
            raise ValueError(
                f"The adapter {module.active_adapter!r} is {module.active_peft_config.peft_type.value}: its soft "
                "prompts act on the forward pass of the wrapper alone, and would be left out here. Use an adapter of "
                "the weights (LoRA, DoRA, IA3), or leave this one out (`with model.disable_adapter(): ...`)."
            )
        if hasattr(type(module), "align"):
            adapters = getattr(module, "peft_config", {}).values()
            if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
                raise ValueError("Only the wrapper knows where activated LoRA begins in a row; use LoRA.")
            return module
    raise ValueError(f"{type(model).__name__} holds no LoopMDMForMaskedLM.")


def input_device(model: nn.Module) -> torch.device:
    """
    The device for a model's inputs. Offloaded weights are on `meta`, and then accelerate's hooks name the device.
    Without such a hook it is the device of the weights, or the CPU.
    """
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    named = [getattr(hook, "execution_device", None) for hook in hooks]
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
    return torch.device(next(device for device in [*named, *devices, "cpu"] if device is not None))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode inside the block, and restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _draw(blocks: list[torch.Tensor], num_samples: int, generator: torch.Generator) -> list[Mask]:
    """The masks of one sequence; samples 2i and 2i + 1 share a stratum."""
    masks = []
    for sample in range(num_samples):
        within = torch.rand((), generator=generator, dtype=torch.float64).item()
        masks.append(draw_mask(blocks, (sample // 2 * 2 + 2 * within) / num_samples, generator))
    return masks


def weighted_losses(
    model: nn.Module, rows: CleanRows, masks: list[tuple[int, Mask]], wanted: list[int], by_parts: bool = True
) -> torch.Tensor:
    """
    Weight times -log p of masked tokens, 0 elsewhere: `(len(wanted), len(masks), length)` float64 on the CPU. With
    `by_parts`, the numbers of loops in `wanted` share their loops, but the wrappers of the model are not called.
    """
    chosen = torch.tensor([row for row, _ in masks])
    ids, real = rows.input_ids[chosen], rows.real[chosen]
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for weight, (_, mask) in zip(weights, masks, strict=True):
        weight[mask.positions] = mask.weight
    masked, device = weights != 0, input_device(model)
    inputs = {
        "input_ids": ids.masked_fill(masked, find_model(model).config.mask_token_id).to(device),
        "attention_mask": None if bool(real.all()) else real.long().to(device),
        "document_ids": rows.documents[chosen].to(device) if rows.packed else None,
    }
    # FSDP gathers weights only in the forward method of the whole model, so its parts cannot be called.
    is_sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    score = _losses_by_parts if by_parts and not is_sharded else _losses_by_forward
    found = score(model, inputs, masked.to(device), ids[masked].to(device), wanted)
    empty = torch.zeros(ids.shape, dtype=torch.float64)
    return torch.stack([empty.masked_scatter(masked, found[loops].double().cpu()) for loops in wanted]) * weights


def _losses_by_parts(
    model: nn.Module, inputs: dict, masked: torch.Tensor, targets: torch.Tensor, wanted: list[int]
) -> dict[int, torch.Tensor]:
    """By number of loops, -log p of the masked tokens, `(num_masked,)`; loops are shared if possible."""
    model = find_model(model)
    config, transformer = model.config, model.model
    start, context = transformer.prelude(**inputs)

    def losses(state: torch.Tensor) -> torch.Tensor:
        states = transformer.readout(state, context)
        picked = model.align(states, inputs["attention_mask"], inputs["document_ids"])[masked]
        size = max(1, MAX_LOGITS // config.vocab_size)
        chunks = zip(picked.split(size), targets.split(size), strict=True)
        return torch.cat([_cross_entropy(model.logits(part), target) for part, target in chunks])

    # With "replace" the states of fewer loops occur on the way; with "damped" a loop's step depends on their number.
    found, together = {}, config.loop_update == "replace"
    for most in [max(wanted)] if together else set(wanted):
        for loops, (state, _) in enumerate(transformer.iterate(start, context, most), start=1):
            if loops == most or (together and loops in wanted):
                found[loops] = losses(state)
    return found


def _losses_by_forward(
    model: nn.Module, inputs: dict, masked: torch.Tensor, targets: torch.Tensor, wanted: list[int]
) -> dict[int, torch.Tensor]:
    """The same through the model's forward method, with one pass for each number of loops."""
    # The masked positions of every row, padded with others
    positions = masked.long().argsort(dim=-1, descending=True, stable=True)[:, : int(masked.sum(-1).max())]
    counts = masked.gather(1, positions)
    found = {}
    for loops in set(wanted):
        logits = model(**inputs, num_loops=loops, logits_to_keep=positions).logits
        found[loops] = _cross_entropy(logits[counts], targets)
    return found


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="none")
