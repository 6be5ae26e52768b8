# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Answers to any number of rows, by one process or many: planned by length, resumed after a kill, one file in the end.

Windows of some thousand rows are read one after the other. The rows of a window are sorted by length into batches,
which depend on the data alone, so that every process makes the same plan. Of `n` processes each generates every n-th
batch, and appends it to a file of its own in a folder beside the output; nothing else passes between them. Whoever
finds that no batch is missing puts the lines in order.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..data import (
    Process,
    UnusedColumns,
    adapter_base,
    check_tokens,
    encode_prompt,
    least_tokens,
    prompt_column,
    read_rows,
    this_process,
)
from ..generation_outputs import LoopMDMGenerationOutput
from ..generation_utils import LoopMDMGenerationConfig, check_argument
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import input_device, seeded_generator
from .loading import check_device, load_model, load_tokenizer, read_model_config
from .protocol import hash_model, versions
from .texts import batches_by_length, pad

# New tokens where neither the caller nor the model says how many, and no mask token is there to be filled in
NEW_TOKENS = 128
# Rows that are planned together. More of them fill batches better, and take more memory.
WINDOW = 4096
COSTS = ("forward_passes", "loops", "flops")


@dataclass
class RowsReport:
    """
    What a process did.

    Args:
        rows (`int`): Rows of the input.
        missing (`int`): Rows without a line yet, which other processes have; 0 once the output is written.
        errors (`int`): Rows whose line is an error, if the output is written.
        first_error (`str`, *optional*): The first of them.
        tokens (`int`): Tokens that this process denoised.
        seconds (`float`): The time that it took.
    """

    rows: int
    missing: int = 0
    errors: int = 0
    first_error: str | None = None
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Row:
    number: int
    tokens: Sequence[int] = ()
    new: int = 0
    is_text: bool = True  # and not a conversation
    error: str | None = None


def generate_rows(
    model: str,
    data: str | Path,
    output: str | Path,
    *,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    dataset: dict[str, Any] | None = None,
    window: int = WINDOW,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[int, int, float], None] | None = None,
    **options: Any,
) -> RowsReport:
    """
    Generates for every row of `data`, and writes `output`: JSON lines in the order of the rows. The folder
    `output + ".run"` holds what is finished, so that the same call goes on after a kill. Under `torchrun` or
    `accelerate launch` every process makes the same call and takes its share (`RANK` and `WORLD_SIZE` in the
    environment say which); several machines need a folder that they share. The bytes are the same for any number of
    processes and kills. Another `batch_size` changes nothing but ties that are decided by rounding.

    Args:
        model (`str`): Folder of a model or adapter, or its Hub id.
        data: A `.jsonl` or `.parquet` file, or the name or folder of a data set, of what
            [`~loopmdm.data.encode_prompt`] reads: texts or conversations.
        output: The file to write.
        batch_size (`int`, *optional*): Rows of a batch at most; 32 where `max_batch_tokens` is not given either.
        max_batch_tokens (`int`, *optional*): Tokens of a batch at most, with padding and new ones; a longer row is
            alone. Either this or `batch_size`.
        seed (`int`, defaults to 0): Seed; every answer has random numbers of its own, by the row's number.
        text_column (`str`, *optional*): Where the texts are, if they are called otherwise.
        dataset (`dict`, *optional*): Further arguments of `datasets.load_dataset` (`name`, `split`, ...).
        window (`int`, defaults to 4096): Rows that are held in memory and planned together.
        dtype, device, trust_remote_code: As in transformers. Each of several processes takes a GPU of its own.
        report (*optional*): Called as `report(rows passed, rows, tokens per second)`.
        options: Arguments of `generate`, as JSON holds them.

    Returns:
        [`RowsReport`]. A line of the output holds the row's `index`, from 0, and
        - `text`, input and answer as one (not for conversations), and `answer`, the new tokens, if there are any;
        - `finish_reason`: `stop` (an end token or stop string), `length` (all new tokens are used), or `filled` (mask
          tokens of the input, and nothing else), `tokens` (denoised ones), `forward_passes`, `loops` and `flops`;
        - or `error` alone, where the row cannot be read or used. With `num_return_sequences`, every row has as many
          lines, with `answer_index` from 0.

    Raises:
        ValueError: Arguments, ranks or all rows cannot be used; an output of others; a process of the same rank.
    """
    if batch_size is not None and max_batch_tokens is not None:
        raise ValueError("`batch_size` and `max_batch_tokens` both say how large a batch is; give one.")
    batch_size = 32 if batch_size is None and max_batch_tokens is None else batch_size
    for name, value in {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens, "window": window}.items():
        if value is not None:
            check_argument(name, value, int, 1)
    # Checks what can be without the model, whose own settings may be what makes it draw.
    LoopMDMGenerationConfig(**options | {"do_sample": True})
    process = this_process()
    run = _Run(Path(output).expanduser(), process)
    read_model_config(model)  # checks
    tokenizer = load_tokenizer(model, trust_remote_code)
    place = check_device(device or _own_gpu(process))
    # The files of a model on the Hub are in the cache then.
    loaded = None if Path(model).expanduser().is_dir() else load_model(model, dtype, str(place))
    source = _Source(data, dataset)
    settings = {"seed": seed, "text_column": text_column, "window": window, "dtype": dtype, "device": place.type}
    settings |= {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens, **options}
    record: dict[str, Any] = {"input": source.describe(), "settings": settings, "model": hash_model(model)}
    record["base_model"] = hash_model(adapter_base(model) or "")
    record["versions"] = versions(("loopmdm", "torch", "transformers"))
    result = RowsReport(rows=source.rows)
    with run.held(record) as is_finished:
        if is_finished:
            return result
        loaded = loaded or load_model(model, dtype, str(place))
        writer = _Writer(loaded, tokenizer, options, seed, text_column, (batch_size, max_batch_tokens), run)
        writer.write(source, window, result, report)
        return run.assemble(result, window)


