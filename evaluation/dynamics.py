# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Dynamics of the loop: attention between masked and visible tokens, states, and predictions after every loop."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..configuration_loopmdm import check_num_loops
from ..generation_utils import check_argument
from ..objective import CleanRows, clean_rows, draw_share, evaluating, find_model, input_device, seeded_generator

# The longest cycle of loops that `recurrence` looks for
MAX_PERIOD = 4
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Dynamics:
    """
    The result of [`measure_dynamics`], for T timesteps, S loops, E executed layers (head, S times mid, tail) and N
    masked tokens. Arrays with a dimension T are means over the masks of a timestep; every mask counts the same.

    Args:
        timesteps (`(T,)` float): Shares of masked tokens. At least one token is masked.
        num_masks (`int`): Masks per timestep: texts times masks per text.
        layer (`(E,)` int), loop (`(E,)` int): Physical layer of each executed layer, and the loop that it belongs to:
            0 in head, 1 to S in mid, S + 1 in tail.
        attention (`(T, E, 2, 2)` float, *optional*): Share of attention that [masked, visible] tokens pay to
            [masked, visible] tokens, averaged over heads and tokens. The last dimension sums to 1.
        uniform_attention (`(T, 2, 2)` float, *optional*): The same share if every token paid equal attention to all
            tokens that it sees.
        change (`(T, S, 3)` float): `||h_s - h_(s-1)|| / ||h_(s-1)||` for the state h_s after loop s, over the
            [masked, visible, all] tokens of a text; h_0 is the state that enters mid.
        distance (`(T, S, 3)` float): `||h_s - h_S|| / ||h_S||`, the distance to the last state.
        recurrence (`(T, S, 4)` float): `||h_s - h_(s-p)|| / ||h_s||` over all tokens for p = 1 to 4; NaN if p > s. In
            a cycle of p loops, the value for p is far below that for 1.
        loss, loss_error, accuracy (`(T, S)` float, *optional*): Logit lens, that is, mid stops after loop s: mean
            -log p of the masked tokens in nats, its standard error over masks, and the share predicted correctly.
        changed (`(T, S)` float, *optional*): Share of masked tokens whose prediction differs from that of the loop
            before; NaN for the first loop, like the next two.
        corrected, spoiled (`(T, S)` float, *optional*): Share of masked tokens whose prediction became correct, or
            ceased to be.
        token_timestep, token_text, token_position, token_target (`(N,)` int, *optional*): For every masked token the
            index of its timestep and text, its position, and the true token.
        token_predictions (`(N, S)` int, *optional*): The token predicted for it after every loop.
    """

    timesteps: np.ndarray
    num_masks: int
    layer: np.ndarray
    loop: np.ndarray
    change: np.ndarray
    distance: np.ndarray
    recurrence: np.ndarray
    attention: np.ndarray | None = None
    uniform_attention: np.ndarray | None = None
    loss: np.ndarray | None = None
    loss_error: np.ndarray | None = None
    accuracy: np.ndarray | None = None
    changed: np.ndarray | None = None
    corrected: np.ndarray | None = None
    spoiled: np.ndarray | None = None
    token_timestep: np.ndarray | None = None
    token_text: np.ndarray | None = None
    token_position: np.ndarray | None = None
    token_target: np.ndarray | None = None
    token_predictions: np.ndarray | None = None

    @property
    def num_loops(self) -> int:
        return self.change.shape[1]

    def attention_of_mid(self) -> np.ndarray:
        """Attention by loop, averaged over the layers of mid: `(T, S, 2, 2)`."""
        return np.stack([self.attention[:, self.loop == s].mean(1) for s in range(1, self.num_loops + 1)], axis=1)

    def save(self, path: str | Path) -> None:
        """Writes the arrays to a file in the `.npz` format, under exactly this name."""
        arrays = {one.name: getattr(self, one.name) for one in fields(self)}
        with Path(path).open("wb") as file:  # numpy adds .npz to names without it
            np.savez_compressed(file, **{name: value for name, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path) -> "Dynamics":
        """Reads what [`~Dynamics.save`] wrote."""
        with np.load(path) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        return cls(**values | {"num_masks": int(values["num_masks"])})

    def plot(self, path: str | Path) -> None:
        """Draws the curves over loops, one for each timestep, into an image file."""
        import matplotlib
        from matplotlib.figure import Figure

        loops = np.arange(1, self.num_loops + 1)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(self.timesteps)))
        figure = Figure(figsize=(13, 7.5), layout="constrained")
        axes = figure.subplots(2, 3)

        def draw(axis, title, values, what, log=False, **style):
            axis.set(title=title, xlabel="loop", ylabel=what)
            if log and np.nanmax(values) > 0:
                axis.set_yscale("log")
            for curve, color, timestep in zip(values, colors, self.timesteps, strict=True):
                axis.plot(loops, curve, color=color, marker="o", markersize=3, label=f"t = {timestep:g}", **style)

        if self.attention is not None:
            mass = self.attention_of_mid()
            for axis, (a, b, title) in zip(
                axes.flat[:2], ((0, 0, "masked to masked"), (1, 0, "visible to masked")), strict=True
            ):
                draw(axis, f"Attention in mid: {title}", mass[..., a, b], "share (dotted: even attention)")
                for value, color in zip(self.uniform_attention[:, a, b], colors, strict=True):
                    axis.axhline(value, color=color, linestyle=":", linewidth=1)
        draw(axes.flat[2], "Change of the state", self.change[..., 2], "relative to the state before", log=True)
        # A logarithmic axis cannot show the distance of the last loop, 0.
        left = np.where(self.distance[..., 2] > 0, self.distance[..., 2], np.nan)
        draw(axes.flat[3], "Distance to the last loop's state", left, "relative", log=self.num_loops > 1)
        if self.loss is not None:
            draw(axes.flat[4], "Logit lens: mid stops here", self.loss, "nats per masked token")
            draw(axes.flat[5], "Predictions that change", self.changed, "share of masked tokens")
        axes.flat[2].legend(fontsize=8)
        for axis in axes.flat:
            axis.set_visible(axis.has_data())
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=110)

    def summary(self) -> list[dict[str, float]]:
        """Means over the timesteps, a row for each loop."""
        rows = []
        mass = None if self.attention is None else self.attention_of_mid().mean(0)
        for s in range(self.num_loops):
            row = {"loop": s + 1, "change": self.change[:, s, 2].mean(), "distance": self.distance[:, s, 2].mean()}
            if mass is not None:
                row |= {
                    "masked_to_masked": mass[s, 0, 0],
                    "masked_to_visible": mass[s, 0, 1],
                    "visible_to_masked": mass[s, 1, 0],
                }
            if self.loss is not None:
                names = ("loss", "accuracy", "changed", "corrected", "spoiled")
                row |= {name: getattr(self, name)[:, s].mean() for name in names}
            rows.append({name: value if name == "loop" else float(value) for name, value in row.items()})
        return rows


