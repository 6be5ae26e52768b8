# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
How fast is `generate` beside LLaDA's and Fast-dLLM's samplers over the same weights, and what do its options save in
FLOPs, time and memory? This makes the table of docs/generation.md:

    git clone https://github.com/ML-GSAI/LLaDA && git clone https://github.com/NVlabs/Fast-dLLM && pip install einops
    python benchmarks/generation.py --llada LLaDA --fast-dllm Fast-dLLM --clock cpu --threads 1 --repeats 3 \\
        --output benchmarks/results/generation.json

The model has LLaDA's format and random weights, large enough that confidences differ and no two tokens are nearly as
likely, so that "same tokens" means something; it is converted by `loopmdm.convert`. The [MASK] row of its head is
zero, as if it had learned never to predict [MASK], which the published samplers do not forbid.

With both folders the references are the authors' own code: LLaDA's sampler and Fast-dLLM's three (without a cache,
with its prefix and with its dual cache), all over Fast-dLLM's model. Without the folders they are this script's own,
which do the same in few lines. Naive looping is always the script's own: LLaDA's sampler over a plain pass in
which mid's layers stand so many times. Every reference must give logits that differ between positions, and in float32
ours must give its tokens.

"ceiling" is FLOPs of the reference / FLOPs of ours: the factor that exact savings would give if a FLOP took as long in
both. "factor" is time of the reference / time of ours, "share" is factor / ceiling; it can exceed 1, since the
references also spend time outside the matrix products. Factors are medians over rounds of the ratio within a round.
What options cost in tokens ("agreement") is that of random weights: one other token early changes all that follow.

Results are written after every part. `--quick` runs a tiny model, which tests that the script works.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import CLOCKS, begin, in_turn, llada_config, llada_shapes, make_parser, peak_bytes, timed, write_result
from reference_samplers import (
    FAST_DLLM,
    LLADA,
    PlainModel,
    assert_positions_differ,
    authors_samplers,
    own_samplers,
    plain_generate,
    reference_flops,
)
from safetensors.torch import save_file
from torch import nn

import loopmdm.convert
from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.cache_utils import LoopMDMCache

SIZES = {
    "small": {"width": 512, "mlp_width": 1536, "layers": 12, "heads": 8, "vocab_size": 32000},
    # LLaDA 8B with 8 of 32 layers and a quarter of its vocabulary
    "8b": {"width": 4096, "mlp_width": 12288, "layers": 8, "heads": 32, "vocab_size": 32000},
    "tiny": {"width": 64, "mlp_width": 96, "layers": 4, "heads": 4, "vocab_size": 400},
}
# Mid is `mid` layers behind the first `loop_start`; `steps` are those of a block, and `tolerance` is what the adaptive
# run has as its `loop_tolerance`.
SETTINGS = {
    "size": "small",
    "loop_start": 1,
    "mid": 2,
    "loops": 8,
    "prompt_length": 64,
    "new_tokens": 128,
    "block_length": 32,
    "steps": 8,
    "tolerance": 0.3,
    "device": "cpu",
    "dtype": "float32",
}
QUICK = {
    "size": "tiny",
    "prompt_length": 16,
    "new_tokens": 24,
    "block_length": 8,
    "steps": 3,
    "loops": 3,
    "tolerance": 0.65,
    "repeats": 1,
}


