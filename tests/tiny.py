# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tiny models for the tests: random, fast, and with weights large enough that every loop changes the logits."""

import torch

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM


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
        "mask_token_id": 22,
        "pad_token_id": 0,
    }
    return LoopMDMConfig(**values | overrides)


def tiny_model(seed: int = 0, **overrides) -> LoopMDMForMaskedLM:
    """A random model in eval mode, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_vectors(LoopMDMForMaskedLM(tiny_config(**overrides))).eval()


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
    tokens = torch.randint(1, 22, (batch_size, length), generator=generator)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 1 / 3, 22)
