"""Which clips are spoken together: a clip's codes depend on who else is in progress, so this is decided by the plan.

Who else is in progress can move the last bit of a sum, on a GPU above all, and so a code: in bfloat16 many clips come
out otherwise in other company. Jobs are therefore spoken in groups, each by itself and as a whole. They are cut from
all jobs of the plan, whoever speaks them, however many processes share them, and whatever a stopped run had done; so
every clip has the companions that it has in a run that nothing stopped.

A group's name is the hash of its jobs and of the slots; every clip keeps the name of the group that it was spoken in.
A plan with more or fewer utterances or seeds cuts other groups where the lists differ, and clips of a group that the
plan has not are no clips of that plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from s2quant.evaluate.plan import EvalPlan, Job, Key
from s2quant.files import sha256_text

GROUP_ROUNDS = 4  # jobs of a group for each slot: fewer leave slots empty at its end, more leave processes idle


@dataclass(frozen=True, kw_only=True)
class Group:
    """Jobs that are spoken together.

    Args:
        engine: Who speaks them, "baseline" or "model".
        jobs: The jobs, in the order of the plan.
        name: Hexadecimal digits, of the jobs and the slots.
    """

    engine: str
    jobs: tuple[Job, ...]
    name: str


def cut_groups(plan: EvalPlan, engines: Iterable[str], num_slots: int) -> list[Group]:
    """Cut a plan into groups.

    Args:
        plan: The plan.
        engines: "baseline" (which speaks the floor, too), "model", or both.
        num_slots: Slots of the engines.

    Returns:
        The groups of each engine, GROUP_ROUNDS jobs for each slot; the last one of an arm may have fewer. No group has
        jobs of two arms, so that clips of the model have the companions of the baseline's.
    """
    size = GROUP_ROUNDS * num_slots
    found = []
    arms = dict.fromkeys(job.arm for job in plan.jobs())
    for engine, arm in ((engine, arm) for engine in engines for arm in arms):
        own = [job for job in plan.jobs() if job.arm == arm and (arm == "model") == (engine == "model")]
        for start in range(0, len(own), size):
            jobs = tuple(own[start : start + size])
            name = sha256_text(json.dumps([num_slots, [job.key for job in jobs]]))[:24]
            found.append(Group(engine=engine, jobs=jobs, name=name))
    return found


def group_names(groups: Iterable[Group]) -> dict[Key, str]:
    """Tell in which group each clip is spoken.

    Args:
        groups: The groups.

    Returns:
        Name of the group by the clip's key.
    """
    return {job.key: group.name for group in groups for job in group.jobs}