def parse_args(argv: list[str] | None = None, **settings: Any) -> argparse.Namespace:
    """What the command line says, with other `settings` than the script's own if they are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--llada", type=Path, help="clone of ML-GSAI/LLaDA")
    parser.add_argument("--fast-dllm", type=Path, help="clone of NVlabs/Fast-dLLM; both or none")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="the authors' Fast-dLLM takes 1 alone")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of the process")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round, whatever else is given")
    parser.set_defaults(**{**SETTINGS, **settings})
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK, batch_sizes=[2 if args.llada is None else 1])
    if (args.llada is None) != (args.fast_dllm is None):
        parser.error("--llada and --fast-dllm go together: the model of both is in Fast-dLLM's repository")
    if args.llada is not None and args.batch_sizes != [1]:
        parser.error(f"--batch-sizes is {args.batch_sizes}; Fast-dLLM's samplers take one row: give --batch-sizes 1")
    if args.llada is not None:
        if (args.fast_dllm / "v1").is_dir():  # since April 2026
            args.fast_dllm /= "v1"
        for path in (args.llada / "generate.py", args.fast_dllm / "llada" / "generate.py"):
            if not path.is_file():
                parser.error(f"{path} is not there; give clones of ML-GSAI/LLaDA and NVlabs/Fast-dLLM")
    return args


# --- the model ---


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint in LLaDA's format, with random weights whose scale makes attention and predictions peaked."""
    size = SIZES[args.size]
    shapes = llada_shapes(size["width"], size["mlp_width"], size["vocab_size"], size["layers"])
    # A unit state behind a norm gives scores of standard deviation `gain`.
    gains = {"wte": size["width"] ** 0.5, "transformer.ff_out": 4.0, "q_proj": 1.5, "k_proj": 1.5}
    generator, dtype = torch.Generator(args.device).manual_seed(args.seed), getattr(torch, args.dtype)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)  # a norm
            continue
        gain = next((gain for part, gain in gains.items() if name.removesuffix(".weight").endswith(part)), 1.0)
        drawn = torch.randn(shape, generator=generator, device=args.device)
        tensors[name] = (gain / shape[1] ** 0.5 * drawn).to("cpu", dtype)
    tensors["model.transformer.ff_out.weight"][-1] = 0.0
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = llada_config(**size, max_sequence_length=args.prompt_length + args.new_tokens)
    (folder / "config.json").write_text(json.dumps(config))


def make_model(source: Path, args: argparse.Namespace) -> LoopMDMForMaskedLM:
    converted = source.with_name("loopmdm")
    window = {"loop_start": args.loop_start, "loop_end": args.loop_start + args.mid, "loop_update": "replace"}
    loopmdm.convert.convert_checkpoint(source, converted, **window, dtype=args.dtype)
    model = LoopMDMForMaskedLM.from_pretrained(converted, dtype=getattr(torch, args.dtype))
    # The file may be mapped into memory, and goes with the folder.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(args.device).eval()


def make_block_causal(model: LoopMDMForMaskedLM, args: argparse.Namespace) -> LoopMDMForMaskedLM:
    """A block-causal model with the same weights, which it shares."""
    config = LoopMDMConfig.from_dict({**model.config.to_dict(), "attention_block_size": args.block_length})
    variant = LoopMDMForMaskedLM(config)
    variant.load_state_dict(model.state_dict(), assign=True)
    return variant.to(args.device).eval()


# --- measurements ---


def generate(model: LoopMDMForMaskedLM, prompt: torch.Tensor, args: argparse.Namespace, **options: Any) -> Any:
    return model.generate(
        prompt,
        max_new_tokens=args.new_tokens,
        block_length=args.block_length,
        max_denoising_steps=args.steps,
        unmasking="confidence",
        return_dict_in_generate=True,
        **options,
    )


