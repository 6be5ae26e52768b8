# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The loop budget: settings of `generate` (fewer loops, fewer loops for visible tokens, adaptive loops) are measured on
examples, and the cheapest one that keeps the quality is chosen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration_loopmdm import LoopMDMConfig, check_num_loops
from ..data import encode_answer, encode_given, first_text, json_lines, write_atomically
from ..data.encode import ANSWER_NAMES
from ..generation_utils import LoopMDMGenerationConfig
from .loading import read_generation_config
from .rows import COSTS, generate_together
from .texts import batches_by_length, check_filled

TOLERANCES = (0.05, 0.1, 0.15, 0.2, 0.3)
# The arguments of `generate` that a setting may hold. Those that it leaves out get their defaults.
BUDGET_ARGUMENTS = ("num_loops", "loop_tolerance", "visible_loops")


@dataclass
class BudgetResult:
    """
    The measurement of one setting.

    Args:
        arguments (`dict`): Arguments of `generate`.
        quality, standard_error (`float`): Mean quality of the examples, from 0 to 1, and its standard error.
        loss, loss_standard_error (`float`): Quality lost against the most loops, and its standard error, from the
            differences between the same examples.
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
        """Mean loops of a forward pass."""
        return self.loops / self.forward_passes


@dataclass
class LoopBudget:
    """
    The result of [`calibrate_loops`].

    Args:
        full (`BudgetResult`): The most loops, on the examples that the choice was made on.
        results (`list[BudgetResult]`): All settings, on the same examples.
        best (`BudgetResult`): The chosen setting, on the same examples.
        check (`BudgetResult`): The chosen setting on the other examples, which had no part in the choice.
        check_full (`BudgetResult`): The most loops on the other examples.
        checks (`list[BudgetResult]`): All settings that were tried on the other examples, the cheapest first. The last
            one kept the quality.
        settings (`dict`): The arguments of the measurement.
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
    """Settings with at most `num_loops` loops: every smaller number, fewer for visible tokens, and tolerances."""
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
    Measures settings of `generate` on examples, and chooses the setting with the fewest FLOPs whose quality is at most
    `max_loss` below that of `num_loops` loops in every step. The best of many settings looks better than it is, so the
    settings are compared on every second example, and the cheapest has to keep the quality on the rest too, or else
    the next one is tried.

    Args:
        model: A [`LoopMDMForMaskedLM`] with `loop_update="replace"`.
        examples (`list[dict]`): At least 4 dicts of `input_ids`, the tokens with [MASK]s to fill in, and `target`, the
            right tokens, each `(length,)` int64.
        num_loops (`int`, *optional*, defaults to `config.num_loops`): The most loops, which quality is compared with.
        max_loss (`float`, defaults to 0.005): Largest loss of quality; 0.005 is half a percentage point.
        quality (`"exact"`, `"tokens"` or `"agreement"`, defaults to `"exact"`):
            Share of examples with every [MASK] filled in right; share of tokens that are right; or share of tokens
            that equal those of `num_loops` loops, which needs no right answers.
        settings (`list[dict]`, *optional*, defaults to [`budget_settings`]): Arguments of `generate` to try.
        batch_size (`int`, defaults to 32): Examples generated together.
        seed (`int`, defaults to 0): Seed of the drawn tokens, if `generate_arguments` ask for sampling.
        progress (*optional*): Called as `progress(done, total)` with numbers of settings.
        generate_arguments: Further arguments of `generate` for all settings.

    Raises:
        ValueError: Bad arguments, examples or settings, before anything is generated; or nothing is right with
            `num_loops` loops, so that no setting could lose quality.
    """
    num_loops = check_budget(model.config, len(examples), num_loops, max_loss, quality)
    settings = budget_settings(num_loops) if settings is None else settings
    _check(model, examples, settings, generate_arguments)
    first, second = (
        _Half(model, half, quality, num_loops, batch_size, seed, generate_arguments)
        for half in (examples[::2], examples[1::2])
    )
    if first.full.quality == second.full.quality == 0:
        others = {"exact": '"tokens" or "agreement"', "tokens": '"agreement"'}
        raise ValueError(
            f"The quality of {num_loops} loops is 0 on all {len(examples)} examples, so there is none to keep; "
            f"measure another one (`quality`, --quality: {others[quality]}), or give examples that the model can "
            "answer."
        )
    results, checks = [first.full], []
    for number, setting in enumerate(settings, start=1):
        results.append(first.measure(setting))
        if progress is not None:
            progress(number, len(settings))
    for best in sorted((result for result in results if result.loss <= max_loss), key=lambda result: result.flops):
        check = second.full if best is first.full else second.measure(best.arguments)
        checks.append(check)
        if check.loss <= max_loss:
            break
    how = {"max_loss": max_loss, "quality": quality, "examples": len(examples), "seed": seed, **generate_arguments}
    return LoopBudget(first.full, results, best, check, second.full, checks, how)


def check_budget(config: LoopMDMConfig, examples: int, num_loops: int | None, max_loss: float, quality: str) -> int:
    """Raises a ValueError for arguments of [`calibrate_loops`] that no weights make good. Returns the most loops."""
    num_loops = check_num_loops(config.num_loops if num_loops is None else num_loops)
    if config.loop_update != "replace":
        raise ValueError(
            'The loops of a model with `loop_update="damped"` are steps towards one result, so fewer loops are not a '
            "smaller budget; calibrate a model that was trained with loops."
        )
    if num_loops < 2:
        raise ValueError("`num_loops` is 1, which leaves nothing to save; give the most loops that may be spent.")
    if examples < 4:
        raise ValueError(f"There are {examples} examples; give at least 4, and hundreds to resolve 1 %.")
    if quality not in ("exact", "tokens", "agreement"):
        raise ValueError(f'`quality` is {quality!r}; choose "exact", "tokens" or "agreement".')
    if not 0 <= max_loss <= 1:
        raise ValueError(f"`max_loss` is {max_loss}; it is a share of the quality, 0 to 1 (0.005 is half a point).")
    return num_loops


def _check(
    model: torch.nn.Module,
    examples: Sequence[dict[str, torch.Tensor]],
    settings: Sequence[dict[str, Any]],
    generate_arguments: dict[str, Any],
) -> None:
    """Raises a ValueError for other bad arguments of [`calibrate_loops`], before the first of many runs."""
    for name in BUDGET_ARGUMENTS:
        if name in generate_arguments:
            raise ValueError(f"`{name}` is what is calibrated; leave it out.")
    for number, example in enumerate(examples):
        if not bool((example["input_ids"] == model.config.mask_token_id).any()):
            raise ValueError(f"Example {number} holds no [MASK]; there is nothing to fill in.")
        if example["input_ids"].shape != example["target"].shape:
            raise ValueError(
                f"Example {number} has {len(example['input_ids'])} tokens and a target of {len(example['target'])}; "
                "give one target for each token."
            )
    for setting in settings:
        if not set(setting) <= set(BUDGET_ARGUMENTS):
            raise ValueError(f"A setting is {setting}; it may hold {', '.join(BUDGET_ARGUMENTS)}.")
        model._prepare_generation_config(None, **_complete(setting), **generate_arguments)


def write_budget(folder: str | Path, arguments: dict[str, Any]) -> Path:
    """
    Makes `arguments`, the choice of [`calibrate_loops`], the defaults of the model or adapter in `folder`. Returns its
    generation_config.json, which is rewritten.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} does not hold a model: there is no config.json in it.")
    file = folder / "generation_config.json"
    config = read_generation_config(str(folder)) or LoopMDMGenerationConfig()
    config.update(**_complete(arguments))
    config.validate()
    write_atomically(file, config.to_json_string(use_diff=False))
    return file


