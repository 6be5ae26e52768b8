# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a study."""

from pathlib import Path
from statistics import fmean

import study
from arms import ARMS
from matplotlib.figure import Figure
from study import Records, tokens_per_parameter

COLORS = {"same_size": "tab:gray", "deeper": "tab:brown", "looped": "tab:blue", "late": "tab:red"}
ABOUT = {
    "same_size": "same size, no loops",
    "deeper": "deeper, no loops",
    "looped": "LoopMDM, the paper's S ~ Uniform{1..6}",
    "late": "LoopMDM, late loops",
}


def finish(axis, title: str, x: str, y: str, log: bool = False) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    if log:
        axis.set_yscale("log")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def main_arms(records: Records) -> Records:
    return {name: runs for name, runs in records.items() if name in study.MAIN}


def plot_by_loops(records: Records, axis, numbers, scale: float = 1) -> None:
    """`numbers` by loops, with error bars; a level where an arm has no loops."""
    for name, runs in records.items():
        if ARMS[name].budget < 1:
            continue
        values = numbers(runs)
        means, errors = ([scale * value[i] for value in values.values()] for i in range(2))
        style = {"color": COLORS.get(name), "label": ABOUT.get(name, name)}
        if len(values) == 1:
            axis.axhline(means[0], linestyle="--", **style)
        else:
            axis.errorbar(list(values), means, errors, marker=".", linewidth=2.5 if name in COLORS else 1, **style)


def plot_nelbo(records: Records, axis) -> None:
    plot_by_loops(records, axis, study.nelbo_by_loops)
    finish(axis, "Likelihood by loops", "num_loops", "NELBO", log=True)


def plot_solved(records: Records, axis) -> None:
    plot_by_loops(records, axis, study.solved_by_loops, 100)
    finish(axis, "Answers by loops", "num_loops", "solved in one step, %")


def plot_adaptive(records: Records, axis) -> None:
    for name, runs in main_arms(records).items():
        if study.training_loops(runs[0]) > 1:
            solved = study.solved_by_loops(runs)
            axis.plot(list(solved), [100 * value for value, _ in solved.values()], color=COLORS[name], label=name)
            _, loops, rate = zip(*study.adaptive(runs), strict=True)
            axis.plot(loops, [100 * one for one in rate], color=COLORS[name], marker="o", linestyle=":")
    finish(axis, "Adaptive loops (dotted: loop_tolerance)", "mean loops", "solved in one step, %")


def plot_by_share(records: Records, axis) -> None:
    for name, runs in main_arms(records).items():
        values = study.by_share(runs)
        places = [(b + 0.5) / len(values) for b in range(len(values))]
        axis.plot(places, values, color=COLORS[name], label=ABOUT[name])
    finish(axis, "Gain by timestep", "share masked (timestep)", "-log p of a masked token", log=True)


def plot_attention(records: Records, axis) -> None:
    for runs in [records[name] for name in study.LOOPED if name in records][:1]:
        shared = runs[0]["dynamics"]
        for share, uniform, mass in zip(shared["shares"], shared["uniform"], study.attention(runs), strict=True):
            (line,) = axis.plot(range(1, len(mass) + 1), mass, marker=".", label=f"{100 * share:.0f} % masked")
            axis.axhline(uniform, color=line.get_color(), linestyle=":", linewidth=1)
    finish(axis, "Attention by loop (dotted: uniform)", "loop", "attention, masked to masked")
    axis.set_ylim(bottom=0)  # room for the legend
    axis.legend(fontsize="small", loc="lower center", ncols=2)


