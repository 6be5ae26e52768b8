# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Special tokens and tokenizer files of a converted checkpoint."""

import json
import shutil
from dataclasses import dataclass
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


class TokenizerFiles:
    """The tokenizer beside a checkpoint, as far as special tokens go. `vocabulary` is that of the added tokens."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json")
        named = read_json(folder / "special_tokens_map.json")
        self.special = {name: _content(self.settings.get(name, named.get(name))) for name in _TOKEN_NAMES}
        self.vocabulary = dict(read_json(folder / "added_tokens.json").items())
        for index, token in (self.settings.get("added_tokens_decoder") or {}).items():
            self.vocabulary[token["content"]] = int(index)
        model = read_json(folder / "tokenizer.json")
        for token in model.get("added_tokens", []):
            self.vocabulary[token["content"]] = token["id"]
        vocabulary = (model.get("model") or {}).get("vocab") or read_json(folder / "vocab.json")
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        self.vocabulary = {**vocabulary, **self.vocabulary}

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


def find_special_tokens(
    source: Source, family: Family, tokenizer: TokenizerFiles, vocab_size: int, mask_token_id: int | None = None
) -> SpecialTokens:
    """
    The special tokens of the result. [MASK] is `mask_token_id`, or what the first of these names: the config, the
    tokenizer, the family. A causal source that has none gets the first id that its tokenizer leaves free.

    Raises a ValueError where [MASK] cannot be determined, is contradicted, or lies outside the vocabulary.
    """
    found = "argument"
    mask_token = tokenizer.special["mask_token"]
    from_tokenizer = tokenizer.id_of(mask_token)
    if mask_token_id is None:
        mask_token_id, found = source.config.get("mask_token_id"), "config.json"
        if None not in (mask_token_id, from_tokenizer) and mask_token_id != from_tokenizer:
            raise ValueError(
                f"The mask token is {mask_token_id} in config.json and {from_tokenizer} ({mask_token!r}) in the "
                "tokenizer; say which with --mask-token-id."
            )
    if mask_token_id is None:
        mask_token_id, found = from_tokenizer, "tokenizer"
    if mask_token_id is None:
        mask_token = next((token for token in MASK_TOKENS if token in tokenizer.vocabulary), None)
        mask_token_id, found = tokenizer.id_of(mask_token), "tokenizer (by name)"
    if mask_token_id is None:
        mask_token_id, found = family.mask_token_id(source), f"family {family.name}"
    if mask_token_id is None and family.from_causal:
        # The tokenizer's first free id: often a row that the embedding has already, otherwise a new one.
        mask_token_id, found = (len(tokenizer) or vocab_size), "new token"
        if mask_token_id > vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows, so they do not "
                "belong together; give --mask-token-id."
            )
    if mask_token_id is None:
        raise ValueError(
            f"The mask token of {source.name} is named neither in its config nor in its tokenizer; give its id with "
            "--mask-token-id."
        )
    grows = family.from_causal and mask_token_id == vocab_size
    if not 0 <= mask_token_id < vocab_size + grows:
        raise ValueError(
            f"The mask token is {mask_token_id} ({found}), outside the {vocab_size} rows of the embedding; give "
            "another with --mask-token-id."
        )

    def token_id(name: str) -> Any:
        for settings in (source.generation_config, source.config):
            if settings.get(f"{name}_id") is not None:
                return settings[f"{name}_id"]
        return tokenizer.id_of(tokenizer.special[name])

    eos_token_id = token_id("eos_token")
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    ends = [end for end in ends if end is not None and end != mask_token_id and 0 <= end < vocab_size]
    pad_token_id, bos_token_id = token_id("pad_token"), token_id("bos_token")
    if pad_token_id is None or pad_token_id == mask_token_id or not 0 <= pad_token_id < vocab_size:
        pad_token_id = ends[0] if ends else None
    if bos_token_id is not None and not 0 <= bos_token_id < vocab_size:
        bos_token_id = None
    return SpecialTokens(
        mask_token_id=mask_token_id,
        # A tokenizer gives a new token the first free id, so only that one can be added.
        mask_token=tokenizer.token_of(mask_token_id)
        or (NEW_MASK_TOKEN if tokenizer and mask_token_id == len(tokenizer) else None),
        mask_found=found,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
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
        added = settings.setdefault("added_tokens_decoder", {})
        added[str(tokens.mask_token_id)] = {
            "content": tokens.mask_token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    if _content(settings.get("pad_token")) == tokens.mask_token:
        settings["pad_token"] = None if tokens.pad_token_id is None else tokenizer.token_of(tokens.pad_token_id)
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return sorted({*names, "tokenizer_config.json"})
