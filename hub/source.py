# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The licence and origin that a model's card names, for the cards of models that are made from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..data import locate

LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# The files of a repository that cards of derived models need
CARD_FILES = ("README.md", *LICENSES)
# Longer cards and licences are not read.
MAX_CARD = 2**20
# Metadata that derived models inherit
KEPT = ("license", "license_name", "license_link", "language")


@dataclass
class SourceCard:
    """
    The card of the model that another one is made from.

    Args:
        hub_id (`str` or `list[str]`, *optional*): Its id on the Hub, or the base models that its card names.
        metadata (`dict`): What derived models inherit: `license`, `license_name`, `license_link`, `language`.
        text (`str`, *optional*): The whole README.md.
        license_files (`list[Path]`): LICENSE, NOTICE and similar files.
    """

    hub_id: str | list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    license_files: list[Path] = field(default_factory=list)


def read_source_card(name: str | Path, folder: str | Path | None = None) -> SourceCard:
    """
    Reads the card of a model. If it is missing or damaged, or the Hub cannot be reached, the result is empty.

    Args:
        name: A folder, a file in one, or an id on the Hub.
        folder (*optional*): The folder that the files of a Hub id have been downloaded to.
    """
    place = Path(folder or name).expanduser()
    is_id = _is_id(str(name))
    if folder is None and is_id:
        try:
            place = Path(snapshot_download(str(name), allow_patterns=list(CARD_FILES)))
        except Exception:  # of the network, the file system, the Hub
            return SourceCard(hub_id=str(name))
    place = place.parent if place.is_file() else place
    if not place.is_dir():
        return SourceCard(hub_id=str(name) if is_id else None)
    text = _read(place / "README.md")
    metadata = {} if text is None else read_metadata(text)
    kept = {key: metadata[key] for key in KEPT if _is_plain(metadata.get(key))}
    files = sorted({path for pattern in LICENSES for path in place.glob(pattern) if _read(path) is not None})
    link = kept.get("license_link")
    if is_id and isinstance(link, str) and "://" not in link and link not in [path.name for path in files]:
        kept["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    base = metadata.get("base_model")
    # peft and the Trainer write folders there too, which mean nothing elsewhere.
    is_known = _is_plain(base) and all(map(_is_id, [base] if isinstance(base, str) else base))
    base = base if is_known else None
    return SourceCard(str(name) if is_id else base, kept, text, files)


def card_data(text: str) -> ModelCardData:
    """The metadata of a card, unchanged. Raises a ValueError, TypeError or YAMLError if they are damaged."""
    return ModelCard(text, ignore_metadata_errors=True).data if REGEX_YAML_BLOCK.search(text) else ModelCardData()


def read_metadata(text: str) -> dict[str, Any]:
    """As [`card_data`]; empty if they are damaged."""
    try:
        return card_data(text).to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}


def _is_id(name: str) -> bool:
    try:
        return not Path(locate(name, "a card")).is_dir()
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) and 0 < len(one) < 1000 for one in values)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= MAX_CARD else None
    except (OSError, UnicodeDecodeError):
        return None
