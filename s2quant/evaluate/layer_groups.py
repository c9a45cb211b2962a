"""Which layers do the damage: the baseline with the quantized weights of one group of layers, one group at a time.

Groups are runs of consecutive Slow AR blocks, as equal as can be, and the Fast AR as a whole. They share no module,
and every linear that can be quantized is in one of them: all groups at once are the quantized model. A group is an arm
like any other (`token_cache.py`), so what was measured once is not measured again. Both models are in memory while
groups are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

from s2quant.checkpoint.reader import Checkpoint
from s2quant.errors import UserError
from s2quant.evaluate.token_cache import Arm
from s2quant.evaluate.tokens import Part
from s2quant.files import sha256_text
from s2quant.model import DualAR, module_name
from s2quant.runtime.memory import release_memory


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Some layers.

    Args:
        part: "slow": blocks of the Slow AR; "fast": the whole Fast AR, its projections and embeddings too.
        layers: Which blocks of that part, consecutive.
    """

    part: Part
    layers: range

    @property
    def name(self) -> str:
        """Such as "slow 0-8", "slow 3" or "fast"; names what is replaced, for the cache as for people."""
        if self.part == "fast":
            return "fast"
        first, last = self.layers[0], self.layers[-1]
        return f"slow {first}" if first == last else f"slow {first}-{last}"

    def has(self, module: str) -> bool:
        """Tell whether a module is in the group.

        Args:
            module: Its name on disk.

        Returns:
            Whether it is.
        """
        words = module_name(module).split(".")
        if words[0] != self.part:
            return False
        return self.part == "fast" or (words[1] == "layers" and int(words[2]) in self.layers)


def make_groups(num_slow: int, num_fast: int, count: int) -> list[LayerGroup]:
    """Cut a model into groups.

    Args:
        num_slow: Blocks of the Slow AR.
        num_fast: Blocks of the Fast AR.
        count: Groups of Slow AR blocks; the first ones have one more where it does not divide.

    Returns:
        `count` groups of the Slow AR from the bottom up, then the Fast AR.

    Raises:
        UserError: There are fewer blocks than groups, or no group is asked for.
    """
    if not 1 <= count <= num_slow:
        raise UserError(
            f"--layer-groups {count}", f"1 to {num_slow}, the blocks of the Slow AR", "give a number among these"
        )
    size, more = divmod(num_slow, count)
    starts = [number * size + min(number, more) for number in range(count + 1)]
    slow = [LayerGroup(part="slow", layers=range(*ends)) for ends in pairwise(starts)]
    return [*slow, LayerGroup(part="fast", layers=range(num_fast))]


def count_quantized(checkpoint: Checkpoint, groups: Sequence[LayerGroup]) -> list[int]:
    """Count the quantized modules of each group.

    Args:
        checkpoint: The model.
        groups: All of its groups.

    Returns:
        A number per group.
    """
    quantized = [name for name, module in checkpoint.modules.items() if module.bits is not None]
    counts = [sum(map(group.has, quantized)) for group in groups]
    assert sum(counts) == len(quantized), "a quantized module that is in no group, or in two"
    return counts


@contextmanager
def swapped(target: DualAR, source: DualAR, group: LayerGroup) -> Iterator[None]:
    """Give a model another one's modules of a group within a block; in place, and undone at the end.

    Args:
        target: The model that is changed.
        source: Whose modules it borrows; of the same sizes and on the same device.
        group: Which.

    Yields:
        Nothing.
    """
    if group.part == "fast":
        kept_fast = target.fast
        target.fast = source.fast
        try:
            yield
        finally:
            target.fast = kept_fast
        return
    ours, theirs = target.slow.layers, source.slow.layers
    kept = {index: ours[index] for index in group.layers}
    try:
        for index in group.layers:
            ours[index] = theirs[index]
        yield
    finally:
        for index, layer in kept.items():
            ours[index] = layer


@contextmanager
def group_arms(baseline: Arm, model: Arm, groups: Sequence[LayerGroup]) -> Iterator[Mapping[str, Arm]]:
    """Make an arm of every group: the baseline, in which that group is the model's.

    Args:
        baseline: The model that spoke.
        model: The quantized one.
        groups: The groups.

    Yields:
        Arms by the groups' names. Both models are loaded when the first one is; only the arm that was loaded last may
        be used. They are given back at the end of the block.
    """
    pair: list[DualAR] = []
    undo = ExitStack()

    def load(group: LayerGroup) -> DualAR:
        undo.close()
        if not pair:
            pair.extend((baseline.load(), model.load()))
        undo.enter_context(swapped(pair[0], pair[1], group))
        return pair[0]

    def arm(group: LayerGroup) -> Arm:
        return Arm(key=sha256_text(f"{baseline.key} {model.key} {group.name}"), load=lambda: load(group))

    try:
        yield {group.name: arm(group) for group in groups}
    finally:
        undo.close()
        pair.clear()
        release_memory()
