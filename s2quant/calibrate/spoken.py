"""Groups of calibration lines that were spoken, on disk, so that a run stopped while it speaks goes on.

Each group has a file of its own, which appears when the whole group is spoken. In the file is the key of all that the
speech depends on; one with another key is passed over, and replaced. The model's part of the key is the sizes and the
times of its files, since hashing them takes seconds that speaking need not wait for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2quant.files import atomic_file
from s2quant.runtime.speech import StopReason

METADATA_KEY = "s2quant"
CODE_DTYPE = torch.int32


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What is kept of a line's speech.

    Args:
        codes: int64 [N, F].
        batch_frames: As in `s2quant.runtime.speech.Speech`.
        stop_reason: As there.
    """

    codes: Tensor
    batch_frames: tuple[int, ...]
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class SpokenGroups:
    """Keeps groups in a folder.

    Args:
        folder: The folder, which need not be there.
        key: Of all that the speech depends on.
    """

    folder: Path
    key: str

    def load(self, number: int, lines: Collection[int]) -> dict[int, Spoken] | None:
        """Get a group.

        Args:
            number: Its number.
            lines: The numbers of its lines.

        Returns:
            Speech by line; None where it is not there, is damaged, has another key or other lines.
        """
        try:
            with safe_open(self._path(number), framework="pt") as file:
                facts = json.loads((file.metadata() or {})[METADATA_KEY])
                codes = {int(name): file.get_tensor(name).to(torch.int64) for name in file.keys()}  # noqa: SIM118
            about = {int(line): told for line, told in facts["lines"].items()}
            if facts["key"] != self.key or not set(codes) == set(about) == set(lines):
                return None
            found = {
                line: Spoken(
                    codes=codes[line],
                    batch_frames=tuple(about[line]["batch_frames"]),
                    stop_reason=cast(StopReason, about[line]["stop_reason"]),
                )
                for line in sorted(codes)
            }
            is_whole = all(one.codes.shape[1] == sum(one.batch_frames) for one in found.values())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
        return found if is_whole else None

    def save(self, number: int, spoken: Mapping[int, Spoken]) -> None:
        """Keep a group, in place of what is there.

        Args:
            number: Its number.
            spoken: Speech by line.

        Raises:
            UserError: The disk refuses.
        """
        about = {
            line: {"batch_frames": one.batch_frames, "stop_reason": one.stop_reason} for line, one in spoken.items()
        }
        tensors = {str(line): one.codes.to(CODE_DTYPE).contiguous() for line, one in spoken.items()}
        with atomic_file(self._path(number), overwrite=True) as partial:
            save_file(tensors, partial, metadata={METADATA_KEY: json.dumps({"key": self.key, "lines": about})})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
