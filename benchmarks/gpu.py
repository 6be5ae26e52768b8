# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What a GPU may do otherwise than a CPU, in at most eight minutes on one: is it right, and how fast?

    git clone https://github.com/ML-GSAI/LLaDA && git clone https://github.com/NVlabs/Fast-dLLM && pip install einops
    python benchmarks/gpu.py --llada LLaDA --fast-dllm Fast-dLLM --output gpu.json

Weights are random. The large model has the shape of LLaDA 8B, with 8 of its 32 layers and a quarter of its vocabulary.
Without the two folders the references are this repository's own, as in generation.py. The sections:

    correctness       logits in float32 and bfloat16 with every attention against float64 on the CPU; rows alone and
                      padded in a batch; tokens with and without the exact cache
    calls             `generate` in all its ways, the NELBO and gradients in float32 against the same on the CPU
    synchronisations  how often a denoising step waits for the device
    training          a step against transformers' Llama: share of the peak, memory with and without
                      `checkpoint_loops`, compiled layers
    float32           `generate` with the tokens of LLaDA's and Fast-dLLM's samplers, and the time of each
    bfloat16          the same without a need for the same tokens; exact caching against none, the memory of caches,
                      new tokens a second by the number of loops

A section that fails, or takes longer than its share of the time, is recorded as failed and does not stop the others;
the exit code is 1 then. Compare numbers of one run alone. `--tiny` tries the script, also on a CPU.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import generation
import torch
import training_step
from common import begin, count_waits, in_turn, make_parser, write_result
from torch.nn.functional import pad
from transformers.utils import is_flash_attn_2_available

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo

MASK, PAD = 127, 0
VARIANTS: dict[str, dict[str, Any]] = {
    "block-causal": {"attention_block_size": 4},
    "grouped, shifted": {"num_key_value_heads": 2, "use_qk_norm": True, "shift_logits": True},
    "learned, plain MLP": {"position_embedding_type": "learned", "use_gated_mlp": False, "norm_type": "layernorm"},
}
# The largest difference that is rounding, relative to the largest logit
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.08}
WAYS: list[dict[str, Any]] = [
    {},
    {"cache_implementation": "dual"},
    {"cache_implementation": "prefix"},
    {"eos_token_id": 3},
    {"guidance_scale": 2.0},
    {"do_sample": True, "top_p": 0.9},
    {"do_sample": True, "remask_probability": 0.2},
    {"unmasking": "margin"},
    {"confidence_threshold": 0.5},
    {"loop_tolerance": 0.3},
    {"visible_loops": 1},
]
# Settings of generation.py and of training_step.py
GENERATION = {"size": "8b", "loop_start": 2, "loops": 4, "prompt_length": 128, "repeats": 2}
TRAINING = {"width": 2048, "heads": 16, "loops": 4, "batch_size": 8, "length": 1024, "vocab_size": 32000, "repeats": 5}
TRAINING |= {"dtype": "bfloat16", "compile": "inductor", "peak_size": 8192}
TINY = {"width": 32, "heads": 4, "layers": 4, "loops": 2, "batch_size": 2, "length": 16, "vocab_size": 50}
TINY |= {"repeats": 1, "compile": "eager", "peak_size": 64}


