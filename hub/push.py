# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Publishing a model's folder on the Hub: checks, the choice of files, and the upload."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..data import adapter_base
from .card import CARD, write_card
from .source import card_data

# Files that nobody needs to load the model: checkpoints, states of optimisers, pickles of trainers, hidden files
IGNORED = [
    *(".*", "*/.*", "__pycache__/*", "*.pyc"),
    *("checkpoints/*", "checkpoint-*", "optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin"),
]
LICENSE_FIX = (
    f"write it into {CARD}, between the lines of `---` at the top (`license: apache-2.0`, or the licence of the model "
    "and data it is made from; https://huggingface.co/docs/hub/repositories-licenses lists them)"
)
# This runs as if the package were not installed, so that only the folder defines the model.
_LOAD = """
import json, os, sys
sys.modules["loopmdm"] = None
import torch
from transformers import AutoModel as Auto, AutoTokenizer
folder = sys.argv[1]
files = os.listdir(folder)
if "config.json" not in files:
    from peft import AutoPeftModelForCausalLM as Auto
model = Auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
config = model.config
tokens = torch.full((1, min(8, config.max_position_embeddings)), config.mask_token_id)
with torch.no_grad():
    logits = model(input_ids=tokens, num_loops=2).logits.float()
logits[..., config.mask_token_id] = 0
if not logits.isfinite().all():
    raise SystemExit("ValueError: its logits are not finite")
if "tokenizer_config.json" in files:
    size = max(AutoTokenizer.from_pretrained(folder, trust_remote_code=True).get_vocab().values()) + 1
    if size > config.vocab_size:
        raise SystemExit(f"ValueError: its tokenizer has {size} tokens, and the model {config.vocab_size}")
print(json.dumps({"class": type(model).__name__, "parameters": model.num_parameters()}))
"""


@dataclass
class Upload:
    """
    A folder that may go to the Hub.

    Args:
        folder (`Path`), repo (`str`): The folder, and the id of the repository.
        files (`dict[str, int]`): Bytes of the files to upload, by path.
        license (`str` or `list[str]`): The licence that the card names.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    license: str | list[str]


def check_upload(folder: str | Path, repo: str) -> Upload:
    """
    Checks a model's folder without loading the model and without changing anything.

    Raises:
        ValueError: It does not hold a model, its card does not name a licence, or the base model of its adapter is a
            local folder.
    """
    folder = Path(folder).expanduser()
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ValueError(f"{repo} is not an id on the Hub; give `owner/name`.") from None
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} does not hold a model: there is no config.json in it.")
    if (folder / "export.json").is_file():
        raise ValueError(
            f"{folder} was written by `loopmdm export`, for engines whose models `push` cannot check; `hf upload "
            f"{repo} {folder}` publishes it."
        )
    license = _check_card(folder)
    base = adapter_base(str(folder))
    if base is not None and Path(base).exists():
        raise ValueError(
            f"{folder} is an adapter of {base}, a folder that nobody else has; push that first, and write its id into "
            "adapter_config.json (`base_model_name_or_path`)."
        )
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path: (folder / path).stat().st_size for path in filter_repo_objects(paths, ignore_patterns=IGNORED)}
    return Upload(folder, repo, files, license)


def _check_card(folder: Path) -> str | list[str]:
    """The licence that the card names. Raises a ValueError if there is none, or it is incomplete."""
    file = folder / CARD
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {CARD}; `loopmdm.hub.write_card({str(folder)!r})` writes one, to which you add the "
            "licence."
        )
    try:
        data = card_data(file.read_text(encoding="utf-8"))
    except Exception as error:  # of YAML, of the encoding
        raise ValueError(f"The metadata of {file} cannot be read: {' '.join(str(error).split())}") from error
    license = data.license
    if not license or not isinstance(license, str | list):
        raise ValueError(f"{file} names no licence, without which nobody may use the model; {LICENSE_FIX}.")
    if license == "other" and not data.license_name:
        raise ValueError(f"The licence in {file} is `other`; name it with `license_name` and `license_link`.")
    link = data.license_link
    if isinstance(link, str) and "://" not in link and not (folder / link).is_file():
        raise ValueError(f"{file} links its licence to {link}, which is not in {folder}; put it there.")
    return license


def load_in_fresh_process(folder: str | Path) -> dict[str, Any]:
    """
    Loads a folder in a new process that does not see this package, as a user of the Hub does, and runs a forward pass.

    Returns:
        `dict`: The `class` and the number of `parameters`.

    Raises:
        ValueError: It does not load, its logits are not finite, or its tokenizer does not fit.
    """
    folder = Path(folder).expanduser().absolute()
    with tempfile.TemporaryDirectory() as place:  # a fresh cache, without code of an earlier state of the folder
        result = subprocess.run(
            [sys.executable, "-c", _LOAD, str(folder)],
            cwd=place,
            env={**os.environ, "HF_MODULES_CACHE": place, "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the process ended with status {result.returncode}"
        raise ValueError(f"{folder} does not load in a process without the package loopmdm: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def upload(checked: Upload, private: bool = False, message: str | None = None) -> str:
    """
    Creates the repository if it does not exist, and uploads the folder in one commit. A card that [`write_card`] may
    write is rewritten first, with the repository's id as the model's name.

    Args:
        checked ([`Upload`]): The result of [`check_upload`].
        private (`bool`, defaults to `False`): Make the repository visible only to people whom you admit.
        message (`str`, *optional*, defaults to "Upload model"): The commit message.

    Returns:
        `str`: The URL of the model.

    Raises:
        ValueError: Nobody is logged in, the Hub refuses, or the repository is public already.
    """
    if get_token() is None:
        raise ValueError("You are not logged in to the Hub; `hf auth login`, or set HF_TOKEN to a token that writes.")
    api = HfApi()
    try:
        repo = api.create_repo(checked.repo, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise ValueError(f"{repo} exists already, and is public; leave out --private, or name another repository.")
        write_card(checked.folder, repo)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=checked.folder,
            commit_message=message or "Upload model",
            ignore_patterns=IGNORED,
        )
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The Hub refuses {checked.repo} ({reason}); does `hf auth whoami` own it?") from error
    return str(commit.repo_url)
