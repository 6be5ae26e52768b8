# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
How few loops are enough: settings of `generate` (fewer loops, schedules over the denoising steps, adaptive loops) are
tried on examples, and the cheapest that keeps the quality is chosen, by measurement rather than by hand.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration_loopmdm import check_num_loops
from ..generation_utils import LoopMDMGenerationConfig

TOLERANCES = (0.05, 0.1, 0.15, 0.2, 0.3)
# What a setting may change, and what is taken back to its default where it does not.
BUDGET_ARGUMENTS = ("num_loops", "loop_schedule", "loop_tolerance", "loop_exit", "visible_loops")


@dataclass
class BudgetResult:
    """
    One setting, measured.

    Args:
        arguments (`dict`): Arguments of `generate`.
        quality, standard_error (`float`): Mean over the examples, from 0 to 1, and its standard error.
        loss, loss_standard_error (`float`): Quality below that of the most loops, on the same examples (paired).
        mean_loops (`float`): Loops of a position in a forward pass.
        forward_passes, token_layer_passes, flops (`float`): Mean per example.
    """

    arguments: dict[str, Any]
    quality: float
    standard_error: float
    loss: float
    loss_standard_error: float
    mean_loops: float
    forward_passes: float
    token_layer_passes: float
    flops: float


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
        settings (`dict`): How it was measured.
    """

    full: BudgetResult
    results: list[BudgetResult]
    best: BudgetResult
    check: BudgetResult
    check_full: BudgetResult
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def budget_settings(num_loops: int, num_steps: int | None = None) -> list[dict[str, Any]]:
    """
    Settings that spend at most `num_loops`: every smaller number, fewer loops for visible tokens, schedules over the
    steps (where there is more than one), and tolerances for rows and for tokens.
    """
    settings: list[dict[str, Any]] = [{"num_loops": loops} for loops in range(1, num_loops)]
    settings += [
        {"num_loops": loops, "visible_loops": visible}
        for loops in sorted({num_loops, max(2, round(num_loops * 2 / 3))})
        for visible in range(1, min(loops, 4))
    ]
    if num_loops > 1 and (num_steps is None or num_steps > 1):
        settings += [
            {"num_loops": loops, "loop_schedule": schedule}
            for schedule in ("early", "middle", "late")
            for loops in sorted({max(2, round(num_loops * share)) for share in (0.5, 1.0)})
        ]
    if num_loops > 1:
        settings += [
            {"num_loops": num_loops, "loop_tolerance": tolerance, "loop_exit": exit_}
            for exit_ in ("row", "token")
            for tolerance in TOLERANCES
        ]
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
    `max_loss` below that of `num_loops` loops in every step. The choice is made on every other example; the rest check
    it, since the best of many settings looks better than it is on what it was chosen on.

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
    if settings is None:
        settings = budget_settings(num_loops, generate_arguments.get("max_denoising_steps"))
    # Bad arguments are found before the first of many runs.
    for setting in settings:
        model._prepare_generation_config(None, **_complete(setting), **generate_arguments)

    halves = [list(examples[::2]), list(examples[1::2])]
    fulls = [_run(model, half, {"num_loops": num_loops}, batch_size, seed, generate_arguments) for half in halves]
    scores = [
        _score(half, full, full.sequences, quality, model.config.mask_token_id)
        for half, full in zip(halves, fulls, strict=True)
    ]

    def measure(setting: dict[str, Any], part: int) -> BudgetResult:
        run = _run(model, halves[part], setting, batch_size, seed, generate_arguments)
        score = _score(halves[part], run, fulls[part].sequences, quality, model.config.mask_token_id)
        return _summarize(setting, run, score, scores[part])

    full, check_full = (
        _summarize({"num_loops": num_loops}, run, score, score) for run, score in zip(fulls, scores, strict=True)
    )
    results = [full]
    for number, setting in enumerate(settings):
        results.append(measure(setting, 0))
        if progress is not None:
            progress(number + 1, len(settings))
    best = min((result for result in results if result.loss <= max_loss), key=lambda result: result.flops)
    check = check_full if best is full else measure(best.arguments, 1)
    how = {"max_loss": max_loss, "quality": quality, "examples": len(examples), "seed": seed, **generate_arguments}
    return LoopBudget(full, results, best, check, check_full, how)


def write_budget(folder: str | Path, arguments: dict[str, Any]) -> Path:
    """
    Makes `arguments`, as [`calibrate_loops`] chose them, the defaults of the model in `folder`: writes its
    generation_config.json anew. Returns the file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; there is no config.json in it.")
    file = folder / "generation_config.json"
    config = LoopMDMGenerationConfig.from_pretrained(folder) if file.is_file() else LoopMDMGenerationConfig()
    config.update(**_complete(arguments))
    config.validate()
    part = folder / ".generation_config.json.part"
    part.write_text(config.to_json_string(use_diff=False))
    json.loads(part.read_text())
    os.replace(part, file)
    return file


