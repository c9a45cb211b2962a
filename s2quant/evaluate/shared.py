"""The baseline's speech taken from another run, so that many models are compared with one baseline that spoke once.

Taken are clips of the baseline and of the floor that this run's plan asks for, with sound, codes, sequences, codes of
voices, transcripts, embeddings and token metrics; files are linked where the disk can, else copied. The other run must
be of the same suite, baseline, device, dtype, backend of linears, decoder and slots, on all of which those clips
depend. They also depend on who was spoken with them, so those are taken that were spoken in a group that this run has,
too (`groups.py`): all of them when both runs ask for the same utterances and seeds. What the other run lacks is made
here. So the results are those of a run that speaks all itself. Timings are not taken: they are measured side by side
in every run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.evaluate.groups import cut_groups
from s2quant.evaluate.plan import EvalPlan, Job
from s2quant.evaluate.store import Clip, Store
from s2quant.files import atomic_file, read_json

_SAME = ("run_version", "suite", "device", "dtype", "linears", "decoder", "num_slots")


def check_shared(source: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a run whose baseline would not have spoken the same.

    Args:
        source: Folder of the other run.
        facts: This run's run.json.

    Raises:
        UserError: It is no run, has no baseline, or differs in something that clips depend on; all is listed.
    """
    if not (source / "run.json").is_file():
        raise UserError(f"{source} holds no run", "the folder of a run with a baseline", "name another --baseline-run")
    other = read_json(source / "run.json")
    faults = [f"{key}: {other.get(key)!r} there, {facts[key]!r} here" for key in _SAME if other.get(key) != facts[key]]
    theirs = other.get("checkpoints", {}).get("baseline")
    if theirs is None:
        faults.append("it has no baseline")
    elif theirs != facts["checkpoints"].get("baseline"):
        faults.append("baseline: other files")
    if faults:
        raise UserError(
            f"{source} has another baseline's speech:\n{shorten_list(faults)}",
            "a run of the same suite, baseline, device, dtype, linears, decoder and slots",
            "name another --baseline-run, or leave it out",
        )


def take_baseline(source: Path, plan: EvalPlan, store: Store, num_slots: int) -> int:
    """Take what this run lacks of the baseline's and the floor's clips.

    Args:
        source: Folder of the other run, see `check_shared`.
        plan: This run's plan.
        store: This run's folder.
        num_slots: Of this run's engines.

    Returns:
        How many clips were taken.

    Raises:
        UserError: A file of the other run is damaged, or the disk refuses.
    """
    other = Store(folder=source)
    theirs, ours = other.clips(), store.clips()
    for folder in ("work/voices", "audio/prompt", "work/tokens"):
        for path in sorted((source / folder).glob("*")):
            if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("."):
                _take(path, store.folder / folder / path.name)
    taken = 0
    for group in cut_groups(plan, ("baseline",), num_slots):
        for job in group.jobs:
            clip = theirs.get(job.key)
            if clip is None or not other.has_clip(job, clip, group.name):
                continue
            if not store.has_clip(job, ours.get(job.key), group.name):
                _take_clip(job, clip, other, store)
                taken += 1
    wanted = {job.key for job in plan.jobs() if job.arm != "model"}
    for kind in ("transcripts", "embeddings"):
        known = {_row_key(row) for _, row in store.rows(kind)}
        for _, row in other.rows(kind):
            key = _row_key(row)
            if key not in known and (key[1:4] in wanted or row["arm"] == "prompt"):
                store.append(kind, row)
                known.add(key)
    return taken


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["backend"], row["arm"], row["utt"], row["seed"], row["given"]


def _take_clip(job: Job, clip: Clip, other: Store, store: Store) -> None:
    """Take a clip in the order in which it is written."""
    store.remove_clip(job)
    if clip.has_audio:
        _take(other.wav(job), store.wav(job))
    if job.arm == "baseline":
        _take(other.sequence(job), store.sequence(job))
    store.add_clip(clip)
    _take(other.codes(job), store.codes(job))


def _take(source: Path, target: Path) -> None:
    if target.is_file():
        return
    with atomic_file(target, overwrite=True) as partial:
        partial.unlink()
        try:
            os.link(source, partial)  # runs replace their files and never write into them
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, partial)
