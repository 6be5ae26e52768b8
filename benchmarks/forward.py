# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Wall time of a forward pass against its FLOPs, for several loop counts: what looping costs beyond its arithmetic.

python benchmarks/forward.py --output forward.json
"""

import statistics

import torch
from common import begin, in_turn, make_parser, write_result

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--loops", type=int, nargs="+", default=[1, 2, 4, 8, 12], help="loop counts; the first is the base"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--layers", type=int, default=12, help="physical layers")
    parser.add_argument("--loop-start", type=int, default=1)
    parser.add_argument("--loop-end", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--mlp-width", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20, help="passes per loop count; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args()


def summarize(model: LoopMDMForMaskedLM, batch_size: int, length: int, seconds: dict[int, float]) -> list[dict]:
    """One row per number of loops; ratios are to the first."""
    flops = {num_loops: model.flops(batch_size, length, num_loops) for num_loops in seconds}
    base = next(iter(seconds))
    rows = []
    for num_loops in seconds:
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
    args = parse_args()
    begin(args)
    config = LoopMDMConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=args.mlp_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        loop_start=args.loop_start,
        loop_end=args.loop_end,
        mask_token_id=args.vocab_size - 1,
    )
    model = LoopMDMForMaskedLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    input_ids = torch.randint(args.vocab_size, (args.batch_size, args.length), device=args.device)
    with torch.inference_mode():
        runs = {
            num_loops: lambda num_loops=num_loops: model(input_ids, num_loops=num_loops) for num_loops in args.loops
        }
        seconds, _ = in_turn(runs, args.repeats, args.device)
    medians = {num_loops: statistics.median(times) for num_loops, times in seconds.items()}
    rows = summarize(model, args.batch_size, args.length, medians)
    print(f"{'S':>3} {'layers':>7} {'GFLOP':>9} {'FLOPs':>8} {'ms':>9} {'time':>8} {'overhead':>9}")
    for row in rows:
        print(
            f"{row['num_loops']:>3} {row['executed_layers']:>7} {row['gflop']:>9.2f} {row['flop_ratio']:>7.3f}x "
            f"{1000 * row['seconds']:>9.2f} {row['time_ratio']:>7.3f}x {row['overhead']:>+9.1%}"
        )
    write_result(args, rows=rows)


if __name__ == "__main__":
    main()
