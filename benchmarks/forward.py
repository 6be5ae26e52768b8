# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Wall time of a forward pass against its FLOPs, for several loop counts: what looping costs beyond its arithmetic.

python benchmarks/forward.py --output forward.json --plot forward.png
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--plot", type=Path, help="image file for a plot (needs matplotlib)")
    return parser.parse_args()


def machine_info(device: str) -> dict:
    """What the times depend on besides this code."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux names the model nowhere else
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@torch.inference_mode()
def measure(
    model: LoopMDMForMaskedLM, input_ids: torch.LongTensor, loops: list[int], repeats: int
) -> dict[int, float]:
    """Median seconds of a forward pass for every number of loops."""

    def seconds(num_loops: int) -> float:
        start = time.perf_counter()
        model(input_ids, num_loops=num_loops)
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for num_loops in loops:  # warm up
        seconds(num_loops)
    times = {num_loops: [] for num_loops in loops}
    for _ in range(repeats):
        # One pass of each in turn, so that a slow spell of the machine falls on all of them.
        for num_loops in loops:
            times[num_loops].append(seconds(num_loops))
    return {num_loops: statistics.median(measured) for num_loops, measured in times.items()}


def summarize(model: LoopMDMForMaskedLM, batch_size: int, length: int, times: dict[int, float]) -> list[dict]:
    """One row per number of loops; ratios are to the first."""
    flops = {num_loops: model.flops(batch_size, length, num_loops) for num_loops in times}
    base = next(iter(times))
    return [
        {
            "num_loops": num_loops,
            "executed_layers": model.config.num_executed_layers(num_loops),
            "gflop": flops[num_loops] / 1e9,
            "flop_ratio": flops[num_loops] / flops[base],
            "seconds": seconds,
            "time_ratio": seconds / times[base],
            "overhead": seconds / times[base] / (flops[num_loops] / flops[base]) - 1,
            "gflop_per_second": flops[num_loops] / 1e9 / seconds,
        }
        for num_loops, seconds in times.items()
    ]


def print_table(rows: list[dict]):
    print(f"{'S':>3} {'layers':>7} {'GFLOP':>9} {'FLOPs':>8} {'ms':>9} {'time':>8} {'overhead':>9} {'GFLOP/s':>9}")
    for row in rows:
        print(
            f"{row['num_loops']:>3} {row['executed_layers']:>7} {row['gflop']:>9.2f} {row['flop_ratio']:>7.3f}x "
            f"{1000 * row['seconds']:>9.2f} {row['time_ratio']:>7.3f}x {row['overhead']:>+9.1%} "
            f"{row['gflop_per_second']:>9.1f}"
        )


def plot(rows: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = [row["flop_ratio"] for row in rows]
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.plot(ratios, ratios, "--", color="gray", label="time = FLOPs")
    axes.plot(ratios, [row["time_ratio"] for row in rows], "o-", label="measured")
    for row in rows:
        axes.annotate(
            f"S={row['num_loops']}", (row["flop_ratio"], row["time_ratio"]), (6, -10), textcoords="offset points"
        )
    axes.set(xlabel="FLOPs (relative)", ylabel="Wall time (relative)", title="Forward pass")
    axes.margins(0.1)  # room for the labels
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
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

    machine = machine_info(args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    times = measure(model, input_ids, args.loops, args.repeats)
    rows = summarize(model, args.batch_size, args.length, times)
    print_table(rows)
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "plot")}
        args.output.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
