# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What does looping cost beyond its arithmetic? Wall time of a forward pass against its FLOPs, for several numbers of
loops. README.md has its overhead:

    python benchmarks/forward.py
"""

import statistics

import torch
from common import begin, in_turn, make_parser, write_result

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM

LOOPS = (1, 2, 4, 8, 12)  # the first is the base of the ratios
BATCH_SIZE, LENGTH = 4, 128


def summarize(model: LoopMDMForMaskedLM, seconds: dict[int, float]) -> list[dict]:
    """One row per number of loops; ratios are to the first."""
    flops = {num_loops: model.flops(BATCH_SIZE, LENGTH, num_loops) for num_loops in LOOPS}
    base, rows = LOOPS[0], []
    for num_loops in LOOPS:
        ratios = {"flop_ratio": flops[num_loops] / flops[base], "time_ratio": seconds[num_loops] / seconds[base]}
        rows.append(
            {
                "num_loops": num_loops,
                "executed_layers": model.config.num_executed_layers(num_loops),
                "gflop": flops[num_loops] / 1e9,
                "seconds": seconds[num_loops],
                **ratios,
                "overhead": ratios["time_ratio"] / ratios["flop_ratio"] - 1,
            }
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="passes per loop count; the median counts")
    args = parser.parse_args()
    begin(args)
    config = LoopMDMConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        loop_start=1,
        loop_end=3,
        mask_token_id=999,
    )
    model = LoopMDMForMaskedLM(config).eval()
    input_ids = torch.randint(config.vocab_size, (BATCH_SIZE, LENGTH))
    with torch.inference_mode():
        runs = {num_loops: lambda num_loops=num_loops: model(input_ids, num_loops=num_loops) for num_loops in LOOPS}
        seconds, _ = in_turn(runs, args.repeats)
    rows = summarize(model, {num_loops: statistics.median(times) for num_loops, times in seconds.items()})
    print(f"{'S':>3} {'layers':>7} {'GFLOP':>9} {'FLOPs':>8} {'ms':>9} {'time':>8} {'overhead':>9}")
    for row in rows:
        print(
            f"{row['num_loops']:>3} {row['executed_layers']:>7} {row['gflop']:>9.2f} {row['flop_ratio']:>7.3f}x "
            f"{1000 * row['seconds']:>9.2f} {row['time_ratio']:>7.3f}x {row['overhead']:>+9.1%}"
        )
    write_result(args, rows=rows)


if __name__ == "__main__":
    main()
