"""What a run of a suite has to do: arms, utterances, seeds, metrics, and which clips are compared with which.

The floor is the baseline with other seeds; its i-th seed is paired with the i-th seed of the two arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.records import Arm
from s2quant.runtime.linears import Backend
from s2quant.runtime.speech import DecoderKind
from s2quant.suite import METRICS, Suite, Utterance, load_suite

Key = tuple[Arm, str, int]
"""(arm, utterance id, seed) names a clip."""
ALIASES = {"sim": "similarity"}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `s2quant eval` is asked for.

    Args:
        suite: The suite's file.
        model: Checkpoint folder to be judged.
        out: The run's folder.
        baseline: Checkpoint folder to compare with, or None for absolute figures only.
        texts: The user's copy of the list that the suite is about, see `load_suite`.
        limit: Most utterances, the first ones of the suite; None for all.
        seeds: Seeds instead of the suite's; None for those.
        metrics: Metrics instead of the suite's; None for those.
        resume: Whether to go on with the run in `out`.
        device: cpu, cuda or cuda:N.
        dtype: Name of the models' dtype.
        linears: Backend of quantized linears.
        decoder: How frames are made, see `Engine`.
        asr_model: Recognizer's file, instead of the suite's.
        similarity_model: Speaker model's file or folder, instead of the suite's.
        num_slots: Utterances in progress at a time.
        baseline_run: Folder of another run of the suite, whose clips of the baseline are taken; None to speak anew.
        layer_groups: Into how many groups of Slow AR blocks the token damage is split, the Fast AR being one more;
            None for no split.
    """

    suite: Path
    model: Path
    out: Path
    baseline: Path | None = None
    texts: Path | None = None
    limit: int | None = None
    seeds: tuple[int, ...] | None = None
    metrics: tuple[str, ...] | None = None
    resume: bool = False
    device: str = "cpu"
    dtype: str = "bfloat16"
    linears: Backend = "auto"
    decoder: DecoderKind = "auto"
    asr_model: str | None = None
    similarity_model: str | None = None
    num_slots: int = 8
    baseline_run: Path | None = None
    layer_groups: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to be made and measured.

    Args:
        arm: Whose.
        utterance: What is spoken.
        seed: Its seed.
        pair: Place of the seed among the arm's; clips of different arms with the same place are compared.
    """

    arm: Arm
    utterance: Utterance
    seed: int
    pair: int

    @property
    def key(self) -> Key:
        """Names the clip."""
        return (self.arm, self.utterance.id, self.seed)

    @property
    def stem(self) -> str:
        """File name of the clip, without suffix."""
        return f"{self.utterance.id}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """A suite as it is run.

    Args:
        suite: The suite.
        utterances: What is spoken.
        seeds: Seeds of the arms.
        floor_seeds: Seeds of the floor; empty without a floor.
        metrics: What is measured.
        arms: Some of "baseline", "model", "floor", in this order.
        asr_model: The recognizer's file.
        similarity_model: The speaker model's file or folder.
    """

    suite: Suite
    utterances: tuple[Utterance, ...]
    seeds: tuple[int, ...]
    floor_seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    arms: tuple[Arm, ...]
    asr_model: str | None
    similarity_model: str | None

    def jobs(self, arm: Arm | None = None) -> list[Job]:
        """List the clips of an arm, or of all.

        Args:
            arm: The arm, or None for all of the plan.

        Returns:
            Sorted by arm, utterance, seed, in the order of the plan.
        """
        return [
            Job(arm=one, utterance=utterance, seed=seed, pair=pair)
            for one in (self.arms if arm is None else (arm,))
            for utterance in self.utterances
            for pair, seed in enumerate(self.floor_seeds if one == "floor" else self.seeds)
        ]

    def groups(self) -> list[list[Job]]:
        """Put together the clips that are compared.

        Returns:
            For each utterance and place of a seed, the clips of all arms.
        """
        found: dict[tuple[str, int], list[Job]] = {}
        for job in self.jobs():
            found.setdefault((job.utterance.id, job.pair), []).append(job)
        return list(found.values())


def make_plan(options: EvalOptions) -> EvalPlan:
    """Read the suite and cut it to what was asked for.

    Args:
        options: What was asked for.

    Returns:
        The plan.

    Raises:
        UserError: The suite is wrong, or an option is out of range; every offender is listed.
    """
    metrics = None if options.metrics is None else [ALIASES.get(name, name) for name in options.metrics]
    _check(options, metrics)
    suite = load_suite(options.suite, options.texts)
    seeds = suite.seeds if options.seeds is None else options.seeds
    chosen = suite.metrics if metrics is None else tuple(name for name in METRICS if name in metrics)
    has_baseline = options.baseline is not None
    if options.layer_groups is not None and not (has_baseline and "tokens" in chosen):
        raise UserError(
            f"--layer-groups {options.layer_groups} without " + ("--metrics tokens" if has_baseline else "--baseline"),
            "token metrics, which compare two models",
            "add it, or leave --layer-groups out",
        )
    floor_seeds = _floor_seeds(seeds, suite.floor_seeds) if has_baseline else ()
    arms: tuple[Arm, ...] = ("baseline", "model") if has_baseline else ("model",)
    return EvalPlan(
        suite=suite,
        utterances=suite.utterances[: options.limit],
        seeds=seeds,
        floor_seeds=floor_seeds,
        metrics=chosen if has_baseline else tuple(name for name in chosen if name != "tokens"),
        arms=(*arms, "floor") if floor_seeds else arms,
        asr_model=options.asr_model or suite.asr_model,
        similarity_model=options.similarity_model or suite.similarity_model,
    )


def _check(options: EvalOptions, metrics: Sequence[str] | None) -> None:
    faults = []
    if options.limit is not None and options.limit < 1:
        faults.append(f"--limit {options.limit}, not positive")
    if options.num_slots < 1:
        faults.append(f"--slots {options.num_slots}, not positive")
    if options.seeds is not None:
        seeds = options.seeds
        if not seeds or len(set(seeds)) < len(seeds) or any(not 0 <= seed < 2**63 for seed in seeds):
            faults.append(f"--seeds {','.join(map(str, seeds))}, not different whole numbers from 0")
    if options.baseline_run is not None and options.baseline is None:
        faults.append(f"--baseline-run {options.baseline_run} without --baseline")
    if metrics is not None:
        unknown = [name for name in metrics if name not in METRICS]
        faults += [f"--metrics {name!r}, not one of {', '.join(METRICS)}" for name in unknown]
        faults += [] if metrics else ["--metrics is empty"]
        if "tokens" in metrics and options.baseline is None:
            faults.append("--metrics tokens without --baseline: they compare two models")
    if faults:
        raise UserError(shorten_list(faults), "options in range", "correct them")


def _floor_seeds(seeds: Sequence[int], floor: Sequence[int]) -> tuple[int, ...]:
    """Choose as many seeds for the floor as the arms have, none of them the arms'; none when the suite has no floor."""
    if not floor:
        return ()
    free = [seed for seed in floor if seed not in seeds]
    following = max(*seeds, *floor) + 1
    missing = max(0, len(seeds) - len(free))
    return (*free[: len(seeds)], *range(following, following + missing))


def suite_facts(plan: EvalPlan) -> dict[str, Any]:
    """Name what is spoken and how, for the results.

    Args:
        plan: The plan.

    Returns:
        The object `suite` of results.json, without the back ends.
    """
    sampling = plan.suite.sampling
    return {
        "name": plan.suite.name,
        "version": plan.suite.version,
        "sha256": plan.suite.sha256,
        "num_utterances": len(plan.utterances),
        "num_utterances_in_suite": len(plan.suite.utterances),
        "seeds": list(plan.seeds),
        "floor_seeds": list(plan.floor_seeds),
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k},
        "max_frames": plan.suite.max_frames,
        "metrics": list(plan.metrics),
        "normalizer": plan.suite.normalizer,
    }