def _own_gpu(process: Process) -> str | None:
    """The GPU of this one of several processes."""
    if process.number == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{process.local_rank % torch.cuda.device_count()}"


def new_tokens(model: LoopMDMForMaskedLM, tokens: Sequence[int], asked: int | None, where: str) -> int:
    """
    How many new tokens a row gets: as many as are `asked` for, as the model's settings say, or as are usual. Raises a
    ValueError, which calls the row `where`, if there is no room for them.
    """
    settings, room = model.generation_config, model.config.max_position_embeddings
    asked = settings.max_new_tokens if asked is None else asked
    if asked is not None:
        new = asked
    elif settings.max_length is not None:
        new = max(0, settings.max_length - len(tokens))
    else:
        new = 0 if model.config.mask_token_id in tokens else max(1, min(NEW_TOKENS, room - len(tokens)))
    if len(tokens) + new > room:
        raise ValueError(
            f"{where} has {len(tokens)} tokens, and {new} new ones are asked for; the model has {room} positions. "
            "Shorten it, or ask for fewer (`max_new_tokens`)."
        )
    return new


def generate_together(
    model: LoopMDMForMaskedLM, rows: Sequence[Sequence[int]], **options: Any
) -> tuple[LoopMDMGenerationOutput, int]:
    """The output of `generate` for rows of tokens, filled up on the left, and the column that new tokens start at."""
    input_ids, attention_mask = (tensor.to(input_device(model)) for tensor in pad(rows, "left"))
    options["return_dict_in_generate"] = True
    return model.generate(input_ids=input_ids, attention_mask=attention_mask, **options), input_ids.shape[1]