def read_examples(path: str | Path, tokenizer: Any, mask_token_id: int) -> list[dict[str, torch.Tensor]]:
    """
    Examples for [`calibrate_loops`] from JSON lines `{"prompt": ..., "answer": ...}` (or the other names that
    `training.encode_answer` takes): the answer's tokens are to be filled in behind the prompt. Where the prompt holds
    mask tokens itself, the answer is the whole text and they are filled in.
    """
    from ..training.data import encode_answer, read_jsonl  # training imports this package

    examples = []
    for number, item in enumerate(read_jsonl(path)):
        where = f"Example {number} of {path}"
        encoded = encode_answer(tokenizer, item, where)
        tokens, prompt_length = encoded["input_ids"], encoded["prompt_length"]
        if mask_token_id in tokens[:prompt_length]:
            input_ids = tokens[:prompt_length]
            tokens = tokens[prompt_length:][: len(input_ids)]
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
        words.append(f"{arguments.get('loop_exit', 'row')} {arguments['loop_tolerance']:g}")
    if "loop_schedule" in arguments:
        words.append(arguments["loop_schedule"])
    return ", ".join(words)


def _complete(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting with defaults for what it leaves open, so that nothing of an earlier calibration remains."""
    return {name: setting.get(name, LoopMDMGenerationConfig.DEFAULTS[name]) for name in BUDGET_ARGUMENTS}


@dataclass
class _Run:
    sequences: list[torch.Tensor]
    cost: dict[str, torch.Tensor]


def _run(
    model: torch.nn.Module,
    examples: list[dict[str, torch.Tensor]],
    setting: dict[str, Any],
    batch_size: int,
    seed: int,
    generate_arguments: dict[str, Any],
) -> _Run:
    """Fills in all examples; those of similar length go together, padded on the left."""
    order = sorted(range(len(examples)), key=lambda number: len(examples[number]["input_ids"]))
    sequences: list[torch.Tensor | None] = [None] * len(examples)
    names = ("forward_passes", "token_passes", "token_loops", "token_layer_passes", "flops")
    cost = {name: torch.zeros(len(examples), dtype=torch.float64) for name in names}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [examples[number]["input_ids"] for number in numbers]
        width = max(len(row) for row in rows)
        pad = model.config.pad_token_id or 0
        input_ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
        real = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=real.to(model.device),
            # One for each row, so that a row's tokens do not depend on its batch.
            generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
            return_dict_in_generate=True,
            **{"max_new_tokens": 0, **_complete(setting), **generate_arguments},
        )
        for number, row, tokens in zip(numbers, rows, output.sequences.cpu(), strict=True):
            sequences[number] = tokens[len(tokens) - len(row) :]
        for name in names:
            cost[name][numbers] = output[name].double().cpu()
    return _Run(sequences, cost)


def _score(
    examples: list[dict[str, torch.Tensor]], run: _Run, full: list[torch.Tensor], quality: str, mask_token_id: int
) -> torch.Tensor:
    """Quality of every example, `(num_examples,)` float64."""
    values = []
    for example, tokens, reference in zip(examples, run.sequences, full, strict=True):
        blank = example["input_ids"] == mask_token_id
        target = reference if quality == "agreement" else example["target"]
        right = (tokens[blank] == target[blank]).double()
        values.append(right.prod() if quality == "exact" else right.mean())
    return torch.stack(values)


def _summarize(setting: dict[str, Any], run: _Run, score: torch.Tensor, full: torch.Tensor) -> BudgetResult:
    root = math.sqrt(len(score))
    loss = full - score
    return BudgetResult(
        arguments=dict(setting),
        quality=score.mean().item(),
        standard_error=score.std().item() / root,
        loss=loss.mean().item(),
        loss_standard_error=loss.std().item() / root,
        mean_loops=(run.cost["token_loops"].sum() / run.cost["token_passes"].sum()).item(),
        forward_passes=run.cost["forward_passes"].mean().item(),
        token_layer_passes=run.cost["token_layer_passes"].mean().item(),
        flops=run.cost["flops"].mean().item(),
    )