def make_prompt(args: argparse.Namespace, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(args.seed + 1)
    shape = (batch_size, args.prompt_length)
    return torch.randint(SIZES[args.size]["vocab_size"] - 1, shape, generator=generator).to(args.device)


class Comparison:
    """Runs that take turns, what they return and what that costs: tokens alone, of `flops`, or an output of ours."""

    def __init__(self, runs: dict[str, Callable[[], Any]], flops: dict[str, int], args: argparse.Namespace, what: str):
        self.start = args.prompt_length
        self.seconds, outputs = in_turn(runs, args.repeats, args.device, args.clock, what)
        self.tokens = {name: getattr(output, "sequences", output) for name, output in outputs.items()}
        self.flops = flops | {name: output.flops.sum().item() for name, output in outputs.items() if name not in flops}
        self.loops = {
            name: (output.loops.sum() / output.forward_passes.sum()).item()
            for name, output in outputs.items()
            if name not in flops
        }

    def against(self, ours: str, reference: str) -> dict:
        """What `ours` gains over `reference`. The tokens compared are the new ones."""
        pairs = zip(self.seconds[reference], self.seconds[ours], strict=True)
        agreement = (self.tokens[reference] == self.tokens[ours])[:, self.start :].double().mean().item()
        ceiling, factor = self.flops[reference] / self.flops[ours], statistics.median(a / b for a, b in pairs)
        row = {"ours": ours, "reference": reference, "flop_ratio": ceiling, "factor": factor}
        return {**row, "share": factor / ceiling, "agreement": agreement, "same_tokens": agreement == 1.0}

    def runs(self) -> dict[str, dict]:
        rows = {}
        for name, seconds in self.seconds.items():
            rows[name] = {"seconds": statistics.median(seconds), "all_seconds": seconds, "flops": self.flops[name]}
            if name in self.loops:
                rows[name]["loops_per_pass"] = self.loops[name]
        return rows


def samplers(model: LoopMDMForMaskedLM, source: Path, args: argparse.Namespace, batch_size: int) -> dict:
    """Ours against the references, with one loop and with many."""
    prompt = make_prompt(args, batch_size)
    authors = args.llada is not None
    reference, runs = authors_samplers(source, prompt, args) if authors else own_samplers(model, prompt, args)
    looped = PlainModel(model, args.loops, args.prompt_length + args.new_tokens)
    runs["naive loops"] = lambda: plain_generate(looped, prompt, args, None, getattr(torch, args.dtype))
    caches = {name: name.rpartition(" ")[2] if name.endswith(("prefix", "dual")) else None for name in runs}
    flops = {
        name: batch_size * reference_flops(model, args, cache, args.loops if name == "naive loops" else 1)
        for name, cache in caches.items()
    }
    many = {"num_loops": args.loops}
    options: dict[str, dict] = {
        "ours": {"num_loops": 1},
        "ours prefix": {"num_loops": 1, "cache_implementation": "prefix"},
        "ours dual": {"num_loops": 1, "cache_implementation": "dual"},
        "ours loops": many,
        "ours loops, dual": {**many, "cache_implementation": "dual"},
        "ours loops, tolerance": {**many, "loop_tolerance": args.tolerance},
        "ours loops, visible": {**many, "visible_loops": 1},
    }
    runs |= {name: lambda given=given: generate(model, prompt, args, **given) for name, given in options.items()}
    hooks = [one.register_forward_hook(assert_positions_differ) for one in (reference, looped)]
    found = Comparison(runs, flops, args, f"batch {batch_size}")
    for hook in hooks:
        hook.remove()
    same_algorithm = {
        LLADA: "ours",
        FAST_DLLM: "ours",
        f"{FAST_DLLM} prefix": "ours prefix",
        f"{FAST_DLLM} dual": "ours dual",
        "naive loops": "ours loops",
    }
    exact = [found.against(ours, other) for other, ours in same_algorithm.items()]
    if args.dtype == "float32" and not all(row["same_tokens"] for row in exact):
        raise SystemExit(f"Not the reference's tokens: {[row['ours'] for row in exact if not row['same_tokens']]}")
    looping = []
    for name, base in (("ours loops", "ours"), ("ours loops, dual", "ours dual")):
        row = found.against(base, name)  # how many times as long `name` takes
        looping.append({"many": name, "one": base, "flop_ratio": row["flop_ratio"], "time_ratio": row["factor"]})
    return {
        "batch_size": batch_size,
        "references": "the authors' code" if authors else "this script's",
        "runs": found.runs(),
        "exact": exact,
        "approximate": [found.against(name, "naive loops") for name in options if name.startswith("ours loops,")],
        "looping": looping,
    }


def block_causal(model: LoopMDMForMaskedLM, source: Path, args: argparse.Namespace, batch_size: int) -> dict:
    """Exact caching against none, in a block-causal model."""
    model = make_block_causal(model, args)
    prompt = make_prompt(args, batch_size)
    runs = {
        f"{loops} loops, {'cache' if use_cache else 'no cache'}": (
            lambda loops=loops, use_cache=use_cache: generate(
                model, prompt, args, num_loops=loops, use_cache=use_cache
            )
        )
        for loops in (1, args.loops)
        for use_cache in (False, True)
    }
    found = Comparison(runs, {}, args, f"block-causal, batch {batch_size}")
    exact = [found.against(f"{loops} loops, cache", f"{loops} loops, no cache") for loops in (1, args.loops)]
    return {"batch_size": batch_size, "runs": found.runs(), "exact": exact}


@contextmanager
def watched(model: LoopMDMForMaskedLM, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Seconds of every phase of the passes made meanwhile."""
    places = {
        "head": (model.model, "prelude"),
        "mid": (model.model, "loop"),
        "tail": (model.model, "readout"),
        "lm_head": (model, "logits"),
    }
    spent = dict.fromkeys(places, 0.0)

    def wrap(phase: str, owner: nn.Module, name: str) -> None:
        original = getattr(owner, name)

        def run(*arguments, **kwargs):
            seconds, result = timed(lambda: original(*arguments, **kwargs), args.device, args.clock)
            spent[phase] += seconds
            return result

        setattr(owner, name, run)

    for phase, (owner, name) in places.items():
        wrap(phase, owner, name)
    try:
        yield spent
    finally:
        for owner, name in places.values():
            delattr(owner, name)  # the class's own is there again


def phases(model: LoopMDMForMaskedLM, source: Path, args: argparse.Namespace, batch_size: int) -> list[dict]:
    """Where the time of `generate` goes."""
    prompt, rows = make_prompt(args, batch_size), []
    for loops in (1, args.loops):
        for cache in (None, "dual"):
            shares = []
            for _ in range(args.repeats):
                with watched(model, args) as spent:
                    run = lambda: generate(model, prompt, args, num_loops=loops, cache_implementation=cache)  # noqa: B023, E731
                    total, _ = timed(run, args.device, args.clock)
                shares.append({phase: seconds / total for phase, seconds in spent.items()})
            share = {phase: statistics.median(one[phase] for one in shares) for phase in shares[0]}
            share["rest"] = 1 - sum(share.values())
            rows.append({"num_loops": loops, "cache": cache, "batch_size": batch_size, "share_of_time": share})
    return rows


def memory(model: LoopMDMForMaskedLM, source: Path, args: argparse.Namespace, batch_size: int) -> list[dict]:
    """What each cache takes by its formula, and what the tensors of a whole call take at most at a time."""
    prompt = make_prompt(args, batch_size)
    few_steps = argparse.Namespace(**{**vars(args), "steps": min(args.steps, 2)})
    length, dtype = args.prompt_length + args.new_tokens, getattr(torch, args.dtype)
    causal = make_block_causal(model, args)
    rows = []
    for name, one, options in (
        ("none", model, {}),
        ("prefix", model, {"cache_implementation": "prefix"}),
        ("dual", model, {"cache_implementation": "dual"}),
        ("block-causal, none", causal, {"use_cache": False}),
        ("block-causal, exact", causal, {"use_cache": True}),
    ):
        expected = 0
        if "none" not in name:
            expected = LoopMDMCache.num_bytes(one.config, args.loops, batch_size, length, dtype, one is model)
        run = lambda: generate(one, prompt, few_steps, num_loops=args.loops, **options)  # noqa: B023, E731
        row = {"cache": name, "batch_size": batch_size, "formula_bytes": expected}
        rows.append({**row, "peak_bytes": peak_bytes(run, args.device)})
    return rows


PARTS = {"samplers": samplers, "block_causal": block_causal, "phases": phases, "memory": memory}


# --- what is shown ---


def print_comparisons(title: str, part: dict, kind: str) -> None:
    print(f"\n{title}")
    print(f"{'ours':>22} {'reference':>18} {'s':>8} {'s':>8} {'ceiling':>8} {'factor':>8} {'share':>7} {'tokens':>7}")
    for row in part[kind]:
        tokens = "same" if row["same_tokens"] else f"{row['agreement']:.1%}"
        seconds = [part["runs"][row[side]]["seconds"] for side in ("ours", "reference")]
        print(
            f"{row['ours']:>22} {row['reference']:>18} {seconds[0]:>8.2f} {seconds[1]:>8.2f} "
            f"{row['flop_ratio']:>7.3f}x {row['factor']:>7.3f}x {row['share']:>7.1%} {tokens:>7}"
        )


def show(name: str, part: Any, batch_size: int) -> None:
    if name == "samplers":
        print_comparisons(f"batch {batch_size}, same algorithm as {part['references']}", part, "exact")
        print_comparisons(f"batch {batch_size}, many loops with options", part, "approximate")
        for row in part["looping"]:
            over = row["time_ratio"] / row["flop_ratio"]
            print(f"{row['many']} over {row['one']}: {row['time_ratio']:.3f} times as long, {over:.3f} by FLOPs")
    elif name == "block_causal":
        print_comparisons(f"block-causal, batch {batch_size}", part, "exact")
    elif name == "phases":
        for row in part:
            shares = ", ".join(f"{phase} {share:.1%}" for phase, share in row["share_of_time"].items())
            print(f"{row['num_loops']} loops, cache {row['cache']}: {shares}")
    else:
        for row in part:
            print(f"{row['cache']:>20}: {row['formula_bytes']:>12,} bytes; peak {row['peak_bytes']:>13,}")


def main() -> None:
    args = parse_args()
    begin(args)
    record: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "llada"
        write_checkpoint(source, args)
        model = make_model(source, args)
        for batch_size in args.batch_sizes:
            for name, measure in PARTS.items():
                part = measure(model, source, args, batch_size)
                record.setdefault(name, []).append(part)
                show(name, part, batch_size)
                write_result(args, parameters=model.num_parameters(), **record)


if __name__ == "__main__":
    main()
