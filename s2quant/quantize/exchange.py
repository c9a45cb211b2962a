"""Several processes that quantize one model together, and end with the same bytes as one alone.

Batch b belongs to process b mod n. Each runs the blocks on its own batches and computes their Hessian products; of n
consecutive batches each process is sent the rows of which it keeps the sum, and adds them in the order of the batches,
so that all rows together are the sum that one alone would have. Linears of a subset are solved in turn by different
processes, and what one found is sent to all; held-out batches are shared as the others are.

Identical means bit for bit on devices of one kind with the same number of threads: each product and each solution is
computed by the same operations on the same numbers, whoever computes it. A `UserError` that one process meets in its
share is raised in all; other errors, such as a lack of memory, and one in what each does for itself, such as loading,
are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from s2quant.errors import S2QuantError, UserError, VerificationError
from s2quant.packing import QuantizedWeight
from s2quant.quantize.hessian import Hessian, Product
from s2quant.quantize.stats import QuantStats

T = TypeVar("T")
Key = TypeVar("Key", int, str)
WEIGHT_TENSORS = ("codes", "scales", "zeros", "g_idx")
Found = tuple[QuantizedWeight, QuantStats]
"""A quantized linear, or some of its outputs, and what happened."""
Task = Callable[[], Found]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One process among those that quantize together; the default is one alone.

    Args:
        rank: Its number, from 0.
        world: Their number.
        group: torch's group for tensors on the device; None is the default group.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Tell whether a batch, or a linear of a subset, is this process's.

        Args:
            index: Its number.

        Returns:
            True for every world-th.
        """
        return index % self.world == self.rank

    def sum(self, hessian: Hessian, num_batches: int, product_of: Callable[[int], Product | None]) -> None:
        """Add the products of all batches in their order, in place; each is computed by the process that owns it.

        Every process adds up a block of rows: of each round of products, one of each process, it is sent its block by
        all, while the next product is being computed. In the end everybody is sent all blocks. The numbers are added
        in the order of the batches, so the sum is that of one process alone; a batch of which no row counts adds
        zeros.

        Args:
            hessian: The sum; nothing has been added to it.
            num_batches: Batches.
            product_of: Computes the product of one of this process's batches; None where no row counts.

        Raises:
            UserError: A product raised one, or an input is NaN or infinite; raised in every process.
        """
        counts: dict[int, tuple[int, float, Tensor]] = {}
        if self.world == 1:
            for index in range(num_batches):
                product = product_of(index)
                if product is not None:
                    counts[index] = product.num_tokens, product.total, product.num_bad
                    hessian.accumulate(product)
                del product  # before the next one is made
            _checked(hessian, counts, None)
            return
        inputs = hessian.in_features
        bounds = [inputs * rank // self.world for rank in range(self.world + 1)]
        sizes = [bounds[rank + 1] - bounds[rank] for rank in range(self.world)]
        rows = sizes[self.rank]
        total = torch.zeros(rows, inputs, device=hessian.device)
        error: UserError | None = None
        under_way: tuple[Any, Tensor, Tensor] | None = None

        def add(under_way: tuple[Any, Tensor, Tensor]) -> None:
            work, _sent, received = under_way
            work.wait()
            for block in received.view(self.world, rows, inputs):
                total.add_(block)

        for start in range(0, num_batches, self.world):
            index, product = start + self.rank, None
            if index < num_batches and error is None:
                try:
                    product = product_of(index)
                except UserError as caught:  # the others are told at the end
                    error = caught
            if product is not None:
                counts[index] = product.num_tokens, product.total, product.num_bad
            sent = torch.zeros(inputs, inputs, device=hessian.device) if product is None else product.matrix
            if under_way is not None:
                add(under_way)
                under_way = None  # its tensors make room
            received = torch.empty(self.world * rows, inputs, device=hessian.device)
            work = dist.all_to_all_single(received, sent, [rows] * self.world, sizes, group=self.group, async_op=True)
            under_way = work, sent, received
            del product, sent, received
        if under_way is not None:
            add(under_way)
            under_way = None
        found = self.gather(partial(_checked, hessian, counts, error))
        if not found:
            return
        whole = torch.empty(inputs, inputs, device=hessian.device)
        whole[bounds[self.rank] : bounds[self.rank + 1]] = total
        for rank, size in enumerate(sizes):
            if size:
                dist.broadcast(whole[bounds[rank] : bounds[rank + 1]], rank, group=self.group)
        num_tokens = sum(count for count, _ in found.values())
        product = Product(
            matrix=whole,
            num_tokens=num_tokens,
            total=_in_order(found.values()),
            num_bad=torch.zeros((), dtype=torch.int64, device=whole.device),
        )
        hessian.accumulate(product)

    def solve(self, tasks: Sequence[Task], device: torch.device) -> list[Found]:
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
        mine: dict[int, Found | UserError] = {}
        for index, task in enumerate(tasks):
            if self.owns(index):
                try:
                    mine[index] = task()
                except UserError as error:
                    mine[index] = error
        return [self._share(mine.get(index), index % self.world, device) for index in range(len(tasks))]

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
        fault, result = self.agree((None if error is None else vars(error), result))
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
        faults = self.merge({self.rank: None if error is None else vars(error)})
        if error is not None:
            raise error
        for fault in faults.values():
            _raise(fault)
        return self.merge(mine)

    def merge(self, mine: Mapping[Key, T]) -> dict[Key, T]:
        """Put together what all processes have.

        Args:
            mine: This process's part; no key is in two parts.

        Returns:
            All parts, by key in order.
        """
        parts: list[Mapping[Key, T]] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, mine)
        return dict(sorted(item for part in parts for item in part.items()))

    def _share(self, result: Found | UserError | None, owner: int, device: torch.device) -> Found:
        """Send one result, or one error, from its owner to all."""
        facts: list[Any] = [None]
        if isinstance(result, UserError):
            facts = [(result.got, result.expected, result.todo)]
        elif result is not None:
            weight, stats = result
            sizes = {name: (getattr(weight, name).shape, getattr(weight, name).dtype) for name in WEIGHT_TENSORS}
            facts = [{"stats": stats, "sizes": sizes, "bits": weight.bits, "group_size": weight.group_size}]
        dist.broadcast_object_list(facts, owner)
        found = facts[0]
        if isinstance(found, tuple):
            raise UserError(*found)
        tensors = {}
        for name, (shape, dtype) in found["sizes"].items():
            if owner == self.rank:
                assert result is not None and not isinstance(result, UserError)
                tensors[name] = getattr(result[0], name).to(device).contiguous()
            else:
                tensors[name] = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensors[name], owner, group=self.group)
        weight = QuantizedWeight(**tensors, bits=found["bits"], group_size=found["group_size"])
        return weight, found["stats"]


