"""One process, or several by `--processes` or `accelerate launch`: who does which part, and waiting for one another.

Processes share nothing but the run's folder. Every one takes its share of the jobs and writes files of its own; they
meet only at barriers, so no tensor ever crosses between them, and the CPU's backend is enough on any machine.

The group's threads must have ended when Python does. One that still holds what the last meeting was about wants the
interpreter's lock to let go of it; refused the lock by an interpreter that is ending, it aborts the process, whose work
was done (https://github.com/pytorch/pytorch/issues/190489). Closing the group waits for its threads, unless something
still refers to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from s2quant.errors import UserError

T = TypeVar("T")


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process among all of a run.

    Args:
        rank: Number of this process, from 0.
        world: Number of processes.
        local_rank: Number of this process on its host.
        wait: Returns when every process has called it.
        close: Ends the group and its threads.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    wait: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Take this process's part, every world-th item.

        Args:
            items: The same in every process.

        Returns:
            Its items, in order.
        """
        return list(items[self.rank :: self.world])

    def device(self, name: str) -> str:
        """Choose this process's device, and make it CUDA's current one, which kernels without a guard run on.

        Args:
            name: What the user asked for.

        Returns:
            `cuda` with the number of the process on its host when there are several, else the name as it is.
        """
        if name != "cuda" or self.world == 1:
            return name
        import torch

        if self.local_rank < torch.cuda.device_count():  # one that is not there is refused where it is used
            torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"


def find_ranks(device: str = "cpu") -> Ranks:
    """Join the other processes, if a launcher started several.

    Args:
        device: What the user asked for.

    Returns:
        This process among all.

    Raises:
        UserError: There are several, and accelerate is not installed, or there is no GPU for each of this host's.
            Raised before they join, in all alike: none waits for one that is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:  # what `accelerate launch` and torchrun tell every process
        return Ranks()
    _check_gpus(device)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError(
            "several processes, and the package accelerate is not installed",
            "the packages of s2quant[eval]",
            "pip install 's2quant[eval]', or run one process",
        ) from error
    from s2quant.quantize.exchange import LONGEST_WAIT  # needs torch

    _import_before_joining()
    state = PartialState(cpu=True, backend="gloo", timeout=LONGEST_WAIT)  # else MPI where torch has it
    return Ranks(
        rank=state.process_index,
        world=state.num_processes,
        local_rank=state.local_process_index,
        wait=state.wait_for_everyone,
        close=state.destroy_process_group,
    )


def _check_gpus(device: str) -> None:
    """Refuse more processes on this host than it has GPUs."""
    if device != "cuda":
        return
    import torch

    wanted, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if wanted > found:
        raise UserError(
            f"{wanted} processes on --device cuda, but torch sees {found} CUDA devices",
            "a GPU for each process",
            "start as many as there are, or say --device cpu",
        )


def _import_before_joining() -> None:
    """Import what takes the group that there is at that moment as a default of its functions, and keeps it for good.

    Building any model imports it, by way of torch._dynamo. Before there is a group, the default is None.
    """
    import torch.distributed.nn.functional  # noqa: F401
