# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The conversion: a plan that is checked against every tensor's shape before anything is written, then tensor after
tensor from the source into shards, then the folder's new name all at once.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_loopmdm import LoopMDMConfig
from ..generation_utils import LoopMDMGenerationConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .families import choose_family
from .family import Family, Recipe
from .loop_window import calibrate, calibration_record, default_window, plot_calibration
from .source import Source, explained, open_source
from .tokenizer import SpecialTokens, TokenizerFiles, find_special_tokens, write_tokenizer
from .verify import verify_with_file, verify_with_transformers

# What a folder needs besides its weights, in bytes, by a generous guess
SMALL_FILES = 64 * 2**20


@dataclass
class Plan:
    """
    Everything about a conversion that can be known before it is done.

    Args:
        source, family, config, tokens: What is converted, as what, into what.
        recipes (`dict[str, Recipe]`): How every stored tensor of the result is made.
        ignored (`list[str]`): Tensors of the source that are not needed.
        copies (`dict[str, str]`): Tensors of the source that must equal another one, whose place they take nowhere.
        shapes (`dict[str, torch.Tensor]`): The result's tensors, without data, in their dtype.
        window_chosen (`str`): How the loop's place was decided.
    """

    source: Source
    family: Family
    config: LoopMDMConfig
    tokens: SpecialTokens
    tokenizer: TokenizerFiles
    generation: LoopMDMGenerationConfig
    recipes: dict[str, Recipe]
    ignored: list[str]
    copies: dict[str, str]
    shapes: dict[str, torch.Tensor]
    window_chosen: str

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.shapes.values())

    def record(self) -> dict[str, Any]:
        """What `conversion.json` keeps of the plan."""
        config = self.config
        layers = dict.fromkeys(("head", "mid", "tail"), 0)
        others = 0
        for name, tensor in self.shapes.items():
            match = re.match(r"model\.layers\.(\d+)\.", name)
            if match is None:
                others += tensor.numel()
            else:
                index = int(match[1])
                part = "head" if index < config.loop_start else "mid" if index < config.loop_end else "tail"
                layers[part] += tensor.numel()
        return {
            "source": self.source.name,
            "family": self.family.name,
            "dtype": str(config.dtype).removeprefix("torch."),
            "parameters": {"total": sum(layers.values()) + others, **layers, "embeddings_and_head": others},
            "layers": config.num_hidden_layers,
            "loop": {
                "loop_start": config.loop_start,
                "loop_end": config.loop_end,
                "num_loops": config.num_loops,
                "max_train_loops": config.max_train_loops,
                "loop_update": config.loop_update,
                "chosen": self.window_chosen,
            },
            "special_tokens": asdict(self.tokens),
            "tensors": {
                target: {"from": list(recipe.sources), "how": recipe.how} for target, recipe in self.recipes.items()
            },
            "ignored": self.ignored,
            "copies": self.copies,
            "versions": {name: importlib.metadata.version(name) for name in ("loopmdm", "torch", "transformers")},
        }


