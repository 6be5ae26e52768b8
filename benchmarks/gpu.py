# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Everything about LoopMDM that takes a GPU to say, in one command of at most eight minutes.

    git clone https://github.com/ML-GSAI/LLaDA && git clone https://github.com/NVlabs/Fast-dLLM && pip install einops
    python benchmarks/gpu.py --llada LLaDA --fast-dllm Fast-dLLM --output gpu.json

Every section runs in a process of its own, for a bounded time. One that fails, or takes longer, is recorded as failed,
and the others go on. What is compared takes turns within one run; compare ratios. Results are written after every
section. Without the two folders the references are those of reference_samplers.py. `--tiny` runs small models in
seconds, on the CPU if there is no GPU, which tests that the script works.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forward
import generation
import torch
import training_step
from common import begin, make_parser, write_result
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo

LIMITS = {"float32": 1e-3, "bfloat16": 0.3}  # differences of log-probabilities from float64 that are no mistake


def make_model(args: argparse.Namespace, **overrides: Any) -> LoopMDMForMaskedLM:
    """A small random model in float32 on the CPU, whose heads fit every attention kernel."""
    torch.manual_seed(args.seed)
    width = 32 if args.tiny else 256
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    window = {"loop_start": 1, "loop_end": 3, "num_loops": 3, "initializer_range": width**-0.5}
    tokens = {"vocab_size": 500, "mask_token_id": 499, "pad_token_id": 0, "max_position_embeddings": 512}
    return LoopMDMForMaskedLM(LoopMDMConfig(**{**sizes, **window, **tokens, **overrides})).eval()


