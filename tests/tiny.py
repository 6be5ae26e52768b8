# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tiny models for the tests: random, fast, and with weights large enough that every loop changes the logits."""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM

MASK, PAD = 22, 0
# Head, mid and tail of a layer each, for what traces or compiles every layer that runs
SHALLOW = {"num_hidden_layers": 3, "loop_end": 2, "num_loops": 2}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
# One of every way in which models differ that loops, caches and costs have to respect
ARCHITECTURES = {
    "rope": {},
    "learned-plain-mlp": {"position_embedding_type": "learned", "use_gated_mlp": False, "norm_type": "layernorm"},
    "gqa-qk-norm": {"num_key_value_heads": 2, "head_dim": 12, "use_qk_norm": True},
    "shift-biases": {"shift_logits": True, **BIASES, "lm_head_bias": True},
    "untied-no-tail": {"loop_end": 4, "tie_word_embeddings": False},
    "all-is-mid": {"loop_start": 0, "loop_end": 4, "shift_logits": True},
}


def tiny_config(**overrides) -> LoopMDMConfig:
    """Four layers, head 1, mid 2, tail 1, three loops."""
    values = {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "loop_start": 1,
        "loop_end": 3,
        "num_loops": 3,
        "initializer_range": 0.2,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    }
    return LoopMDMConfig(**values | overrides)


def tiny_model(seed: int = 0, **overrides) -> LoopMDMForMaskedLM:
    """A random model in eval mode, the same for the same arguments. The tied ones hardly ever write padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomize_vectors(LoopMDMForMaskedLM(tiny_config(**overrides))).eval()
    if model.config.pad_token_id is not None:
        model.get_input_embeddings().weight.data[model.config.pad_token_id] = 0
    return model


def randomize_vectors(model: torch.nn.Module) -> torch.nn.Module:
    """Moves norm weights and biases off 1 and 0, where forgetting them would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_ids(batch_size: int, length: int, seed: int = 0) -> torch.LongTensor:
    """Tokens of `tiny_config`'s vocabulary without padding; about a third are [MASK]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, MASK, (batch_size, length), generator=generator)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 1 / 3, MASK)


def scores(logits: torch.Tensor, mask_token_id: int = MASK) -> torch.Tensor:
    """Logits of all tokens but [MASK], whose own are -inf: differences of those would be NaN."""
    assert (logits[..., mask_token_id] == -torch.inf).all(), "the mask token has a chance"
    return torch.cat((logits[..., :mask_token_id], logits[..., mask_token_id + 1 :]), -1)


def in_turn(rows: Iterable, columns: Iterable, others: Sequence) -> list[tuple]:
    """For `parametrize`: every row with every column, and with one of the others, so that both meet each of these."""
    pairs = itertools.product(enumerate(rows), enumerate(columns))
    return [(row, column, others[(i + j) % len(others)]) for (i, row), (j, column) in pairs]


@contextmanager
def counted_rows(module: torch.nn.Module):
    """Yields a list that collects the number of rows of every call of `module`."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    try:
        yield rows
    finally:
        handle.remove()
