"""The best choice of bits for each unit: least damage within a size, or least size within a damage.

It is the multiple-choice knapsack problem. Of each unit's choices only those on the lower convex hull of damage over
size matter at first; steps down the hulls of all units, cheapest damage per byte saved first, pass through choices
that are the best there are at exactly their sizes. Between two such steps the linear program (a fraction of a step)
gives a bound that no choice can beat. What is left of the budget is then filled, always with what helps most.
Everything is deterministic: ties go by name.

Source: Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from s2quant.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to store a unit.

    Args:
        bits: Bits per weight; 16 means that it is kept.
        num_bytes: Its size.
        damage: Nats per frame.
    """

    bits: int
    num_bytes: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Item:
    """A unit with its choices.

    Args:
        name: The unit's name.
        choices: At least one.
    """

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step down a unit's hull.

    Args:
        name: The unit.
        before: The choice left.
        after: The smaller choice taken.
    """

    name: str
    before: Choice
    after: Choice

    @property
    def saved(self) -> int:
        """Bytes saved, above 0."""
        return self.before.num_bytes - self.after.num_bytes

    @property
    def damage(self) -> float:
        """Damage added, above 0."""
        return self.after.damage - self.before.damage

    @property
    def order(self) -> tuple[float, str, int]:
        """Key by which steps are taken: damage per byte, then name; larger choices first."""
        return (self.damage / self.saved, self.name, -self.before.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What was found.

    Args:
        choices: By unit.
        num_bytes: Of the whole checkpoint.
        damage: Sum over the units, nats per frame.
        bound: What no choice can be below: a damage within a budget, or a size in bytes within a damage.
    """

    choices: Mapping[str, Choice]
    num_bytes: int
    damage: float
    bound: float


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Keep the choices on the lower convex hull of damage over size.

    Args:
        choices: Any number, at least one.

    Returns:
        From the least damage to the least size, each smaller and worse than the one before, at rising cost per byte.
    """
    order = sorted(choices, key=lambda one: (one.damage, one.num_bytes, one.bits))
    kept: list[Choice] = []
    for one in order:
        if kept and one.num_bytes >= kept[-1].num_bytes:
            continue  # as large and not better
        while len(kept) > 1 and _cost(kept[-2], kept[-1]) >= _cost(kept[-2], one):
            kept.pop()
        kept.append(one)
    return kept


def _cost(before: Choice, after: Choice) -> float:
    return (after.damage - before.damage) / (before.num_bytes - after.num_bytes)


def walk(items: Sequence[Item], fixed_bytes: int) -> Iterator[Solution]:
    """Go along the best choices, from the least damage to the least size.

    Args:
        items: The units.
        fixed_bytes: Bytes of everything else.

    Yields:
        Solutions that are the best at their size; the bound is their own damage.
    """
    chosen, steps = _start(items)
    yield _solution(chosen, fixed_bytes, None)
    for step in steps:
        chosen[step.name] = step.after
        yield _solution(chosen, fixed_bytes, None)


def _start(items: Sequence[Item]) -> tuple[dict[str, Choice], list[Step]]:
    hulls = {item.name: hull(item.choices) for item in items}
    steps = [
        Step(name=name, before=before, after=after)
        for name, choices in hulls.items()
        for before, after in pairwise(choices)
    ]
    return {name: choices[0] for name, choices in hulls.items()}, sorted(steps, key=lambda step: step.order)


def _solution(chosen: Mapping[str, Choice], fixed_bytes: int, bound: float | None) -> Solution:
    damage = math.fsum(choice.damage for choice in chosen.values())
    return Solution(
        choices=dict(chosen),
        num_bytes=fixed_bytes + sum(choice.num_bytes for choice in chosen.values()),
        damage=damage,
        bound=damage if bound is None else bound,
    )


def least_damage(items: Sequence[Item], fixed_bytes: int, budget: int) -> Solution:
    """Find the choice of least damage within a size.

    Args:
        items: The units.
        fixed_bytes: Bytes of everything else.
        budget: The most bytes in all.

    Returns:
        The choice; its bound is a damage.

    Raises:
        UserError: Nothing is that small.
    """
    chosen, steps = _start(items)
    size = fixed_bytes + sum(choice.num_bytes for choice in chosen.values())
    bound = 0.0
    for step in steps:
        if size <= budget:
            break
        before = math.fsum(choice.damage for choice in chosen.values())
        bound = before + step.damage * min(1.0, (size - budget) / step.saved)
        chosen[step.name] = step.after
        size -= step.saved
    if size > budget:
        raise UserError(
            f"a budget of {budget:,} bytes",
            f"at least {size:,} bytes: every linear at its smallest, and {fixed_bytes:,} bytes that stay as they are",
            "raise --budget, or measure fewer bits",
        )
    _fill(items, chosen, budget - size)
    found = _solution(chosen, fixed_bytes, None)
    return _solution(chosen, fixed_bytes, min(bound, found.damage) if bound else found.damage)


def _fill(items: Sequence[Item], chosen: dict[str, Choice], spare: int) -> None:
    """Spend spare bytes, in place, always on the choice that takes away most damage."""
    while True:
        better = [
            (choice.damage - chosen[item.name].damage, item.name, choice.num_bytes, choice)
            for item in items
            for choice in item.choices
            if choice.damage < chosen[item.name].damage and choice.num_bytes - chosen[item.name].num_bytes <= spare
        ]
        if not better:
            return
        _, name, size, choice = min(better, key=lambda one: one[:3])
        spare -= size - chosen[name].num_bytes
        chosen[name] = choice


def least_size(items: Sequence[Item], fixed_bytes: int, target: float) -> Solution:
    """Find the smallest choice within a damage.

    Args:
        items: The units.
        fixed_bytes: Bytes of everything else.
        target: The most damage, nats per frame.

    Returns:
        The choice; its bound is a size in bytes.

    Raises:
        UserError: Nothing is that harmless.
    """
    chosen, steps = _start(items)
    damage = math.fsum(choice.damage for choice in chosen.values())
    if damage > target:
        raise UserError(
            f"a target of {target:g} nats per frame",
            f"at least {damage:g}, which is the least that was measured",
            "raise --target-kl",
        )
    bound: float | None = None
    for step in steps:
        after = dict(chosen) | {step.name: step.after}
        total = math.fsum(choice.damage for choice in after.values())
        if total > target:
            size = fixed_bytes + sum(choice.num_bytes for choice in chosen.values())
            bound = size - step.saved * (target - damage) / step.damage
            break
        chosen, damage = after, total
    _shrink(items, chosen, target)
    found = _solution(chosen, fixed_bytes, None)
    return _solution(chosen, fixed_bytes, float(found.num_bytes) if bound is None else bound)


def _shrink(items: Sequence[Item], chosen: dict[str, Choice], target: float) -> None:
    """Spend spare damage, in place, always on the choice that saves most bytes."""
    while True:
        spare = target - math.fsum(choice.damage for choice in chosen.values())
        smaller = [
            (choice.num_bytes - chosen[item.name].num_bytes, item.name, choice.damage, choice)
            for item in items
            for choice in item.choices
            if choice.num_bytes < chosen[item.name].num_bytes and choice.damage - chosen[item.name].damage <= spare
        ]
        if not smaller:
            return
        _, name, _, choice = min(smaller, key=lambda one: one[:3])
        chosen[name] = choice