def read_examples(path: str | Path, tokenizer: Any, mask_token_id: int) -> list[dict[str, torch.Tensor]]:
    """
    Examples for [`calibrate_loops`] from JSON lines `{"prompt": ..., "answer": ...}` (or the other names that
    `data.encode_answer` reads). The [MASK]s to fill in are the tokens of the answer, which follows the prompt. If the
    prompt contains mask tokens itself, these are filled in, and the answer is the complete text.
    """
    if Path(path).suffix == ".txt":
        raise ValueError(f'{path} is a text; give answers as JSON lines, {{"prompt": ..., "answer": ...}}.')
    if not Path(path).exists() or Path(path).is_dir():  # it may be a pipe
        raise ValueError(f"{path} is not a file.")
    examples = []
    for number, item in json_lines(Path(path)):
        where = f"{path}, line {number}"
        encoded = encode_answer(tokenizer, item, where)
        tokens, prompt_length = encoded["input_ids"], encoded["prompt_length"]
        if prompt_length == len(tokens):
            raise ValueError(f"{where} has an answer without tokens, so there is nothing to fill in.")
        if mask_token_id in tokens[:prompt_length]:
            input_ids = tokens[:prompt_length]
            # With the same special tokens as the prompt
            tokens = encode_given(tokenizer, first_text(item, ANSWER_NAMES, where), where)
            check_filled(input_ids, tokens, mask_token_id, where)
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
    """A setting with defaults for the arguments that it leaves out, so that no earlier calibration shows through."""
    return {name: setting.get(name, LoopMDMGenerationConfig.FIELDS[name][0]) for name in BUDGET_ARGUMENTS}


class _Half:
    """Half of the examples, with their results at the most loops."""

    def __init__(self, model, examples, quality, num_loops, batch_size, seed, generate_arguments):
        self.model, self.examples, self.quality = model, examples, quality
        self.batch_size, self.seed, self.generate_arguments = batch_size, seed, generate_arguments
        # Both are set by the first measurement, which the others are compared with.
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
        count = len(self.examples)
        sequences, cost = [None] * count, torch.zeros(len(COSTS), count, dtype=torch.float64)
        for numbers in batches_by_length([example["input_ids"] for example in self.examples], self.batch_size):
            rows = [self.examples[number]["input_ids"] for number in numbers]
            output, _ = generate_together(
                self.model,
                rows,
                # A generator per row, so that its tokens do not depend on the batch.
                generator=[torch.Generator().manual_seed(self.seed + number) for number in numbers],
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
