# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
How few loops are enough: settings of `generate` (fewer loops, fewer for visible tokens, adaptive loops) are tried on
examples, and the cheapest that keeps the quality is chosen, by measurement rather than by hand.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration_loopmdm import check_num_loops
from ..data import encode_answer, json_lines
from ..generation_utils import LoopMDMGenerationConfig
from ..objective import input_device
from .loading import read_generation_config
from .texts import batches_by_length, pad_left

TOLERANCES = (0.05, 0.1, 0.15, 0.2, 0.3)
# What a setting may change, and what is taken back to its default where it does not.
BUDGET_ARGUMENTS = ("num_loops", "loop_tolerance", "visible_loops")
COSTS = ("forward_passes", "loops", "flops")


@dataclass
class BudgetResult:
    """
    One setting, measured.

    Args:
        arguments (`dict`): Arguments of `generate`.
        quality, standard_error (`float`): Mean over the examples, from 0 to 1, and its standard error.
        loss, loss_standard_error (`float`): Quality below that of the most loops, on the same examples (paired).
        forward_passes, loops, flops (`float`): Mean cost of an example, as `generate` reports it.
    """

    arguments: dict[str, Any]
    quality: float
    standard_error: float
    loss: float
    loss_standard_error: float
    forward_passes: float
    loops: float
    flops: float

    @property
    def mean_loops(self) -> float:
        """Loops of a forward pass."""
        return self.loops / self.forward_passes


@dataclass
class LoopBudget:
    """
    Outcome of [`calibrate_loops`].

    Args:
        full (`BudgetResult`): The setting with the most loops, to which the others are compared.
        results (`list[BudgetResult]`): All settings on the examples that the choice was made on.
        best (`BudgetResult`): The chosen one on these.
        check (`BudgetResult`): The chosen one on the other examples, which had no part in the choice.
        check_full (`BudgetResult`): The most loops on those.
        checks (`list[BudgetResult]`): All settings that were tried there, the cheapest first; the last one held.
        settings (`dict`): How it was measured.
    """

    full: BudgetResult
    results: list[BudgetResult]
    best: BudgetResult
    check: BudgetResult
    check_full: BudgetResult
    checks: list[BudgetResult] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def budget_settings(num_loops: int) -> list[dict[str, Any]]:
    """
    Settings that spend at most `num_loops`: every smaller number, fewer loops for visible tokens, and tolerances.
    """
    settings: list[dict[str, Any]] = [{"num_loops": loops} for loops in range(1, num_loops)]
    settings += [
        {"num_loops": loops, "visible_loops": visible}
        for loops in sorted({num_loops, max(2, round(num_loops * 2 / 3))})
        for visible in range(1, min(loops, 4))
    ]
    if num_loops > 1:
        settings += [{"num_loops": num_loops, "loop_tolerance": tolerance} for tolerance in TOLERANCES]
    return settings


