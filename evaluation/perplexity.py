# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Two kinds of perplexity: of texts under a masked diffusion model ([`text_likelihood`], the NELBO in windows), and of a
model's samples under a causal language model ([`generative_perplexity`]). The latter comes with the samples' entropy,
since a model that repeats one likely word has a low perplexity.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import encode
from ..generation_utils import check_argument
from ..objective import NelboEstimate, find_model, input_device, nelbo
from .texts import Text, Window, batches_by_length, make_windows, pad_windows


@dataclass
class TextLikelihood:
    """
    The NELBO of texts.

    Args:
        estimate ([`NelboEstimate`]): The NELBO of each window.
        windows (`list[Window]`), texts (`list[Text]`): The windows and the texts that were scored.
    """

    estimate: NelboEstimate
    windows: list[Window]
    texts: list[Text]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that were scored."""
        return int(self.estimate.num_tokens.sum())

    @property
    def num_bytes(self) -> int | None:
        """Number of UTF-8 bytes that these tokens stand for; None if it is not known."""
        sizes = [window.num_bytes for window in self.windows]
        return None if None in sizes else sum(sizes)

    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token and their standard error from the sampling of masks, see [`NelboEstimate.per_token`]."""
        return self.estimate.per_token()

    def error_between_texts(self) -> torch.Tensor:
        """
        Standard error of [`~TextLikelihood.per_token`] as an estimate for other texts of this kind,
        `(len(num_loops),)`. It comes from the spread between texts, or between the windows of a single text, and
        includes the sampling of masks. NaN for a single window.
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
        """Bits per byte of UTF-8, which tokenizers do not change, and the standard error; None without bytes."""
        if not self.num_bytes:
            return None
        scale = self.num_tokens / self.num_bytes / math.log(2)
        nats, error = self.per_token()
        return nats * scale, error * scale

    def by_text(self) -> list[dict]:
        """For each text: name, tokens, bytes, and, by number of loops, lists of the NELBO in nats and its error."""
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
        All scored tokens: `text`, `position` (in the text) and `token`, each `(num_tokens,)` int64, and `nats`,
        `(len(num_loops), num_tokens)` float64, their parts of the NELBO. For a single token it is a rough estimate,
        since few masks contain the token.
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
    The NELBO of texts of any length, computed in windows ([`~loopmdm.evaluation.texts.make_windows`]).

    Args:
        model: A [`LoopMDMForMaskedLM`].
        texts (`list[Text]`): The texts, as [`~loopmdm.evaluation.texts.read_texts`] returns them.
        num_loops, num_samples, batch_size, seed: As in [`nelbo`].
        length (`int`, *optional*, defaults to `max_position_embeddings`, at most 1024): Tokens of a window.
        stride (`int`, *optional*, defaults to `length`): Tokens that each further window scores.
        max_windows (`int`, *optional*): Score only this many windows, evenly spread.
        progress (*optional*): Called as `progress(done, total)` with numbers of windows.

    Raises:
        ValueError: A window does not fit the model, or there is nothing to score.
    """
    longest = find_model(model).config.max_position_embeddings
    length = min(1024, longest) if length is None else length
    if length > longest:
        raise ValueError(f"The window is {length} tokens long; the model takes 1 to {longest} positions.")
    windows = make_windows(texts, length, stride, max_windows)
    if not windows:
        raise ValueError("There is no text to score.")

    longest = max(len(window.input_ids) for window in windows)
    order, parts = [], []
    # The masks of a window depend only on its index, and so not on the batches.
    for chosen in batches_by_length([window.input_ids for window in windows], 8):
        rows = pad_windows([windows[index] for index in chosen])
        part = nelbo(model, *rows, None, num_loops, num_samples, batch_size, seed, chosen)
        part.token_nats = nn.functional.pad(part.token_nats, (0, longest - part.token_nats.shape[-1]))
        order, parts = order + chosen, [*parts, part]
        if progress is not None:
            progress(len(order), len(windows))
    back = torch.tensor(order).argsort()
    dims = {"nats": 1, "standard_error": 1, "num_tokens": 0, "samples": 1, "masked_share": 0, "token_nats": 1}
    joined = {name: torch.cat([getattr(part, name) for part in parts], dim) for name, dim in dims.items()}
    joined = {name: values.index_select(dims[name], back) for name, values in joined.items()}
    return TextLikelihood(NelboEstimate(parts[0].num_loops, **joined), windows, list(texts))


