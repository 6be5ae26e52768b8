# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Builds the page: `make web` runs `npm ci` in web/, and then `python -m loopmdm.web.build`.

The site is `web/dist`: the files of `web/page`, onnxruntime-web from `web/node_modules`, and the bundled model. Any
server of static files can serve it, and it loads nothing from elsewhere.
"""

import argparse
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

from .export import export_board_model
from .serve import SITE

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web"
# The builds of onnxruntime-web for WebAssembly, and for WebAssembly and WebGPU
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
MODEL_LIMIT = 8_000_000  # bytes of the three graphs together


def build(model: str, site: Path = SITE) -> dict[str, Any]:
    """
    Builds the site, complete or not at all, and returns the description of the model.

    Args:
        model (`str`): A clone of the repository, whose examples give samples and measured solve rates, or any other
            model of boards.
        site (`Path`, defaults to `web/dist`): Folder to write; replaced if it exists.

    Raises:
        ValueError: onnxruntime-web is not installed, or the model cannot be shown.
    """
    if not RUNTIME.is_dir():
        raise ValueError(f"{RUNTIME} is missing; run `npm ci` in {HERE} (`make web` does).")
    temporary = site.with_name(f".{site.name}.{os.getpid()}")
    try:
        shutil.copytree(HERE / "page", temporary)
        (temporary / "runtime").mkdir()
        for name in RUNTIME_FILES:
            shutil.copy(RUNTIME / "dist" / name, temporary / "runtime")
        version = json.loads((RUNTIME / "package.json").read_text(encoding="utf-8"))["version"]
        (temporary / "runtime" / "VERSION").write_text(f"onnxruntime-web {version} (MIT)\n", encoding="utf-8")
        description = export_board_model(model, temporary / "model", *example_data(model))
        size = sum(description["bytes"].values())
        if size > MODEL_LIMIT:
            raise ValueError(f"The model takes {size / 1e6:.1f} MB as int8; a page loads at most 8 MB.")
        shutil.rmtree(site, ignore_errors=True)
        os.rename(temporary, site)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def example_data(model: str) -> tuple[list[str] | None, dict[str, Any] | None]:
    """Puzzles and measured solve rates from the examples of a clone; None for each that is missing."""
    folder = Path(model) / "examples" / "sudoku"
    generator, measured = folder / "puzzles.py", folder / "results.json"
    puzzles = None
    if generator.is_file():
        generate = runpy.run_path(str(generator))["generate_puzzles"]
        puzzles = [puzzle for puzzle, _ in generate(48, 7, 36, 72) + generate(24, 7, None, None)]
    return puzzles, json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent), help="folder of the model (default: the bundled one)")
    parser.add_argument("--output", type=Path, default=SITE, help="folder of the site (default: web/dist)")
    args = parser.parse_args()
    description = build(args.model, args.output)
    size = sum(description["bytes"].values())
    print(f"{args.output}: {description['weights']} weights, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
