# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The YAML file that describes a training run."""

import difflib
import inspect
import json
import re
import typing
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.dataclasses import dataclass
from transformers import TrainingArguments

from ..configuration_loopmdm import LoopMDMConfig
from .loop_schedules import LOOP_SCHEDULES

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rows = Annotated[int, Field(gt=0, le=2**15)]
Level = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
# Arguments of `TrainingArguments` whose range it does not check itself, or whose type is too wide
LIMITS: dict[str, Any] = {
    "max_steps": Annotated[int, Field(gt=0, lt=2**31)] | Literal[-1],
    "num_train_epochs": PositiveFloat,
    **dict.fromkeys(
        ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"], Rows
    ),
    **dict.fromkeys(["learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"], NonNegativeFloat),
    **dict.fromkeys(["warmup_steps", "eval_delay"], NonNegativeFloat),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], Share),
    **dict.fromkeys(["logging_steps", "save_steps"], PositiveFloat),
    **dict.fromkeys(["eval_steps", "neftune_noise_alpha"], PositiveFloat | None),
    "save_total_limit": PositiveInt | None,
    "dataloader_num_workers": NonNegativeInt,
    "seed": Seed,
    "data_seed": Seed | None,
    "fsdp": bool | str | list[str] | None,
    **dict.fromkeys(["log_level", "log_level_replica"], Level),
    "parallelism_config": None,  # an object, which YAML cannot hold
}
TRAINER = inspect.signature(TrainingArguments).parameters
OF_EVALUATION = ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size")
# Arguments of `TrainingArguments` that this command would ignore
IDLE = {
    **dict.fromkeys(["data_seed", "length_column_name"], "`seed` decides the order of the data"),
    **dict.fromkeys(["eval_accumulation_steps", "eval_do_concat_batches"], "the evaluation is the NELBO"),
    **dict.fromkeys(["eval_use_gather_object", "batch_eval_metrics"], "the evaluation is the NELBO"),
    **dict.fromkeys(["bf16_full_eval", "fp16_full_eval", "include_for_metrics"], "the evaluation is the NELBO"),
}
LORA = {"layers": str, "r": PositiveInt, "lora_alpha": PositiveFloat, "lora_dropout": Share}
COLLATOR = {"mask_ratio": tuple[float, float], "complementary": bool, "learn_padding": bool}


