# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What do a training step's time and memory look like beside transformers' Llama with the loops unrolled as layers? This
makes the table of docs/training.md:

    python benchmarks/training_step.py --threads 2 --repeats 6

Llama is made bidirectional and has as many layers as LoopMDM executes, the same width, heads, MLP and vocabulary; both
see the same batch and compute the head at the same masked positions. A step is forward, backward and AdamW.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import begin, make_parser, peak_bytes, synchronize, timed, write_result
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.training import MaskedDiffusionCollator, set_num_train_loops, training_flops

PHASES = ("forward", "backward", "optimizer")
# Mid is `mid` layers behind the first `loop_start`. A backend as `compile` adds steps of compiled layers; `peak_size`
# is the side of the matrices that give the peak of the machine.
SETTINGS = {
    "width": 384,
    "heads": 6,
    "layers": 12,
    "loop_start": 1,
    "mid": 2,
    "loops": 6,
    "batch_size": 4,
    "length": 256,
    "vocab_size": 8192,
    "device": "cpu",
    "dtype": "float32",
    "compile": None,
    "peak_size": 2048,
}


def parse_args(argv: list[str] | None = None, **settings: Any) -> argparse.Namespace:
    """What the command line says, with other `settings` than the script's own if they are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=12, help="steps of each model; the median counts")
    parser.set_defaults(**{**SETTINGS, **settings})
    return parser.parse_args(argv)


# --- models ---


def make_models(args: argparse.Namespace) -> tuple[LoopMDMForMaskedLM, LlamaForCausalLM]:
    """Both models in training mode, with the same values: Llama's layers are LoopMDM's in the order of execution."""
    shared = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.width,
        "intermediate_size": -(-args.width * 8 // 3 // 64) * 64,  # 8/3 of the width, in whole 64s
        "num_attention_heads": args.heads,
        "max_position_embeddings": args.length,
    }
    config = LoopMDMConfig(
        **shared,
        num_hidden_layers=args.layers,
        loop_start=args.loop_start,
        loop_end=args.loop_start + args.mid,
        num_loops=args.loops,
        mask_token_id=args.vocab_size - 1,
    )
    looped = LoopMDMForMaskedLM(config)
    unrolled = LlamaForCausalLM(
        LlamaConfig(
            **shared,
            num_hidden_layers=config.num_executed_layers(args.loops),
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=False,
        )
    )
    numbers = list(range(args.layers))
    mid = slice(config.loop_start, config.loop_end)
    executed = numbers[: mid.start] + numbers[mid] * args.loops + numbers[mid.stop :]
    for layer, number in zip(unrolled.model.layers, executed, strict=True):
        layer.load_state_dict(looped.model.layers[number].state_dict())
        layer.self_attn.is_causal = False
    unrolled.model.embed_tokens.load_state_dict(looped.model.embed_tokens.state_dict())
    unrolled.model.norm.load_state_dict(looped.model.norm.state_dict())
    unrolled.lm_head.load_state_dict(looped.lm_head.state_dict())
    dtype = getattr(torch, args.dtype)
    looped, unrolled = (model.to(args.device, dtype).train() for model in (looped, unrolled))
    set_num_train_loops(looped, args.loops)
    return looped, unrolled


def make_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    tokens = torch.randint(args.vocab_size - 1, (args.batch_size, args.length))
    rows = [{"input_ids": row, "index": index} for index, row in enumerate(tokens)]
    batch = MaskedDiffusionCollator(mask_token_id=args.vocab_size - 1, seed=args.seed)(rows)
    del batch["attention_mask"]  # nothing is padded
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def unrolled_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss by hand. Llama's own computes the head at every position."""
    hidden_states = model.model(batch["input_ids"]).last_hidden_state
    masked = batch["loss_weights"] != 0
    logits = model.lm_head(hidden_states[masked]).float()
    losses = nn.functional.cross_entropy(logits, batch["labels"][masked], reduction="none")
    return (losses * batch["loss_weights"][masked]).sum() / batch["labels"].numel()


# --- measurements ---


def peak_flops(size: int, device: str, dtype: torch.dtype, repeats: int = 8) -> float:
    """Floating point operations per second of a large matrix product, the best of some."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: left @ right, device)[0] for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


class Step:
    """One of the models compared, with an optimiser of its own."""

    def __init__(
        self, model: nn.Module, loss: Callable[[], torch.Tensor], device: str, checkpoint_loops: bool = False
    ):
        self.model, self.loss, self.device = model, loss, device
        self.checkpoint_loops = checkpoint_loops
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def _prepare(self):
        if isinstance(self.model, LoopMDMForMaskedLM):
            self.model.model.checkpoint_loops = self.checkpoint_loops

    def run(self):
        """A timed step. Other models' gradients do not exist meanwhile."""
        self._prepare()
        times = [self._now()]
        loss = self.loss()
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        self.optimizer.step()
        times.append(self._now())
        for phase, start, end in zip(PHASES, times, times[1:], strict=False):
            self.seconds[phase].append(end - start)
        self.optimizer.zero_grad()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def state_bytes(self) -> dict[str, int]:
        """Exact sizes of what stays between steps (gradients: within one)."""
        parameters = list(self.model.parameters())
        weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        state = [tensor for tensors in self.optimizer.state.values() for tensor in tensors.values()]
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weight_bytes": weights,
            "gradient_bytes": weights,
            "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state),
        }

    def activation_bytes(self) -> int:
        """Most memory that forward and backward hold at once beyond weights, gradients and optimiser state."""
        self._prepare()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        peak = peak_bytes(lambda: self.loss().backward(), self.device)
        self.optimizer.zero_grad()
        return peak


