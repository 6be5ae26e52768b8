# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
How much memory and time does a conversion take, beside a plain copy of the files? On a checkpoint of LLaDA 8B's shapes
(16 GB in bfloat16; three times that is needed on disk). This makes the figures of docs/convert.md:

    python benchmarks/convert.py --folder /tmp/bench --repeats 5

The peak is that of the process's resident memory (VmHWM) over what it holds after its imports. The copy and the
conversion read and write the same disk; each runs --repeats times, in turn, and the median counts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import begin, llada_config, llada_shapes, make_parser, write_result
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

CHILD = """
import json, sys, time
from pathlib import Path
from loopmdm.convert import convert_checkpoint
import loopmdm.convert.engine

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
base, start = status("VmRSS"), time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="2GB")
print(json.dumps({"seconds": time.perf_counter() - start, "base": base, "peak": status("VmHWM")}))
"""


def build(folder: Path, layers: int) -> None:
    """A checkpoint with the names, shapes and shards of LLaDA 8B. The numbers are a tile of noise, repeated."""
    sizes = {"width": 4096, "mlp_width": 12288, "vocab_size": 126464, "layers": layers}
    shapes = llada_shapes(**sizes)
    tile = (0.02 * torch.randn(2**20 + 7)).bfloat16()
    meta = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size="3GB")
    folder.mkdir(parents=True)
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            count = meta[name].numel()
            shard[name] = tile.repeat(-(-count // len(tile)))[:count].view(meta[name].shape)
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = {"mask_token_id": 126336, "pad_token_id": 126081, "eos_token_id": 126081}
    config = llada_config(**sizes, heads=32, rope_theta=500000.0, **tokens)
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; removed at the end")
    parser.add_argument("--layers", type=int, default=32, help="layers of the checkpoint (default: 32, as LLaDA 8B)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    begin(args)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    source, result = args.folder / "source", args.folder / "result"
    if not source.exists():
        build(source, args.layers)
    runs, copies = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        shutil.copytree(source, result)
        copies.append(time.perf_counter() - start)
        shutil.rmtree(result)
        child = [sys.executable, "-c", CHILD, str(source), str(result)]
        runs.append(json.loads(subprocess.check_output(child, text=True, env=environment)))
        sizes = [file.stat().st_size for file in result.glob("*.safetensors")]
        shutil.rmtree(result)
    shutil.rmtree(args.folder)

    largest_tensor = 126464 * 4096 * 2
    record = {
        "bytes": sum(sizes),
        "largest_shard": max(sizes),
        "largest_tensor": largest_tensor,
        "peak_over_base": max(run["peak"] - run["base"] for run in runs),
        "limit": max(sizes) + largest_tensor,
        "copy_seconds": copies,
        "convert_seconds": [run["seconds"] for run in runs],
        "time_over_copy": statistics.median(run["seconds"] for run in runs) / statistics.median(copies),
    }
    print(json.dumps(record, indent=2))
    write_result(args, **record)


if __name__ == "__main__":
    main()
