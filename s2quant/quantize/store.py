"""What a run has finished so far, on disk: one file per stage, so that a stopped run goes on.

The folder `OUT.partial` holds `run.json` (the identity of the run), the groups of calibration lines that were spoken,
each with a key of its own, the calibration set, and for each finished stage its packed tensors with the records of its
modules. A group's or a stage's file appears only when it is complete. Under hidden names it holds what is being
written; what a killed run left of that is removed when the next one goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2quant.errors import UserError, shorten_list
from s2quant.files import atomic_file, disk_errors, read_json, write_json
from s2quant.packing import QuantizedWeight, pack, unpack
from s2quant.quantize.copies import to_host

IDENTITY = "run.json"
RUN_VERSION = 3  # of what finished stages are and hold; part of what a run must agree in to be gone on with
SPEECH = "speech"  # the folder of spoken groups
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class StageStore:
    """The finished stages of one run.

    Args:
        folder: `OUT.partial`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = folder / "stages"

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], resume: bool) -> StageStore:
        """Begin a run, or go on with one.

        Args:
            folder: `OUT.partial`.
            identity: All that the result depends on.
            resume: Whether to go on with what is there.

        Returns:
            The store.

        Raises:
            UserError: A stopped run is there and `resume` is false, or it is a different run.
        """
        identity = json.loads(json.dumps(identity))
        if folder.exists() and not resume:
            raise UserError(f"{folder} holds a stopped run", "no such folder", "go on with --resume, or remove it")
        if (folder / IDENTITY).exists():  # a run that was killed before it wrote this has finished nothing
            before = read_json(folder / IDENTITY)
            changed = [
                f"{key}: {before.get(key)!r}, now {identity.get(key)!r}"
                for key in sorted(before.keys() | identity.keys())
                if before.get(key) != identity.get(key)
            ]
            if changed:
                raise UserError(
                    f"{folder} holds a different run:\n{shorten_list(changed)}",
                    "the same model, recipe, calibration, device, --slots and threads (OMP_NUM_THREADS)",
                    "restore them, or remove the folder and start again",
                )
        with disk_errors(folder):
            (folder / "stages").mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
            if not (folder / IDENTITY).exists():
                with atomic_file(folder / IDENTITY) as partial:
                    write_json(partial, identity)
        return cls(folder)

    def save(self, stage: str, weights: Mapping[str, QuantizedWeight], records: list[dict[str, Any]]) -> None:
        """Keep a finished stage.

        Args:
            stage: Its name.
            weights: Quantized weights by module name.
            records: One per module.

        Raises:
            UserError: The disk refuses.
        """
        tensors = {
            f"{name}.{part}": to_host(tensor)
            for name, weight in weights.items()
            for part, tensor in pack(weight).items()
        }
        with atomic_file(self._path(stage), overwrite=True) as partial:
            save_file(tensors, partial, metadata={"records": json.dumps(records)})

    def has(self, stage: str) -> bool:
        """Tell whether a stage is finished.

        Args:
            stage: Its name.

        Returns:
            True when it is.
        """
        return self._path(stage).exists()

    def names(self) -> list[str]:
        """List the finished stages.

        Returns:
            Their names, sorted.
        """
        return sorted(path.stem for path in self.stages.glob("[!.]*.safetensors"))

    def load(
        self, stage: str, sizes: Mapping[str, tuple[int, int]], device: torch.device | str = "cpu"
    ) -> tuple[dict[str, QuantizedWeight], list[Any]]:
        """Get a finished stage.

        Args:
            stage: Its name.
            sizes: (bits, group_size) of the modules it should hold.
            device: Where to unpack them.

        Returns:
            Weights by module name, on the device, and records.

        Raises:
            UserError: The file is corrupt or holds other modules.
        """
        path = self._path(stage)
        try:
            with safe_open(path, framework="pt") as file:
                records = json.loads((file.metadata() or {})["records"])
                weights = {
                    name: unpack(
                        {part: file.get_tensor(f"{name}.{part}").to(device) for part in PARTS}, bits, group_size
                    )
                    for name, (bits, group_size) in sizes.items()
                }
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path}: {error}", "a finished stage of this run", "remove the file and --resume"
            ) from error
        return weights, records

    def tensors(self, module: str, stage: str) -> dict[str, Tensor]:
        """Get the packed tensors of one module of a finished stage.

        Args:
            module: Its name on disk.
            stage: The stage's name.

        Returns:
            qweight, qzeros, scales and g_idx.
        """
        with safe_open(self._path(stage), framework="pt") as file:
            return {part: file.get_tensor(f"{module}.{part}") for part in PARTS}

    def _path(self, stage: str) -> Path:
        return self.stages / f"{stage}.safetensors"


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    places = (folder, folder / "stages", folder / SPEECH)
    for path in [path for place in places for path in place.glob(".*.partial-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