@dataclass
class GenerativePerplexity:
    """
    The perplexity of samples under a judge, in the judge's tokens.

    Args:
        nats (`torch.DoubleTensor` of shape `(num_samples,)`): Negative log-likelihood of each sample in nats.
        num_tokens (`torch.LongTensor` of shape `(num_samples,)`): Number of scored tokens of each sample; 0 if it is
            too short.
        entropy (`torch.DoubleTensor` of shape `(num_samples,)`): Unigram entropy of each sample in nats, that is, of
            the distribution of its tokens over the vocabulary; at most the logarithm of its length. NaN if empty.
        repetition (`torch.DoubleTensor` of shape `(num_samples,)`): Share of the 4-grams of each sample that occurred
            in it before. NaN below four tokens.
        distinct (`dict[int, float]`): For n = 1, 2, 3 the number of different n-grams of all samples together, as a
            share of all their n-grams.
    """

    nats: torch.Tensor
    num_tokens: torch.Tensor
    entropy: torch.Tensor
    repetition: torch.Tensor
    distinct: dict[int, float]

    def per_token(self) -> tuple[float, float]:
        """Nats per token of all samples together, and the standard error from the spread between samples."""
        total = self.num_tokens.sum().double()
        mean = self.nats.sum() / total
        count = int((self.num_tokens > 0).sum())
        if count < 2:
            return mean.item(), math.nan
        residuals = self.nats - mean * self.num_tokens
        return mean.item(), (residuals.square().sum() * count / (count - 1)).sqrt().item() / total.item()

    def perplexity(self) -> tuple[float, float]:
        """`exp` of the nats per token, and its standard error."""
        mean, error = self.per_token()
        perplexity = torch.tensor(mean, dtype=torch.float64).exp().item()  # infinite where `math.exp` raises
        return perplexity, perplexity * error

    def summary(self) -> dict[str, Any]:
        """All measures of all samples together, as plain numbers."""
        nats, nats_error = self.per_token()
        perplexity, error = self.perplexity()
        return {
            "perplexity": perplexity,
            "standard_error": error,
            "nats_per_token": nats,
            "nats_standard_error": nats_error,
            "entropy": self.entropy.nanmean().item(),
            "repetition": self.repetition.nanmean().item(),
            **{f"distinct_{n}": value for n, value in self.distinct.items()},
            "samples": len(self.nats),
            "unscored": int((self.num_tokens == 0).sum()),
            "tokens": int(self.num_tokens.sum()),
        }


