# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Special tokens and tokenizer files of a converted checkpoint."""

import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from ..data import turn_end, write_json
from ..weight_files import read_json
from .family import TOKEN_FIELDS, Family
from .source import Source

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.json",
)
# Names of mask tokens in tokenizers that do not declare theirs
MASK_TOKENS = ("<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[MASK]", "<mask>", "|<MASK>|")
NEW_MASK_TOKEN = "<|mask|>"
FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)


@dataclass
class SpecialTokens:
    """
    Ids of the special tokens. `mask_found` says where the id of [MASK] was found. `mask_token` is its name in the
    tokenizer, or None if there is no tokenizer, or it cannot have a token with that id.
    """

    mask_token_id: int
    mask_token: str | None
    mask_found: str
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    def ids(self) -> dict[str, Any]:
        """The ids, as arguments of a configuration."""
        return {name: value for name, value in asdict(self).items() if name.endswith("_id")}

    def ends(self) -> list[int]:
        """The ids of the end tokens."""
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    def add_end(self, index: int | None) -> None:
        """Adds the token that ends turns in the chat template to the end tokens."""
        ends = self.ends()
        if index not in (None, self.mask_token_id, *ends):
            self.eos_token_id = [*ends, index] if ends else index
            self.pad_token_id = index if self.pad_token_id is None else self.pad_token_id


