# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What the tests of test_fuzz.py draw from: configurations with every flag of every family, batches with padding
anywhere, arguments of `generate`. `FUZZ_MINUTES=60` (`make fuzz`) tries other examples each time, for about so long,
and begins with those that failed before; without it they are few, and always the same.
"""

import os

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from tiny import tiny_model

from loopmdm import LoopMDMForMaskedLM

MINUTES = int(os.environ.get("FUZZ_MINUTES", "0"))


def examples(count: int) -> settings:
    """With FUZZ_MINUTES so many a minute; without, a sixth of them."""
    if MINUTES > 0:
        how = {"max_examples": count * MINUTES, "database": DirectoryBasedExampleDatabase(".hypothesis/fuzz")}
    else:
        how = {"max_examples": count // 6, "derandomize": True, "database": None}
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(deadline=None, phases=phases, suppress_health_check=slow, print_blob=MINUTES > 0, **how)


FLAGS = ("attention_bias", "attention_output_bias", "mlp_bias", "lm_head_bias", "use_qk_norm", "shift_logits")
LENGTHS = {"original_max_position_embeddings": 8}
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, **LENGTHS},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTHS},
    "longrope": {"factor": 4.0, "short_factor": [1.0], "long_factor": [3.0], **LENGTHS},
}
BY_LENGTH = ("dynamic", "longrope")  # frequencies that depend on the row's length


def pick(draw, *options):
    """One of the options; the first is the simplest."""
    return draw(st.sampled_from(options))


def flag(draw) -> bool:
    return pick(draw, False, True)


@st.composite
def configs(draw, block_sizes=(None, 1, 2, 3, 4), damped=True, max_vocab_size=24):
    """Fields of a `LoopMDMConfig`, for [`double`]."""
    config = {name: True for name in FLAGS if flag(draw)}
    size = pick(draw, *block_sizes)
    config |= {} if size is None else {"attention_block_size": size}
    if flag(draw):
        config["position_embedding_type"] = "learned"
    else:
        # What depends on the length would turn the keys of finished blocks again and again.
        kinds = [kind for kind in ROPES if size is None or kind not in BY_LENGTH]
        config["rope_parameters"] = {"rope_type": pick(draw, *kinds), "rope_theta": pick(draw, 10000.0, 100.0)}
        config["rope_precision"] = pick(draw, "model", "float32", "bfloat16")
    heads = pick(draw, 2, 1, 4)
    config |= {
        "num_attention_heads": heads,
        "num_key_value_heads": pick(draw, *(n for n in (heads, 1, 2) if n <= heads)),
    }
    config |= {"head_dim": pick(draw, 8, 4, 6), "norm_type": pick(draw, "rmsnorm", "layernorm")}
    config |= {"hidden_act": pick(draw, "silu", "gelu_new", "relu"), "use_gated_mlp": pick(draw, True, False)}
    config |= {"tie_word_embeddings": pick(draw, True, False), "attn_implementation": pick(draw, "sdpa", "eager")}
    layers = draw(st.integers(1, 4))
    start = draw(st.integers(0, layers - 1))
    config |= {"num_hidden_layers": layers, "loop_start": start, "loop_end": draw(st.integers(start + 1, layers))}
    config |= {"num_loops": pick(draw, 2, 1, 3), "loop_update": pick(draw, "replace", *["damped"] * damped)}
    config["vocab_size"] = draw(st.integers(4, max_vocab_size))
    config["mask_token_id"] = pick(draw, config["vocab_size"] - 1, 0, 1)
    config["pad_token_id"] = pick(draw, None, *(token for token in (0, 2) if token != config["mask_token_id"]))
    return config


def double(config: dict, **overrides) -> LoopMDMForMaskedLM:
    """A model in float64, where what differs by rounding alone gives the same tokens."""
    config = {"hidden_size": 16, "intermediate_size": 24} | config | overrides
    rope = config.get("rope_parameters")
    if rope is not None:
        rope = rope | ROPES[rope["rope_type"]]
        half = config["head_dim"] // 2
        lists = {name: value * half for name, value in rope.items() if isinstance(value, list)}
        config["rope_parameters"] = rope | lists
    return tiny_model(**config).double()


def words(config: dict, masks: bool = True):
    """A token; of those that stand in a prompt about a third are [MASK]."""
    mask = config["mask_token_id"]
    word = st.integers(0, config["vocab_size"] - 1).filter(lambda token: token != mask)
    return st.one_of(word, word, st.just(mask)) if masks else word


def document_ids(draw, config: dict, ids: torch.Tensor) -> torch.Tensor | None:
    """The ids of documents packed into the rows `ids`, the same in every row; None if there is one alone."""
    if config.get("rope_parameters", {}).get("rope_type") in BY_LENGTH or not flag(draw):
        return None
    ends = draw(st.lists(st.booleans(), min_size=ids.shape[1], max_size=ids.shape[1]))
    return torch.tensor(ends).long().cumsum(-1).expand(ids.shape)


@st.composite
def batches(draw, config: dict, masks: bool = True, max_length: int = 9, least: int = 1):
    """Rows, and the batch of them with its mask; what stands in the padding is any token."""
    rows = draw(st.lists(st.lists(words(config, masks), min_size=least, max_size=max_length), min_size=1, max_size=3))
    side = pick(draw, "right", "left", "scattered")
    width = max(map(len, rows)) + (pick(draw, 0, 1, 3) if side == "scattered" else 0)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        free = width - len(row)
        gaps = {"right": range(len(row)), "left": range(free, width)}.get(side)
        if gaps is None:
            gaps = sorted(draw(st.permutations(range(width)))[: len(row)])
        ids[number] = draw(words(config))
        ids[number, list(gaps)], mask[number, list(gaps)] = torch.tensor(row, dtype=torch.long), 1
    return rows, ids, mask


RULES = ("confidence", "margin", "entropy", "random", "left_to_right", "ancestral")


@st.composite
def commitments(draw, config: dict):
    """Arguments of `generate` that say what a step commits, and which tokens."""
    steps = pick(draw, None, 1, 2, 5, 9)
    arguments = {"max_denoising_steps": steps, "unmasking": pick(draw, *RULES)}
    chance = pick(draw, {}, {"do_sample": True}, {"remask_probability": 0.3}, {"remask_probability": 1.0})
    if "do_sample" in chance:
        warpers = {"temperature": (0.5, 1.5), "top_k": (1, 3, 99), "top_p": (0.6, 0.95), "min_p": (0.05, 0.5)}
        chance = chance | {name: pick(draw, *values) for name, values in warpers.items() if flag(draw)}
    if arguments["unmasking"] != "ancestral":
        chance |= pick(draw, {}, {"confidence_threshold": 0.3}, {"entropy_bound": 1.5}, {"entropy_bound": 0.0})
    if flag(draw):
        ends = draw(st.lists(words(config, masks=False), min_size=1, max_size=3, unique=True))
        chance |= {"eos_token_id": tuple(ends), "eos_penalty": pick(draw, 0.0, 0.3)}
    return {name: value for name, value in (arguments | chance).items() if value is not None}


@st.composite
def computations(draw, config: dict, steps: int | None = None):
    """Arguments of `generate` that say how a step predicts: loops, exit rules, blocks, caches, guidance."""
    block, damped = config.get("attention_block_size"), config["loop_update"] == "damped"
    arguments = {"num_loops": pick(draw, *(loops for loops in (None, 1, 3, [1, 3], [3, 1, 2]) if fits(loops, steps)))}
    arguments["block_length"] = pick(draw, None, *(n * (block or 1) for n in (1, 2, 3)))
    arguments["guidance_scale"] = pick(draw, None, None, 1.0, 1.7, 0.3)
    if not damped and flag(draw):
        rule = pick(draw, "loop_tolerance", "visible_loops")
        arguments[rule] = draw(st.floats(0.01, 2)) if rule == "loop_tolerance" else pick(draw, 1, 2)
    if block is not None:
        arguments["use_cache"] = pick(draw, None, False)
    elif flag(draw):
        arguments |= {"cache_implementation": pick(draw, "dual", "prefix")}
        arguments["cache_refresh_interval"] = pick(draw, None, 1, 2)
    return {name: value for name, value in arguments.items() if value is not None}


def fits(loops, steps) -> bool:
    return not isinstance(loops, list) or steps is None or len(loops) <= steps
