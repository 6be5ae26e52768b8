# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Special tokens and tokenizer files of a converted checkpoint."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .family import Family
from .source import Source, read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.json",
)
# What mask tokens are called in the tokenizers that have one without saying so
MASK_TOKENS = ("<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[MASK]", "<mask>", "|<MASK>|")
NEW_MASK_TOKEN = "<|mask|>"


@dataclass
class SpecialTokens:
    """
    Ids of the special tokens. `mask_found` says where that of [MASK] is from; `mask_token` is what the tokenizer calls
    it, None where there is no tokenizer, or one that can have no token of that id.
    """

    mask_token_id: int
    mask_token: str | None
    mask_found: str
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    def ids(self) -> dict[str, Any]:
        """The ids that a configuration has."""
        return {name: value for name, value in asdict(self).items() if name.endswith("_id")}


class TokenizerFiles:
    """
    The tokenizer beside a checkpoint, as far as special tokens go. `vocabulary` is all that its files list in JSON,
    which for slow tokenizers can be the added tokens alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json")
        named = read_json(folder / "special_tokens_map.json")
        self.special = {name: _content(self.settings.get(name, named.get(name))) for name in _TOKEN_NAMES}
        model = read_json(folder / "tokenizer.json")
        vocabulary = (model.get("model") or {}).get("vocab") or read_json(folder / "vocab.json")
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = (self.settings.get("added_tokens_decoder") or {}).items()
        self.vocabulary: dict[str, int] = {
            **vocabulary,
            **read_json(folder / "added_tokens.json"),
            **{token["content"]: int(index) for index, token in added},
            **{token["content"]: token["id"] for token in model.get("added_tokens", [])},
        }

    def __bool__(self) -> bool:
        return any((self.folder / name).is_file() for name in FILES)

    def __len__(self) -> int:
        """One more than the highest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self.vocabulary.get(token)

    def token_of(self, index: int) -> str | None:
        return next((token for token, at in self.vocabulary.items() if at == index), None)


_TOKEN_NAMES = ("mask_token", "pad_token", "bos_token", "eos_token")


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _find_mask_token(
    source: Source, family: Family, tokenizer: TokenizerFiles, settings: dict[str, Any], argument: int | None
) -> tuple[int, str]:
    """The id of [MASK], and where it was found."""
    declared, named = source.config.get("mask_token_id"), tokenizer.id_of(tokenizer.special["mask_token"])
    if argument is None and None not in (declared, named) and declared != named:
        raise ValueError(
            f"The mask token is {declared} in config.json and {named} ({tokenizer.special['mask_token']!r}) in the "
            "tokenizer; say which with --mask-token-id."
        )
    candidates = [
        (argument, "argument"),
        (declared, "config.json"),
        (named, "tokenizer"),
        *((tokenizer.id_of(token), "tokenizer (by name)") for token in MASK_TOKENS),
        (settings.get("mask_token_id"), f"family {family.name}"),
    ]
    vocab_size = settings["vocab_size"]
    if family.from_causal:
        # The tokenizer's first free id: often a row that the embedding has already, otherwise a new one.
        candidates.append((len(tokenizer) or vocab_size, "new token"))
    index, found = next((candidate for candidate in candidates if candidate[0] is not None), (None, None))
    if index is None:
        raise ValueError(
            f"Neither the config nor the tokenizer of {source.name} names its mask token; give its id with "
            "--mask-token-id."
        )
    if found == "new token" and index > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows, so they do not belong "
            "together; give --mask-token-id."
        )
    if not 0 <= index < vocab_size + family.from_causal:
        raise ValueError(
            f"The mask token is {index} ({found}), outside the {vocab_size} rows of the embedding; give another with "
            "--mask-token-id."
        )
    return index, found


def find_special_tokens(
    source: Source,
    family: Family,
    tokenizer: TokenizerFiles,
    settings: dict[str, Any],
    mask_token_id: int | None = None,
) -> SpecialTokens:
    """
    The special tokens of the result, whose configuration the family gives as `settings`. [MASK] is `mask_token_id`, or
    what the first of these names: the config, the tokenizer, the family. A causal source that has none gets the first
    id that its tokenizer leaves free.

    Raises a ValueError where [MASK] cannot be determined, is contradicted, or lies outside the vocabulary.
    """
    mask_token_id, found = _find_mask_token(source, family, tokenizer, settings, mask_token_id)

    def declared(name: str) -> Any:
        for content in (source.generation_config, source.config):
            if content.get(f"{name}_id") is not None:
                return content[f"{name}_id"]
        return tokenizer.id_of(tokenizer.special[name])

    def usable(index: int | None) -> bool:
        return index is not None and index != mask_token_id and 0 <= index < settings["vocab_size"]

    ends = declared("eos_token")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if usable(end)]
    pad, start = declared("pad_token"), declared("bos_token")
    return SpecialTokens(
        mask_token_id=mask_token_id,
        # A tokenizer gives a new token the first free id, so only that one can be added.
        mask_token=tokenizer.token_of(mask_token_id)
        or (NEW_MASK_TOKEN if tokenizer and mask_token_id == len(tokenizer) else None),
        mask_found=found,
        pad_token_id=pad if usable(pad) else next(iter(ends), None),
        bos_token_id=start if usable(start) else None,
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
    )


def write_tokenizer(source: Source, tokenizer: TokenizerFiles, tokens: SpecialTokens, output: Path) -> list[str]:
    """
    Copies the tokenizer's files (its own code and chat template included) and tells it what its mask token is. Returns
    the names of the files.
    """
    if not tokenizer:
        return []
    templates = [path.name for path in source.folder.glob("*.jinja")]
    code = [path.name for path in source.folder.glob("tokenization*.py")]
    names = [name for name in (*FILES, *templates, *code) if (source.folder / name).is_file()]
    for name in names:
        shutil.copyfile(source.folder / name, output / name)

    settings = dict(tokenizer.settings)
    if "tokenizer_class" not in settings and "auto_map" not in settings:
        # Otherwise the class is looked up by the model's type, and ours is not in that table.
        is_fast = (source.folder / "tokenizer.json").is_file()
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if is_fast else "GPT2Tokenizer"
    settings["mask_token"] = tokens.mask_token
    if tokens.mask_token is not None and tokenizer.id_of(tokens.mask_token) is None:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        added = settings.setdefault("added_tokens_decoder", {})
        added[str(tokens.mask_token_id)] = {"content": tokens.mask_token, "special": True, **flags}
    if _content(settings.get("pad_token")) == tokens.mask_token:
        settings["pad_token"] = None if tokens.pad_token_id is None else tokenizer.token_of(tokens.pad_token_id)
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return sorted({*names, "tokenizer_config.json"})