def _checked(
    hessian: Hessian, counts: Mapping[int, tuple[int, float, Tensor]], error: UserError | None
) -> dict[int, tuple[int, float]]:
    """Give tokens and weight by batch, or raise: an error that was met, or one of inputs that are not finite."""
    if error is not None:
        raise error
    if counts:
        bad = torch.stack([num_bad for _, _, num_bad in counts.values()]).tolist()
        for (num_tokens, _, _), num_bad in zip(counts.values(), bad, strict=True):
            hessian.check(num_tokens, num_bad)
    return {index: (num_tokens, total) for index, (num_tokens, total, _) in counts.items()}


def _in_order(counts: Iterable[tuple[int, float]]) -> float:
    """Add the weights of batches as one process alone does."""
    total = 0.0
    for _, weight in counts:
        total += weight
    return total


def _raise(fault: Mapping[str, str] | None) -> None:
    """Raise another process's error, if it has one."""
    if fault is not None:
        raise UserError(**fault) if "got" in fault else VerificationError(**fault)


def join_exchange(rank: int, world: int, device: torch.device) -> Exchange:
    """Take part in an exchange; the processes have joined torch's default group, on the CPU's backend.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where this process works; on CUDA, tensors go by NCCL.

    Returns:
        This process's exchange.
    """
    group = dist.new_group(backend="nccl") if world > 1 and device.type == "cuda" else None
    return Exchange(rank=rank, world=world, group=group)
