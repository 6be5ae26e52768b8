# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The negative evidence lower bound (NELBO) of a masked diffusion model: an upper bound on the negative log-likelihood.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_loopmdm import check_num_loops
from ..modeling_loopmdm import document_starts
from ..randomness import seeded_generator

# Logits of at most so many numbers are held at a time.
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
    """

    num_loops: list[int]
    nats: torch.Tensor
    standard_error: torch.Tensor
    num_tokens: torch.Tensor

    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        NELBO in nats per token over all sequences together, and its standard error (sampling of masks), each
        `(len(num_loops),)`. `exp` of the former bounds the perplexity from above.
        """
        total = self.num_tokens.sum()
        return self.nats.sum(-1) / total, self.standard_error.square().sum(-1).sqrt() / total


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
) -> NelboEstimate:
    """
    Estimates the NELBO of sequences: of a sequence's L maskable tokens, k uniform in 1..L are masked, and L/k times
    the sum of their -log p estimates it without bias (method of LLaDA's evaluation; lower variance than masking each
    token independently). The draws of k are stratified, two in each stratum, from which the standard error comes.

    A block-causal model (`config.attention_block_size`) is scored as it decodes, block by block: a sample masks
    tokens of one block, drawn uniformly, whose earlier blocks are clean and whose later ones are out of its sight.

    Args:
        model: A [`LoopMDMForMaskedLM`], wrapped by PEFT or not. It is evaluated in eval mode and put back.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): Clean tokens.
        attention_mask (`torch.Tensor` of shape `(num_sequences, length)`, *optional*): 0 on padding.
        maskable (`torch.BoolTensor` of shape `(num_sequences, length)`, *optional*):
            The tokens to score, given all others (a prompt). By default all real ones.
        document_ids (`torch.LongTensor` of shape `(num_sequences, length)`, *optional*):
            Documents packed into a row, which do not see each other.
        num_loops (`int` or `list[int]`, *optional*, defaults to `config.num_loops`):
            With `loop_update="replace"` a list costs one pass of the most loops and a tail for each of the others;
            with `"damped"` one pass each.
        num_samples (`int`, defaults to 32): Masks per sequence; even, as they are drawn in pairs.
        batch_size (`int`, defaults to 16): Masked sequences per forward pass.
        seed (`int`, defaults to 0):
            Seed of the masks. A sequence's masks depend on the seed and its place in `input_ids` alone.
    """
    wrapped, model = model, find_model(model)
    # FSDP gathers the weights of a module in its forward method alone, so the parts cannot be called one by one.
    is_sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    score = _masked_losses_by_forward if is_sharded else _masked_losses
    config = model.config
    wanted = (
        [config.num_loops] if num_loops is None else [num_loops] if isinstance(num_loops, int) else list(num_loops)
    )
    check_settings(wanted, num_samples)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    if input_ids.ndim != 2:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; it needs (num_sequences, length).")
    for name, tensor in (("attention_mask", attention_mask), ("maskable", maskable), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; `input_ids` has {tuple(input_ids.shape)}.")
    input_ids = input_ids.cpu()
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    maskable = real if maskable is None else real & maskable.cpu().bool()
    empty = (~maskable.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Sequences {empty[:5]} have no maskable token, so there is nothing to score.")
    if (input_ids[maskable] == config.mask_token_id).any():
        raise ValueError(f"`input_ids` holds the mask token ({config.mask_token_id}); give clean tokens.")

    documents = torch.zeros_like(input_ids) if document_ids is None else document_ids.cpu()
    blocks = torch.zeros_like(input_ids)
    if config.attention_block_size is not None:
        # By position within each document; different documents never share a block.
        starts = document_starts(documents)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        positions = positions - (positions * starts).cummax(-1).values
        blocks = positions // config.attention_block_size + starts.cumsum(-1) * 2**32
    num_sequences = len(input_ids)
    samples = torch.empty(len(wanted), num_sequences, num_samples, dtype=torch.float64)
    jobs = [(row, sample) for row in range(num_sequences) for sample in range(num_samples)]
    masks = [
        _draw_masks(maskable[row], blocks[row], num_samples, seeded_generator(seed, row))
        for row in range(num_sequences)
    ]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            rows = torch.tensor([row for row, _ in batch])
            masked = torch.stack([masks[row][0][sample] for row, sample in batch])
            weights = torch.tensor([masks[row][1][sample] for row, sample in batch], dtype=torch.float64)
            packed = None if document_ids is None else documents[rows]
            losses = score(wrapped if is_sharded else model, input_ids[rows], real[rows], packed, masked, wanted)
            for i, (row, sample) in enumerate(batch):
                samples[:, row, sample] = losses[:, i] * weights[i]
    finally:
        model.train(was_training)
    # Two samples fall into each stratum: a quarter of their squared difference estimates the variance of their mean.
    pairs = samples.unflatten(-1, (num_samples // 2, 2))
    variance = (pairs[..., 0] - pairs[..., 1]).square().sum(-1) / num_samples**2
    return NelboEstimate(wanted, samples.mean(-1), variance.sqrt(), maskable.sum(-1))


def check_settings(num_loops: Sequence[int], num_samples: int) -> None:
    """Raises a ValueError where [`nelbo`] cannot read out `num_loops`, or draw masks in pairs."""
    if len(num_loops) == 0:
        raise ValueError("`num_loops` is an empty list; give at least one number of loops.")
    for loops in num_loops:
        check_num_loops(loops)
    if num_samples < 2 or num_samples % 2 != 0:
        raise ValueError(f"`num_samples` is {num_samples}; it must be even, at least 2.")


def find_model(model: nn.Module) -> nn.Module:
    """The LoopMDMForMaskedLM within the wrappers of PEFT, DDP and others. Raises a ValueError where there is none."""
    for module in model.modules():
        if hasattr(type(module), "align"):
            return module
    raise ValueError(f"{type(model).__name__} holds no LoopMDMForMaskedLM.")


def _draw_masks(
    maskable: torch.Tensor, block_ids: torch.Tensor, num_samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[float]]:
    """
    Masks of one sequence, `(num_samples, length)` bool, and their weights. One uniform number chooses the block and,
    by its place within it, the number of masked tokens; samples 2i and 2i + 1 share a stratum.
    """
    positions = maskable.nonzero().squeeze(-1)
    blocks = [positions[block_ids[positions] == block] for block in block_ids[positions].unique()]
    masks = torch.zeros(num_samples, len(maskable), dtype=torch.bool)
    weights = []
    for sample in range(num_samples):
        stratum = sample // 2 * 2
        uniform = (stratum + 2 * torch.rand((), generator=generator, dtype=torch.float64).item()) / num_samples
        place = uniform * len(blocks)
        block = blocks[min(int(place), len(blocks) - 1)]
        num_masked = min(int((place - int(place)) * len(block)), len(block) - 1) + 1
        masks[sample, block[torch.randperm(len(block), generator=generator)[:num_masked]]] = True
        weights.append(len(blocks) * len(block) / num_masked)
    return masks, weights


def _masked_losses(
    model: nn.Module,
    input_ids: torch.Tensor,
    real: torch.Tensor,
    document_ids: torch.Tensor | None,
    masked: torch.Tensor,
    wanted: list[int],
) -> torch.Tensor:
    """Sum of -log p over each row's masked tokens, `(len(wanted), batch_size)` float64 on the CPU."""
    config, transformer = model.config, model.model
    device = transformer.embed_tokens.weight.device
    inputs = input_ids.masked_fill(masked, config.mask_token_id).to(device)
    attention_mask = None if bool(real.all()) else real.long().to(device)
    document_ids = None if document_ids is None else document_ids.to(device)
    start, context = transformer.prelude(inputs, attention_mask, document_ids=document_ids)

    states = {}
    if config.loop_update == "replace":
        state = start
        for loops in range(1, max(wanted) + 1):
            state = transformer.loop(state, context)
            if loops in wanted:
                states[loops] = transformer.readout(state, context)
    else:
        for loops in set(wanted):
            state = start
            for _ in range(loops):
                state = transformer.loop(state, context, 1 / loops)
            states[loops] = transformer.readout(state, context)

    targets, rows = input_ids[masked], masked.nonzero()[:, 0]
    losses = torch.zeros(len(wanted), len(input_ids), dtype=torch.float64)
    for i, loops in enumerate(wanted):
        picked = model.align(states[loops], attention_mask, document_ids)[masked.to(device)]
        token_losses = [
            _cross_entropy(model.lm_head(chunk), target.to(device), config.mask_token_id)
            for chunk, target in zip(
                *(part.split(max(1, MAX_LOGITS // config.vocab_size)) for part in (picked, targets)), strict=True
            )
        ]
        losses[i].index_add_(0, rows, torch.cat(token_losses).double().cpu())
    return losses


def _masked_losses_by_forward(
    model: nn.Module,
    input_ids: torch.Tensor,
    real: torch.Tensor,
    document_ids: torch.Tensor | None,
    masked: torch.Tensor,
    wanted: list[int],
) -> torch.Tensor:
    """The same by way of the model's forward method, one pass for each number of loops."""
    mask_token_id = find_model(model).config.mask_token_id
    device = next(model.parameters()).device
    inputs = input_ids.masked_fill(masked, mask_token_id).to(device)
    # The masked positions of every row, filled up with others
    positions = masked.long().argsort(dim=-1, descending=True, stable=True)[:, : int(masked.sum(-1).max())]
    counts = masked.gather(1, positions)
    targets = input_ids.gather(1, positions).masked_fill(~counts, -100)
    losses = []
    for loops in wanted:
        logits = model(
            input_ids=inputs,
            attention_mask=real.long().to(device),
            document_ids=None if document_ids is None else document_ids.to(device),
            num_loops=loops,
            logits_to_keep=positions.to(device),
        ).logits
        token_losses = _cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), mask_token_id)
        losses.append(token_losses.view(targets.shape).double().cpu().sum(-1))
    return torch.stack(losses)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[..., mask_token_id] = -torch.inf
    return nn.functional.cross_entropy(logits, targets, reduction="none")
