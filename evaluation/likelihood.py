# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The negative evidence lower bound (NELBO) of a masked diffusion model: an upper bound on the negative log-likelihood,
of sequences ([`nelbo`]) and of whole texts ([`text_likelihood`]).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_loopmdm import check_num_loops
from ..modeling_loopmdm import document_starts
from ..randomness import seeded_generator
from .texts import Text, Window, make_windows

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
        samples (`torch.DoubleTensor` of shape `(len(num_loops), num_sequences, num_samples)`):
            What each mask says of the NELBO; `nats` is their mean. All numbers of loops see the same masks.
        masked_share (`torch.DoubleTensor` of shape `(num_sequences, num_samples)`):
            The timestep of each mask: its share k/L of the maskable tokens (of its block, in a block-causal model).
        token_nats (`torch.DoubleTensor` of shape `(len(num_loops), num_sequences, length)`):
            What each token adds to `nats`: the mean over the masks of L/k times its -log p, 0 where it is visible.
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
        NELBO in nats per token over all sequences together, and its standard error (sampling of masks), each
        `(len(num_loops),)`. `exp` of the former bounds the perplexity from above.
        """
        total = self.num_tokens.sum()
        return self.nats.sum(-1) / total, self.standard_error.square().sum(-1).sqrt() / total

    def change(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Change of [`~NelboEstimate.per_token`] against the first number of loops, and its standard error, each
        `(len(num_loops),)`. As the masks are the same, this is known far better than the two values are.
        """
        total = self.num_tokens.sum()
        difference = self.samples - self.samples[:1]
        error = _standard_error(difference).square().sum(-1).sqrt()
        return difference.mean(-1).sum(-1) / total, error / total

    def by_timestep(self, num_bins: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Mean -log p of a masked token by timestep t, the share of masked tokens: bin b holds the masks with
        `b / num_bins < t <= (b + 1) / num_bins`. Long sequences weigh more, so that the mean of a fine curve is
        [`~NelboEstimate.per_token`].

        Returns:
            Means and standard errors, each `(len(num_loops), num_bins)`, NaN in bins without a mask, and the number of
            masks in each bin, `(num_bins,)`. The errors come from the spread between sequences where there are several
            (so they hold for other texts of this kind), and from that between masks where there is one.
        """
        if num_bins < 1:
            raise ValueError(f"`num_bins` is {num_bins}; it must be at least 1.")
        # A sample is (its weight B L/k) x (sum of -log p over its k masked tokens): L times the mean of a masked token
        # (times the number of blocks B, which a block-causal model's tokens come in).
        tokens = self.num_tokens[:, None].expand(self.masked_share.shape).double()
        per_masked = self.samples / tokens
        index = (self.masked_share * num_bins - 1e-9).floor().long().clamp(0, num_bins - 1)
        mean = torch.full((len(self.num_loops), num_bins), math.nan, dtype=torch.float64)
        error, counts = mean.clone(), torch.bincount(index.flatten(), minlength=num_bins)
        for number in range(num_bins):
            weights = tokens * (index == number)
            if counts[number] == 0:
                continue
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
    Of the mean over the last dimension. Two samples fall into each stratum: a quarter of their squared difference
    estimates the variance of their mean.
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
    indices: Sequence[int] | None = None,
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
        seed (`int`, defaults to 0): Seed of the masks. A sequence's masks depend on the seed and its index alone.
        indices (`list[int]`, *optional*): Index of each sequence; by default its place in `input_ids`.
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
    blocks = block_ids(real, documents, config.attention_block_size)
    num_sequences = len(input_ids)
    indices = range(num_sequences) if indices is None else indices
    if len(indices) != num_sequences:
        raise ValueError(f"`indices` has {len(indices)} entries for {num_sequences} sequences; give one for each.")
    samples = torch.empty(len(wanted), num_sequences, num_samples, dtype=torch.float64)
    token_nats = torch.zeros(len(wanted), *input_ids.shape, dtype=torch.float64)
    jobs = [(row, sample) for row in range(num_sequences) for sample in range(num_samples)]
    masks = [
        _draw_masks(maskable[row], blocks[row], num_samples, seeded_generator(seed, indices[row]))
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
            losses *= weights[:, None]
            token_nats.index_add_(1, rows, losses, alpha=1 / num_samples)
            for i, (row, sample) in enumerate(batch):
                samples[:, row, sample] = losses[:, i].sum(-1)
    finally:
        model.train(was_training)
    shares = torch.tensor([share for _, _, share in masks], dtype=torch.float64)
    error = _standard_error(samples)
    return NelboEstimate(wanted, samples.mean(-1), error, maskable.sum(-1), samples, shares, token_nats)


@dataclass
class TextLikelihood:
    """
    The NELBO of texts.

    Args:
        estimate ([`NelboEstimate`]): Of each window.
        windows (`list[Window]`), texts (`list[Text]`): What was scored.
    """

    estimate: NelboEstimate
    windows: list[Window]
    texts: list[Text]

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return int(self.estimate.num_tokens.sum())

    @property
    def num_bytes(self) -> int | None:
        """Bytes of UTF-8 that they stand for; None where that is not known."""
        sizes = [window.num_bytes for window in self.windows]
        return None if None in sizes else sum(sizes)

    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`NelboEstimate.per_token`]: nats per token and their standard error from the sampling of masks."""
        return self.estimate.per_token()

    def error_between_texts(self) -> torch.Tensor:
        """
        Standard error of [`~TextLikelihood.per_token`] for other texts of this kind, `(len(num_loops),)`: from the
        spread between texts, or between windows where there is one text. The sampling of masks is part of it. NaN with
        a single window.
        """
        texts = torch.tensor([window.text for window in self.windows])
        groups = texts.unique(return_inverse=True)[1]
        if groups.max() == 0:
            groups = torch.arange(len(groups))
        count = int(groups.max()) + 1
        if count == 1:
            return torch.full((len(self.estimate.num_loops),), math.nan, dtype=torch.float64)
        tokens = self.estimate.num_tokens.double()
        residuals = self.estimate.nats - self.per_token()[0][:, None] * tokens
        sums = torch.zeros(len(residuals), count, dtype=torch.float64).index_add_(1, groups, residuals)
        return (sums.square().sum(-1) * count / (count - 1)).sqrt() / tokens.sum()

    def perplexity_bound(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`exp` of the nats per token, which bounds the perplexity from above, and its standard error (masks)."""
        nats, error = self.per_token()
        return nats.exp(), nats.exp() * error

    def bits_per_byte(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same per byte of the text's UTF-8 and in bits, comparable between tokenizers; None: bytes not known."""
        if not self.num_bytes:
            return None
        scale = self.num_tokens / self.num_bytes / math.log(2)
        nats, error = self.per_token()
        return nats * scale, error * scale

    def by_text(self) -> list[dict]:
        """Of each text its name, tokens and bytes, and by number of loops its NELBO in nats and the standard error."""
        rows = []
        for index in sorted({window.text for window in self.windows}):
            members = [i for i, window in enumerate(self.windows) if window.text == index]
            sizes = [self.windows[i].num_bytes for i in members]
            rows.append(
                {
                    "name": self.texts[index].name,
                    "tokens": int(self.estimate.num_tokens[members].sum()),
                    "bytes": None if None in sizes else sum(sizes),
                    "nats": self.estimate.nats[:, members].sum(-1).tolist(),
                    "standard_error": self.estimate.standard_error[:, members].square().sum(-1).sqrt().tolist(),
                }
            )
        return rows

    def by_token(self) -> dict[str, torch.Tensor]:
        """
        Every scored token: `text`, `position` (in the text) and `token`, each `(num_tokens,)`, and `nats`,
        `(len(num_loops), num_tokens)`, what it adds to the NELBO. A single token's is a rough estimate, as few of the
        masks hold it.
        """
        parts = []
        for index, window in enumerate(self.windows):
            places = torch.tensor(window.maskable).nonzero().flatten()
            parts.append(
                (
                    torch.full_like(places, window.text),
                    places + window.start,
                    torch.tensor(window.input_ids)[places],
                    self.estimate.token_nats[:, index, places],
                )
            )
        joined = [torch.cat(part, dim=-1) for part in zip(*parts, strict=True)]
        return dict(zip(("text", "position", "token", "nats"), joined, strict=True))


def text_likelihood(
    model: nn.Module,
    texts: Sequence[Text],
    num_loops: int | Sequence[int] | None = None,
    length: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    num_samples: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TextLikelihood:
    """
    The NELBO of texts of any length, by windows ([`~loopmdm.evaluation.texts.make_windows`]).

    Args:
        model: A [`LoopMDMForMaskedLM`].
        texts: From [`~loopmdm.evaluation.texts.read_texts`].
        num_loops, num_samples, batch_size, seed: As in [`nelbo`].
        length (`int`, *optional*, defaults to `max_position_embeddings`, at most 1024): Tokens seen at once.
        stride (`int`, *optional*, defaults to `length`): Fresh tokens of a window.
        max_windows (`int`, *optional*): Take so many windows, evenly spread.
        progress (*optional*): `progress(done, total)`, called with numbers of windows.
    """
    longest = find_model(model).config.max_position_embeddings
    length = min(1024, longest) if length is None else length
    if length > longest:
        raise ValueError(f"The window is {length} tokens long; the model takes 1 to {longest} positions.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"`max_windows` is {max_windows}; it must be at least 1.")
    windows = make_windows(texts, length, stride)
    if not windows:
        raise ValueError("There is no text to score.")
    count = min(max_windows or len(windows), len(windows))
    windows = [windows[i * len(windows) // count] for i in range(count)]

    # Windows of about the same length together, as rows are filled up to the longest. Masks do not depend on it.
    order = sorted(range(count), key=lambda index: len(windows[index].input_ids))
    longest_window = len(windows[order[-1]].input_ids)
    parts = []
    for start in range(0, count, 8):
        chosen = order[start : start + 8]
        rows = pad_windows([windows[index] for index in chosen])
        estimate = nelbo(
            model,
            *rows,
            num_loops=num_loops,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            indices=chosen,
        )
        filling = longest_window - estimate.token_nats.shape[-1]
        estimate.token_nats = nn.functional.pad(estimate.token_nats, (0, filling))
        parts.append(estimate)
        if progress is not None:
            progress(start + len(chosen), count)
    back = torch.tensor(order).argsort()
    joined = {
        name: torch.cat([getattr(part, name) for part in parts], dim=dim).index_select(dim, back)
        for name, dim in (
            ("nats", 1),
            ("standard_error", 1),
            ("num_tokens", 0),
            ("samples", 1),
            ("masked_share", 0),
            ("token_nats", 1),
        )
    }
    return TextLikelihood(NelboEstimate(parts[0].num_loops, **joined), windows, list(texts))


def pad_windows(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `input_ids` and `attention_mask`, int64, and `maskable`, bool, each `(len(windows), length)` of the longest one,
    filled up on the right.
    """
    length = max(len(window.input_ids) for window in windows)
    input_ids = torch.zeros(len(windows), length, dtype=torch.long)
    attention_mask, maskable = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, window in enumerate(windows):
        size = len(window.input_ids)
        input_ids[row, :size] = torch.tensor(window.input_ids)
        attention_mask[row, :size] = 1
        maskable[row, :size] = torch.tensor(window.maskable)
    return input_ids, attention_mask, maskable


def block_ids(real: torch.Tensor, documents: torch.Tensor, block_size: int | None) -> torch.Tensor:
    """
    The block of every token, `(num_sequences, length)` int64, by position within each document; different documents
    never share a block. All 0 where attention is not block-causal (`block_size=None`).
    """
    if block_size is None:
        return torch.zeros_like(documents)
    starts = document_starts(documents)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    positions = positions - (positions * starts).cummax(-1).values
    return positions // block_size + starts.cumsum(-1) * 2**32


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
) -> tuple[torch.Tensor, list[float], list[float]]:
    """
    Masks of one sequence, `(num_samples, length)` bool, their weights and shares of masked tokens. One uniform number
    chooses the block and, by its place within it, the number of masked tokens; samples 2i and 2i + 1 share a stratum.
    """
    positions = maskable.nonzero().squeeze(-1)
    blocks = [positions[block_ids[positions] == block] for block in block_ids[positions].unique()]
    masks = torch.zeros(num_samples, len(maskable), dtype=torch.bool)
    weights, shares = [], []
    for sample in range(num_samples):
        stratum = sample // 2 * 2
        uniform = (stratum + 2 * torch.rand((), generator=generator, dtype=torch.float64).item()) / num_samples
        place = uniform * len(blocks)
        block = blocks[min(int(place), len(blocks) - 1)]
        num_masked = min(int((place - int(place)) * len(block)), len(block) - 1) + 1
        masks[sample, block[torch.randperm(len(block), generator=generator)[:num_masked]]] = True
        weights.append(len(blocks) * len(block) / num_masked)
        shares.append(num_masked / len(block))
    return masks, weights, shares


def _masked_losses(
    model: nn.Module,
    input_ids: torch.Tensor,
    real: torch.Tensor,
    document_ids: torch.Tensor | None,
    masked: torch.Tensor,
    wanted: list[int],
) -> torch.Tensor:
    """-log p of the masked tokens, 0 elsewhere: `(len(wanted), batch_size, length)` float64 on the CPU."""
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

    targets = input_ids[masked]
    losses = torch.zeros(len(wanted), *input_ids.shape, dtype=torch.float64)
    for i, loops in enumerate(wanted):
        picked = model.align(states[loops], attention_mask, document_ids)[masked.to(device)]
        token_losses = [
            _cross_entropy(model.lm_head(chunk), target.to(device), config.mask_token_id)
            for chunk, target in zip(
                *(part.split(max(1, MAX_LOGITS // config.vocab_size)) for part in (picked, targets)), strict=True
            )
        ]
        losses[i][masked] = torch.cat(token_losses).double().cpu()
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
    losses = torch.zeros(len(wanted), *input_ids.shape, dtype=torch.float64)
    for i, loops in enumerate(wanted):
        logits = model(
            input_ids=inputs,
            attention_mask=real.long().to(device),
            document_ids=None if document_ids is None else document_ids.to(device),
            num_loops=loops,
            logits_to_keep=positions.to(device),
        ).logits
        token_losses = _cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), mask_token_id)
        losses[i].scatter_(1, positions, token_losses.view(targets.shape).double().cpu())
    return losses


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[..., mask_token_id] = -torch.inf
    return nn.functional.cross_entropy(logits, targets, reduction="none")
