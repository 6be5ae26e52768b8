# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What several benchmarks share: arguments and results, timing in turns, live memory, waits, Sudoku puzzles, the training
of a small head, a random model of words, a checkpoint in LLaDA's format.
"""

import argparse
import os
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.data import write_json
from loopmdm.evaluation.protocol import protocol

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "sudoku"))
import puzzles  # noqa: F401 - what the benchmarks on Sudoku import from here

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def positive(text: str) -> int:
    """An option's integer of at least 1."""
    if not int(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def begin(args: argparse.Namespace) -> None:
    """Applies the options of `make_parser`."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def write_result(args: argparse.Namespace, **result: Any) -> None:
    """Writes `--output`, if it is given: settings, versions and machine, and the result."""
    if args.output is None:
        return
    paths = {name for name, value in vars(args).items() if isinstance(value, Path)}
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    record = protocol(settings)
    del record["timing"]  # the benchmarks say themselves what they time
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    write_json(args.output, {"protocol": {**record, "load": load}, **result})


# --- time ---


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str = "cpu", clock: str = "wall") -> tuple[float, Any]:
    """Seconds that `run` takes, and what it returns."""
    now = CLOCKS[clock]
    synchronize(device)
    start = now()
    result = run()
    synchronize(device)
    return now() - start, result


def in_turn(
    runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu", clock: str = "wall", what: str | None = None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """
    Seconds of every run in each of `repeats` rounds, and what each returned. Within a round the runs take turns, so
    that a slow spell of the machine falls on all of them. A first round, the warm-up, is not counted; the results are
    its. With `what` every run is printed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}
    for number in range(repeats):
        for name, run in runs.items():
            taken, _ = timed(run, device, clock)
            seconds[name].append(taken)
            if what is not None:
                print(f"  {what}, round {number + 1}/{repeats}: {name} {taken:.2f} s", flush=True)
    return seconds, results


# --- memory ---


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made since it was entered that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Results in place of an argument, and views, have storages that were there before.
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in before or storage in self._seen:
                continue
            self._seen.add(storage)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, size: int) -> None:
        self.bytes -= size


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory that tensors made by `run` hold at a time."""
    if not device.startswith("cuda"):
        with LiveTensors() as live:
            run()
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- Sudoku ---


def load(folder: str | Path = ROOT) -> tuple[LoopMDMForMaskedLM, Any]:
    """The model of a folder, the bundled one by default, in eval mode, and its tokenizer."""
    return LoopMDMForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def read_pairs(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of boards and of their solutions, `(num_puzzles, 81)` each."""
    boards, solutions = zip(*pairs, strict=True)
    return tuple(tokenizer(list(texts), return_tensors="pt")["input_ids"] for texts in (boards, solutions))


def solved(right: torch.Tensor) -> dict[str, float]:
    """The percentage of `right`, `(num_puzzles,)` bool, and its standard error."""
    rate = right.double().mean().item()
    error = (rate * (1 - rate) / len(right)) ** 0.5
    return {"solved": round(100 * rate, 1), "standard_error": round(100 * error, 1)}


def fit(head: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int) -> None:
    """Trains `head` with AdamW, for two steps at least; every call of `loss` draws a batch."""
    steps = max(steps, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


# --- waits ---


class HostReads(TorchDispatchMode):
    """Counts operators whose result goes to the host."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_waits(run: Callable[[], Any], device: str) -> int:
    """How often `run` waits for the GPU; on the CPU, how often it looks at values."""
    if not device.startswith("cuda"):
        with HostReads() as reads:
            run()
        return reads.counts.total()
    run()  # what happens but once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


# --- a model of words ---


def save_word_model(folder: str | Path, words: list[str], chat_template: str | None = None, **config: Any) -> None:
    """Saves a random model that runs its layers 1 and 2 twice, and a tokenizer of `words`."""
    names = {"pad_token": "<pad>", "eos_token": "<end>", "mask_token": "<mask>"}
    ids = {f"{name}_id": index for index, name in enumerate(names)}
    vocabulary = {word: index for index, word in enumerate([*names.values(), *words])}
    shape = {"vocab_size": len(vocabulary), "intermediate_size": 192, "num_attention_heads": 4, **config}
    model = LoopMDMForMaskedLM(LoopMDMConfig(loop_start=1, loop_end=3, num_loops=2, **shape, **ids))
    model.save_pretrained(folder)
    of_words = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    of_words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_words, chat_template=chat_template, **names)
    tokenizer.save_pretrained(folder)


# --- LLaDA's format ---


def llada_shapes(width: int, mlp_width: int, vocab_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an untied LLaDA."""
    root = "model.transformer."
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}wte.weight": (vocab_size, width),
        f"{root}ln_f.weight": (width,),
        f"{root}ff_out.weight": (vocab_size, width),
    }
    for layer in range(layers):
        name = f"{root}blocks.{layer}."
        shapes |= {f"{name}{norm}.weight": (width,) for norm in ("attn_norm", "ff_norm")}
        shapes |= {f"{name}{proj}.weight": (width, width) for proj in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{name}{proj}.weight": (mlp_width, width) for proj in ("ff_proj", "up_proj")}
        shapes[f"{name}ff_out.weight"] = (width, mlp_width)
    return shapes


def llada_config(width: int, mlp_width: int, vocab_size: int, layers: int, heads: int, **others: Any) -> dict:
    """Its config.json; the mask token is the last one unless `others` say so."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "d_model": width,
        "embedding_size": vocab_size,
        "layer_norm_type": "rms",
        "mask_token_id": vocab_size - 1,
        "max_sequence_length": 4096,
        "mlp_hidden_size": mlp_width,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "weight_tying": False,
        **others,
    }
