"""Several processes that quantize one model together, and end with the same bytes as one alone.

Batches belong to lanes, and lanes to processes. Each process runs the blocks on its own batches and sums their Hessian
products lane by lane; the sums of the lanes are added in one order, which does not depend on the processes. Linears of
a subset, or parts of one, are solved in turn by different processes, and what one found is sent to all; held-out
batches are shared as the others are.

Identical means bit for bit on devices of one kind with the same number of threads: each product and each solution is
computed by the same operations on the same numbers, whoever computes it. A `UserError` that one process meets in a
task of its own, or in what it makes of what all `gather`, is raised in all; other errors, such as a lack of memory, and
one in what each does for itself, such as loading, are not.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from s2quant.errors import DiskError, OutOfMemory, S2QuantError, UserError, VerificationError
from s2quant.packing import QuantizedWeight
from s2quant.quantize.hessian import Hessian, Product
from s2quant.quantize.rows import Part

T = TypeVar("T")
Key = TypeVar("Key", int, str)
LONGEST_WAIT = timedelta(days=7)  # a process may have nothing left to do long before the others
SMALL_BYTES = 8192  # of an object that is exchanged by a GPU, with its length
KINDS: Mapping[str, Callable[..., S2QuantError]] = {
    kind.__name__: kind for kind in (UserError, DiskError, OutOfMemory, VerificationError)
}
LANES = 4  # sums of batches that processes share; more processes than that have no batches, only linears
Task = Callable[[], Part]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One process among those that quantize together; the default is one alone.

    Args:
        rank: Its number, from 0.
        world: Their number.
        group: torch's group for tensors on the device; None is the default group.
        device: A GPU by which small objects are exchanged; None: by the host.
    """

    rank: int = 0
    world: int = 1
    group: Any = None
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Send something small between GPUs, as the first time takes seconds; beside what goes by the host, if need be.

        Args:
            device: Where tensors will be sent from.
        """
        if self.group is not None:
            dist.broadcast(torch.zeros(1, device=device), 0, group=self.group)

    def owns(self, index: int) -> bool:
        """Tell whether a linear of a subset is this process's.

        Args:
            index: Its number.

        Returns:
            True for every world-th.
        """
        return index % self.world == self.rank

    def owns_by_size(self, index: int) -> bool:
        """Tell whether a group of lines is this process's, where the first ones are the largest.

        Args:
            index: Its number.

        Returns:
            True for every world-th, going back and forth among the processes, so that all have about as much.
        """
        turn, place = divmod(index, self.world)
        return (self.world - 1 - place if turn % 2 else place) == self.rank

    def owns_batch(self, index: int) -> bool:
        """Tell whether a batch is this process's.

        Args:
            index: Its number.

        Returns:
            True for all batches of one lane in `world`.
        """
        return index % LANES % self.world == self.rank

    def share_batches(self, parts: Mapping[int, Tensor]) -> Tensor:
        """Give all processes what the owners of batches have.

        Args:
            parts: By batch [R, K], each what its owner has; in others of the same size and type, overwritten.

        Returns:
            All, one behind the other; empty [0, 0] without batches.
        """
        if self.world > 1:
            for index, part in parts.items():
                if part.numel():
                    dist.broadcast(part.view(torch.uint8), index % LANES % self.world, group=self.group)
        return torch.cat(list(parts.values())) if parts else torch.empty(0, 0)

    def sum(
        self, hessian: Hessian, counts: Sequence[tuple[int, float]], product_of: Callable[[int], Product | None]
    ) -> None:
        """Add the products of all batches, in place; each is computed by the process that owns it.

        Batches of a lane are added in their order, then the lanes in pairs, (0 + 2) + (1 + 3): always the same sums,
        whoever makes them. So only sums of lanes have to be sent. A batch of which no row counts adds nothing. Inputs
        that are not finite are noted in the Hessian of every process; nothing here waits for the device.

        Args:
            hessian: The sum; nothing has been added to it.
            counts: Rows that count and the sum of their weights, of every batch, the same in every process.
            product_of: Computes the product of one of this process's batches; None where no row counts.
        """
        if not any(count for count, _ in counts):
            return
        lanes: dict[int, Tensor] = {}
        num_bad = torch.zeros((), dtype=torch.int64, device=hessian.device)
        for lane in filter(self.owns_batch, range(LANES)):
            for index in range(lane, len(counts), LANES):
                product = product_of(index)
                if product is None:
                    continue
                num_bad += product.num_bad
                lanes[lane] = lanes[lane].add_(product.matrix) if lane in lanes else product.matrix
                del product  # before the next one is made
        _, whole = self._add_up(hessian, lanes, tuple(range(LANES)))
        if self.world > 1:
            dist.all_reduce(num_bad, group=self.group)
        num_tokens = sum(count for count, _ in counts)
        hessian.accumulate(Product(matrix=whole, num_tokens=num_tokens, total=_in_order(counts), num_bad=num_bad))

    def _add_up(self, hessian: Hessian, sums: dict[int, Tensor], lanes: tuple[int, ...]) -> tuple[int | None, Tensor]:
        """Add the sums of lanes in pairs; give the process that has the result (None: all do), and it, or anything."""
        if len(lanes) == 1:
            single = lanes[0] % self.world
            if lanes[0] not in sums:  # another's, or without a row that counts
                size = hessian.in_features if single == self.rank else 0
                return single, torch.zeros(size, size, device=hessian.device)
            return single, sums.pop(lanes[0])
        (owner, left), (other, right) = (self._add_up(hessian, sums, lanes[start::2]) for start in range(2))
        if owner != other and self.world == 2:
            return None, self._swapped(left if owner == self.rank else right, 1 - self.rank)
        if owner != other:
            return None, self._sent(hessian, owner, left).add_(self._sent(hessian, other, right))
        return owner, left.add_(right)

    def _swapped(self, mine: Tensor, partner: int) -> Tensor:
        """Add a partner's matrix to this process's while it gets this one's: a sum of two is the same either way."""
        theirs = torch.empty_like(mine)
        ways = ((dist.isend, mine), (dist.irecv, theirs))
        works = dist.batch_isend_irecv([dist.P2POp(way, matrix, partner, self.group) for way, matrix in ways])
        for work in works:
            work.wait()
        return mine.add_(theirs)

    def _sent(self, hessian: Hessian, owner: int | None, matrix: Tensor) -> Tensor:
        """Give all processes a matrix that one has, or all have."""
        if owner is None:
            return matrix
        if owner != self.rank:
            matrix = torch.empty(hessian.in_features, hessian.in_features, device=hessian.device)
        dist.broadcast(matrix, owner, group=self.group)
        return matrix

    def solve(self, tasks: Sequence[Task], device: torch.device) -> list[Part]:
        """Work on tasks side by side, each in one process, and give all results to all.

        Args:
            tasks: The same list in every process.
            device: Where the results are wanted.

        Returns:
            One result per task, in order.

        Raises:
            UserError: A task raised one; raised in every process.
        """
        if self.world == 1:
            return [task() for task in tasks]
        mine: dict[int, Part] = {}
        facts: dict[int, Any] = {}
        for index in filter(self.owns, range(len(tasks))):
            try:
                part = mine[index] = tasks[index]()
            except UserError as error:
                facts[index] = _fault(error)
                continue
            sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in part.weight.tensors.items()}
            facts[index] = (part.stats, part.squares, sizes, part.weight.bits, part.weight.group_size)
        found = self.merge(facts, at_once=True)
        for told in found.values():
            _raise(told if isinstance(told, dict) else None)
        return [self._share(mine.get(index), told, index % self.world, device) for index, told in found.items()]

    def agree(self, value: T) -> T:
        """Take the first process's value of something that others may see otherwise, such as whether a file exists.

        Args:
            value: This process's.

        Returns:
            The first process's.
        """
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def once(self, action: Callable[[], T]) -> T:
        """Let the first process do something that is done once; the others wait for it.

        Args:
            action: What is done.

        Returns:
            What the first process got.

        Raises:
            UserError: The action raised one; raised in every process.
            VerificationError: As UserError.
        """
        if self.world == 1:
            return action()
        result: list[T] = []
        error: S2QuantError | None = None
        if self.is_first:
            try:
                result.append(action())
            except S2QuantError as caught:
                error = caught
        fault, result = self.agree((None if error is None else _fault(error), result))
        if error is not None:
            raise error
        _raise(fault)
        return result[0]

    def gather(self, action: Callable[[], Mapping[Key, T]]) -> dict[Key, T]:
        """Put together what all processes make, each a part; none waits for one that could not.

        Args:
            action: Makes this process's part; no key is in two parts.

        Returns:
            All parts, by key in order.

        Raises:
            UserError: The action raised one in any process; raised in every process.
            VerificationError: As UserError.
        """
        if self.world == 1:
            return dict(sorted(action().items()))
        mine: Mapping[Key, T] = {}
        error: S2QuantError | None = None
        try:
            mine = action()
        except S2QuantError as caught:
            error = caught
        told = self.merge({self.rank: (None if error is None else _fault(error), mine)})
        if error is not None:
            raise error
        for fault, _ in told.values():
            _raise(fault)
        return dict(sorted(item for _, part in told.values() for item in part.items()))

    def merge(self, mine: Mapping[Key, T], at_once: bool = False) -> dict[Key, T]:
        """Put together what all processes have.

        Args:
            mine: This process's part; no key is in two parts.
            at_once: Whether the others are there already, or will be soon, so that a GPU may wait for them.

        Returns:
            All parts, by key in order.
        """
        parts: list[Mapping[Key, T]] = [mine] * self.world
        if self.world > 1:
            small = self._small(mine, self.device) if at_once and self.device is not None else None
            if small is None:
                dist.all_gather_object(parts, mine)
            else:
                parts = small
        return dict(sorted(item for part in parts for item in part.items()))

    def _small(self, mine: T, device: torch.device) -> list[T] | None:
        """Gather objects of a few thousand bytes by the GPU; None, in all processes, if one is larger.

        By the host that takes milliseconds where threads read and write files beside it.
        """
        data = pickle.dumps(mine)
        told = torch.zeros(SMALL_BYTES, dtype=torch.uint8)
        told[:8] = torch.tensor([len(data)]).view(torch.uint8)
        if len(data) <= SMALL_BYTES - 8:
            told[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = torch.empty(self.world, SMALL_BYTES, dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(found, told.to(device)[None], group=self.group)
        whole = [row.numpy().tobytes() for row in found.cpu()]
        sizes = [int.from_bytes(row[:8], sys.byteorder) for row in whole]
        if max(sizes) > SMALL_BYTES - 8:
            return None
        return [pickle.loads(row[8 : 8 + size]) for row, size in zip(whole, sizes, strict=True)]

    def _share(self, result: Part | None, facts: Any, owner: int, device: torch.device) -> Part:
        """Send one result from its owner to all, its tensors in one piece."""
        stats, squares, sizes, bits, group_size = facts
        if result is not None:
            pieces = [tensor.to(device).contiguous() for tensor in result.weight.tensors.values()]
            whole = torch.cat([piece.flatten().view(torch.uint8) for piece in pieces])
        else:
            num_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in sizes.values())
            whole = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        dist.broadcast(whole, owner, group=self.group)
        parts = whole.split([shape.numel() * dtype.itemsize for shape, dtype in sizes.values()])
        tensors = {
            name: part.view(dtype).view(shape)
            for part, (name, (shape, dtype)) in zip(parts, sizes.items(), strict=True)
        }
        return Part(weight=QuantizedWeight(**tensors, bits=bits, group_size=group_size), stats=stats, squares=squares)


def _in_order(counts: Iterable[tuple[int, float]]) -> float:
    """Add the weights of batches one by one; `sum` compensates for rounding since Python 3.12, but not before."""
    total = 0.0
    for _, weight in counts:
        total += weight
    return total


def _fault(error: S2QuantError) -> dict[str, Any]:
    """Say what an error is, so that another process can raise it."""
    return {"kind": type(error).__name__} | vars(error)


def _raise(fault: Mapping[str, Any] | None) -> None:
    """Raise another process's error, if it has one."""
    if fault is not None:
        raise KINDS[fault["kind"]](**{name: value for name, value in fault.items() if name != "kind"})


def join_exchange(rank: int, world: int, device: torch.device) -> Exchange:
    """Take part in an exchange; the processes have joined torch's default group, on the CPU's backend.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where this process works; on CUDA, tensors go by NCCL.

    Returns:
        This process's exchange.
    """
    if world == 1 or device.type != "cuda":
        return Exchange(rank=rank, world=world)
    return Exchange(rank=rank, world=world, group=dist.new_group(backend="nccl", timeout=LONGEST_WAIT), device=device)