def summarize(name: str, step: Step, args: argparse.Namespace, flops: int, peak: float) -> dict:
    seconds = statistics.median(map(sum, zip(*step.seconds.values(), strict=True)))
    memory = {**step.state_bytes(), "activation_bytes": step.activation_bytes()}
    return {
        "model": name,
        "seconds": seconds,
        **{f"{phase}_seconds": statistics.median(step.seconds[phase]) for phase in PHASES},
        "tokens_per_second": args.batch_size * args.length / seconds,
        "gflop": flops / 1e9,
        "gflop_per_second": flops / 1e9 / seconds,
        "share_of_peak": flops / seconds / peak,
        **memory,
        "total_bytes": sum(size for part, size in memory.items() if part.endswith("bytes")),
    }


def print_table(rows: list[dict]):
    header = ("model", "params", "ms", "forward", "backward", "AdamW", "tok/s", "GFLOP/s", "of peak")
    print(("{:>20}" + "{:>9}" * 8).format(*header), *(f"{part:>9}" for part in ("states", "activ.", "MiB")), sep="")
    for row in rows:
        states = row["total_bytes"] - row["activation_bytes"]
        print(
            f"{row['model']:>20}{row['parameters'] / 1e6:>8.2f}M{1e3 * row['seconds']:>9.1f}"
            + "".join(f"{1e3 * row[f'{phase}_seconds']:>9.1f}" for phase in PHASES)
            + f"{row['tokens_per_second']:>9.0f}{row['gflop_per_second']:>9.1f}{row['share_of_peak']:>9.1%}"
            + "".join(f"{size / 2**20:>9.1f}" for size in (states, row["activation_bytes"], row["total_bytes"]))
        )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of all models in turn; what `main` shows and writes."""
    looped, unrolled = make_models(args)
    batch = make_batch(args)
    losses = {"LoopMDM": lambda: looped(**batch).loss, "Llama, unrolled": lambda: unrolled_loss(unrolled, batch)}
    with torch.no_grad():
        values = {name: loss().item() for name, loss in losses.items()}
    steps = {
        "Llama, unrolled": Step(unrolled, losses["Llama, unrolled"], args.device),
        "LoopMDM": Step(looped, losses["LoopMDM"], args.device),
        "LoopMDM, checkpoints": Step(looped, losses["LoopMDM"], args.device, checkpoint_loops=True),
    }
    if args.compile is not None:
        compiled = copy.deepcopy(looped)
        for layer in compiled.model.layers:
            layer.compile(dynamic=True, backend=args.compile)
        steps["LoopMDM, compiled"] = Step(compiled, lambda: compiled(**batch).loss, args.device)
    peaks = []
    for repeat in range(args.repeats + 1):
        if repeat % 4 == 0:  # over the whole run, as other work on the machine may come and go
            peaks.append(peak_flops(args.peak_size, args.device, getattr(torch, args.dtype)))
        # One step of each in turn, so that a slow spell of the machine falls on all of them.
        for step in steps.values():
            step.run()
        if repeat == 0:  # warm-up
            for step in steps.values():
                step.seconds = {phase: [] for phase in PHASES}

    num_logits = int((batch["loss_weights"] != 0).sum()) / args.batch_size
    rows = []
    for name, step in steps.items():
        flops = training_flops(
            looped, args.batch_size, args.length, args.loops, num_logits, checkpoint_loops=step.checkpoint_loops
        )
        rows.append(summarize(name, step, args, flops, max(peaks)))
    return {
        "executed_layers": looped.config.num_executed_layers(args.loops),
        "masked_positions": round(num_logits * args.batch_size),
        "losses_before": values,
        "peak_gflop_per_second": max(peaks) / 1e9,
        "rows": rows,
        "ratios_to_llama": {row["model"]: ratios(row, rows[0]) for row in rows[1:]},
    }


def ratios(row: dict, base: dict) -> dict[str, float]:
    speeds = [one["forward_seconds"] + one["backward_seconds"] for one in (base, row)]
    states = [one["total_bytes"] - one["activation_bytes"] for one in (row, base)]
    return {
        "tokens_per_second": row["tokens_per_second"] / base["tokens_per_second"],
        "forward_and_backward": speeds[0] / speeds[1],
        "state_bytes": states[0] / states[1],
        "activation_bytes": row["activation_bytes"] / base["activation_bytes"],
        "total_bytes": row["total_bytes"] / base["total_bytes"],
    }


def main():
    args = parse_args()
    begin(args)
    found = measure(args)
    values = found["losses_before"].items()
    print("loss before training:", ", ".join(f"{name} {value:.6f}" for name, value in values))
    print_table(found["rows"])
    for name, ratio in found["ratios_to_llama"].items():
        print(f"{name} over Llama: " + ", ".join(f"{part} {value:.3f}" for part, value in ratio.items()))
    print(f"matrix product of side {args.peak_size}: {found['peak_gflop_per_second']:.1f} GFLOP/s")
    write_result(args, **found)


if __name__ == "__main__":
    main()
