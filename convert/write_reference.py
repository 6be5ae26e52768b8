# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Stores logits of a checkpoint as its own code computes them, for `loopmdm convert ... --verify-against FILE.npz`.

Run it where the checkpoint's remote code still works (often an older transformers); it needs torch, numpy,
transformers and nothing of this package, so copy this one file there:

    python write_reference.py GSAI-ML/LLaDA-8B-Instruct reference.npz

The model runs in float32 on the CPU (an 8B one needs 32 GB; --device cuda for a GPU), without padding, on tokens drawn
from a seed. Models that need more than `model(input_ids)` to attend to the whole sequence are not for this script.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the checkpoint")
    parser.add_argument("output", help="file to write (.npz)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=32, help="tokens per row (default: 32)")
    parser.add_argument("--max-token", type=int, help="draw tokens below this id (default: the whole vocabulary)")
    parser.add_argument("--auto-class", default="AutoModel", help="e.g. AutoModelForMaskedLM (default: AutoModel)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import numpy
    import torch
    import transformers

    auto_class = getattr(transformers, args.auto_class)
    # The name that every version of transformers knows
    model = auto_class.from_pretrained(args.model, trust_remote_code=True, torch_dtype=torch.float32)
    model = model.float().to(args.device).eval()
    vocab_size = args.max_token or model.config.vocab_size
    generator = torch.Generator().manual_seed(args.seed)
    input_ids = torch.randint(vocab_size, (args.batch_size, args.length), generator=generator)
    with torch.no_grad():
        output = model(input_ids.to(args.device))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    numpy.savez(args.output, input_ids=input_ids.numpy(), logits=logits.float().cpu().numpy())
    print(f"{args.output}: logits {tuple(logits.shape)} of {args.model}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