def calibrate_loops(
    model: torch.nn.Module,
    examples: Sequence[dict[str, torch.Tensor]],
    num_loops: int | None = None,
    max_loss: float = 0.005,
    quality: str = "exact",
    settings: Sequence[dict[str, Any]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **generate_arguments,
) -> LoopBudget:
    """
    Measures settings of `generate` on examples and chooses the one of the fewest FLOPs whose quality is at most
    `max_loss` below that of `num_loops` loops in every step. Settings are compared on every other example, and the
    cheapest has to hold on the rest too, or the next one is taken: the best of many settings looks better than it is.

    Args:
        model: A [`LoopMDMForMaskedLM`] with `loop_update="replace"`.
        examples: `{"input_ids": (length,), "target": (length,)}`, int64: tokens with [MASK]s to fill in, and what
            belongs there. At least 4.
        num_loops (`int`, defaults to `config.num_loops`): The most loops, and what quality is compared with.
        max_loss (`float`, defaults to 0.005): Largest loss of quality, 0.005 being half a point of 100.
        quality (`"exact"`, `"tokens"` or `"agreement"`):
            Share of examples with every [MASK] filled in right, share of the tokens, or share of the tokens that are
            those of `num_loops` loops, which needs no right answers.
        settings: Arguments of `generate` to try; by default [`budget_settings`].
        batch_size (`int`, defaults to 32): Examples generated together.
        seed (`int`, defaults to 0): Where tokens are drawn.
        progress: Called with the settings measured so far and their number.
        generate_arguments: Further arguments of `generate`, for all settings alike.
    """
    num_loops = check_num_loops(model.config.num_loops if num_loops is None else num_loops)
    settings = budget_settings(num_loops) if settings is None else settings
    _check(model, examples, num_loops, max_loss, quality, settings, generate_arguments)
    first, second = (
        _Half(model, half, quality, num_loops, batch_size, seed, generate_arguments)
        for half in (examples[::2], examples[1::2])
    )
    results, checks = [first.full], []
    for number, setting in enumerate(settings, start=1):
        results.append(first.measure(setting))
        if progress is not None:
            progress(number, len(settings))
    # The cheapest of many settings is often a lucky one: it has to hold on the other examples too.
    for best in sorted((result for result in results if result.loss <= max_loss), key=lambda result: result.flops):
        check = second.full if best is first.full else second.measure(best.arguments)
        checks.append(check)
        if check.loss <= max_loss:
            break
    how = {"max_loss": max_loss, "quality": quality, "examples": len(examples), "seed": seed, **generate_arguments}
    return LoopBudget(first.full, results, best, check, second.full, checks, how)


def _check(
    model: torch.nn.Module,
    examples: Sequence[dict[str, torch.Tensor]],
    num_loops: int,
    max_loss: float,
    quality: str,
    settings: Sequence[dict[str, Any]],
    generate_arguments: dict[str, Any],
) -> None:
    """Raises a ValueError for bad arguments of [`calibrate_loops`], before the first of many runs."""
    if model.config.loop_update != "replace":
        raise ValueError(
            'The loops of a model with `loop_update="damped"` are steps towards one result, whose number is not a '
            "budget; calibrate a model that was trained with loops."
        )
    if num_loops < 2:
        raise ValueError("`num_loops` is 1, which leaves nothing to save; give the most loops that may be spent.")
    if len(examples) < 4:
        raise ValueError(f"There are {len(examples)} examples; give at least 4, and some hundred to tell 1 % apart.")
    if quality not in ("exact", "tokens", "agreement"):
        raise ValueError(f'`quality` is {quality!r}; choose "exact", "tokens" or "agreement".')
    if not 0 <= max_loss <= 1:
        raise ValueError(
            f"`max_loss` is {max_loss}; it is a share of the quality, from 0 to 1 (0.005 is half a point)."
        )
    for name in BUDGET_ARGUMENTS:
        if name in generate_arguments:
            raise ValueError(f"`{name}` is what is calibrated; leave it out.")
    for number, example in enumerate(examples):
        if not bool((example["input_ids"] == model.config.mask_token_id).any()):
            raise ValueError(f"Example {number} holds no [MASK]; there is nothing to fill in.")
        if example["input_ids"].shape != example["target"].shape:
            raise ValueError(
                f"Example {number} has {len(example['input_ids'])} tokens and a target of {len(example['target'])}; "
                "they stand for each other one by one."
            )
    for setting in settings:
        if not set(setting) <= set(BUDGET_ARGUMENTS):
            raise ValueError(f"A setting is {setting}; it may hold {', '.join(BUDGET_ARGUMENTS)}.")
        model._prepare_generation_config(None, **_complete(setting), **generate_arguments)


def write_budget(folder: str | Path, arguments: dict[str, Any]) -> Path:
    """
    Makes `arguments`, as [`calibrate_loops`] chose them, the defaults of the model or adapter in `folder`: writes its
    generation_config.json anew. Returns the file.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} does not hold a model: there is no config.json in it.")
    file = folder / "generation_config.json"
    config = read_generation_config(str(folder)) or LoopMDMGenerationConfig()
    config.update(**_complete(arguments))
    config.validate()
    part = folder / ".generation_config.json.part"
    try:
        part.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


def read_examples(path: str | Path, tokenizer: Any, mask_token_id: int) -> list[dict[str, torch.Tensor]]:
    """
    Examples for [`calibrate_loops`] from JSON lines `{"prompt": ..., "answer": ...}` (or the other names that
    `data.encode_answer` takes): the answer's tokens are to be filled in behind the prompt. Where the prompt holds
    mask tokens itself, the answer is the whole text and they are filled in.
    """
    if Path(path).suffix == ".txt":
        raise ValueError(f'{path} is a text; give answers as JSON lines, {{"prompt": ..., "answer": ...}}.')
    examples = []
    for number, item in json_lines(Path(path)):
        where = f"{path}, line {number}"
        encoded = encode_answer(tokenizer, item, where)
        tokens, prompt_length = encoded["input_ids"], encoded["prompt_length"]
        if prompt_length == len(tokens):
            raise ValueError(f"{where} has an answer without tokens, so there is nothing to fill in.")
        if mask_token_id in tokens[:prompt_length]:
            input_ids = tokens[:prompt_length]
            tokens = tokens[prompt_length:]
            if tokens[-1:] == [tokenizer.eos_token_id]:
                tokens = tokens[:-1]
            if len(tokens) != len(input_ids):
                raise ValueError(
                    f"{where}: the prompt has mask tokens among its {len(input_ids)} tokens, and the answer, which "
                    f"has to repeat it with them filled in, has {len(tokens)}."
                )
        else:
            input_ids = [*tokens[:prompt_length], *[mask_token_id] * (len(tokens) - prompt_length)]
        examples.append({"input_ids": torch.tensor(input_ids), "target": torch.tensor(tokens)})
    return examples


def describe(arguments: dict[str, Any]) -> str:
    """A setting in a few words."""
    words = [f"{arguments['num_loops']} loops"]
    if "visible_loops" in arguments:
        words.append(f"visible {arguments['visible_loops']}")
    if "loop_tolerance" in arguments:
        words.append(f"tolerance {arguments['loop_tolerance']:g}")
    return ", ".join(words)


def _complete(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting with defaults for what it leaves open, so that nothing of an earlier calibration remains."""
    return {name: setting.get(name, LoopMDMGenerationConfig.FIELDS[name][0]) for name in BUDGET_ARGUMENTS}


class _Half:
    """Half of the examples, with what the most loops make of them."""

    def __init__(self, model, examples, quality, num_loops, batch_size, seed, generate_arguments):
        self.model, self.examples, self.quality = model, examples, quality
        self.batch_size, self.seed, self.generate_arguments = batch_size, seed, generate_arguments
        # `full_score` is set by the first measurement, of which nothing is lost against itself.
        self.full_sequences = self.full_score = None
        self.full = self.measure({"num_loops": num_loops})

    def measure(self, setting: dict[str, Any]) -> BudgetResult:
        sequences, cost = self._generate(setting)
        if self.full_sequences is None:
            self.full_sequences = sequences
        score = torch.stack([self._score(number, tokens) for number, tokens in enumerate(sequences)])
        if self.full_score is None:
            self.full_score = score
        loss, root = self.full_score - score, math.sqrt(len(score))
        means = score.mean().item(), score.std().item() / root, loss.mean().item(), loss.std().item() / root
        return BudgetResult(dict(setting), *means, *cost.mean(-1).tolist())

    def _generate(self, setting: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every example filled in, and its `COSTS`, `(3, num_examples)` float64."""
        device, count = input_device(self.model), len(self.examples)
        sequences, cost = [None] * count, torch.zeros(len(COSTS), count, dtype=torch.float64)
        for numbers in batches_by_length([example["input_ids"] for example in self.examples], self.batch_size):
            rows = [self.examples[number]["input_ids"] for number in numbers]
            input_ids, attention_mask = pad_left(rows)
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                # One for each row, so that a row's tokens do not depend on its batch.
                generator=[torch.Generator().manual_seed(self.seed + number) for number in numbers],
                return_dict_in_generate=True,
                **{"max_new_tokens": 0, **_complete(setting), **self.generate_arguments},
            )
            for number, row, tokens in zip(numbers, rows, output.sequences.cpu(), strict=True):
                sequences[number] = tokens[len(tokens) - len(row) :]
            cost[:, numbers] = torch.stack([output[name].double().cpu() for name in COSTS])
        return sequences, cost

    def _score(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        """Quality of an example, a float64 scalar."""
        example = self.examples[number]
        blank = example["input_ids"] == self.model.config.mask_token_id
        target = self.full_sequences[number] if self.quality == "agreement" else example["target"]
        right = (tokens[blank] == target[blank]).double()
        return right.prod() if self.quality == "exact" else right.mean()