def generate_answers(
    model: LoopMDMForMaskedLM, rows: Sequence[Any], seed: int, **options: Any
) -> tuple[LoopMDMGenerationOutput, list[tuple[Any, list[int], dict[str, int]]]]:
    """
    Runs `generate` on rows, which have a `number`, `tokens`, and the same number of `new` ones. Returns its output,
    and for every answer the row, the tokens of both, and the `COSTS`. An answer's random numbers are its own, by the
    number of its row.
    """
    copies = options.get("num_return_sequences", model.generation_config.num_return_sequences) or 1
    generators = [seeded_generator(seed, "generate", row.number, copy) for row in rows for copy in range(copies)]
    options |= {"max_new_tokens": rows[0].new, "generator": generators}
    output, start = generate_together(model, [row.tokens for row in rows], **options)
    answers = []
    for place, tokens in enumerate(output.sequences.tolist()):
        row, cost = rows[place // copies], {name: output[name][place].item() for name in COSTS}
        answers.append((row, tokens[start - len(row.tokens) :], cost))
    return output, answers


class _Source:
    """The rows of the input, which are read twice: for their number and hash, and to be used."""

    def __init__(self, data: str | Path, dataset: dict[str, Any] | None):
        if Path(data).suffix == ".txt":
            raise ValueError(f"{data} is a text; give rows as JSON lines (.jsonl), .parquet, or a data set.")
        self.data, self.dataset = data, dataset
        self.rows = sum(1 for _ in self)
        self._first = self._digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._digest = hashlib.sha256()
        for where, row in read_rows(self.data, dataset=self.dataset, keep_errors=True):
            text = str(row) if isinstance(row, ValueError) else json.dumps(row, default=str)
            self._digest.update(f"{text}\n".encode())
            yield where, row

    def describe(self) -> dict[str, Any]:
        """What tells one input from another."""
        return {"data": str(self.data), "dataset": self.dataset, "rows": self.rows, "sha256": self._first}

    def check(self) -> None:
        """Raises a ValueError if the second reading differed from the first."""
        if self._digest.hexdigest() != self._first:
            raise ValueError(f"{self.data} has changed while it was read; start again with another output.")


class _Run:
    """The folder beside the output. In it are `run.json`, what the run is made of, and files of finished batches."""

    def __init__(self, output: Path, process: Process):
        if output.is_dir():
            raise ValueError(f"{output} is a folder; name a file.")
        self.output, self.rank, self.processes = output, process.rank, process.number
        self.folder = output.with_name(f"{output.name}.run")
        self.record = self.folder / "run.json"
        if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise ValueError(f"{output.parent} is not a folder that can be written to; put the output elsewhere.")
        if output.exists() and not self.record.is_file():
            raise ValueError(f"{output} exists already, and is not of a run like this; name another file.")

    @contextlib.contextmanager
    def held(self, record: dict[str, Any]) -> Iterator[bool]:
        """A context in which no other process has this one's rank. It says whether the output is complete."""
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / f"rank{self.rank}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process (of rank {self.rank}) is writing {self.output}; wait for it, or name another output."
            ) from None
        with lock:
            self._check(json.loads(json.dumps(record, default=str)))
            if self.output.exists():
                self._clean()
            try:
                yield self.output.exists()
            except ValueError:
                self._withdraw()
                raise

    def _withdraw(self) -> None:
        """Removes what a bad argument has begun before the first answer, so that the right one can begin anew."""
        numbers = {path.name.partition("-")[0] for path in self.folder.glob("*-*.jsonl")}
        batches = (batch for number in numbers for batch in self.finished(int(number))[0].values())
        if self.processes == 1 and all("error" in line for batch in batches for line in batch):
            shutil.rmtree(self.folder)

    def _check(self, record: dict[str, Any]) -> None:
        """Writes the record, or raises a ValueError if another one is there."""
        if not self.record.is_file():
            self._replace(self.record, [json.dumps(record, indent=2) + "\n"])
            return
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            parts = [(part, name) for part in record for name in {**record[part], **found[part]}]
            wrong = [name for part, name in parts if record[part].get(name) != found[part].get(name)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is damaged; remove {self.folder}, or name another output.") from error
        if wrong:
            raise ValueError(
                f"{self.output} was begun with another input or other settings (they differ in {', '.join(wrong)}); "
                f"name another output, or remove {self.folder} and the output to start anew."
            )

    def part(self, window: int) -> Path:
        """The file for batches of a window that this process finishes."""
        return self.folder / f"{window:06d}-{self.rank}.jsonl"

    def finished(self, window: int) -> tuple[dict[int, list[dict[str, Any]]], int | None]:
        """The lines of each finished batch of a window, and how many batches it has, if one is finished."""
        batches: dict[int, list[dict[str, Any]]] = {}
        count = None
        for path in sorted(self.folder.glob(f"{window:06d}-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    batch = json.loads(line.decode("utf-8"))
                except ValueError:  # cut off by a kill
                    continue
                batches[batch["batch"]], count = batch["lines"], batch["of"]
        return batches, count

    def assemble(self, result: RowsReport, window: int) -> RowsReport:
        """Writes the output, if no row is missing."""
        with FileLock(self.folder / "output.lock"):
            if self.output.exists():  # another process was faster
                return result
            windows = range(-(-result.rows // window))
            for number in windows:
                batches, count = self.finished(number)
                here = min(window, result.rows - number * window)
                if len(batches) != count:
                    result.missing += here - len({line["index"] for lines in batches.values() for line in lines})
            if result.missing == 0:
                self._replace(self.output, self._lines(windows, result))
                self._clean()
        return result

    def _clean(self) -> None:
        """Removes what the output holds."""
        for path in self.folder.glob("*-*.jsonl"):
            path.unlink(missing_ok=True)

    def _lines(self, windows: Iterable[int], result: RowsReport) -> Iterator[str]:
        for number in windows:
            lines = [line for batch in self.finished(number)[0].values() for line in batch]
            for line in sorted(lines, key=lambda line: (line["index"], line.get("answer_index", 0))):
                if "error" in line:
                    result.errors += 1
                    result.first_error = result.first_error or line["error"]
                yield _dump(line)
        if result.errors == result.rows:
            raise ValueError(f"None of the {result.rows} rows can be used: {result.first_error}")

    def _replace(self, path: Path, lines: Iterable[str]) -> None:
        """Writes a file, which is complete or absent."""
        temporary = self.folder / f"{path.name}.{self.rank}"
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(lines)
        os.replace(temporary, path)


@dataclass
class _Writer:
    """Generates this process's share of the batches."""

    model: LoopMDMForMaskedLM
    tokenizer: Any
    options: dict[str, Any]
    seed: int
    text_column: str | None
    sizes: tuple[int | None, int | None]
    run: _Run
    unused: UnusedColumns = field(default_factory=UnusedColumns)

    def write(
        self, source: _Source, window: int, result: RowsReport, report: Callable[[int, int, float], None] | None
    ) -> None:
        """Appends every batch that is this process's, and not finished, to its files."""
        run, started, passed, rows = self.run, time.perf_counter(), 0, enumerate(source)
        for number in range(-(-source.rows // window)):
            finished, count = run.finished(number)
            chunk = itertools.islice(rows, window)
            if len(finished) == count:
                passed += sum(1 for _ in chunk)
                continue
            batches = self.plan([self.read(index, where, row) for index, (where, row) in chunk])
            with run.part(number).open("ab") as file:
                file.write(b"\n" if file.tell() else b"")  # ends a line that a kill cut off
                for index, batch in enumerate(batches):
                    if index not in finished and (number + index) % run.processes == run.rank:
                        lines = self.answer(batch)
                        text = _dump({"batch": index, "of": len(batches), "lines": lines})
                        file.write(text.encode("utf-8", errors="backslashreplace"))
                        file.flush()
                        result.tokens += sum(line.get("tokens", 0) for line in lines)
                    passed += len(batch)
                    result.seconds = time.perf_counter() - started
                    if report is not None:
                        report(passed, source.rows, result.tokens / result.seconds)
        for _ in rows:  # none, unless the input has grown
            pass
        source.check()

    def read(self, number: int, where: str, row: Any) -> _Row:
        """A row as tokens, or what is wrong with it."""
        config = self.model.config
        try:
            if isinstance(row, ValueError):
                raise row
            column = prompt_column(row, self.text_column)
            if self.run.rank == 0:
                self.unused.note(row, (column, "tools"), where.rpartition(", ")[0])
            least = least_tokens(row, (column,))
            if least > config.max_position_embeddings:  # tokenising takes a hundred times the memory
                room = config.max_position_embeddings
                raise ValueError(f"{where} has at least {least} tokens; the model has {room} positions. Shorten it.")
            ids = encode_prompt(self.tokenizer, row, where, self.text_column)
            check_tokens(ids, config.vocab_size, where)
            new = new_tokens(self.model, ids, self.options.get("max_new_tokens"), where)
            if new == 0 and config.mask_token_id not in ids:
                raise ValueError(
                    f"{where} has nothing to generate: it does not hold a mask token ({config.mask_token_id}), and no "
                    "new tokens are asked for (`max_new_tokens`)."
                )
            return _Row(number, array("q", ids), new, isinstance(row[column], str))
        except ValueError as error:
            return _Row(number, error=str(error))

    def plan(self, rows: list[_Row]) -> list[list[_Row]]:
        """Batches of rows that get as many new tokens, and are of similar length; those that are wrong come first."""
        kinds: dict[int, list[_Row]] = {}
        for row in rows:
            if row.error is None:
                kinds.setdefault(row.new, []).append(row)
        wrong = [row for row in rows if row.error is not None]
        batches = [wrong] if wrong else []
        for new, members in sorted(kinds.items()):
            for places in batches_by_length([row.tokens for row in members], *self.sizes, new):
                batches.append([members[place] for place in places])
        return batches

    def answer(self, batch: list[_Row]) -> list[dict[str, Any]]:
        """The lines of a batch."""
        if batch[0].error is not None:
            return [{"index": row.number, "error": row.error} for row in batch]
        output, answers = generate_answers(self.model, batch, self.seed, tokenizer=self.tokenizer, **self.options)
        copies, lines = len(answers) // len(batch), []
        for place, (row, tokens, cost) in enumerate(answers):
            line: dict[str, Any] = {"index": row.number}
            if copies > 1:
                line["answer_index"] = place % copies
            if row.is_text:
                line["text"] = self._decode(tokens)
            if row.new > 0:
                line["answer"] = self._decode(tokens[len(row.tokens) :])
            is_full = bool(output.attention_mask[place, -1])
            line["finish_reason"] = self._reason(row, tokens, is_full, line.get("answer", ""))
            line["tokens"] = round(output.tokens_per_forward[place].item() * cost["forward_passes"])
            lines.append(line | cost)
        return lines

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _reason(self, row: _Row, tokens: list[int], is_full: bool, answer: str) -> str:
        defaults = self.model.generation_config
        ends = self.options.get("eos_token_id", defaults.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        strings = self.options.get("stop_strings", defaults.stop_strings) or []
        strings = [strings] if isinstance(strings, str) else strings
        is_end = tokens[-1] in ends and (row.new > 0 or row.tokens[-1] == self.model.config.mask_token_id)
        if not is_full or is_end or any(string in answer for string in strings):
            return "stop"
        return "length" if row.new > 0 else "filled"


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