@torch.no_grad()
def measure_dynamics(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    maskable: torch.Tensor | None = None,
    num_loops: int | None = None,
    timesteps: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    masks_per_text: int = 2,
    attention: bool = True,
    lens: bool = True,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Dynamics:
    """
    Masks texts at given timesteps, runs `num_loops` loops, and records attention, states and predictions by loop.

    In a text with L maskable tokens, `round(t L)` are masked, at least one. In a block-causal model, L counts the
    tokens of one block, drawn uniformly, and later blocks are left out, as in decoding.

    Args:
        model: A [`LoopMDMForMaskedLM`]. It runs in eval mode, with eager attention if `attention` is measured; its
            mode and its kind of attention are restored.
        input_ids (`torch.LongTensor` of shape `(num_texts, length)`): Clean tokens.
        attention_mask (`torch.Tensor` of shape `(num_texts, length)`, *optional*): 0 on padding.
        maskable (`torch.BoolTensor` of shape `(num_texts, length)`, *optional*): Tokens that may be masked; by default
            all real ones.
        num_loops (`int`, *optional*, defaults to `config.max_train_loops`): Number of loops.
        timesteps (`list[float]`): Shares of masked tokens, in (0, 1].
        masks_per_text (`int`, defaults to 2): Masks per text and timestep.
        attention (`bool`, defaults to `True`): Measure attention. The maps of all executed layers are kept in memory.
        lens (`bool`, defaults to `True`): Read out predictions after every loop. Models with `loop_update="damped"`
            need `lens=False`, since their state after s of S loops is not the state of a pass with s loops.
        batch_size (`int`, defaults to 4): Masked texts per forward pass.
        seed (`int`, defaults to 0): Seed of the masks. A mask depends on the seed, the index of its text and the index
            of its timestep.
        progress (*optional*): Called as `progress(done, total)` with numbers of masked texts.

    Raises:
        ValueError: Arguments that do not fit the model or one another, or a text without a maskable token.
    """
    model = find_model(model)
    config = model.config
    timesteps = list(timesteps)
    num_loops = check_settings(config, num_loops, timesteps, masks_per_text, batch_size, lens)
    rows = clean_rows(config, input_ids, attention_mask, maskable)
    numbers = itertools.product(range(len(timesteps)), range(len(input_ids)), range(masks_per_text))
    jobs = [_draw(rows, step, timesteps[step], text, mask, seed) for step, text, mask in numbers]
    recorder = _Recorder(config, timesteps, num_loops, attention, lens)
    with evaluating(model), _eager_attention(model) if attention else contextlib.nullcontext():
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            recorder.add(model, rows, batch)
            if progress is not None:
                progress(start + len(batch), len(jobs))
    return recorder.result(len(input_ids) * masks_per_text)


def check_settings(
    config: Any, num_loops: int | None, timesteps: list[float], masks_per_text: int, batch_size: int, lens: bool
) -> int:
    """Raises a ValueError for bad arguments of [`measure_dynamics`]. Returns the number of loops."""
    num_loops = check_num_loops(config.max_train_loops if num_loops is None else num_loops)
    if lens and config.loop_update == "damped":
        raise ValueError(
            'The model\'s `loop_update` is "damped": its steps depend on the number of loops, so the state after an '
            "earlier loop is not the result of fewer loops and there is nothing to read out. Leave out the logit lens "
            "(`lens=False`, --no-lens)."
        )
    if not timesteps or not all(0 < timestep <= 1 for timestep in timesteps):
        raise ValueError(f"`timesteps` is {timesteps}; it must list shares of masked tokens, above 0 and at most 1.")
    check_argument("masks_per_text", masks_per_text, int, 1)
    check_argument("batch_size", batch_size, int, 1)
    return num_loops


@contextlib.contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Eager attention inside the block. It is a setting of the model, so only one thread at a time may change it."""
    with _ONE_AT_A_TIME:
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(implementation)


class _Job(NamedTuple):
    """A masked text: the indices of its timestep and text, its masked tokens, and those it sees, `(length,)` bool."""

    step: int
    text: int
    masked: torch.Tensor
    seen: torch.Tensor


def _draw(rows: CleanRows, step: int, timestep: float, text: int, number: int, seed: int) -> _Job:
    mask = draw_share(rows.split(text), timestep, seeded_generator(seed, "dynamics", text, step, number))
    masked = torch.zeros_like(rows.maskable[text])
    masked[mask.positions] = True
    # Later blocks are not seen.
    return _Job(step, text, masked, rows.real[text] & (rows.blocks[text] <= rows.blocks[text][mask.block[0]]))


class _Recorder:
    """Collects the measurements of all masked texts, and averages them by timestep."""

    def __init__(self, config: Any, timesteps: list[float], num_loops: int, attention: bool, lens: bool):
        self.config, self.timesteps, self.num_loops = config, timesteps, num_loops
        self.with_attention, self.with_lens = attention, lens
        self.steps: list[int] = []  # the timestep of every mask
        self.records: dict[str, list[torch.Tensor]] = {}  # by name, a tensor per batch with a row for every mask
        self.tokens: list[tuple[torch.Tensor, ...]] = []

    def add(self, model: nn.Module, rows: CleanRows, batch: list[_Job]) -> None:
        self.steps += [job.step for job in batch]
        texts, device = torch.tensor([job.text for job in batch]), input_device(model)
        masked, seen = (torch.stack([getattr(job, name) for job in batch]) for name in ("masked", "seen"))
        input_ids, blocks = rows.input_ids[texts], rows.blocks[texts]
        inputs = input_ids.masked_fill(masked, self.config.mask_token_id).to(device)
        attention_mask = None if bool(seen.all()) else seen.long().to(device)
        kinds = torch.stack((masked, seen & ~masked, seen), dim=1)  # (batch, 3, length)

        start, context = model.model.prelude(inputs, attention_mask)
        states, predictions, losses = [start], [], []
        for state, _ in model.model.iterate(start, context, self.num_loops):
            states.append(state)
            if self.with_lens:
                output = model.align(model.model.readout(state, context), attention_mask)[masked.to(device)]
                logits = model.logits(output)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                log_probs = logits.log_softmax(-1).cpu()
                predictions.append(log_probs.argmax(-1))
                losses.append(-log_probs.gather(1, input_ids[masked][:, None])[:, 0].double())
        self._add_states(states, kinds.to(device))
        if self.with_lens:
            self._add_lens(batch, torch.stack(predictions, 1), torch.stack(losses, 1), input_ids, masked)
        if self.with_attention:
            maps = model.model(inputs, attention_mask, num_loops=self.num_loops, output_attentions=True).attentions
            self._add_attention(maps, kinds[:, :2], seen, blocks)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        """Keeps `values`, which have a row for each mask of the batch."""
        self.records.setdefault(name, []).append(values.double().cpu())

    def _add_states(self, states: list[torch.Tensor], kinds: torch.Tensor) -> None:
        states = [state.to(torch.promote_types(state.dtype, torch.float32)) for state in states]

        def norms(state: torch.Tensor) -> torch.Tensor:
            """Norms over the tokens of each kind and their features, `(batch, 3)`."""
            return (state.square().sum(-1)[:, None] * kinds).sum(-1).sqrt()

        sizes = [norms(state) for state in states]
        pairs = list(zip(states[:-1], states[1:], sizes[:-1], strict=True))
        self._keep("change", torch.stack([norms(new - old) / size for old, new, size in pairs], 1))
        left = [norms(state - states[-1]) / sizes[-1] for state in states[1:]]
        self._keep("distance", torch.stack(left, 1))
        recurrence = torch.full((len(kinds), self.num_loops, MAX_PERIOD), torch.nan)
        for s in range(1, self.num_loops + 1):
            for period in range(1, min(s, MAX_PERIOD) + 1):
                recurrence[:, s - 1, period - 1] = (norms(states[s] - states[s - period]) / sizes[s])[:, 2]
        self._keep("recurrence", recurrence)

    def _add_lens(self, batch, predictions, losses, input_ids, masked) -> None:
        targets = input_ids[masked]
        rows, positions = masked.nonzero(as_tuple=True)
        right = predictions == targets[:, None]
        before = torch.cat((predictions[:, :1], predictions[:, :-1]), 1)
        was_right = torch.cat((right[:, :1], right[:, :-1]), 1)
        changed = predictions != before

        def by_mask(values: torch.Tensor) -> torch.Tensor:
            sums = torch.zeros(len(batch), self.num_loops, dtype=torch.float64).index_add_(0, rows, values.double())
            return sums / masked.sum(-1)[:, None]

        for name, values in (
            ("loss", losses),
            ("accuracy", right),
            ("changed", changed),
            ("corrected", changed & right & ~was_right),
            ("spoiled", changed & ~right & was_right),
        ):
            means = by_mask(values)
            if name not in ("loss", "accuracy"):
                means[:, 0] = torch.nan
            self._keep(name, means)
        steps, texts = (torch.tensor([job[i] for job in batch])[rows] for i in (0, 1))  # of every masked token
        self.tokens.append((steps, texts, positions, targets, predictions))

    def _add_attention(self, maps, kinds: torch.Tensor, seen: torch.Tensor, blocks: torch.Tensor) -> None:
        # Without visible tokens the mean over them is NaN, which the mean over masks leaves out.
        kinds = kinds.double()
        counts = kinds.sum(-1)
        masses = []
        for probabilities in maps:
            mean = probabilities.double().mean(1).cpu()  # over heads: (batch, queries, keys)
            masses.append(torch.einsum("baq,bqk,bck->bac", kinds, mean, kinds) / counts[..., None])
        self._keep("attention", torch.stack(masses, 1))
        visible = seen[:, None, :] & (blocks[:, None, :] <= blocks[:, :, None])
        even = visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)
        self._keep("uniform_attention", torch.einsum("baq,bqk,bck->bac", kinds, even, kinds) / counts[..., None])

    def result(self, num_masks: int) -> Dynamics:
        steps = torch.tensor(self.steps)

        def by_timestep(name: str, reduce: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
            values = torch.cat(self.records[name])
            return torch.stack([reduce(values[steps == step]) for step in range(len(self.timesteps))]).numpy()

        start, end, layers = self.config.loop_start, self.config.loop_end, self.config.num_hidden_layers
        executed = [(layer, 0) for layer in range(start)]
        executed += [(layer, loop) for loop in range(1, self.num_loops + 1) for layer in range(start, end)]
        executed += [(layer, self.num_loops + 1) for layer in range(end, layers)]
        values = {name: by_timestep(name, lambda part: part.nanmean(0)) for name in self.records}
        if self.with_lens:
            values["loss_error"] = by_timestep("loss", _standard_error)
            names = ("token_timestep", "token_text", "token_position", "token_target", "token_predictions")
            values |= {
                name: torch.cat(part).numpy() for name, part in zip(names, zip(*self.tokens, strict=True), strict=True)
            }
        layer, loop = np.array(executed).T
        return Dynamics(np.array(self.timesteps), num_masks, layer, loop, **values)


def _standard_error(values: torch.Tensor) -> torch.Tensor:
    """Standard error of the mean over the first dimension; NaN for a single value."""
    count = len(values)
    return values.std(0) / count**0.5 if count > 1 else torch.full_like(values[0], torch.nan)