def plot_claims(records: Records, runs: list[dict], path: Path) -> None:
    """One panel for each claim; `runs` are those of all budgets."""
    panels = [plot_nelbo, plot_by_share, plot_attention]
    if "one_step" in runs[0]:
        panels[1:1] = [plot_solved, plot_adaptive]
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    first, *others = figure.subplots(2, (len(panels) + 1) // 2).flatten()
    plot_budgets(runs, first)
    for panel, axis in zip(panels, others, strict=True):
        panel(records, axis)
    figure.savefig(path, dpi=150)


def plot_grid(grids: dict[str, dict], path: Path) -> None:
    """What is not solved against inference FLOPs, every setting and the frontier of every arm."""

    def points(entries: list[dict]) -> tuple[list[float], list[float]]:
        # None of 1,000 is not zero.
        return [one["flops"] / 1e6 for one in entries], [max(100 * (1 - one["solved"]), 0.05) for one in entries]

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (name, grid) in enumerate(grids.items()):
        color = COLORS.get(name, f"C{i + 1}")
        axis.scatter(*points(grid["grid"]), color=color, s=8, alpha=0.4)
        flops, left = points(study.frontier(grid))
        axis.step([*flops, 1e9], [*left, left[-1]], where="post", color=color, label=ABOUT.get(name, name))
    everything = [entry["flops"] / 1e6 for grid in grids.values() for entry in grid["grid"]]
    axis.set(xscale="log", xlim=(min(everything) * 0.9, max(everything) * 1.1))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter(lambda x, _: f"{x:.0f}" if f"{x:.0e}"[0] in "235" else "")
    finish(axis, "Loops and steps: best per budget", "inference MFLOP a puzzle", "not solved, %", log=True)
    axis.yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


def plot_differences(runs: list[dict], path: Path) -> None:
    """
    The NELBO of `late_s3` less that of the same-size run of its budget and seed, on each set of held-out rows, by the
    tokens per parameter that it was trained on: every run (a sign for each seed), and means over seeds.
    """
    budgets: dict[float, list[dict]] = {}
    for run in runs:
        if run["arm"].startswith("late_s3"):
            budgets.setdefault(run["settings"]["tflop"] * run["settings"]["budget"], []).append(run)
    ticks = [fmean(map(tokens_per_parameter, budgets[tflop])) for tflop in sorted(budgets)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"held_out": "On held-out text", "other": "On WikiText-2"}
    axes = figure.subplots(1, len(titles), sharey=True)
    for axis, (held_out, title) in zip(axes, titles.items(), strict=True):
        axis.axhline(0, color=COLORS["same_size"], linestyle="--", label=ABOUT["same_size"])
        for color, loops in zip(("C0", "C3", "C1", "C2"), ("1", "2", "3", "4"), strict=True):
            means = []
            for tick, tflop in zip(ticks, sorted(budgets), strict=True):
                values = [run["likelihood"][held_out][loops]["to_base"] for run in budgets[tflop]]
                means.append(fmean(values))
                for run, value in zip(budgets[tflop], values, strict=True):
                    axis.plot(tick, value, "ox+"[run["seed"]], color=color, markersize=4)
            axis.plot(ticks, means, color=color, label=f"late, {loops} loop{'s' * (loops > '1')}")
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.set_xticks([], minor=True)
        finish(axis, title, "training tokens a parameter", "NELBO, nats a token more")
    axes[1].get_legend().remove()
    figure.savefig(path, dpi=150)


def plot_budgets(runs: list[dict], axis) -> None:
    """Final NELBO of whole runs by training budget, and how much further the best looped arm's FLOPs go."""
    means: dict[str, study.Points] = {}
    for base, seeds in study.by_budget(runs, study.final_nelbo).items():
        points = sorted(point for seed in seeds.values() for point in seed)
        axis.scatter(*zip(*points, strict=True), color=COLORS[base], s=8, alpha=0.5)
        budgets = {flops: [value for at, value in points if at == flops] for flops, _ in points}
        means[base] = [(flops, fmean(values)) for flops, values in budgets.items()]
        axis.plot(*zip(*means[base], strict=True), color=COLORS[base], marker="o", label=ABOUT[base])
    if "same_size" in means:
        flops, level = means["same_size"][-1]
        reached = [at for base in study.LOOPED if (at := study.crossing(means.get(base, []), level)) is not None]
        if reached and (at := min(reached)) < flops:
            axis.annotate("", (at, level), (flops, level), arrowprops={"arrowstyle": "->", "color": "black"})
            text = {"ha": "center", "textcoords": "offset points"}
            axis.annotate(f"{flops / at:.1f}x fewer", ((at * flops) ** 0.5, level), (0, -12), **text)
    axis.set_xscale("log")
    ticks = sorted({flops for points in means.values() for flops, _ in points})
    axis.set_xticks(ticks, [f"{flops:g}" for flops in ticks])
    axis.set_xticks([], minor=True)
    unit = runs[0]["settings"]["unit"]
    finish(
        axis, "What a training budget buys", "training TFLOP, each point a run", f"NELBO, nats per {unit}", log=True
    )