@torch.no_grad()
def generative_perplexity(
    samples: Sequence[str],
    judge: nn.Module,
    tokenizer: Any,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> GenerativePerplexity:
    """
    Scores samples under a causal language model, the judge, in the judge's own tokens. If the judge has a start token,
    every token of a sample is scored; otherwise the first one is only context.

    Args:
        samples (`list[str]`): Texts. Token ids are refused, since those of another model mean something else here.
        judge: A causal language model of transformers, in eval mode.
        tokenizer: The judge's tokenizer.
        length (`int`, *optional*, defaults to the judge's `max_position_embeddings`, at most 1024):
            Tokens of a window, the start token included.
        stride (`int`, *optional*, defaults to half of `length`): Tokens that each further window of a sample scores.
        batch_size (`int`, defaults to 8): Windows per forward pass.
        progress (*optional*): Called as `progress(done, total)` with numbers of windows.

    Raises:
        ValueError: The judge is not causal, the tokenizer is not the judge's, or there is nothing to score.
    """
    if isinstance(samples, str) or not all(isinstance(sample, str) for sample in samples):
        raise ValueError(
            "`samples` must be a list of texts; token ids mean something else to the judge, so decode them with the "
            "tokenizer of the model that made them."
        )
    if len(samples) == 0:
        raise ValueError("There are no samples to score.")
    check_argument("batch_size", batch_size, int, 1)
    check_judge(judge, tokenizer)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length, stride = check_window(judge, length, stride)
    texts = []
    for number, sample in enumerate(samples, start=1):
        ids = prefix + encode(tokenizer, sample, f"sample {number}")
        texts.append(Text(f"sample {number}", ids, [position > 0 for position in range(len(ids))]))
    largest = max((max(text.input_ids) for text in texts if text.input_ids), default=0)
    if largest >= (vocabulary := judge.get_input_embeddings().num_embeddings):
        raise ValueError(
            f"The tokenizer gives the token {largest}, outside the judge's vocabulary of {vocabulary}; it is not the "
            "judge's own."
        )
    windows = make_windows(texts, length, stride)
    if not windows:
        raise ValueError("All samples are too short: there is no token to score.")

    nats = torch.zeros(len(texts), dtype=torch.float64)
    device, done = input_device(judge), 0
    for chosen in batches_by_length([window.input_ids for window in windows], batch_size):
        batch = [windows[index] for index in chosen]
        ids, mask, scored = pad_windows(batch)
        logits = judge(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        targets = ids[:, 1:].to(logits.device)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        sums = (losses.double().cpu() * scored[:, 1:]).sum(-1)
        nats.index_add_(0, torch.tensor([window.text for window in batch]), sums)
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    tokens = [text.input_ids[len(prefix) :] for text in texts]
    return GenerativePerplexity(
        nats,
        torch.tensor([sum(text.maskable) for text in texts]),
        torch.tensor([unigram_entropy(part) for part in tokens], dtype=torch.float64),
        torch.tensor([1 - _distinct([part], 4) for part in tokens], dtype=torch.float64),
        {n: _distinct(tokens, n) for n in (1, 2, 3)},
    )


def check_window(judge: nn.Module, length: int | None, stride: int | None) -> tuple[int, int]:
    """`length` and `stride` of [`generative_perplexity`] with defaults filled in. Raises a ValueError for bad ones."""
    longest = getattr(judge.config, "max_position_embeddings", None) or 1024
    length = min(1024, longest) if length is None else length
    if not 2 <= length <= longest:
        raise ValueError(f"The window is {length} tokens long; the judge takes 2 to {longest}.")
    # The first token of a window is only context.
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride < length:
        raise ValueError(f"The stride is {stride}; it must be at least 1 and under the window's length ({length}).")
    return length, stride


def check_judge(judge: nn.Module, tokenizer: Any) -> None:
    """
    Raises a ValueError unless the prediction of a token depends only on the tokens before it: a bidirectional model
    sees the token that it has to predict, and its "perplexity" means nothing.
    """
    if getattr(judge.config, "model_type", None) == "loopmdm":
        raise ValueError("The judge is a LoopMDM; it must be a causal language model, such as GPT-2.")
    vocabulary = judge.get_input_embeddings().num_embeddings
    ids = torch.arange(6, device=input_device(judge))[None] % vocabulary
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary
    with torch.no_grad():
        before, after = (judge(input_ids=one).logits[0, :-1].float() for one in (ids, changed))
    # Kernels may round differently, but a model that sees the last token changes far more.
    if (before - after).abs().max() > 1e-3 * before.abs().max().clamp(min=1):
        raise ValueError(
            f"The judge ({type(judge).__name__}) is not causal: its logits depend on later tokens. Name a causal "
            "language model."
        )


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy in nats of the distribution of `tokens` over the vocabulary; NaN without tokens."""
    if len(tokens) == 0:
        return math.nan
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0


def _distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """The number of different n-grams as a share of all; NaN without any."""
    grams = [tuple(tokens[i : i + n]) for tokens in samples for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