def plan_conversion(
    source: Source,
    *,
    family: str | None = None,
    from_causal: bool = False,
    shift_logits: bool | None = None,
    loop_start: int | None = None,
    loop_end: int | None = None,
    num_loops: int = 1,
    max_train_loops: int | None = None,
    loop_update: str | None = None,
    mask_token_id: int | None = None,
    dtype: str | None = None,
) -> Plan:
    """See [`convert_checkpoint`]. Reads no weights."""
    try:
        chosen = choose_family(source, family, from_causal)
        source = chosen.prepare(source)
        settings = chosen.config(source)
        tokenizer = TokenizerFiles(source.folder)
        tokens = find_special_tokens(source, chosen, tokenizer, settings["vocab_size"], mask_token_id)
    except (TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        # What these files hold can be anything; they are read as if they were right.
        raise ValueError(
            f"The config or tokenizer of {source.name} has a value that makes no sense ({type(error).__name__}: "
            f"{error})."
        ) from error
    if shift_logits is not None:
        if not chosen.from_causal:
            raise ValueError("`shift_logits` is for --from-causal; the other families know theirs.")
        settings["shift_logits"] = shift_logits
    recipes = chosen.recipes(source, settings)
    if chosen.from_causal:
        recipes = _with_mask_row(recipes, settings, tokens)

    window_chosen = "by hand"
    loop_update = loop_update or ("damped" if num_loops > 1 else "replace")
    if loop_start is None and loop_end is None:
        loop_start, loop_end = default_window(settings["num_hidden_layers"], loop_update)
        window_chosen = "by depth"
    elif loop_start is None or loop_end is None:
        raise ValueError("`loop_start` and `loop_end` go together; give both, or none for the default by depth.")
    try:
        config = LoopMDMConfig(
            **settings,
            loop_start=loop_start,
            loop_end=loop_end,
            num_loops=num_loops,
            max_train_loops=LoopMDMConfig.max_train_loops if max_train_loops is None else max_train_loops,
            loop_update=loop_update,
            mask_token_id=tokens.mask_token_id,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            dtype=_result_dtype(source, recipes, dtype),
            architectures=["LoopMDMForMaskedLM"],
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    ignored, copies = _account_for_all(source, chosen, recipes, config)
    generation = LoopMDMGenerationConfig(
        **{
            "pad_token_id": tokens.pad_token_id,
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
            **chosen.generation(source),
        }
    )
    return Plan(
        source=source,
        family=chosen,
        config=config,
        tokens=tokens,
        tokenizer=tokenizer,
        generation=generation,
        recipes=recipes,
        ignored=ignored,
        copies=copies,
        shapes=_result_shapes(source, recipes, config),
        window_chosen=window_chosen,
    )


def _with_mask_row(recipes: dict[str, Recipe], settings: dict[str, Any], tokens: SpecialTokens) -> dict[str, Recipe]:
    """Gives the new mask token the mean of all other rows, in embedding and head, in a new row where it needs one."""
    index, vocab_size = tokens.mask_token_id, settings["vocab_size"]
    settings["vocab_size"] = max(vocab_size, index + 1)

    def with_row(tensor: torch.Tensor) -> torch.Tensor:
        mean = tensor[:index].mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat((tensor[:index], mean, tensor[index + 1 :]))

    changed = dict(recipes)
    for target in ("model.embed_tokens.weight", "lm_head.weight"):
        if target in recipes and tokens.mask_found == "new token":
            changed[target] = Recipe(recipes[target].sources, f"row {index} = mean of the rows before it", with_row)
    return changed


def _result_dtype(source: Source, recipes: dict[str, Recipe], dtype: str | None) -> str:
    if dtype is not None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` is {dtype!r}; it must be float32, bfloat16 or float16 (default: the source's).")
        return dtype
    result = None
    for name in {name for recipe in recipes.values() for name in recipe.sources if name in source}:
        stored = source.tensors[name].dtype
        result = stored if result is None else torch.promote_types(result, stored)
    return str(result or torch.float32).removeprefix("torch.")


def _account_for_all(
    source: Source, family: Family, recipes: dict[str, Recipe], config: LoopMDMConfig
) -> tuple[list[str], dict[str, str]]:
    """
    The source's tensors that no recipe uses: those that may be ignored, and copies of others. Raises on the rest.
    """
    used = {name for recipe in recipes.values() for name in recipe.sources}
    missing = sorted(used - source.tensors.keys())
    if missing:
        raise ValueError(
            f"{source.name} lacks {len(missing)} tensors of a {family.name} checkpoint: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}."
        )
    copies = {}
    if config.tie_word_embeddings:
        embedding = recipes["model.embed_tokens.weight"].sources[0]
        copies = {name: embedding for name in family.tied_names if name in source and name not in used}
    left = sorted(source.tensors.keys() - used - copies.keys())
    ignored = [name for name in left if any(re.fullmatch(pattern, name) for pattern in family.ignored)]
    surplus = sorted(set(left) - set(ignored))
    if surplus:
        raise ValueError(
            f"{source.name} has {len(surplus)} tensors that a {family.name} checkpoint has not: "
            f"{', '.join(surplus[:3])}{', ...' if len(surplus) > 3 else ''}; is it another format, or quantised, or "
            f"an adapter?"
        )
    return ignored, copies


def _result_shapes(source: Source, recipes: dict[str, Recipe], config: LoopMDMConfig) -> dict[str, torch.Tensor]:
    """Runs all recipes on tensors without data and compares with what the model needs."""
    with torch.device("meta"):
        model = LoopMDMForMaskedLM(config)
    needed = dict(model.state_dict())
    if config.tie_word_embeddings:
        del needed["lm_head.weight"]
    missing, unknown = sorted(needed.keys() - recipes.keys()), sorted(recipes.keys() - needed.keys())
    if missing or unknown:
        what = f"has nothing for {missing[0]!r}" if missing else f"has no place for what would be {unknown[0]!r}"
        raise ValueError(f"{source.name} {what}; its layers differ from each other, or it is incomplete.")
    shapes = {}
    for target in needed:  # the model's order
        recipe = recipes[target]
        try:
            inputs = [torch.empty(source.shape(name), device="meta") for name in recipe.sources]
            result = tuple(recipe.compute(*inputs).shape)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{', '.join(recipe.sources)} of {source.name} cannot become {target!r}: {error}"
            ) from error
        if result != tuple(needed[target].shape):
            raise ValueError(
                f"{recipe.sources[0]!r} of {source.name} has shape {source.shape(recipe.sources[0])}, which gives "
                f"{result} for {target!r} ({recipe.how}) where {tuple(needed[target].shape)} is needed."
            )
        shapes[target] = torch.empty(result, dtype=config.dtype, device="meta")
    return shapes


def write_weights(
    plan: Plan,
    folder: Path,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """
    Writes the plan's tensors as safetensors, one shard in memory at a time. `progress` is called with the bytes done
    and to do. Raises a ValueError for NaN and infinite values.
    """
    for name, original in plan.copies.items():
        if not torch.equal(plan.source.read(name), plan.source.read(original)):
            raise ValueError(
                f"{name!r} of {plan.source.name} differs from {original!r}, but its config ties the two "
                "(`tie_word_embeddings`, `weight_tying`); one of them is wrong."
            )
    shards = split_torch_state_dict_into_shards(plan.shapes, max_shard_size=max_shard_size)
    done = 0
    for file, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = _make(plan, name)
            done += shard[name].numel() * shard[name].element_size()
            progress(done, plan.num_bytes)
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())  # as any other file, not for this user alone
    if shards.is_sharded:
        total = {"total_parameters": sum(tensor.numel() for tensor in plan.shapes.values()), **shards.metadata}
        index = {"metadata": total, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _make(plan: Plan, name: str) -> torch.Tensor:
    recipe, dtype = plan.recipes[name], plan.config.dtype
    with explained(f"{', '.join(recipe.sources)} of {plan.source.name}"):
        inputs = [plan.source.read(source) for source in recipe.sources]
        result = recipe.compute(*inputs)
        made = torch.empty(result.shape, dtype=dtype).copy_(result)
    del inputs, result
    if made.numel() > 0 and not all(value.isfinite() for value in made.aminmax()):
        raise ValueError(
            f"{', '.join(recipe.sources)} of {plan.source.name} holds NaN or infinite values, or values that "
            f"{str(dtype).removeprefix('torch.')} cannot hold; the checkpoint is damaged, or try --dtype float32."
        )
    return made


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    A folder to fill under another name, which becomes `output` at the end. If anything goes wrong before, nothing is
    left; if the process is killed, a hidden folder without config.json.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already; name a new folder, or remove it.")
    created = [parent for parent in output.absolute().parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{output} cannot be made, as {error.filename} is a file; name another folder.") from error
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if output.exists():
            raise ValueError(f"{output} has come into being during the conversion; remove it and convert again.")
        os.rename(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _check_shard_size(size: int | str) -> None:
    match = re.fullmatch(r"(\d+(\.\d+)?) *([KMGT]?B)?", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"`max_shard_size` is {size!r}; give a number of bytes, or one with a unit such as 5GB.")


def check_space(plan: Plan, output: Path) -> None:
    """Raises a ValueError where the disk has no room for the result."""
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(existing).free, plan.num_bytes + SMALL_FILES
    if free < needed:
        raise ValueError(
            f"{output} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; make room, choose "
            "another disk, or a smaller --dtype."
        )


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    num_loops: int = 1,
    loop_start: int | None = None,
    loop_end: int | None = None,
    loop_update: str | None = None,
    max_train_loops: int | None = None,
    family: str | None = None,
    from_causal: bool = False,
    shift_logits: bool | None = None,
    mask_token_id: int | None = None,
    sigma: float | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    calibrate_on: str | Path | None = None,
    calibration_width: int | None = None,
    calibration_sequences: int = 16,
    calibration_length: int = 256,
    verify: bool = False,
    verify_against: str | Path | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    on_plan: Callable[[Plan], Any] = lambda plan: None,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> dict[str, Any]:
    """
    Turns a non-looped checkpoint into a LoopMDM that computes the same at `num_loops=1`.

    The result is an initialisation: with more loops it has to be trained first (`loop_update="replace"`), or loops in
    damped sub-steps (`"damped"`), which change little, and gain little, without training.

    Args:
        source: A folder, a file of weights, or an id on the Hugging Face Hub.
        output: The folder to write, which must not exist. It appears complete or not at all.
        num_loops (`int`, defaults to 1): Loops of an inference pass that names none.
        loop_start, loop_end (`int`, *optional*): mid is `layers[loop_start:loop_end]`. By default by depth, see
            [`~loopmdm.convert.default_window`].
        loop_update (`"replace"` or `"damped"`, *optional*): By default `"damped"` where `num_loops` is above 1, as the
            loops of the result are not trained, and `"replace"`, for training, otherwise.
        max_train_loops (`int`, defaults to 12): S_max of a later training.
        family (`str`, *optional*): Name of the source's family, where its files do not tell.
        from_causal (`bool`): Take a causal language model as a start for adaptation to diffusion.
        shift_logits (`bool`, defaults to `True`): With `from_causal`: the state of position i - 1 goes on predicting
            token i.
        mask_token_id (`int`, *optional*): Id of [MASK], where neither config, tokenizer nor family tells.
        sigma (`float`, *optional*): Noise level at which a time-conditioned source (UDLM) is converted.
        dtype (`"float32"`, `"bfloat16"`, `"float16"`, *optional*): By default the source's.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights, and the memory that is used.
        calibrate_on (*optional*): A text file. The loop is put where its NELBO is lowest at 2 loops (or `num_loops`
            where that is more). The table is in the record and, with a picture, in the folder.
        calibration_width (`int`, *optional*): Layers of a candidate window; by default those of the default window.
        calibration_sequences, calibration_length (`int`, default to 16 and 256): How much of the text is used.
        verify (`bool`): Compare with the source's weights in transformers' own class, in float32.
        verify_against (*optional*): Compare with logits stored by `convert/write_reference.py`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        allow_pickle (`bool`): Read pickled weights where there are no others; only tensors are admitted.
        on_plan (`Callable`): Called with the [`Plan`] before anything is written.
        progress (`Callable`): Called with what is being done, and how much is done of how much.

    Returns:
        `dict`: What is also written to `conversion.json`: the mapping of tensors, parameter counts, the loop, and what
        calibration and verification found.

    Raises:
        `ValueError`: For anything about the source or the arguments that does not fit. Nothing is left then.
    """
    output = Path(output).expanduser()
    if output.exists():
        raise ValueError(f"{output} exists already; name a new folder, or remove it.")
    if calibrate_on is not None and (loop_start is not None or loop_end is not None):
        raise ValueError("Calibration chooses the loop's place; leave out `loop_start` and `loop_end`.")
    if calibrate_on is None and calibration_width is not None:
        raise ValueError("The calibration's width is given without a text; add --calibrate FILE, or leave it out.")
    _check_shard_size(max_shard_size)
    for path in (calibrate_on, verify_against):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{path} is no file.")
    opened = open_source(source, revision, allow_pickle, sigma)
    plan = plan_conversion(
        opened,
        family=family,
        from_causal=from_causal,
        shift_logits=shift_logits,
        loop_start=loop_start,
        loop_end=loop_end,
        num_loops=num_loops,
        max_train_loops=max_train_loops,
        loop_update=loop_update,
        mask_token_id=mask_token_id,
        dtype=dtype,
    )
    if calibrate_on is not None and not plan.tokenizer:
        raise ValueError(f"{opened.name} has no tokenizer, which calibration needs to read {calibrate_on}.")
    if verify and plan.family.reference is None:
        raise ValueError(
            f"transformers has no class of its own for {plan.family.name}; make reference logits where the source "
            "still runs (convert/write_reference.py says how) and give --verify-against FILE.npz."
        )
    check_space(plan, output)
    on_plan(plan)
    with new_folder(output) as folder:
        write_weights(plan, folder, max_shard_size, lambda done, total: progress("writing", done, total))
        files = write_tokenizer(opened, plan.tokenizer, plan.tokens, folder)
        plan.generation.save_pretrained(folder)
        _write_code(plan, folder)
        record = {}
        if calibrate_on is not None:
            record["calibration"] = _calibrate(
                plan,
                folder,
                Path(calibrate_on),
                calibration_width,
                calibration_sequences,
                calibration_length,
                progress,
            )
        record = {**plan.record(), "tokenizer_files": files, **record}
        if verify or verify_against is not None:
            model = _load(plan, folder, torch.float32)
            if verify:
                record["verification"] = verify_with_transformers(model, opened, plan.family)
            if verify_against is not None:
                record["verification_against_file"] = verify_with_file(model, verify_against)
            del model
        (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
        # Last of all: a folder without it does not load.
        plan.config.save_pretrained(folder)
    return record


def _write_code(plan: Plan, folder: Path) -> None:
    """The modeling files, so that the folder loads with `trust_remote_code=True` alone."""
    with torch.device("meta"):
        model = LoopMDMForMaskedLM(plan.config)
    custom_object_save(model, folder)


def _load(plan: Plan, folder: Path, dtype: torch.dtype | None = None) -> LoopMDMForMaskedLM:
    """The model just written; its configuration is still in memory alone."""
    return LoopMDMForMaskedLM.from_pretrained(folder, config=plan.config, dtype=dtype or plan.config.dtype).eval()


def _calibrate(
    plan: Plan,
    folder: Path,
    text: Path,
    width: int | None,
    num_sequences: int,
    length: int,
    progress: Callable[[str, int, int], Any],
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    config = plan.config
    width = config.num_mid_layers if width is None else width
    if not 1 <= width <= config.num_hidden_layers:
        raise ValueError(f"The width of the loop is {width}; the model has {config.num_hidden_layers} layers.")
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is no text in UTF-8: {error}") from error
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(length, config.max_position_embeddings)
    available = len(ids) // length
    if available == 0:
        raise ValueError(f"{text} has {len(ids)} tokens; calibration needs at least {length}.")
    # Spread over the whole text
    starts = [
        index * (len(ids) - length) // max(1, min(available, num_sequences) - 1)
        for index in range(min(available, num_sequences))
    ]
    input_ids = torch.tensor([ids[start : start + length] for start in starts])
    num_loops = max(2, config.num_loops)
    model = _load(plan, folder)
    scores, plain = calibrate(
        model, input_ids, width, num_loops, progress=lambda done, total: progress("calibrating", done, total)
    )
    record = calibration_record(scores, plain, num_loops)
    record |= {"text": text.name, "sequences": len(starts), "length": length, "loop_update": config.loop_update}
    config.loop_start, config.loop_end = record["best"]
    plan.window_chosen = f"by calibration on {text.name}"
    (folder / "calibration.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_calibration(record, folder / "calibration.png")
    return record