class TokenizerFiles:
    """
    The files of a checkpoint's tokenizer, read as far as special tokens need it. `vocabulary` has all tokens that JSON
    files list, which for slow tokenizers may be only the added ones.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.settings:  # otherwise transformers does not read it
            for name, token in read_json(folder / "special_tokens_map.json").items():
                is_added = isinstance(token, dict) and "content" in token
                self.settings[name] = {**token, "__type": "AddedToken"} if is_added else token
        self.special = {name: _content(self.settings.get(name)) for name in (f[:-3] for f in TOKEN_FIELDS)}
        model = read_json(folder / "tokenizer.json")
        vocabulary = (model.get("model") or {}).get("vocab") or read_json(folder / "vocab.json")
        if not vocabulary and "auto_map" not in self.settings:  # code of its own may read vocab.txt otherwise
            vocabulary = _lines(folder)
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = (self.settings.get("added_tokens_decoder") or {}).items()
        self.added: dict[str, int] = {
            **read_json(folder / "added_tokens.json"),
            **{token["content"]: int(index) for index, token in added},
            **{token["content"]: token["id"] for token in model.get("added_tokens") or []},
        }
        # What transformers reads of added tokens where tokenizer_config.json has no `added_tokens_decoder`
        listed = self.settings.get("additional_special_tokens") or self.settings.get("extra_special_tokens") or []
        special = {*self.special.values(), *map(_content, listed)}
        self.decoder: dict[str, dict] = {
            str(index): {**FLAGS, "content": token, "normalized": token not in special, "special": token in special}
            for token, index in read_json(folder / "added_tokens.json").items()
        }
        for token in model.get("added_tokens") or []:
            self.decoder[str(token["id"])] = {name: value for name, value in token.items() if name != "id"}
        self.vocabulary: dict[str, int] = {**vocabulary, **self.added}
        wrong = next((token for token, index in self.vocabulary.items() if type(index) is not int), None)
        if wrong is not None:
            raise ValueError(
                f"The tokenizer in {folder} has {wrong!r} as token {self.vocabulary[wrong]!r}, no number."
            )
        # Whether the files list all tokens; the formats of slow tokenizers are not read.
        self.is_complete = bool(vocabulary)

    def __bool__(self) -> bool:
        return any((self.folder / name).is_file() for name in FILES)

    def __len__(self) -> int:
        """One more than the highest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """The chat template, or None."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self.settings.get(
            "chat_template", read_json(self.folder / "chat_template.json").get("chat_template")
        )
        if isinstance(template, list):  # several, by name
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return template

    def turn_end(self) -> str | None:
        """
        The token that the chat template puts behind an answer, as far as the files tell: an added token, or one
        written like `<this>`.
        """
        if self.chat_template is None:
            return None
        answer = "An answer."
        messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
        special = {name: token or "" for name, token in self.special.items()}
        try:
            rendered = render_jinja_template([messages], chat_template=self.chat_template, **special)[0][0]
        except Exception:  # a template can raise anything
            return None
        behind = rendered.rpartition(answer)[2].lstrip()
        names = [*self.added, *self.special.values(), *re.findall(r"^<[^<>\s]+>", behind)]
        fitting = [name for name in names if name in self.vocabulary and name and behind.startswith(name)]
        return max(fitting, key=len, default=None)

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self.vocabulary.get(token)

    def token_of(self, index: int) -> str | None:
        return next((token for token, at in self.vocabulary.items() if at == index), None)


def _lines(folder: Path) -> dict[str, int]:
    """BERT's vocabulary: a token a line."""
    file = folder / "vocab.txt"
    text = file.read_text(encoding="utf-8").removesuffix("\n") if file.is_file() else ""
    return {token: index for index, token in enumerate(text.split("\n"))} if text else {}


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
            "tokenizer; choose one with --mask-token-id."
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
        # The first free id of the tokenizer. Often the embedding has a row for it already.
        candidates.append((len(tokenizer) if tokenizer.is_complete else vocab_size, "new token"))
    index, found = next((candidate for candidate in candidates if candidate[0] is not None), (None, None))
    if index is None:
        raise ValueError(f"Neither config nor tokenizer of {source.name} names the mask token; give --mask-token-id.")
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
    The special tokens of the result. [MASK] is `mask_token_id`, or else what the config, the tokenizer or the family,
    in this order, name. A causal source without a mask token gets the first free id of its tokenizer.

    Args:
        source, family, tokenizer: The source, its family, and its tokenizer files.
        settings (`dict`): The arguments of the result's configuration, as the family gives them.
        mask_token_id (`int`, *optional*): Id of [MASK].

    Raises:
        ValueError: [MASK] is not known, or is contradicted, or an id is outside the vocabulary.
    """
    mask_token_id, found = _find_mask_token(source, family, tokenizer, settings, mask_token_id)
    vocab_size = settings["vocab_size"]

    def declared(name: str) -> list[int]:
        """The ids that the source's files name, without the mask token, which cannot have a second role."""
        files = {"generation_config.json": source.generation_config, "config.json": source.config}
        places = [(content.get(f"{name}_id"), file) for file, content in files.items()]
        places.append((tokenizer.id_of(tokenizer.special[name]), "the tokenizer"))
        value, place = next((entry for entry in places if entry[0] is not None), (None, None))
        if value is None or (name == "pad_token" and value == -1):  # -1 means none in early configs of Llama
            return []
        ids = value if isinstance(value, list) and name == "eos_token" else [value]
        for index in ids:
            if type(index) is not int or not 0 <= index < max(vocab_size, mask_token_id + 1):
                raise ValueError(
                    f"`{name}_id` is {value!r} in {place} of {source.name}, and the embedding has {vocab_size} rows; "
                    "name the right token there, or none (null)."
                )
        return [index for index in ids if index != mask_token_id]

    ends, pads, starts = declared("eos_token"), declared("pad_token"), declared("bos_token")
    return SpecialTokens(
        mask_token_id=mask_token_id,
        mask_token=tokenizer.token_of(mask_token_id) or (NEW_MASK_TOKEN if tokenizer else None),
        mask_found=found,
        pad_token_id=next(iter([*pads, *ends]), None),
        bos_token_id=next(iter(starts), None),
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
    )


