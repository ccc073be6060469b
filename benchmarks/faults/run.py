"""Trainings that are killed, whose disks fail, whose stores are damaged, or that need one store at the same time.

python -m benchmarks.faults.run
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._common import Claim, make_parser, pick, prepare, result_folder, write_result
from . import company, damages, disks, groups, kills, losses
from .trainings import PHASES

Rows = list[dict[str, Any]]
#: Phases of the first kills of trainings, in turn: half of them are aimed at, the others (None) come at any time.
_FIRST_KILLS = [phase for aimed in PHASES if aimed != "resuming" for phase in (aimed, None)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--group_kills", type=int, default=20, help="of one of two processes")
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--races", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="parts (default: all)")
    options = parser.parse_args()
    if options.smoke:
        options.kills, options.group_kills, options.damages, options.races = 3, 1, 6, 1
    prepare(options)
    logging.getLogger("hf_freezecache").setLevel(logging.WARNING)
    logging.getLogger("hf_freezecache").propagate = False
    with tempfile.TemporaryDirectory() as name:
        results = {part: _timed(run, Path(name), options) for part, run in PARTS.items() if _wanted(part, options)}
    table = make_table(results)
    print(table)
    folder = result_folder("faults", options.smoke)
    (folder / "table.md").write_text(table)
    write_result("faults", options, pick(options, "kills group_kills damages races"), results, make_claims(results))


def _wanted(part: str, options: argparse.Namespace) -> bool:
    return not options.only or part in options.only


def _timed(run: Callable[[Path, argparse.Namespace], Rows], folder: Path, options: argparse.Namespace) -> Mapping:
    begin = time.perf_counter()
    rows = run(folder, options)
    return {"seconds": time.perf_counter() - begin, "trainings": rows}


# Parts: each gives a row for every training, with `kind`, `lost` and `wrong`


def run_kills(folder: Path, options: argparse.Namespace) -> Rows:
    """Kills at any time, and kills in phases that are aimed at, half of each."""
    wholes = {plan: kills.run_whole(plan, folder / f"whole-{plan}") for plan in kills.PLANS}
    return _listen("kill -9", kills.tell_stories(wholes, options.seed, options.kills, folder / "kills", _FIRST_KILLS))


def run_groups(folder: Path, options: argparse.Namespace) -> Rows:
    """The same of trainings in two processes, of which one is killed."""
    wholes = {plan: groups.run_whole_group(plan, folder / f"group-{plan}") for plan in kills.PLANS}
    kills_in_all, tell = options.group_kills, groups.tell_story_of_group
    stories = kills.tell_stories(wholes, options.seed, kills_in_all, folder / "groups", _FIRST_KILLS, tell)
    return _listen("kill -9 of one of two", stories)


def _listen(kind: str, stories: Iterable[kills.Story]) -> Rows:
    rows = []
    for story in stories:
        lost = bool(story.failed or story.debris)
        rows.append({"kind": kind, **asdict(story), "lost": lost, "wrong": not story.equal and not story.failed})
        print(" ".join(story.killed_in), "survived" if story.survived else story, flush=True)
    return rows


def run_disks(folder: Path, options: argparse.Namespace) -> Rows:
    """Small disks that fill, and disks that cannot be written any more."""
    reason = disks.why_impossible()
    if reason is not None:
        print(f"no disks: {reason}.")
        return []
    frozen, rows = {}, []
    names = list(disks.DISK_FAULTS)[:: 5 if options.smoke else 1]
    for number, name in enumerate(names):
        fault = disks.DISK_FAULTS[name]
        key = str(sorted(disks.freeze_only_settings(fault).items()))
        if key not in frozen:
            frozen[key] = disks.run_freeze_only(fault, folder / f"frozen-{number}")
        story = disks.run_fault(name, folder / f"disk-{number}", frozen[key])
        kind = "read-only disk" if fault.how == "is read-only" else "full disk"
        lost = bool(story.failed or story.remains) or not (story.told and story.replayed)
        rows.append({"kind": kind, **asdict(story), "lost": lost, "wrong": not story.equal and not story.failed})
        print(name, "survived" if story.survived else story, flush=True)
    return rows


def run_damages(folder: Path, options: argparse.Namespace) -> Rows:
    """Single bytes of a store."""
    store, weights = damages.build_store(folder / "undamaged")
    rows = []
    for number, damage in enumerate(damages.draw_damages(store, options.damages, options.seed)):
        story = damages.suffer(damage, store, weights, folder / f"damage-{number}")
        when = "before a training" if damage.step is None else "while a training reads the store"
        lost = story.failed is not None or (damage.counts and not story.found)
        wrong = not story.equal and not story.failed
        rows.append({"kind": f"byte changed {when}", **asdict(story), "lost": lost, "wrong": wrong})
    return rows


def run_losses(folder: Path, options: argparse.Namespace) -> Rows:
    """Stores that are lost while a training reads them."""
    weights, rows = losses.train_frozen(folder / "frozen-whole"), []
    for number, loss in enumerate(losses.LOSSES[:: 5 if options.smoke else 1]):
        story = losses.suffer_loss(loss, weights, folder / f"loss-{number}")
        wrong = not story.equal and not story.failed
        rows.append({"kind": "store lost", **asdict(story), "lost": story.failed is not None, "wrong": wrong})
        print(loss, "survived" if story.survived else story, flush=True)
    return rows


def run_races(folder: Path, options: argparse.Namespace) -> Rows:
    """Two trainings that need one store."""
    alone, rows = company.train_alone(folder / "alone"), []
    for number in range(options.races):
        found = company.race(folder / f"race-{number}", alone)
        lost = bool(found.remains) or found.built != 1
        rows.append({"kind": "race", **asdict(found), "lost": lost, "wrong": not found.equal})
        print(found, flush=True)
    return rows


def run_cleaning(folder: Path, options: argparse.Namespace) -> Rows:
    """The command that deletes stores, beside a training."""
    rows = []
    for name in list(company.CLEANINGS)[:: 3 if options.smoke else 1]:
        found = company.clean_beside(name, folder / f"clean-{name}")
        lost = bool(found.removed_beside or found.rebuilt or found.left_after)
        rows.append({"kind": "clean", "phase": name, **asdict(found), "lost": lost, "wrong": not found.equal})
        print(name, found, flush=True)
    return rows


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Rows]] = {
    "kills": run_kills,
    "groups": run_groups,
    "disks": run_disks,
    "damages": run_damages,
    "losses": run_losses,
    "races": run_races,
    "cleaning": run_cleaning,
}


# Results

#: Kind -> how the table calls it.
_WORDS = {
    "kill -9": "`kill -9`, then resumed",
    "kill -9 of one of two": "`kill -9` of one of two processes (DDP), then both resumed",
    "full disk": "the disk is full",
    "read-only disk": "the disk is read-only",
    "byte changed before a training": "a byte of a store changes before a training",
    "byte changed while a training reads the store": "a byte of a store changes while a training reads it",
    "store lost": "a store is lost while a training reads it",
    "race": "two trainings need the same store",
    "clean": "`freezecache clean --yes` beside a training",
}


def _rows(results: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for part in results.values():
        yield from part["trainings"]


def make_table(results: Mapping[str, Any]) -> str:
    """Faults by kind: how many there were, and what came of them."""
    lines = [
        "| fault | attempted | survived | lost | wrong | |",
        "|---|---|---|---|---|---|",
    ]
    for kind, words in _WORDS.items():
        rows = [row for row in _rows(results) if row["kind"] == kind]
        if rows:
            counts = [sum(weight(row) for row in rows) for weight in (_attempts, _survived, _lost, _wrong)]
            lines.append(f"| {words} | {' | '.join(map(str, counts))} | {_notes(kind, rows)} |")
    return "\n".join(lines) + "\n"


def _attempts(row: Mapping[str, Any]) -> int:
    return max(1, len(row["killed_in"])) if "killed_in" in row else 1


def _survived(row: Mapping[str, Any]) -> int:
    return 0 if row["lost"] or row["wrong"] else _attempts(row)


def _lost(row: Mapping[str, Any]) -> int:
    return _attempts(row) if row["lost"] and not row["wrong"] else 0


def _wrong(row: Mapping[str, Any]) -> int:
    return _attempts(row) if row["wrong"] else 0


def _notes(kind: str, rows: Rows) -> str:
    if kind.startswith("kill -9"):
        found = Counter(phase for row in rows for phase in row["killed_in"])
        return f"{len(rows)} trainings; " + ", ".join(f"{found[phase]} {phase}" for phase in PHASES if found[phase])
    if "disk" in kind:
        return "; ".join(row["fault"].removeprefix("is read-only ").removeprefix("is full ") for row in rows)
    if "byte" in kind:
        found = sum(row["found"] for row in rows)
        return f"{found} found, {len(rows) - found} in what no training reads (again)"
    if kind == "store lost":
        ways = Counter(row["loss"]["way"] for row in rows)
        return ", ".join(f"{count} {way}" for way, count in ways.items()) + f"; {_replayed(rows)} replay to the end"
    if kind == "race":
        return f"{sum(row['built'] for row in rows)} stores built, {sum(row['waited'] for row in rows)} waited"
    return ", ".join(row["phase"] for row in rows)


def _replayed(rows: Rows) -> int:
    """Trainings whose last epoch has read a store."""
    return sum(row["replayed"] for row in rows)


def make_claims(results: Mapping[str, Any]) -> list[Claim]:
    """Nothing is lost, nothing is wrong, and kills have hit every phase."""
    rows = list(_rows(results))
    claims = [
        Claim("faults in which something was lost", sum(map(_lost, rows)), at_most=0),
        Claim("faults after which something was wrong", sum(map(_wrong, rows)), at_most=0),
    ]
    if "kills" in results:
        hit = {phase for row in results["kills"]["trainings"] for phase in row["killed_in"]}
        claims.append(Claim(f"of {len(PHASES)} phases, those in which a kill was", len(hit), at_least=len(PHASES)))
    return claims


if __name__ == "__main__":
    main()