def make_small(**changes: Any) -> LoopMDMForMaskedLM:
    torch.manual_seed(0)
    shape = {"vocab_size": MASK + 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    loops = {"num_hidden_layers": 4, "loop_start": 1, "loop_end": 3, "num_loops": 3}
    others = {"mask_token_id": MASK, "pad_token_id": PAD, "max_position_embeddings": 64, "initializer_range": 0.2}
    return LoopMDMForMaskedLM(LoopMDMConfig(**shape, **loops, **others, **changes)).eval()


@torch.no_grad()
def compare(variant: str, dtype: torch.dtype, attention: str, device: str) -> dict[str, Any]:
    """One model: logits against float64, rows against themselves in a batch, `generate` with and without a cache."""
    model, exact = make_small(**VARIANTS[variant]), make_small(**VARIANTS[variant]).double()
    for parameter in model.parameters():  # `model.to` would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    exact.load_state_dict(model.state_dict())
    model.to(device).set_attn_implementation(attention)
    rows = [pad(torch.randint(1, MASK, (1, length)), (0, 6), value=MASK) for length in (14, 7, 10)]
    batch = torch.cat([pad(row, (20 - row.shape[1], 0), value=PAD) for row in rows]).to(device)
    expected = [exact(row).logits[..., :MASK] for row in rows]
    alone = [model(row.to(device)).logits[..., :MASK].double().cpu() for row in rows]
    padded = model(batch, attention_mask=(batch != PAD).long()).logits[..., :MASK].double().cpu()
    largest = max(logits.abs().max().item() for logits in expected)

    def difference(others: list[torch.Tensor]) -> float:
        pairs = zip(alone, others, strict=True)
        return max((one - other).abs().max().item() for one, other in pairs) / largest

    differences = {
        "to_float64": difference(expected),
        "to_the_batch": difference([row[None, -one.shape[1] :] for row, one in zip(padded, alone, strict=True)]),
    }
    few = {"max_new_tokens": 8, "max_denoising_steps": 2}
    made = model.generate(batch, **few)
    single = [model.generate(row.to(device), **few)[0] for row in rows]
    same = {
        "rows": all(torch.equal(row[-len(one) :], one) for row, one in zip(made, single, strict=True)),
        "cache": torch.equal(model.generate(batch, use_cache=False, **few), made),
    }
    # In bfloat16 a kernel for another shape may round to another token, which is recorded and no failure.
    is_right = max(differences.values()) < BOUNDS[dtype] and (all(same.values()) or dtype is not torch.float32)
    return {"difference": differences, "same_tokens": same, "is_right": is_right}


def checked(rows: list[dict]) -> list[dict]:
    if wrong := [row for row in rows if not row["is_right"]]:
        raise RuntimeError(f"{len(wrong)} of {len(rows)} are wrong: {wrong}")
    return rows


def generation_args(args: argparse.Namespace, dtype: str) -> argparse.Namespace:
    """The arguments of generation.py; ends the program where the folders are not what they should be."""
    same = {name: getattr(args, name) for name in ("llada", "fast_dllm", "device", "seed")}
    return generation.parse_args(["--quick"] if args.tiny else [], dtype=dtype, **same, **GENERATION)


class Sections:
    """The sections, and the large model."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.device = args, folder, args.device

    def make(self, dtype: str) -> tuple[LoopMDMForMaskedLM, Path, argparse.Namespace]:
        args = generation_args(self.args, dtype)
        source = self.folder / dtype / "llada"
        generation.write_checkpoint(source, args)
        return generation.make_model(source, args), source, args

    def correctness(self) -> list[dict]:
        rows, is_gpu = [], self.device.startswith("cuda")
        for dtype in BOUNDS:
            flash = ["flash_attention_2"] if is_gpu and is_flash_attn_2_available() and dtype.itemsize == 2 else []
            for attention in ("eager", "sdpa", *flash, *(["flex_attention"] if is_gpu else [])):
                for variant in VARIANTS:
                    if not flash or attention != flash[0] or variant != "block-causal":  # which is refused
                        row = {"dtype": str(dtype), "attention": attention, "model": variant}
                        rows.append({**row, **compare(variant, dtype, attention, self.device)})
        return checked(rows)

    def calls(self) -> list[dict]:
        ids = torch.randint(1, MASK, (3, 10))
        ids[0, :4] = PAD
        mask, rows = (ids != PAD).long(), []

        def written(model: LoopMDMForMaskedLM, device: str, options: dict) -> torch.Tensor:
            draws = [torch.Generator().manual_seed(row) for row in range(len(ids))]  # on the CPU, for the same numbers
            sizes = {"max_new_tokens": 8, "max_denoising_steps": 2}
            return model.generate(ids.to(device), mask.to(device), generator=draws, **sizes, **options)

        def gradients(model: LoopMDMForMaskedLM, device: str, checkpoints: bool) -> torch.Tensor:
            model.train().model.checkpoint_loops = checkpoints
            masked = ids.masked_fill(ids % 2 == 1, MASK)
            model(masked.to(device), mask.to(device), labels=ids.to(device)).loss.backward()
            return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

        ways = WAYS[::5] if self.args.tiny else WAYS
        runs: dict[str, tuple[Callable, float]] = {}
        for way in ways:
            runs[f"generate {way}"] = partial(written, options=way), 0
        runs["nelbo"] = lambda model, device: nelbo(model, ids, mask, num_samples=4).nats, 1e-4
        for checkpoints in (False, True):
            runs[f"gradients, checkpoint_loops={checkpoints}"] = partial(gradients, checkpoints=checkpoints), 1e-3
        for name, (run, bound) in runs.items():
            found, expected = (run(make_small().to(device), device).cpu().double() for device in (self.device, "cpu"))
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            rows.append({"call": name, "difference": difference, "is_right": difference <= bound})
        return checked(rows)

    def samplers(self) -> dict:
        return generation.samplers(*self.make("float32"), 1)

    def generation(self) -> dict:
        model, source, args = self.make("bfloat16")
        found = {name: part(model, source, args, 1) for name, part in generation.PARTS.items() if name != "phases"}
        return {**found, "loops": self.loops(model, args)}

    def loops(self, model: LoopMDMForMaskedLM, args: argparse.Namespace) -> list[dict]:
        prompt = generation.make_prompt(args, 1)
        runs = {str(n): lambda n=n: generation.generate(model, prompt, args, num_loops=n) for n in (1, 2, 4, 8)}
        seconds, outputs = in_turn(runs, args.repeats, self.device)
        flops = {name: output.flops.sum().item() for name, output in outputs.items()}
        best = {name: min(taken) for name, taken in seconds.items()}
        return [
            {"num_loops": int(name), "tokens_per_second": args.new_tokens / best[name]}
            | {"time_ratio": best[name] / best["1"], "flop_ratio": flops[name] / flops["1"]}
            for name in runs
        ]

    def training(self) -> dict:
        settings = TINY if self.args.tiny else TRAINING
        return training_step.measure(training_step.parse_args([], device=self.device, **settings))

    def synchronisations(self) -> list[dict]:
        """What 16 more new tokens, a step for each, add to 8."""
        model, rows = make_small().to(self.device), []
        for options in WAYS[:2] if self.args.tiny else WAYS:
            for batch_size in (1, 8):
                ids = torch.full((batch_size, 4), 5, device=self.device)
                runs = [lambda n=n: model.generate(ids, max_new_tokens=n, **options) for n in (8, 24)]  # noqa: B023
                few, many = (count_waits(run, self.device) for run in runs)
                rows.append({"options": options, "batch_size": batch_size, "waits_per_step": (many - few) / 16})
        return rows


# Every section with its share of eight minutes, in seconds
SECTIONS: dict[str, tuple[Callable[[Sections], Any], float]] = {
    "correctness": (Sections.correctness, 90),
    "calls": (Sections.calls, 30),
    "synchronisations": (Sections.synchronisations, 30),
    "training": (Sections.training, 100),
    "float32": (Sections.samplers, 90),
    "bfloat16": (Sections.generation, 140),
}


def work(name: str, args: argparse.Namespace, folder: Path) -> None:
    """A section in a process of its own, as an error of CUDA spoils all that follows in the same one."""
    begin(args)
    try:
        found = {"result": SECTIONS[name][0](Sections(args, folder))}
    except (Exception, SystemExit) as error:  # generation.py exits where tokens differ
        found = {"failed": f"{type(error).__name__}: {error}"}
    (folder / "found.json").write_text(json.dumps(found))


def run_section(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a section finds, or why it failed, and its seconds."""
    context, started = multiprocessing.get_context("spawn" if args.device != "cpu" else "fork"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=work, args=(name, args, Path(folder)))
        process.start()
        process.join(SECTIONS[name][1])
        found = {"failed": f"The process ended with {process.exitcode}."}
        if process.is_alive():
            process.kill()
            process.join()
            found = {"failed": f"It takes longer than {SECTIONS[name][1]} s."}
        elif (Path(folder) / "found.json").exists():
            found = json.loads((Path(folder) / "found.json").read_text())
    return {**found, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--llada", type=Path, help="clone of ML-GSAI/LLaDA")
    parser.add_argument("--fast-dllm", type=Path, help="clone of NVlabs/Fast-dLLM; both or none")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, and torch sees no GPU; `--device cpu --tiny` tries the script")
    generation_args(args, "float32")
    found: dict[str, dict] = {}
    for name in args.sections:
        found[name] = run_section(name, args)
        print(f"{name}: {found[name].get('failed', 'done')} ({found[name]['seconds']:.0f} s)", flush=True)
        write_result(args, sections=found)
    raise SystemExit(any("failed" in section for section in found.values()))


if __name__ == "__main__":
    main()