def write_tokenizer(tokenizer: TokenizerFiles, tokens: SpecialTokens, output: Path) -> list[str]:
    """
    Copies the tokenizer's files, including its code and chat template, and declares the mask token in them. Returns
    the names of the files.
    """
    if not tokenizer:
        return []
    folder = tokenizer.folder
    found = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    found += [*folder.glob("tokenization*.py"), *(folder / name for name in FILES)]
    names = [str(path.relative_to(folder)) for path in found if path.is_file()]
    for name in names:
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, output / name)

    settings = dict(tokenizer.settings)
    if "tokenizer_class" not in settings and "auto_map" not in settings:
        # Without it, transformers looks the class up by the model's type, and does not know ours.
        guess = "PreTrainedTokenizerFast" if "tokenizer.json" in names else "GPT2Tokenizer"
        settings["tokenizer_class"] = read_json(folder / "config.json").get("tokenizer_class") or guess
    settings["mask_token"] = tokens.mask_token
    if tokens.mask_token is not None and tokenizer.id_of(tokens.mask_token) is None:
        new = {str(tokens.mask_token_id): {**FLAGS, "content": tokens.mask_token, "special": True}}
        settings["added_tokens_decoder"] = {**settings.get("added_tokens_decoder", tokenizer.decoder), **new}
    if tokens.mask_token is not None and _content(settings.get("pad_token")) == tokens.mask_token:
        settings["pad_token"] = None if tokens.pad_token_id is None else tokenizer.token_of(tokens.pad_token_id)
    write_json(output / "tokenizer_config.json", settings)
    return sorted({*names, "tokenizer_config.json"})


def load_tokenizer(
    source: Source, tokenizer: TokenizerFiles, tokens: SpecialTokens, trust_remote_code: bool = False
) -> Any:
    """
    The tokenizer of the result. None if there is none, or if it needs `trust_remote_code` and that is False. Raises a
    ValueError if it does not load.
    """
    if not tokenizer:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, tokens, Path(folder))
        try:
            loaded = AutoTokenizer.from_pretrained(
                folder, config=PreTrainedConfig(), trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).replace(folder, str(source.folder)).split()) or type(error).__name__
            if "trust_remote_code" in reason and not trust_remote_code:
                if tokens.mask_token == NEW_MASK_TOKEN and tokens.mask_token_id > len(tokenizer):
                    tokens.mask_token = None
                return None
            raise ValueError(
                f"The tokenizer of {source.name} does not load ({reason}); repair its files, install what it needs, "
                "or convert a copy of the checkpoint without them."
            ) from error
    if tokens.mask_token is None or loaded.mask_token_id == tokens.mask_token_id:
        return loaded
    if tokenizer.token_of(tokens.mask_token_id) is None:  # a tokenizer gives a new token its first free id
        tokens.mask_token = None
        return load_tokenizer(source, tokenizer, tokens, trust_remote_code)
    raise ValueError(
        f"The mask token is {tokens.mask_token_id}, {tokens.mask_token!r}, and the tokenizer of {source.name} takes "
        f"{loaded.mask_token_id} for it; repair its files, or choose another one with --mask-token-id."
    )


def find_turn_end(tokenizer: TokenizerFiles, loaded: Any) -> int | None:
    """The token that ends an answer in the chat template."""
    if loaded is None:
        return tokenizer.id_of(tokenizer.turn_end())
    end = turn_end(loaded)
    return None if end == loaded.unk_token_id else end


def token_ids(source: Source, tokenizer: TokenizerFiles, loaded: Any, vocab_size: int) -> set[int] | None:
    """
    The ids that have a token; None if they are not known. Raises a ValueError if one of them has no row in the
    embedding, which has `vocab_size`.
    """
    if loaded is None and not tokenizer.is_complete:
        return None
    ids = set((tokenizer.vocabulary if loaded is None else loaded.get_vocab()).values())
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"The tokenizer of {source.name} has the token {max(ids)}, and the embedding {vocab_size} rows, so they "
            "do not belong together; put the right tokenizer beside the weights."
        )
    return ids


def ids_without_token(ids: set[int] | None, tokens: SpecialTokens, vocab_size: int) -> list[int]:
    """The ids without a token in the tokenizer, which `generate` must not produce; none if there is no tokenizer."""
    if ids is None:
        return []
    known = {*ids, *tokens.ends(), tokens.mask_token_id, tokens.pad_token_id, tokens.bos_token_id}
    return [index for index in range(vocab_size) if index not in known]
