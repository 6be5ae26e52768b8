# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm info`."""

import json
from typing import Annotated, Any

import typer

from .application import MEASURE, app
from .options import Json, Model, at_least, check_idle
from .output import show_facts, show_table


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm info my-model --length 256")
def info(
    model: Model,
    length: Annotated[int | None, typer.Option(help="Positions in a row (default: the model's longest).")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in memory, and rows to generate with --measure.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Generate with the model's settings, and show what it took.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="With --measure: tokens to generate (default: 128 at most).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers and loops, and its FLOPs and memory by number of loops."""
    at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if not measure:
        check_idle("nothing is measured without --measure", max_new_tokens=max_new_tokens)
    facts = _facts(model, length, batch_size)
    if measure:
        facts["measured"] = _measure(model, max_new_tokens, batch_size)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    cost, generation, measured = facts.pop("cost"), facts.pop("generation"), facts.pop("measured", None)
    memory = facts.pop("memory")
    show_facts(model, facts | {f"generate: {name}": value for name, value in generation.items()})
    show_table(
        f"One forward pass over {cost[0]['length']} positions",
        ["num_loops", "layers executed", "GFLOP", "of one loop"],
        [
            [row["num_loops"], row["layers"], f"{row['flops'] / 1e9:,.3f}", f"{row['flops'] / cost[0]['flops']:.2f}x"]
            for row in cost
        ],
    )
    names = ("weights", "cache", "training_state", "activations")
    show_table(
        f"Memory in MiB, of {batch_size} x {cost[0]['length']} positions",
        ["num_loops", "to generate: weights", "cache", "to train: AdamW, float32", "activations"],
        [[row["num_loops"], *(f"{row[name] / 2**20:,.1f}" for name in names)] for row in memory],
    )
    if measured is not None:
        show_facts("Generation, after a warm-up", measured)


def _facts(model: str, length: int | None, batch_size: int) -> dict[str, Any]:
    """What `info` shows. The model is built without weights, so this is quick at any size."""
    import torch

    from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig
    from loopmdm.data import adapter_base
    from loopmdm.evaluation.loading import read_generation_config, read_model_config

    config = read_model_config(model)
    length = config.max_position_embeddings if length is None else length
    if not 1 <= length <= config.max_position_embeddings:
        raise ValueError(f"--length is {length}; the model takes 1 to {config.max_position_embeddings} positions.")
    with torch.device("meta"):
        empty = LoopMDMForMaskedLM(config)
    defaults, base = read_generation_config(model) or LoopMDMGenerationConfig(), adapter_base(model)
    block_size = config.attention_block_size
    loops = sorted({1, 2, 4, 8, config.num_loops, config.max_train_loops, 2 * config.max_train_loops})
    return {
        **({} if base is None else {"adapter of": base}),
        "parameters": empty.num_parameters(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "head": f"layers[0:{config.loop_start}]",
        "mid": f"layers[{config.loop_start}:{config.loop_end}]",
        "tail": f"layers[{config.loop_end}:{config.num_hidden_layers}]",
        "num_loops": config.num_loops,
        "max_train_loops": config.max_train_loops,
        "loop_update": config.loop_update,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "attention": "whole sequence" if block_size is None else f"block-causal, blocks of {block_size}",
        "generation": {
            name: getattr(defaults, name)
            for name, (default, *_) in LoopMDMGenerationConfig.FIELDS.items()
            if getattr(defaults, name) != default
        },
        "cost": [
            {
                "num_loops": num_loops,
                "layers": config.num_executed_layers(num_loops),
                "length": length,
                "flops": empty.flops(1, length, num_loops),
            }
            for num_loops in loops
        ],
        "memory": _memory(empty, loops, batch_size, length),
    }


def _memory(empty: Any, loops: list[int], batch_size: int, length: int) -> list[dict[str, int]]:
    """
    Bytes by number of loops: weights in the model's dtype, and the cache, which attention over the whole sequence has
    with `cache_implementation` alone; and, to train, weights, gradients and AdamW's state in float32, and activations,
    as `loopmdm train --dry-run` counts them.
    """
    import torch

    from loopmdm.cache_utils import LoopMDMCache
    from loopmdm.training.memory import Shape, StepSettings, activations, training_memory

    config, shape = empty.config, Shape(batch_size, length, batch_size * length // 2)  # half of the tokens are masked
    first, second = (activations(empty.train(), shape, number, StepSettings()) for number in (1, 2))
    states = training_memory(empty, shape, 1, StepSettings())
    dtype, shares = config.dtype or torch.float32, config.attention_block_size is None
    return [
        {
            "num_loops": number,
            "rows": batch_size,
            "length": length,
            "weights": empty.num_parameters() * dtype.itemsize,
            "cache": LoopMDMCache.num_bytes(config, number, batch_size, length, dtype, shares),
            "training_state": states["together"] - first,
            "activations": first + (number - 1) * (second - first),  # every loop keeps as much
        }
        for number in loops
    ]


def _measure(model: str, max_new_tokens: int | None, batch_size: int) -> dict[str, Any]:
    """Cost and speed of one `generate` from nothing, with the model's own settings, after another one to warm up."""
    import torch

    from loopmdm.evaluation.loading import load_model
    from loopmdm.objective import input_device

    loaded = load_model(model)
    device = input_device(loaded)
    room = loaded.config.max_position_embeddings
    new_tokens = min(room, 128) if max_new_tokens is None else max_new_tokens
    prompt = torch.full((batch_size, 1), loaded.config.mask_token_id, device=device)
    arguments = {
        "max_new_tokens": new_tokens - 1,
        "eos_token_id": [],
        "stop_strings": None,
        "return_dict_in_generate": True,
    }
    for _ in range(2):
        output = loaded.generate(prompt, **arguments)
    names = ("forward_passes", "loops", "flops")
    return {
        "rows": batch_size,
        "new_tokens": new_tokens,
        **{f"{name}_per_row": output[name].double().mean().item() for name in names},
        "seconds": output.seconds,
        "tokens_per_second": output.tokens_per_second,
        "GFLOP_per_second": output.flops.sum().item() / output.seconds / 1e9,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