@dataclass(config=STRICT)
class TrainConfig:
    """
    A training run. Every key of the YAML file is one of these; unknown ones raise.

    Args:
        output (`str`): Folder of the trained model. Its subfolder `checkpoints` holds the checkpoints.
        data (`str` or `list[str]`): Text files (`.txt`), files with one JSON object per line (`.jsonl`), `.parquet`
            files, or the name of a data set that the `datasets` library loads.
        model (`str`, *optional*): Folder or Hub id to start from. By default a fresh model is made from
            `model_config`.
        model_config (`dict`): Arguments of [`LoopMDMConfig`]: all of a fresh model's, or the changes to `model`'s
            (`loop_update`, `max_train_loops`, ...). `num_loops` is lowered to S_max if it is not given.
        tokenizer (`str`, *optional*, defaults to `model`): Folder or Hub id.
        task (`"pretrain"` or `"answers"`, defaults to `"pretrain"`): Learn texts, or answers given prompts
            (`prompt` and `answer`, or `messages`).
        eval_data (`str` or `list[str]`, *optional*): As `data`. The NELBO on it is the evaluation.
        dataset (`dict`): Further arguments of `datasets.load_dataset` (`name`, `split`, `streaming`, ...).
        text_column (`str`, defaults to `"text"`): The field of JSON objects and data sets that holds the text.
        documents (`"blank_line"`, `"line"` or `"file"`, defaults to `"blank_line"`): What separates documents in text
            files.
        sequence_length (`int`, *optional*, defaults to `max_position_embeddings`, at most 1024): Tokens per row.
        isolate_documents (`bool`, defaults to `False`): Keep documents in one row from seeing each other.
        skip_long (`bool`, defaults to `False`): Skip examples longer than a row instead of raising an error.
        loops (`dict`): `schedule` (`"uniform"` by default), `max_loops` (S_max, by default `max_train_loops`), and
            options of the schedule.
        gradient_loops (`int`, *optional*), checkpoint_loops (`bool`), ema_decay (`float`, *optional*): As in
            [`LoopMDMTrainer`].
        collator (`dict`): `mask_ratio`, `complementary`, `learn_padding` of [`MaskedDiffusionCollator`].
        lora (`dict`, *optional*): Train an adapter: `layers`, and arguments of peft's `LoraConfig`.
        optimizer (`"adamw"` or `"muon"`, defaults to `"adamw"`).
        dtype (`"float32"`, `"bfloat16"` or `"float16"`, defaults to `"float32"`): Dtype of the weights; float16 only
            with `lora`. `trainer: {bf16: true}` computes in bfloat16 with weights in float32.
        eval_loops (`list[int]`, defaults to 1, 2, 4, 8 below S_max, and S_max): Numbers of loops of the evaluation.
        eval_sequences (`int`, defaults to 64): Number of rows of `eval_data` to use: spread evenly, or the first ones
            of a stream.
        eval_samples (`int`, defaults to 8): Masks per row; even.
        eval_texts (`int`, defaults to 0): Number of rows of `eval_data` that each evaluation also continues, by 32
            sampled tokens at each number of loops. The texts are printed and logged. Not with FSDP.
        trainer (`dict`): Arguments of transformers' `TrainingArguments`.
    """

    output: Text
    data: Text | Annotated[list[Text], Field(min_length=1)]
    model: Text | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Text | None = None
    task: Literal["pretrain", "answers"] = "pretrain"
    eval_data: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    documents: Literal["blank_line", "line", "file"] = "blank_line"
    sequence_length: PositiveInt | None = None
    isolate_documents: bool = False
    skip_long: bool = False
    loops: dict[str, Any] = field(default_factory=dict)
    gradient_loops: PositiveInt | None = None
    checkpoint_loops: bool = False
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    collator: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    eval_loops: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    eval_sequences: PositiveInt = 64
    eval_samples: PositiveInt = 8
    eval_texts: NonNegativeInt = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.model is None and not self.model_config:
            raise ValueError("There is neither a `model` to start from nor a `model_config` for a new one; give one.")
        if self.model is None and self.tokenizer is None:
            raise ValueError("`tokenizer` is missing; a fresh model needs one (a folder, or an id on the Hub).")
        if self.dtype == "float16" and self.lora is None:
            raise ValueError(
                "`dtype` is 'float16', in which small updates of the weights are lost; use float32 with `trainer: "
                "{fp16: true}`, which computes in float16, or bfloat16."
            )
        self._check_effect()
        for name, value in self.trainer.items():
            if name.endswith("_strategy") and value is False:
                self.trainer[name] = "no"  # YAML reads `no` as False
        check_section("model_config", self.model_config, inspect.get_annotations(LoopMDMConfig))
        check_section("trainer", self.trainer, {**_arguments_of(TrainingArguments), **LIMITS})
        check_section("collator", self.collator, COLLATOR)
        name = self.loops.get("schedule", "uniform")
        if not isinstance(name, str) or name not in LOOP_SCHEDULES:
            raise ValueError(f"The loop schedule is {name!r}; choose one of {', '.join(LOOP_SCHEDULES)}.")
        options = _arguments_of(LOOP_SCHEDULES[name])
        check_section("loops", self.loops, {**options, "schedule": str, "max_loops": PositiveInt | None})
        if self.lora is not None:
            try:
                from peft import LoraConfig
            except ImportError as error:
                raise ValueError("`lora` needs peft; `pip install peft`.") from error
            check_section("lora", self.lora, {**_arguments_of(LoraConfig), **LORA})

    def _check_effect(self) -> None:
        """Raises a ValueError where a setting would be ignored."""
        paths = [*listed(self.data), *listed(self.eval_data)]
        texts, answers = [path.endswith(".txt") for path in paths], self.task == "answers"
        evaluation = ("eval_loops", "eval_sequences", "eval_samples", "eval_texts")
        for name, works, why in (
            *((name, self.eval_data is not None, "there is no `eval_data`") for name in evaluation),
            ("text_column", not answers, "`task: answers` reads prompts and answers"),
            ("text_column", not all(texts), "`data` holds .txt files alone"),
            ("isolate_documents", not answers, "`task: answers` gives every row one example"),
            ("skip_long", answers, "`task: pretrain` continues a long text in the next row"),
            ("documents", any(texts), "`data` holds no .txt files"),
            ("dataset", not all(path.endswith((".txt", ".jsonl")) for path in paths), "`data` names files"),
        ):
            if not works and getattr(self, name) not in ({}, TrainConfig.__dataclass_fields__[name].default):
                raise ValueError(f"`{name}` has no effect, as {why}; leave it out.")
        for name, value in self.trainer.items():
            if self.optimizer == "muon" and name.startswith(("adam_", "optim")):
                raise ValueError(f"`trainer.{name}` has no effect with `optimizer: muon`; leave one of them out.")
            is_asked = name in TRAINER and value not in (None, False, [], TRAINER[name].default)
            if self.eval_data is None and name in OF_EVALUATION and is_asked:
                raise ValueError(f"`trainer.{name}` has no effect, as there is no `eval_data`; leave it out.")
            if name.startswith(("push_to_hub", "hub_")) and is_asked:
                raise ValueError(
                    f"`trainer.{name}` would publish checkpoints that nothing has checked; leave it out, and publish "
                    "the trained model with `loopmdm push`."
                )
            if name in IDLE and is_asked:
                raise ValueError(f"`trainer.{name}` has no effect, as {IDLE[name]}; leave it out.")
            if name in ("eval_strategy", "logging_strategy", "save_strategy") and value == "epoch":
                steps = name.replace("strategy", "steps")
                raise ValueError(
                    f"`trainer.{name}` is 'epoch', which would be once, at the end: to the Trainer, a run of any "
                    f"length is one epoch. Use steps (`{steps}: 100`, or `{steps}: 0.1` for ten times in a run)."
                )


