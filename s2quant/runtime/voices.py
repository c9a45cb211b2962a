"""Reference recordings are encoded once: their codes are kept on disk, by content.

Legend: N codebooks, F frames.

An entry's name is a hash of everything that its codes depend on: the recording's bytes, the codec's bytes, the device
and torch (whose rounding may move a code), and the version of the code here. A recording that is edited, or another
codec, so has another entry; nothing is ever out of date. Entries appear when they are complete. One that is damaged
is made anew, and `notes` says so; a cache that cannot be written costs nothing but the encoding, and a note.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2quant.codec import Codec
from s2quant.codec.state import FILE_NAME
from s2quant.errors import UserError
from s2quant.files import atomic_file, sha256_file, sha256_text
from s2quant.prompt.voice import code_faults
from s2quant.runtime.load import device_name

VOICE_VERSION = 1  # raised when reading or encoding a recording may give other codes


def user_cache_folder(environ: Mapping[str, str], platform: str = sys.platform, home: Path | None = None) -> Path:
    """Name the folder where this user's programs keep what can be made anew.

    Args:
        environ: Environment variables.
        platform: `sys.platform`.
        home: The user's home; None asks the system.

    Returns:
        $XDG_CACHE_HOME/s2quant, or s2quant in the platform's own folder; it may not exist. A relative
        XDG_CACHE_HOME does not count, as its specification has it.
    """
    stated = Path(environ.get("XDG_CACHE_HOME", ""))
    if stated.is_absolute():
        return stated / "s2quant"
    home = home or Path.home()
    if platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "s2quant"
    return home / ("Library/Caches" if platform == "darwin" else ".cache") / "s2quant"


class VoiceCache:
    """Codes of recordings, by one codec on one device.

    Args:
        folder: Where entries are; made when it is needed.
        codec_file: The codec.pth that encodes, or a folder that holds it.
        codec: The codec that it is, on its device.
        num_semantic: Semantic codes that the model has tokens for.
    """

    def __init__(self, folder: Path, codec_file: Path, codec: Codec, num_semantic: int) -> None:
        self.folder = folder
        self.codec_file = codec_file / FILE_NAME if codec_file.is_dir() else codec_file
        self.device = codec.device
        self._sizes = (codec.num_codebooks, num_semantic, codec.config.residual_size)
        self._codec_hash: str | None = None
        self.notes: list[str] = []
        self.hits = self.misses = 0

    def codes(self, recording: Path, encode: Callable[[], Tensor]) -> Tensor:
        """Give a recording's codes, encoding it only when they are not kept.

        Args:
            recording: An audio file.
            encode: Reads and encodes it: int64 [N, F] on the CPU.

        Returns:
            int64 [N, F] on the CPU.

        Raises:
            UserError: The recording cannot be used.
        """
        if not recording.is_file():
            return encode()  # which says what is wrong
        content = sha256_file(recording)
        entry = self.folder / "voices" / f"{self._key(content)}.safetensors"
        found = self._read(entry)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        codes = encode()
        if sha256_file(recording) == content:  # else it was being written to: whose codes these are is not known
            self._write(entry, codes, recording)
        return codes

    def _key(self, content: str) -> str:
        is_cuda = self.device.type == "cuda"
        tf32 = (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) if is_cuda else None
        facts = {
            "recording": content,
            "codec": self._codec(),
            "version": VOICE_VERSION,
            "torch": torch.__version__,
            "device": device_name(self.device),
            "tf32": tf32,
        }
        return sha256_text(json.dumps(facts))

    def _codec(self) -> str:
        """Hash the codec's file; kept by name, size and time, because it is large."""
        if self._codec_hash is None:
            status = self.codec_file.stat()
            seen = [str(self.codec_file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
            note = self.folder / "codecs" / sha256_text(json.dumps(seen))
            try:
                known = note.read_text("ascii").strip()
            except (OSError, UnicodeDecodeError):
                known = ""
            if len(known) != 64:
                known = sha256_file(self.codec_file)
                self._store(note, lambda partial: partial.write_text(known, encoding="ascii"))
            self._codec_hash = known
        return self._codec_hash

    def _read(self, entry: Path) -> Tensor | None:
        if not entry.is_file():
            return None
        try:
            with safe_open(entry, framework="pt") as file:
                stated, codes = (file.metadata() or {}).get("sha256"), file.get_tensor("codes")
        except (SafetensorError, OSError) as error:
            self._damaged(entry, str(error))
            return None
        num_codebooks, num_semantic, residual_size = self._sizes
        if codes.dtype != torch.int16 or _hash(codes) != stated:
            self._damaged(entry, "its codes are not those that were written")
            return None
        faults = code_faults(codes.long(), num_codebooks, num_semantic, residual_size)
        if faults:
            self._damaged(entry, faults[0])
            return None
        return codes.long()

    def _damaged(self, entry: Path, why: str) -> None:
        self.notes.append(f"the kept voice {entry} is damaged ({why.splitlines()[0]}) and is encoded anew")

    def _write(self, entry: Path, codes: Tensor, recording: Path) -> None:
        small = codes.to(torch.int16).contiguous()
        assert torch.equal(small.long(), codes), "codes do not fit 16 bits"
        metadata = {"sha256": _hash(small), "recording": recording.name}
        self._store(entry, lambda partial: save_file({"codes": small}, partial, metadata))

    def _store(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            with atomic_file(path, overwrite=True) as partial:
                write(partial)
        except (UserError, OSError) as error:
            reason = error.got if isinstance(error, UserError) else str(error)
            self.notes.append(f"a voice's codes could not be kept: {reason}")


def _hash(codes: Tensor) -> str:
    return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()


def default_voice_folder() -> Path:
    """Name the folder where voices are kept unless another one is named.

    Returns:
        This user's cache folder.
    """
    return user_cache_folder(os.environ)
