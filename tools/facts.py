"""The numbers that texts may state: each has a name, comes from a file in `results/`, and is written by `report`.

A text holds a number between two comments, invisible where Markdown is shown: `<!--quick.accuracy-->91.4 %<!--/-->`.
`fill` puts the present value in; a test fails where a text and `results/` differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from cifar_ft import CifarFtError, results
from cifar_ft.results import accuracy_text

MARK = re.compile(r"<!--([a-z0-9_.]+)-->(.*?)<!--/-->", re.DOTALL)


class FactError(CifarFtError, ValueError):
    """A text names a number that `results/` does not have."""


def facts(root: Path) -> dict[str, str]:
    """Every number by its name, as text, from the files in `root`/results."""
    folder = root / "results"
    found = {}
    for path in sorted(folder.glob("*/metrics.json")):
        found |= _run_facts(path.parent.name, results.load_run(path.parent), path.with_name("course.json"))
    found |= _redrawn_facts(folder / "redrawn")
    if (folder / "benchmarks.json").exists():
        found |= _speed_facts(_json(folder / "benchmarks.json"))
    if (folder / "shipped.json").exists():
        found |= _shipped_facts(_json(folder / "shipped.json"))
    if (folder / "ablations.csv").exists():
        found |= _ablation_facts(pd.read_csv(folder / "ablations.csv"))
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """The text with every marked number as `found` has it.

    Raises
    ------
    FactError
        When a mark names what is not in `found`.
    """

    def value(mark: re.Match) -> str:
        if mark[1] not in found:
            raise FactError(f"there is no number {mark[1]!r} in results/; it has {', '.join(sorted(found))}")
        return f"<!--{mark[1]}-->{found[mark[1]]}<!--/-->"

    return MARK.sub(value, text)


def _run_facts(name: str, run: results.Run, course: Path) -> dict[str, str]:
    n = len(run.labels)
    found = {
        f"{name}.accuracy": accuracy_text(run.correct, n),
        f"{name}.percent": _percent(run.accuracy),
        f"{name}.minutes": f"{run.metrics['train_seconds'] / 60:.0f}",
        f"{name}.memory": f"{run.metrics['peak_memory_mb'] / 1000:.1f} GB",
    }
    if run.metrics.get("val_accuracy"):
        found[f"{name}.validation"] = _percent(run.metrics["val_accuracy"])
    if course.exists():
        found[f"{name}.course_minutes"] = f"{_json(course)['total_seconds'] / 60:.0f}"
    return found


def _speed_facts(sections: dict) -> dict[str, str]:
    found = {}
    if steps := sections.get("steps"):
        found["steps.ratio"] = f"{steps['ratio_to_plain']:.1f}"
        speed = steps["batch_32"]["course"]["images_per_second"]
        found["steps.images_per_second"] = f"{speed:.0f}"
        found["steps.reference_hours"] = f"{60 * 50_000 / speed / 3600:.0f}"
        found["steps.peak_share"] = f"{100 * steps['share_of_bf16_peak']:.0f} %"
    if start := sections.get("start"):
        found["start.import"] = f"{start['import_cifar_ft_training']:.1f} s"
        found["start.data"] = f"{start['load_cached_dataset']:.1f} s"
    if speedrun := sections.get("speedrun"):
        low, high = speedrun["test_accuracy_ci95"]
        found["speedrun.accuracy"] = f"{_percent(speedrun['test_accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"
        found["speedrun.minutes"] = f"{speedrun['train_seconds'] / 60:.0f}"
    if processes := sections.get("processes"):
        found["processes.moving"] = f"{100 * processes['moving_difference']:+.1f}"
        found["processes.moving_std"] = f"{100 * processes['moving_std']:.1f}"
        found["processes.frozen"] = f"{100 * processes['frozen_difference']:+.1f}"
    if growth := sections.get("growth"):
        area, memory = growth["fits"]["seconds_per_1000_by_area"], growth["fits"]["memory_mb_by_batch"]
        found["growth.area"] = f"{area['slope']:.1f}"
        found["growth.fixed"] = f"{area['intercept']:.1f}"
        found["growth.memory_per_image"] = f"{memory['slope']:.1f} MB"
    if compare := sections.get("compare"):
        found |= _comparison_facts(pd.DataFrame(compare["runs"]))
    return found


def _comparison_facts(runs: pd.DataFrame) -> dict[str, str]:
    work, found = runs.epochs.min(), {}
    for name, mine in runs[runs.epochs == work].groupby("name"):
        best = mine.loc[mine.val_accuracy.idxmax()]
        found[f"compare.{name}.speed"] = f"{mine.images_per_second.median():.0f}"
        found[f"compare.{name}.seconds"] = f"{mine.train_seconds.median():.0f}"
        found[f"compare.{name}.default"] = _percent(mine.iloc[0].test_accuracy)
        found[f"compare.{name}.tuned"] = _percent(best.test_accuracy)
        ours = runs[(runs["name"] == "cifar_ft") & (runs.epochs == work)].images_per_second.median()
        found[f"compare.{name}.ratio"] = f"{ours / mine.images_per_second.median():.1f}"
    for _, longer in runs[runs.epochs > work].iterrows():
        found["compare.longer.epochs"] = str(longer.epochs)
        found["compare.longer.seconds"] = f"{longer.train_seconds:.0f}"
        found["compare.longer.accuracy"] = _percent(longer.test_accuracy)
    return found


def _shipped_facts(shipped: dict) -> dict[str, str]:
    found = {
        "shipped.temperature": f"{shipped['temperature']:.2f}",
        "shipped.ece_before": f"{100 * shipped['ece_before']:.1f}",
        "shipped.ece_after": f"{100 * shipped['ece_after']:.1f}",
        "shipped.false_alarms": f"{100 * shipped['false_alarms']:.1f} %",
    }
    for name, values in shipped["without"].items():
        found[f"shipped.{name.replace(' ', '_')}"] = f"{100 * values['accuracy']:.2f} %"
    for row in shipped["coverage"]:
        found[f"shipped.coverage.{100 * row['coverage']:.0f}"] = _percent(row["accuracy"])
    for row in shipped["corruptions"]:
        found[f"shipped.{row['corruption']}.{row['level']:g}"] = _percent(row["accuracy"])
    return found


def _ablation_facts(rows: pd.DataFrame) -> dict[str, str]:
    from cifar_ft.results import summarize

    found = {"ablations.runs": str(len(rows)), "ablations.seeds": str(rows.seed.nunique())}
    for row in summarize(rows).to_dict("records"):
        name = "ablations." + re.sub(r"[^a-z0-9]+", "_", f"{row['question']} {row['variant']}".lower()).strip("_")
        found[name] = _percent(row["mean"])
        found[f"{name}.difference"] = f"{100 * row['difference']:+.1f}"
    return found


def _redrawn_facts(folder: Path) -> dict[str, str]:
    from cifar_ft.results import recorded_redrawn, redrawn_table

    if not (redrawn := recorded_redrawn(folder)):
        return {}
    rows, found = redrawn_table(redrawn).to_dict("records"), {}
    for name, row in zip([*redrawn, "published"], rows, strict=True):
        interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        found[f"redrawn.{name}.first"] = _percent(row["first_epoch"])
        found[f"redrawn.{name}.percent"] = _percent(row["test_accuracy"])
        found[f"redrawn.{name}.accuracy"] = f"{_percent(row['test_accuracy'])} {interval}"
        found[f"redrawn.{name}.train"] = _percent(row["train_accuracy"])
        found[f"redrawn.{name}.difference"] = f"{100 * (row['test_accuracy'] - rows[0]['test_accuracy']):+.1f}"
        if name in redrawn:
            found[f"redrawn.{name}.minutes"] = f"{row['minutes']:.0f}"
    found["redrawn.machine"] = "; ".join(sorted({metrics["hardware"] for _, metrics in redrawn.values()}))
    found["redrawn.epochs"] = str(rows[0]["epochs"])
    found["redrawn.minutes"] = f"{sum(row['minutes'] for row in rows[:-1]):.0f}"
    return found


def _json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