def listed(names: str | list[str] | None) -> list[str]:
    """The names in `data` or `eval_data`, of which one may stand alone."""
    return [names] if isinstance(names, str) else names or []


def _arguments_of(takes: Any) -> dict[str, Any]:
    """The arguments of a class and their types."""
    hints = typing.get_type_hints(takes if "__annotations__" in vars(takes) else takes.__init__)
    return {name: hints.get(name, Any) for name in inspect.signature(takes).parameters}


def check_section(name: str, values: dict[str, Any], types: dict[str, Any]) -> None:
    """Raises a ValueError if a key of `values` is not in `types`, or its value is not of that type."""
    settings: dict[str, Any] = {one: (hint, None) for one, hint in types.items()}
    schema = create_model(name, __config__=ConfigDict(**STRICT, protected_namespaces=()), **settings)
    _validate(schema, values, f"`{name}`", settings, f"{name}.")


def _validate(schema: Any, values: dict[str, Any], where: str, known: Iterable[str], prefix: str = "") -> Any:
    """Reads values by a schema. The ValueError names every wrong value, and says what it should be."""
    text = json.dumps(values, default=str)
    try:
        return TypeAdapter(schema).validate_json(text)
    except ValidationError as error:
        reasons: dict[str, list[str]] = {}
        for one in error.errors():
            path: list[str] = []
            value = json.loads(text)
            for part in one["loc"]:
                try:
                    value = value[part]
                except (TypeError, LookupError):  # the member of a union that was tried, or what is missing
                    continue
                path.append(str(part))
            place, what = f"`{prefix}{'.'.join(path)}` is {value!r}; it should ", one["msg"]
            if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                close = difflib.get_close_matches(path[-1], list(known), n=1)
                place = f"{where} has a key `{path[-1]}`, which does not exist"
                what = f"; `{close[0]}`?" if close else ""
            elif one["type"] in ("missing", "missing_argument") and isinstance(one["loc"][-1], str):
                place, what = f"{where} has no `{one['loc'][-1]}`", ""
            elif one["type"] == "value_error":
                place, what = "", str(one["ctx"]["error"]).removesuffix(".")
            what = re.sub(r"^\w+ should ", "", what).partition(" after validation")[0]
            what = what.replace("Field required", "have a value more").replace("a valid array", "a list")
            reasons.setdefault(place, []).append(what.replace("an object", "names and values"))
        found = ". ".join(place + " or ".join(dict.fromkeys(whats)) for place, whats in reasons.items())
        raise ValueError(found if found.endswith("?") else f"{found}.") from error


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number, and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the block at line {node.start_mark.line + 1} has `{twice}` twice; remove one of them")
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        value = float(node.value.replace("_", ""))
        return int(value) if value.is_integer() else value  # for `max_steps: 1e4`


_Loader.add_implicit_resolver("number", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_constructor("number", _Loader.construct_number)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """
    Reads a run from a YAML file.

    Args:
        path: The file, in UTF-8.
        overrides: Texts `key=value` that change it, with dots into nested keys (`trainer.max_steps=100`) and values in
            YAML.

    Raises:
        ValueError: The file cannot be read, or keys and values are wrong; it names all of them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    values = _read_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold names and values.")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not `key=value`.")
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:  # a block may be left empty in the file
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"{override!r}: `{parent}` holds a single value, which has no {last!r}.")
        place[last] = _read_yaml(value, repr(override))
    return _validate(TrainConfig, values, str(path), inspect.signature(TrainConfig).parameters)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
