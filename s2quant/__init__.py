"""s2quant: make Fish Audio S2 Pro small, and prove with speech what that cost.

The names below are loaded on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2quant.codec import load_codec as load_codec
    from s2quant.prompt import load_tokenizer as load_tokenizer
    from s2quant.runtime.load import load_model as load_model
    from s2quant.runtime.loading import load_engine as load_engine

__version__ = "0.1.0"
__all__ = ["load_codec", "load_engine", "load_model", "load_tokenizer"]

_HOMES = {
    "load_codec": "s2quant.codec",
    "load_engine": "s2quant.runtime.loading",
    "load_model": "s2quant.runtime.load",
    "load_tokenizer": "s2quant.prompt",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 's2quant' has no attribute {name!r}")
