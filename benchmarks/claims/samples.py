# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
How well do trained arms of a study of text write, by denoising steps and loops? The perplexity of their samples under
a judge, a causal language model that is trained here on the arms' own training rows, and their entropy.
docs/results/text.md has the table, and studies.md the whole command, which is run for all arms as here for two:

    python benchmarks/claims/samples.py --task language-small --train-text train.txt --work /tmp/claims \\
        --results benchmarks/results/claims language-small/same_size-0 language-small/late_s3-0

The samples are drawn from nothing by the exact reverse process (`unmasking="ancestral"`, temperature 1). Adds every
arm to `RESULTS/samples.json` when it is done, and first of all, as `held_out`, real text and the judge; what is there
is not run again. The judge and the samples are kept in `--work`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import study
import tasks
import torch
import transformers
from run import Clock, protocol_of
from tokenizers import ByteLevelBPETokenizer
from transformers.trainer_utils import get_last_checkpoint

from loopmdm import LoopMDMForMaskedLM
from loopmdm.data import write_json
from loopmdm.evaluation import generative_perplexity
from loopmdm.objective import seeded_generator
from loopmdm.training import MuonAdamW

BATCH = 64
# Without and with --quick: steps of the judge's training, samples of each setting, denoising steps, and loops
SETTINGS = (900, 64, (8, 16, 64), (1, 2, 3, 4)), (20, 6, (2, 4), (1, 2))


def texts_of(rows: torch.Tensor, task: tasks.Task) -> list[str]:
    """The texts of rows, with a blank line between documents, as in the file."""
    texts = task.tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False)
    return [text.replace("[END]", "\n\n") for text in texts]


def train_judge(task: tasks.Task, folder: Path, steps: int, quick: bool) -> dict[str, Any]:
    """
    Trains a judge and its tokenizer on some of the training rows, evenly spread, into `folder`, from the last
    checkpoint if there is one. The optimiser and its schedule are the arms'.
    """
    clock, count = Clock(), min(24_000, len(task.examples))
    chosen = [task.examples[i * len(task.examples) // count]["input_ids"] for i in range(count)]
    texts = texts_of(torch.stack(chosen), task)
    bpe = ByteLevelBPETokenizer()
    special = {"pad_token": "[PAD]", "bos_token": "[START]"}
    bpe.train_from_iterator(texts, 400 if quick else 2048, special_tokens=[*special.values()], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    tokenizer.save_pretrained(folder)
    rows = [{"input_ids": ids} for ids in tokenizer([special["bos_token"] + text for text in texts])["input_ids"]]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32 if quick else 128,
        intermediate_size=88 if quick else 352,
        num_hidden_layers=1 if quick else 4,
        num_attention_heads=4,
        max_position_embeddings=4 * task.length,  # samples may need more tokens than real text
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    )
    judge = transformers.LlamaForCausalLM(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear"},
        warmup_steps=min(50, steps // 10),
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=150,
        save_total_limit=2,
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    optimizers = MuonAdamW(judge, lr=task.learning_rate), None
    trainer = transformers.Trainer(judge, arguments, collator, rows, optimizers=optimizers)
    begun = (folder / "checkpoints").is_dir() and get_last_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=begun)
    judge.save_pretrained(folder)
    return {"rows": count, "steps": steps, "parameters": judge.num_parameters(), **clock.read()}


def score(texts: list[str], folder: Path) -> dict[str, float]:
    """
    What the judge in `folder` says of texts: nats a token and entropy in its own tokens, of which a broken word has
    more, and nats a byte, with standard errors over texts.
    """
    judge, tokenizer = (
        transformers.LlamaForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    found = generative_perplexity(texts, judge, tokenizer, batch_size=BATCH)
    summary = found.summary()
    sizes = torch.tensor([len(text.encode()) for text in texts])
    per_byte = (found.nats.sum() / sizes.sum()).item()
    errors = (found.nats - per_byte * sizes).std() * len(texts) ** 0.5 / sizes.sum()
    names = ("perplexity", "standard_error", "nats_per_token", "nats_standard_error", "entropy", "repetition")
    return {
        **{name: summary[name] for name in (*names, "distinct_1", "distinct_2", "tokens")},
        "entropy_error": found.entropy.std().item() / len(texts) ** 0.5,
        "nats_per_byte": per_byte,
        "nats_per_byte_error": errors.item(),
        "bytes": int(sizes.sum()),
    }


def sample(model: LoopMDMForMaskedLM, task: tasks.Task, count: int, steps: int, loops: int) -> list[str]:
    """Texts drawn from nothing; the noise depends on the number of steps alone."""
    generator = seeded_generator("samples", steps)
    canvas = torch.full((count, task.length), tasks.MASK)
    options = {"max_denoising_steps": steps, "num_loops": loops, "unmasking": "ancestral"}
    options["suppress_tokens"] = [tasks.PAD]
    parts = [model.generate(part, max_new_tokens=0, generator=generator, **options) for part in canvas.split(BATCH)]
    return texts_of(torch.cat(parts), task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", help="trained arms: STUDY/ARM-SEED in --work")
    parser.add_argument("--task", choices=[name for name in tasks.TASKS if "language" in name], required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of run.py, with the arms")
    parser.add_argument("--results", type=Path, required=True, help="folder for samples.json")
    parser.add_argument("--train-text", required=True, help="the text file that the arms were trained on")
    parser.add_argument("--quick", action="store_true", help="tiny data, judge and settings: a test of the machinery")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    args.texts = {"train": args.train_text}
    judge_steps, count, all_steps, all_loops = SETTINGS[args.quick]
    if args.threads:
        torch.set_num_threads(args.threads)
    missing = [arm for arm in args.arms if not (args.work / arm / "model" / "config.json").is_file()]
    if missing:
        parser.error(f"{args.work} holds no trained arm {', '.join(missing)}; train it with run.py")
    transformers.utils.logging.disable_progress_bar()
    task = tasks.make_task(args.task, args.work / "data", args.quick, args.texts)
    folder, path = args.work / "judge", args.results / "samples.json"
    if not (folder / "training.json").is_file():
        write_json(folder / "training.json", train_judge(task, folder, judge_steps, args.quick))
    if not study.find(path, "held_out", 0):
        texts = texts_of(task.rows.input_ids, task)
        training = json.loads((folder / "training.json").read_text())
        record = {"arm": "held_out", "seed": 0, "samples": len(texts), **score(texts, folder)}
        study.add(path, {**record, "judge": training})
    for arm in args.arms:
        name, seed = arm.rsplit("-", 1)
        if study.find(path, name, int(seed)):
            print(f"{arm} is in {path}", flush=True)
            continue
        clock, found = Clock(), []
        model = LoopMDMForMaskedLM.from_pretrained(args.work / arm / "model").eval()
        for steps in all_steps:
            for loops in all_loops if model.config.max_train_loops > 1 else [1]:
                kept = folder / "samples" / f"{arm}-{count}x{steps}x{loops}.json"
                texts = tasks.cached(kept, lambda: sample(model, task, count, steps, loops))  # noqa: B023
                flops = steps * model.flops(1, task.length, loops)
                found.append({"steps": steps, "loops": loops, "flops": flops, **score(texts, folder)})
                print(f"{arm} {json.dumps(study.rounded(found[-1]))}", flush=True)
        record = {"arm": name, "seed": int(seed), "samples": count, "settings": found}
        study.add(path, {**record, "protocol": protocol_of(clock, args)})


if __name__ == "__main__":
    main()
