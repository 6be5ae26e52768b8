# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Speed, FLOPs and memory of `generate` against plain loops over the same weights.

    python benchmarks/generation.py --output generation.json --plot generation.png

The model has LLaDA's format and random weights, large enough that confidences differ and no two tokens are nearly as
likely, so that "same tokens" means something; it is converted by `loopmdm.convert`. The [MASK] row of its head is
zero, as if it had learned never to predict [MASK], which the published samplers do not forbid.

The references are this script's own: LLaDA's sampler (in every step full logits of the whole sequence, a softmax over
the vocabulary, a topk per row; the softmax in the model's dtype, as since June 2025, before in float64) and
Fast-dLLM's (with the softmax in float64; without cache, with its prefix and with its dual cache), over a plain forward
pass in the style of transformers with keys and values in tuples, rotated once. With more loops the plain pass runs mid
as often, which is naive looping. The authors' own code is slower in places.

"ceiling" is FLOPs of the reference / FLOPs of ours: the factor that exact savings would give if a FLOP took as long in
both. FLOPs of the references are counted (`FlopCounterMode`), ours are those that `generate` states. "factor" is time
of the reference / time of ours, "share" is factor / ceiling; it can exceed 1, since the references also spend time
outside the matrix products. Runs take turns, so that a slow spell of the machine falls on all of them; factors are
medians over rounds of the ratio within a round; the first run of each is not counted. What options cost in tokens
("agreement") is that of random weights: one other token early changes all that follow, and how many loops a tolerance
leaves says nothing about a trained model.

A full run takes long on few cores, most of it naive looping at batch 8; results are written after every part.
`--batch-sizes 1` or `--parts samplers phases` run less, `--quick` a tiny model, which tests that the script works and
measures nothing.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from training_step import LiveTensors, machine_info, synchronize
from transformers.generation import CompileConfig

import loopmdm.convert
from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.cache_utils import LoopMDMCache

PARTS = ("samplers", "block_causal", "phases", "memory", "compile")
PHASES = ("head", "mid", "tail", "lm_head")
SIZES = {
    "small": {"width": 512, "mlp_width": 1536, "layers": 12, "heads": 8, "vocab_size": 32000},
    "1b": {"width": 2048, "mlp_width": 5632, "layers": 22, "heads": 32, "vocab_size": 32000},
    "tiny": {"width": 64, "mlp_width": 96, "layers": 4, "heads": 4, "vocab_size": 400},
}
QUICK = {
    "size": "tiny",
    "batch_sizes": [2],
    "prompt_length": 16,
    "new_tokens": 24,
    "block_length": 8,
    "steps": 3,
    "loops": 3,
    "tolerance": 0.65,
    "repeats": 1,
    "compile_backend": "eager",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="sets the next five")
    parser.add_argument("--width", type=int)
    parser.add_argument("--mlp-width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--loop-start", type=int, default=1, help="layers before mid")
    parser.add_argument("--mid", type=int, default=2, help="layers that are looped")
    parser.add_argument("--loops", type=int, default=8, help="loops of the looped runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block")
    parser.add_argument("--tolerance", type=float, default=0.3, help="loop_tolerance of the adaptive runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="wall",
        help="cpu: seconds of the process, which on one thread hardly feel other work on the machine",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--compile-backend", default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round, whatever else is given")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--plot", type=Path, help="image file for a plot (needs matplotlib)")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.new_tokens % args.block_length:
        parser.error("--new-tokens must be a multiple of --block-length")
    if args.prompt_length % args.block_length and "block_causal" in args.parts:
        parser.error("--prompt-length must be a multiple of --block-length for the part block_causal")
    if args.steps > args.block_length:
        parser.error("--steps must be at most --block-length")
    return args


# --- the model ---


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint in LLaDA's format, with random weights whose scale makes attention and predictions peaked."""
    generator = torch.Generator().manual_seed(args.seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        return gain / columns**0.5 * torch.randn(rows, columns, generator=generator)

    width, mlp = args.width, args.mlp_width
    root = "model.transformer."
    # A unit state behind a norm gives scores of standard deviation `gain`.
    tensors = {
        f"{root}wte.weight": matrix(args.vocab_size, width, width**0.5),
        f"{root}ln_f.weight": torch.ones(width),
        f"{root}ff_out.weight": matrix(args.vocab_size, width, 4.0),
    }
    tensors[f"{root}ff_out.weight"][-1] = 0.0
    for layer in range(args.layers):
        name = f"{root}blocks.{layer}."
        tensors |= {f"{name}{norm}.weight": torch.ones(width) for norm in ("attn_norm", "ff_norm")}
        tensors |= {f"{name}{proj}.weight": matrix(width, width, 1.5) for proj in ("q_proj", "k_proj")}
        tensors |= {f"{name}{proj}.weight": matrix(width, width, 1.0) for proj in ("v_proj", "attn_out")}
        tensors |= {f"{name}{proj}.weight": matrix(mlp, width, 1.0) for proj in ("ff_proj", "up_proj")}
        tensors[f"{name}ff_out.weight"] = matrix(width, mlp, 1.0)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "d_model": width,
        "layer_norm_type": "rms",
        "mask_token_id": args.vocab_size - 1,
        "max_sequence_length": args.prompt_length + args.new_tokens,
        "mlp_hidden_size": mlp,
        "n_heads": args.heads,
        "n_kv_heads": args.heads,
        "n_layers": args.layers,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "vocab_size": args.vocab_size,
        "embedding_size": args.vocab_size,
        "weight_tying": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def make_model(args: argparse.Namespace) -> LoopMDMForMaskedLM:
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder) / "llada", Path(folder) / "loopmdm"
        write_checkpoint(source, args)
        loopmdm.convert.convert_checkpoint(
            source,
            converted,
            loop_start=args.loop_start,
            loop_end=args.loop_start + args.mid,
            loop_update="replace",
            dtype=args.dtype,
        )
        model = LoopMDMForMaskedLM.from_pretrained(converted, dtype=getattr(torch, args.dtype))
        # The file may be mapped into memory, and goes with the folder.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(args.device).eval()


def variant_of(model: LoopMDMForMaskedLM, **changes) -> LoopMDMForMaskedLM:
    """A model with the same weights, which it shares, and a changed config."""
    config = LoopMDMConfig.from_dict({**model.config.to_dict(), **changes})
    with torch.device("meta"):
        variant = LoopMDMForMaskedLM(config)
    variant.load_state_dict(model.state_dict(), assign=True)
    if hasattr(variant.model, "rotary_emb"):
        variant.model.rotary_emb = model.model.rotary_emb
    return variant.eval()


# --- the references ---


class PlainModel:
    """
    A transformer as others write it, over the weights of a LoopMDM: no position is left out anywhere, and with
    `num_loops` above 1 mid's layers simply stand in the list so many times.
    """

    def __init__(self, model: LoopMDMForMaskedLM, num_loops: int, max_length: int):
        config = self.config = model.config
        layers = list(model.model.layers)
        start, stop = config.loop_start, config.loop_end
        self.layers = layers[:start] + layers[start:stop] * num_loops + layers[stop:]
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.lm_head = model.lm_head.weight
        places = torch.arange(max_length, device=self.embedding.device)[None]
        self.cos, self.sin = (table[:, None] for table in model.model.rotary_emb(self.embedding[None, :1], places))

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype, states = states.dtype, states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * states.to(dtype)

    @staticmethod
    def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)

    def __call__(
        self,
        tokens: torch.Tensor,
        start: int = 0,
        past: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        replaces: bool = False,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """
        Logits at all `tokens`, `(batch_size, length)`, which stand at `start`, and the keys and values of every layer.
        Those of `past` are the positions before them, or, if the pass `replaces`, all positions.
        """
        stop = start + tokens.shape[1]
        cos, sin = self.cos[:, :, start:stop], self.sin[:, :, start:stop]
        states = functional.embedding(tokens, self.embedding)
        shape = (*tokens.shape, -1, self.config.head_dim)
        present = []
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed = self._norm(states, layer.input_layernorm.weight)
            query, key, value = (
                functional.linear(normed, projection.weight).view(shape).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
            if past is not None and replaces:
                keys, values = past[index]
                keys[:, :, start:stop], values[:, :, start:stop] = key, value
                key, value = keys, values
            elif past is not None:
                key, value = torch.cat((past[index][0], key), dim=2), torch.cat((past[index][1], value), dim=2)
            present.append((key, value))
            attended = functional.scaled_dot_product_attention(query, key, value)
            attended = attended.transpose(1, 2).reshape(*tokens.shape, -1)
            states = states + functional.linear(attended, attention.o_proj.weight)
            normed = self._norm(states, layer.post_attention_layernorm.weight)
            gate = functional.silu(functional.linear(normed, mlp.gate_proj.weight))
            states = states + functional.linear(
                gate * functional.linear(normed, mlp.up_proj.weight), mlp.down_proj.weight
            )
        return functional.linear(self._norm(states, self.norm), self.lm_head), present


def commit(
    logits: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
) -> None:
    """Writes the `counts`, `(batch_size,)`, most probable predictions into the masked places of `tokens`."""
    predicted = logits.argmax(-1)
    probability = logits.to(dtype).softmax(-1).gather(-1, predicted[..., None]).squeeze(-1)
    confidence = torch.where(masked, probability, -torch.inf)
    for row in range(len(tokens)):
        chosen = confidence[row].topk(int(counts[row])).indices
        tokens[row, chosen] = predicted[row, chosen]


@torch.inference_mode()
def plain_generate(
    model: PlainModel, prompt: torch.Tensor, args: argparse.Namespace, cache: str | None, dtype: torch.dtype
) -> torch.Tensor:
    """LLaDA's sampler, and Fast-dLLM's two with `cache`; `dtype` is that of the softmax."""
    mask = model.config.mask_token_id
    tokens = torch.cat((prompt, prompt.new_full((len(prompt), args.new_tokens), mask)), dim=1)
    for start in range(prompt.shape[1], tokens.shape[1], args.block_length):
        stop = start + args.block_length
        left = (tokens[:, start:stop] == mask).sum(-1)
        share, remainder = left // args.steps, left % args.steps
        past = None
        for step in range(args.steps):
            # What the pass computes, and so what it returns logits of.
            first = 0 if past is None else start
            last = stop if past is not None and cache == "dual" else tokens.shape[1]
            logits, present = model(tokens[:, first:last], first, past, replaces=cache == "dual")
            if cache == "dual":
                past = present
            elif cache == "prefix" and past is None:
                past = [(key[:, :, :start], value[:, :, :start]) for key, value in present]
            masked = tokens[:, first:last] == mask
            masked[:, stop - first :] = False
            commit(logits, tokens[:, first:last], masked, share + (step < remainder), dtype)
    return tokens


# --- measurements ---

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


def set_clock(name: str) -> None:
    global clock
    clock = CLOCKS[name]


@dataclass
class Result:
    """What a run returned, and what it cost as far as it says."""

    tokens: torch.Tensor
    flops: int
    details: dict[str, Any]


class Timings:
    """Seconds of several runs that take turns."""

    def __init__(self, runs: dict[str, Callable[[], Any]], args: argparse.Namespace, what: str):
        self.runs, self.device, self.what = runs, args.device, what
        self.seconds: dict[str, list[float]] = {name: [] for name in runs}

    def once(self, name: str) -> tuple[float, Any]:
        synchronize(self.device)
        start = clock()
        result = self.runs[name]()
        synchronize(self.device)
        return clock() - start, result

    def measure(self, repeats: int, on_result: Callable[[str, Any], None] = lambda name, result: None) -> None:
        for number in range(repeats):
            for name in self.runs:
                seconds, result = self.once(name)
                self.seconds[name].append(seconds)
                on_result(name, result)
                print(f"  {self.what}, round {number + 1}/{repeats}: {name} {seconds:.2f} s", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds of seconds of `over` / seconds of `under`."""
        return statistics.median(a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True))


def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    batch_size, heads, queries, head_dim = query_shape
    return 4 * batch_size * heads * queries * key_shape[2] * head_dim


def flop_counter() -> FlopCounterMode:
    """torch's counter, which does not know the attention of CPUs."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def counted(run: Callable[[], torch.Tensor]) -> Result:
    with flop_counter() as counter:
        tokens = run()
    return Result(tokens, counter.get_total_flops(), {})


def generate(model: LoopMDMForMaskedLM, prompt: torch.Tensor, args: argparse.Namespace, **options):
    return model.generate(
        prompt,
        max_new_tokens=args.new_tokens,
        block_length=args.block_length,
        max_denoising_steps=args.steps,
        unmasking="confidence",
        return_dict_in_generate=True,
        **options,
    )


def result_of(output) -> Result:
    passes = output.forward_passes.sum().item()
    details = {
        "forward_passes_per_row": output.forward_passes.double().mean().item(),
        "loops_per_pass": output.loops.sum().item() / passes,
        "token_layer_passes": output.token_layer_passes.sum().item(),
    }
    return Result(output.sequences, output.flops.sum().item(), details)


def make_prompt(args: argparse.Namespace, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(args.seed + 1)
    shape = (batch_size, args.prompt_length)
    return torch.randint(args.vocab_size - 1, shape, generator=generator).to(args.device)


def comparison(ours: str, reference: str, timings: Timings, results: dict[str, Result], args) -> dict:
    """What `ours` gains over `reference`. The tokens compared are the new ones."""
    theirs, own = results[reference], results[ours]
    agreement = (theirs.tokens == own.tokens)[:, args.prompt_length :].double().mean().item()
    ceiling, factor = theirs.flops / own.flops, timings.ratio(reference, ours)
    return {
        "ours": ours,
        "reference": reference,
        "flop_ratio": ceiling,
        "factor": factor,
        "share": factor / ceiling,
        "agreement": agreement,
        "same_tokens": agreement == 1.0,
    }


def describe_runs(timings: Timings, results: dict[str, Result], num_tokens: int) -> dict[str, dict]:
    return {
        name: {
            "seconds": timings.median(name),
            "all_seconds": timings.seconds[name],
            "flops": results[name].flops,
            "gflop_per_second": results[name].flops / timings.median(name) / 1e9,
            "tokens_per_second": num_tokens / timings.median(name),
            **results[name].details,
        }
        for name in timings.runs
    }


def samplers(model: LoopMDMForMaskedLM, args: argparse.Namespace, batch_size: int) -> dict:
    """Ours against the references, with one loop and with many."""
    prompt = make_prompt(args, batch_size)
    plain = PlainModel(model, 1, args.prompt_length + args.new_tokens)
    looped = PlainModel(model, args.loops, args.prompt_length + args.new_tokens)
    own_dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    references = {
        "LLaDA": lambda: plain_generate(plain, prompt, args, None, own_dtype),
        "Fast-dLLM": lambda: plain_generate(plain, prompt, args, None, torch.float64),
        "Fast-dLLM prefix": lambda: plain_generate(plain, prompt, args, "prefix", torch.float64),
        "Fast-dLLM dual": lambda: plain_generate(plain, prompt, args, "dual", torch.float64),
        "naive loops": lambda: plain_generate(looped, prompt, args, None, own_dtype),
    }
    many = {"num_loops": args.loops}
    adaptive = {**many, "loop_tolerance": args.tolerance}
    options = {
        "ours": {"num_loops": 1},
        "ours prefix": {"num_loops": 1, "cache_implementation": "prefix"},
        "ours dual": {"num_loops": 1, "cache_implementation": "dual"},
        "ours loops": many,
        "ours loops, dual, each": {**many, "cache_implementation": "dual", "cache_loops": "each"},
        "ours loops, dual": {**many, "cache_implementation": "dual"},
        "ours loops, row": adaptive,
        "ours loops, token": {**adaptive, "loop_exit": "token"},
        "ours loops, dual, token": {**adaptive, "loop_exit": "token", "cache_implementation": "dual"},
    }
    runs = dict(references)
    for name, given in options.items():
        runs[name] = lambda given=given: generate(model, prompt, args, **given)
    timings = Timings(runs, args, f"batch {batch_size}")
    # The warm-up counts FLOPs and gives the tokens.
    results = {name: counted(run) for name, run in references.items()}
    results |= {name: result_of(runs[name]()) for name in options}
    timings.measure(args.repeats)

    exact = [
        comparison(ours, reference, timings, results, args)
        for ours, reference in (
            ("ours", "LLaDA"),
            ("ours", "Fast-dLLM"),
            ("ours prefix", "Fast-dLLM prefix"),
            ("ours dual", "Fast-dLLM dual"),
            ("ours loops", "naive loops"),
        )
    ]
    approximate = [
        comparison(name, "naive loops", timings, results, args) for name in options if name.startswith("ours loops,")
    ]
    looping = []
    for many_loops, one_loop in (("ours loops", "ours"), ("ours loops, dual, each", "ours dual")):
        flop_ratio = results[many_loops].flops / results[one_loop].flops
        time_ratio = timings.ratio(many_loops, one_loop)
        looping.append(
            {
                "many": many_loops,
                "one": one_loop,
                "num_loops": args.loops,
                "flop_ratio": flop_ratio,
                "time_ratio": time_ratio,
                "time_over_flops": time_ratio / flop_ratio,
            }
        )
    return {
        "batch_size": batch_size,
        "runs": describe_runs(timings, results, batch_size * args.new_tokens),
        "exact": exact,
        "approximate": approximate,
        "looping": looping,
    }


def block_causal(model: LoopMDMForMaskedLM, args: argparse.Namespace, batch_size: int) -> dict:
    """Exact caching against none, in a block-causal model."""
    model = variant_of(model, attention_block_size=args.block_length)
    prompt = make_prompt(args, batch_size)
    runs = {}
    for loops in (1, args.loops):
        for use_cache in (False, True):
            name = f"{loops} loops, {'cache' if use_cache else 'no cache'}"
            runs[name] = lambda loops=loops, use_cache=use_cache: generate(
                model, prompt, args, num_loops=loops, use_cache=use_cache
            )
    timings = Timings(runs, args, f"block-causal, batch {batch_size}")
    results = {name: result_of(run()) for name, run in runs.items()}
    timings.measure(args.repeats)
    return {
        "batch_size": batch_size,
        "runs": describe_runs(timings, results, batch_size * args.new_tokens),
        "exact": [
            comparison(f"{loops} loops, cache", f"{loops} loops, no cache", timings, results, args)
            for loops in (1, args.loops)
        ],
    }


@contextmanager
def watched(model: LoopMDMForMaskedLM, device: str, counter: FlopCounterMode | None = None) -> Iterator[dict]:
    """Seconds, or with a counter FLOPs, of every phase of the passes made meanwhile."""
    spent = dict.fromkeys(PHASES, 0.0)

    def now() -> float:
        if counter is not None:
            return counter.get_total_flops()
        synchronize(device)
        return clock()

    def wrap(owner: torch.nn.Module, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def run(*args, **kwargs):
            start = now()
            result = original(*args, **kwargs)
            spent[phase] += now() - start
            return result

        setattr(owner, name, run)

    places = ((model.model, "prelude"), (model.model, "loop"), (model.model, "readout"), (model, "_head"))
    for (owner, name), phase in zip(places, PHASES, strict=True):
        wrap(owner, name, phase)
    try:
        yield spent
    finally:
        for owner, name in places:
            delattr(owner, name)  # the class's own is there again


@torch.inference_mode()
def matmul_rate(rows: int, columns: int, outputs: int, args: argparse.Namespace, repeats: int = 10) -> float:
    """FLOPs per second of `(rows, columns) @ (columns, outputs)`, the best of some."""
    dtype = getattr(torch, args.dtype)
    states = torch.randn(rows, columns, device=args.device, dtype=dtype)
    weight = torch.randn(outputs, columns, device=args.device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        synchronize(args.device)
        start = clock()
        functional.linear(states, weight)
        synchronize(args.device)
        seconds.append(clock() - start)
    return 2 * rows * columns * outputs / min(seconds)


def phases(model: LoopMDMForMaskedLM, args: argparse.Namespace, batch_size: int) -> list[dict]:
    """Where the time of `generate` goes, and what share of the machine's matmul rate each phase reaches."""
    prompt = make_prompt(args, batch_size)
    length = args.prompt_length + args.new_tokens
    mean_masked = max(round(args.block_length * (args.steps + 1) / (2 * args.steps)), 1)
    rows = []
    for name, options, width in (
        ("ours", {"num_loops": 1}, length),
        ("ours dual", {"num_loops": 1, "cache_implementation": "dual"}, args.block_length),
        ("ours loops", {"num_loops": args.loops}, length),
        ("ours loops, dual", {"num_loops": args.loops, "cache_implementation": "dual"}, args.block_length),
    ):
        with flop_counter() as counter, watched(model, args.device, counter) as flops:
            generate(model, prompt, args, **options)
        layer_rates, head_rates, shares, speeds = [], [], [], []
        for _ in range(args.repeats):
            layer_rates.append(matmul_rate(batch_size * width, args.width, args.mlp_width, args))
            head_rates.append(matmul_rate(batch_size * mean_masked, args.width, args.vocab_size, args))
            with watched(model, args.device) as seconds:
                synchronize(args.device)
                start = clock()
                generate(model, prompt, args, **options)
                synchronize(args.device)
                total = clock() - start
            share = {phase: seconds[phase] / total for phase in PHASES}
            shares.append({**share, "rest": 1 - sum(share.values())})
            speeds.append({phase: flops[phase] / seconds[phase] for phase in PHASES})
        rates = {phase: max(head_rates if phase == "lm_head" else layer_rates) for phase in PHASES}
        row = {
            "run": name,
            "batch_size": batch_size,
            "share_of_time": {
                phase: statistics.median(share[phase] for share in shares) for phase in (*PHASES, "rest")
            },
            "flops": flops,
            "gflop_per_second": {phase: statistics.median(speed[phase] for speed in speeds) / 1e9 for phase in PHASES},
            "matmul_gflop_per_second": {phase: rate / 1e9 for phase, rate in rates.items()},
        }
        row["share_of_matmul_rate"] = {
            phase: row["gflop_per_second"][phase] / row["matmul_gflop_per_second"][phase] for phase in PHASES
        }
        rows.append(row)
    return rows


def memory(model: LoopMDMForMaskedLM, args: argparse.Namespace, batch_size: int) -> list[dict]:
    """What each cache holds against its formula, and what tensors of a whole call take at most at a time."""
    prompt = make_prompt(args, batch_size)
    causal = variant_of(model, attention_block_size=args.block_length)
    few_steps = argparse.Namespace(**{**vars(args), "steps": min(args.steps, 2)})
    length, dtype = args.prompt_length + args.new_tokens, getattr(torch, args.dtype)
    rows = []
    for name, one, options in (
        ("none", model, {}),
        ("prefix, last", model, {"cache_implementation": "prefix"}),
        ("dual, last", model, {"cache_implementation": "dual"}),
        ("dual, each", model, {"cache_implementation": "dual", "cache_loops": "each"}),
        ("block-causal, none", causal, {"use_cache": False}),
        ("block-causal, exact", causal, {"use_cache": True}),
    ):
        caches: dict[int, LoopMDMCache] = {}  # by their layers, which selections of rows share

        def keep(module, arguments, kwargs, caches=caches):
            cache = kwargs.get("past_key_values")
            if cache is not None:
                caches[id(cache.layers)] = cache

        hook = one.register_forward_pre_hook(keep, with_kwargs=True)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            generate(one, prompt, few_steps, num_loops=args.loops, **options)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with LiveTensors() as live:
                generate(one, prompt, few_steps, num_loops=args.loops, **options)
            peak = live.peak
        hook.remove()
        held = sum(
            tensor.untyped_storage().nbytes()
            for cache in caches.values()
            for layer in cache.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )
        formula = sum(
            LoopMDMCache.num_bytes(
                one.config, cache.num_loops, cache.batch_size, cache.max_length, dtype, cache.share_loops
            )
            for cache in caches.values()
        )
        expected = 0
        if caches:
            share_loops = options.get("cache_implementation") is not None and options.get("cache_loops") != "each"
            expected = LoopMDMCache.num_bytes(one.config, args.loops, batch_size, length, dtype, share_loops)
        rows.append(
            {
                "cache": name,
                "batch_size": batch_size,
                "num_loops": args.loops,
                "formula_bytes": expected,
                "formula_of_caches_made_bytes": formula,
                "held_bytes": held,
                "num_caches": len(caches),
                "peak_bytes": peak,
            }
        )
        caches.clear()
        gc.collect()
    by_name = {row["cache"]: row for row in rows}
    for row in rows:
        base = by_name["block-causal, none" if row["cache"].startswith("block") else "none"]
        row["peak_over_no_cache_bytes"] = row["peak_bytes"] - base["peak_bytes"]
    return rows


def compiled(model: LoopMDMForMaskedLM, args: argparse.Namespace, batch_size: int) -> dict:
    """Compiled layers against plain ones, and how often they were compiled."""
    from torch._dynamo.utils import counters

    compiled_model = variant_of(model)
    compile_config = CompileConfig(mode=args.compile_mode, backend=args.compile_backend, fullgraph=False)
    prompt = make_prompt(args, batch_size)
    cases = {
        "ours": {"num_loops": 1},
        "ours dual": {"num_loops": 1, "cache_implementation": "dual"},
        "ours loops": {"num_loops": args.loops},
    }
    torch._dynamo.reset()
    counters.clear()

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    runs, results, first_calls = {}, {}, []
    for name, options in cases.items():
        runs[name] = lambda options=options: generate(model, prompt, args, **options)
        runs[f"{name}, compiled"] = lambda options=options: generate(
            compiled_model, prompt, args, compile_config=compile_config, **options
        )
        results[name] = result_of(runs[name]())
        before, start = graphs(), clock()
        results[f"{name}, compiled"] = result_of(runs[f"{name}, compiled"]())
        first_calls.append({"run": name, "graphs": graphs() - before, "seconds": clock() - start})
    warm = graphs()
    timings = Timings(runs, args, f"compiled, batch {batch_size}")
    timings.measure(args.repeats)
    return {
        "batch_size": batch_size,
        "mode": args.compile_mode,
        "backend": args.compile_backend,
        "first_calls": first_calls,
        "graphs": warm,
        "recompilations": graphs() - warm,  # after the first call of every case
        "runs": describe_runs(timings, results, batch_size * args.new_tokens),
        "against_plain": [comparison(f"{name}, compiled", name, timings, results, args) for name in cases],
    }


# --- what is shown ---


def print_comparisons(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    print(f"{'ours':>26} {'reference':>20} {'ceiling':>8} {'factor':>8} {'share':>7} {'tokens':>9}")
    for row in rows:
        tokens = "same" if row["same_tokens"] else f"{row['agreement']:.1%}"
        print(
            f"{row['ours']:>26} {row['reference']:>20} {row['flop_ratio']:>7.3f}x {row['factor']:>7.3f}x "
            f"{row['share']:>7.1%} {tokens:>9}"
        )


def print_runs(part: dict) -> None:
    print(f"\n{'run':>26} {'s':>8} {'GFLOP':>10} {'GFLOP/s':>8} {'tok/s':>8} {'loops':>6}")
    for name, run in part["runs"].items():
        loops = f"{run['loops_per_pass']:.2f}" if "loops_per_pass" in run else ""
        print(
            f"{name:>26} {run['seconds']:>8.2f} {run['flops'] / 1e9:>10.1f} {run['gflop_per_second']:>8.1f} "
            f"{run['tokens_per_second']:>8.1f} {loops:>6}"
        )


def print_phases(rows: list[dict]) -> None:
    names = (*PHASES, "rest")
    print("\nshare of the time (and of the matmul rate of such shapes)")
    print(f"{'run':>18} {'batch':>5} " + " ".join(f"{name:>15}" for name in names))
    for row in rows:
        cells = [
            f"{row['share_of_time'][name]:.1%}"
            + (f" ({row['share_of_matmul_rate'][name]:.0%})" if name in PHASES else "")
            for name in names
        ]
        print(f"{row['run']:>18} {row['batch_size']:>5} " + " ".join(f"{cell:>15}" for cell in cells))


def print_memory(rows: list[dict]) -> None:
    print(f"\n{'cache':>20} {'batch':>5} {'formula':>9} {'held':>9} {'peak':>9} {'over none':>10}   (MiB)")
    for row in rows:
        sizes = [row[f"{name}_bytes"] / 2**20 for name in ("formula", "held", "peak", "peak_over_no_cache")]
        print(
            f"{row['cache']:>20} {row['batch_size']:>5} "
            + " ".join(f"{size:>{width}.2f}" for size, width in zip(sizes, (9, 9, 9, 10), strict=True))
        )


def plot(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = record["samplers"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, kind, title in (
        (axes[0], "exact", "Same tokens"),
        (axes[1], "approximate", "Approximations, over naive looping"),
    ):
        names = [f"{row['ours']}\nvs. {row['reference']}" for row in parts[0][kind]]
        height = 0.8 / len(parts)
        for index, part in enumerate(parts):
            places = [place + (index - (len(parts) - 1) / 2) * height for place in range(len(names))]
            factors = [row["factor"] for row in part[kind]]
            axis.barh(places, factors, height * 0.9, label=f"batch {part['batch_size']}")
            for place, row in zip(places, part[kind], strict=True):
                axis.plot([row["flop_ratio"]] * 2, [place - height / 2, place + height / 2], "k--", lw=1)
        axis.plot([], [], "k--", lw=1, label="FLOP ratio")
        axis.axvline(1, color="gray", lw=0.8)
        axis.set(title=title, xlabel="times as fast", yticks=range(len(names)), yticklabels=names)
        axis.tick_params(axis="y", labelsize=8)
        axis.invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_clock(args.clock)
    machine = machine_info(args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    model = make_model(args)
    length = args.prompt_length + args.new_tokens
    flops = {loops: model.flops(1, length, loops) for loops in (1, args.loops)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters; a pass over {length} positions: "
        + ", ".join(f"{count / 1e9:.2f} GFLOP with {loops} loops" for loops, count in flops.items()),
        flush=True,
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "plot")}
    record: dict[str, Any] = {
        "protocol": {
            **machine,
            "platform": platform.platform(),
            "settings": settings,
            "timing": "rounds in turn, first run of each not counted; seconds are medians, factors medians of the "
            "ratios within rounds",
        },
        "model": {
            "parameters": parameters,
            "executed_layers": {loops: model.config.num_executed_layers(loops) for loops in flops},
            "pass_flops": flops,
        },
    }

    def save() -> None:
        if args.output:
            args.output.write_text(json.dumps(record, indent=2) + "\n")

    for batch_size in args.batch_sizes:
        if "samplers" in args.parts:
            part = samplers(model, args, batch_size)
            record.setdefault("samplers", []).append(part)
            save()
            print_runs(part)
            print_comparisons(f"batch {batch_size}, same algorithm", part["exact"])
            print_comparisons(f"batch {batch_size}, {args.loops} loops with options", part["approximate"])
            for row in part["looping"]:
                print(
                    f"{row['many']} over {row['one']}: time {row['time_ratio']:.3f}x, FLOPs {row['flop_ratio']:.3f}x, "
                    f"time / FLOPs {row['time_over_flops']:.3f}"
                )
        if "block_causal" in args.parts:
            part = block_causal(model, args, batch_size)
            record.setdefault("block_causal", []).append(part)
            save()
            print_runs(part)
            print_comparisons(f"block-causal, batch {batch_size}", part["exact"])
        if "phases" in args.parts:
            part = phases(model, args, batch_size)
            record.setdefault("phases", []).extend(part)
            save()
            print_phases(part)
        if "memory" in args.parts:
            part = memory(model, args, batch_size)
            record.setdefault("memory", []).extend(part)
            save()
            print_memory(part)
    if "compile" in args.parts:
        for batch_size in args.batch_sizes:
            part = compiled(model, args, batch_size)
            record.setdefault("compile", []).append(part)
            save()
            print_runs(part)
            print_comparisons(f"compiled ({args.compile_mode}), batch {batch_size}", part["against_plain"])
            calls = [f"{call['run']} {call['graphs']} in {call['seconds']:.1f} s" for call in part["first_calls"]]
            print(f"graphs of the first calls: {', '.join(calls)}; later: {part['recompilations']}")
    if args.plot and "samplers" in record:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