def inputs(args: argparse.Namespace, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows with some [MASK]s, `(4, length)`, and their mask; two rows begin with padding."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(1, 499, (4, length), generator=generator)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, 499)
    mask = torch.ones_like(ids)
    mask[:2, : length // 4] = 0
    return ids, mask


def attentions(device: str) -> list[str]:
    """The kinds of attention that run here. On a CPU flex attention would be compiled for minutes."""
    flash = ["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []
    return ["eager", "sdpa", *([*flash, "flex_attention"] if device.startswith("cuda") else [])]


# --- sections ---


@torch.no_grad()
def logits(args: argparse.Namespace) -> list[dict]:
    """Log-probabilities in every dtype, with every attention, against eager attention in float64 on the CPU."""
    ids, mask = inputs(args, 16 if args.tiny else 200)
    rows = []
    for kind, overrides in {"whole": {}, "block-causal": {"attention_block_size": 8}}.items():
        model = make_model(args, **overrides)
        model.set_attn_implementation("eager")
        expected = {n: model.double()(ids, attention_mask=mask, num_loops=n).logits.log_softmax(-1) for n in (1, 3)}
        for dtype, limit in LIMITS.items():
            for attention in attentions(args.device):
                if attention == "flash_attention_2" and (dtype == "float32" or kind == "block-causal"):
                    continue  # neither exists
                row = {"attention": attention, "dtype": dtype, "model": kind, "limit": limit}
                with failures(row):
                    # From the file's float32, not from what the last dtype has left
                    tried = make_model(args, **overrides).to(args.device, getattr(torch, dtype))
                    tried.set_attn_implementation(attention)
                    row["difference"] = max(
                        difference(tried(ids.to(args.device), mask.to(args.device), num_loops=n).logits, wanted, mask)
                        for n, wanted in expected.items()
                    )
                    row["passed"] = row["difference"] < limit
                rows.append(row)
    return rows


def difference(logits: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest difference of the log-probabilities of real tokens; the mask token has none."""
    found = logits.double().log_softmax(-1).cpu() - expected
    return found[mask != 0][:, :-1].abs().max().item()


@contextlib.contextmanager
def failures(row: dict) -> Iterator[None]:
    """Notes in `row` what went wrong."""
    try:
        yield
    except Exception as error:
        row |= {"passed": False, "failed": f"{type(error).__name__}: {error}"[:500]}


def calls(args: argparse.Namespace) -> list[dict]:
    """What runs on the device against the same on the CPU, in float32: `generate` in all its ways, NELBO, a step."""
    ids, mask = inputs(args, 16 if args.tiny else 48)
    device, rows = args.device, []

    def check(name: str, run: Callable[[str], torch.Tensor], tolerance: float = 0.0) -> None:
        row: dict[str, Any] = {"call": name}
        with failures(row):
            found, expected = run(device).cpu().double(), run("cpu").double()
            row["difference"] = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
            row["passed"] = row["difference"] <= tolerance
        rows.append(row)

    models = {"whole": make_model(args), "block-causal": make_model(args, attention_block_size=8)}
    ways: dict[str, dict] = {
        "greedy": {},
        **{name: {"unmasking": name} for name in ("margin", "entropy", "left_to_right")},
        "prefix cache": {"cache_implementation": "prefix"},
        "dual cache": {"cache_implementation": "dual"},
        "guidance": {"guidance_scale": 1.5},
        "threshold": {"confidence_threshold": 0.5},
        "tolerance": {"loop_tolerance": 0.3},
        "visible": {"visible_loops": 1},
        "sampled": {"do_sample": True, "top_p": 0.9},
        "remasked": {"do_sample": True, "remask_probability": 0.2},
    }
    for kind, model in models.items():
        for name, options in list(ways.items())[:: 4 if args.tiny else 1]:
            if kind == "block-causal" and "cache" in name:
                continue

            def run(where: str, model=model, options=options) -> torch.Tensor:
                # A generator of the CPU for each row gives the same numbers everywhere.
                draws = [torch.Generator().manual_seed(row) for row in range(len(ids))]
                settings = {"max_new_tokens": 16, "block_length": 8, "max_denoising_steps": 2, **options}
                return model.to(where).generate(ids.to(where), mask.to(where), generator=draws, **settings)

            check(f"generate: {name}, {kind}", run)
    own = lambda where: torch.Generator(where).manual_seed(0)  # noqa: E731
    sample = {"max_new_tokens": 8, "do_sample": True}
    check(
        "generate: a generator of the device gives the same twice",
        lambda where: sum(
            sign * models["whole"].to(where).generate(ids.to(where), mask.to(where), generator=own(where), **sample)
            for sign in (1, -1)
        ),
    )
    clean = ids.masked_fill(ids == 499, 5)
    check("nelbo", lambda where: nelbo(models["whole"].to(where), clean, mask, num_samples=4).nats, 1e-4)
    for checkpoints in (False, True):

        def gradient(where: str, checkpoints=checkpoints) -> torch.Tensor:
            model = make_model(args).to(where).train()
            model.model.checkpoint_loops = checkpoints
            model(ids.to(where), mask.to(where), labels=clean.to(where)).loss.backward()
            return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

        check(f"gradients, checkpoint_loops={checkpoints}", gradient, 1e-3)
    return rows


WAITS: list[dict] = [
    {"cache_implementation": "dual"},
    {"do_sample": True},
    {"confidence_threshold": 0.99},
    {"loop_tolerance": 0.01},
    {"visible_loops": 1},
]


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host waits for."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, moved = func(*args, **(kwargs or {})), False
        if func.name() == "aten::_to_copy":
            moved = args[0].device.type != "cpu" and result.device.type == "cpu"
        self.count += moved or func.name() in self.NAMES
        return result


def waits(args: argparse.Namespace) -> list[dict]:
    """How often the host waits for the device in a denoising step: the growth of the count from few steps to many."""
    model, rows, few, many = make_model(args).to(args.device), [], 2, 4 if args.tiny else 12
    prompt = inputs(args, 16)[0].masked_fill(inputs(args, 16)[0] == 499, 5).to(args.device)
    for options in ({}, *WAITS):
        counts: dict[str, list[int]] = {"operations": [], "warnings": []}
        for steps in (few, few, many):  # the first warms up
            run = lambda: model.generate(prompt, max_new_tokens=24, max_denoising_steps=steps, **options)  # noqa: B023, E731
            with Waits() as watched:
                run()
            counts["operations"].append(watched.count)
            if args.device.startswith("cuda"):
                torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    run()
                torch.cuda.set_sync_debug_mode("default")
                counts["warnings"].append(sum("synchronizing" in str(one.message) for one in found))
        each = {kind: (n[2] - n[1]) / (many - few) for kind, n in counts.items() if n}
        rows.append({"options": options, "waits_per_step": each})
    return rows


def script(module: Any, args: argparse.Namespace, *options: str) -> dict:
    """What another benchmark finds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        sys.argv = [
            f"{module.__name__}.py",
            "--device",
            args.device,
            "--seed",
            str(args.seed),
            "--output",
            str(output),
        ]
        sys.argv += options
        module.main()
        found = json.loads(output.read_text())
    return {"settings": found.pop("protocol")["settings"], **found}


def generate_small(args: argparse.Namespace) -> dict:
    """Against the references in float32, where the tokens have to be theirs."""
    return script(generation, args, *folders(args), *(["--quick"] if args.tiny else ["--size", "small"]))


def generate_large(args: argparse.Namespace) -> dict:
    """The same in bfloat16 with layers as wide as those of 8 billion parameters."""
    options = ["--quick"] if args.tiny else ["--size", "8b-cut", "--loops", "4"]
    return script(generation, args, *folders(args), *options, "--dtype", "bfloat16")


def folders(args: argparse.Namespace) -> list[str]:
    given = {"--llada": args.llada, "--fast-dllm": args.fast_dllm}
    return [str(part) for name, path in given.items() if path is not None for part in (name, path.resolve())]


TINY = ("--width", "32", "--mlp-width", "48", "--heads", "4", "--layers", "4", "--length", "16", "--batch-size", "2")


def loops(args: argparse.Namespace) -> dict:
    """Tokens a second by loops."""
    options = (*TINY, "--repeats", "1", "--loops", "1", "3")
    if not args.tiny:
        options = (
            "--width",
            "2048",
            "--mlp-width",
            "5632",
            "--heads",
            "16",
            "--length",
            "1024",
            "--dtype",
            "bfloat16",
        )
    return script(forward, args, *options)


def training(args: argparse.Namespace) -> dict:
    """A step: share of the peak (MFU), memory with and without `checkpoint_loops`, compiled layers."""
    options = (*TINY, "--repeats", "1", "--peak-size", "64", "--vocab-size", "100")
    if not args.tiny:
        options = ("--width", "1024", "--heads", "16", "--length", "1024", "--batch-size", "16", "--compile")
        options += ("--vocab-size", "32000", "--dtype", "bfloat16", "--repeats", "8")
    return script(training_step, args, *options)


# Seconds that each may take, 480 in all. What is correct comes first.
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Any], int]] = {
    "logits": (logits, 80),
    "calls": (calls, 50),
    "waits": (waits, 30),
    "generate_small": (generate_small, 80),
    "generate_large": (generate_large, 120),
    "loops": (loops, 40),
    "training": (training, 80),
}


CHECKS = ("logits", "calls")  # whose rows say whether they passed


# --- processes ---


def work(name: str, args: argparse.Namespace, output: Path) -> None:
    """A section, in a process of its own: writes what it found, or why it failed."""
    begin(args)
    try:
        found = SECTIONS[name][0](args)
    except (Exception, SystemExit) as error:
        found = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
    output.write_text(json.dumps(found, default=str))


def run_section(name: str, args: argparse.Namespace) -> dict:
    seconds = SECTIONS[name][1]
    # A process that has used CUDA cannot be forked; without it a fork saves the imports.
    context = multiprocessing.get_context("spawn" if args.device.startswith("cuda") else "fork")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        process = context.Process(target=work, args=(name, args, output))
        started = time.perf_counter()
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            found = {"failed": f"It took longer than {seconds} seconds."}
        elif not output.is_file():
            found = {"failed": f"The process ended with {process.exitcode}."}
        else:
            found = json.loads(output.read_text())
    found = found if isinstance(found, dict) else {"rows": found}
    return {"section_seconds": time.perf_counter() - started, **found}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--llada", type=Path, help="clone of ML-GSAI/LLaDA")
    parser.add_argument("--fast-dllm", type=Path, help="clone of NVlabs/Fast-dLLM; both or none")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to test the script")
    args = parser.parse_args()
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() or not args.tiny else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; give --tiny to try the script on the CPU")
    return args


def main() -> None:
    args, results = parse_args(), {}
    for name in args.sections:
        print(f"\n--- {name}: {SECTIONS[name][0].__doc__}", flush=True)
        found = results[name] = run_section(name, args)
        print(f"{found['section_seconds']:.0f} s. {found.get('failed', '')}")
        for row in found["rows"] if name in CHECKS and "rows" in found else ():
            print(f"  {row}")
        write_result(args, sections=results)
    failed = [name for name, found in results.items() if "failed" in found]
    failed += [f"{row}" for name in CHECKS for row in results.get(name, {}).get("rows", ()) if not row["passed"]]
    if failed:
        raise SystemExit("Failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
