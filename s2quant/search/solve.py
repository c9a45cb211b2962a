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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    yield _solution(chosen, fixed_bytes)
    for step in steps:
        chosen[step.name] = step.after
        yield _solution(chosen, fixed_bytes)


def _start(items: Sequence[Item]) -> tuple[dict[str, Choice], list[Step]]:
    hulls = {item.name: hull(item.choices) for item in items}
    steps = [
        Step(name=name, before=before, after=after)
        for name, choices in hulls.items()
        for before, after in pairwise(choices)
    ]
    return {name: choices[0] for name, choices in hulls.items()}, sorted(steps, key=lambda step: step.order)


def _solution(chosen: Mapping[str, Choice], fixed_bytes: int) -> Solution:
    damage = _damage(chosen)
    return Solution(choices=dict(chosen), num_bytes=fixed_bytes + _size(chosen), damage=damage, bound=damage)


def _size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.num_bytes for choice in chosen.values())


def _damage(chosen: Mapping[str, Choice]) -> float:
    return math.fsum(choice.damage for choice in chosen.values())


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
    size = fixed_bytes + _size(chosen)
    bound = None
    for step in steps:
        if size <= budget:
            break
        bound = _damage(chosen) + step.damage * min(1.0, (size - budget) / step.saved)
        chosen[step.name] = step.after
        size -= step.saved
    if size > budget:
        raise UserError(
            f"a budget of {budget:,} bytes",
            f"at least {size:,} bytes: every linear at its smallest, and {fixed_bytes:,} bytes that stay as they are",
            "raise --budget, or measure fewer bits",
        )
    _spend(items, chosen, budget - fixed_bytes, cost=lambda choice: choice.num_bytes, goal=lambda choice: choice.damage)
    found = _solution(chosen, fixed_bytes)
    return found if bound is None else replace(found, bound=min(bound, found.damage))


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
    damage = _damage(chosen)
    if damage > target:
        raise UserError(
            f"a target of {target:g} nats per frame",
            f"at least {damage:g}, which is the least that was measured",
            "raise --target-kl",
        )
    bound: float | None = None
    for step in steps:
        after = chosen | {step.name: step.after}
        total = _damage(after)
        if total > target:
            bound = fixed_bytes + _size(chosen) - step.saved * (target - damage) / step.damage
            break
        chosen, damage = after, total
    _spend(items, chosen, target, cost=lambda choice: choice.damage, goal=lambda choice: choice.num_bytes)
    found = _solution(chosen, fixed_bytes)
    return replace(found, bound=float(found.num_bytes) if bound is None else bound)


def _spend(
    items: Sequence[Item],
    chosen: dict[str, Choice],
    limit: float,
    *,
    cost: Callable[[Choice], float],
    goal: Callable[[Choice], float],
) -> None:
    """Change choices, in place, while their cost in all stays within the limit: always what brings the goal down most.

    Args:
        items: The units.
        chosen: The choice of each.
        limit: The most that all choices may cost.
        cost: What a choice takes of the limit: bytes of a budget, or damage of a target.
        goal: What is to become small: the other one.
    """
    while True:
        spare = limit - math.fsum(cost(choice) for choice in chosen.values())
        better = [
            (goal(choice) - goal(now), item.name, cost(choice), choice)
            for item in items
            for now in [chosen[item.name]]
            for choice in item.choices
            if goal(choice) < goal(now) and cost(choice) - cost(now) <= spare
        ]
        if not better:
            return
        _, name, _, choice = min(better, key=lambda one: one[:3])
        chosen[name] = choice
