"""config.json of an S2 Pro checkpoint as plain data.

The file is read, never guessed at: a field that the model needs and that is missing is an error, and the raw
object is kept so that writing a checkpoint preserves every field s2quant does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_json

MODEL_TYPE = "fish_qwen3_omni"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and constants of one of the two transformers.

    Args:
        vocab_size: Rows of the embedding (Slow AR: tokens; Fast AR: codes).
        n_layer: Number of blocks.
        n_head: Query heads H.
        n_local_heads: Key/value heads; divides n_head.
        head_dim: Head width h.
        dim: Model width D.
        intermediate_size: Width inside the feed-forward.
        max_seq_len: The most positions.
        rope_base: Rotary base.
        norm_eps: Epsilon of every RMSNorm.
        attention_qk_norm: Whether queries and keys are normalised per head.
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_local_heads: int
    head_dim: int
    dim: int
    intermediate_size: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    attention_qk_norm: bool

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused wqkv: queries, keys, values."""
        return (self.n_head + 2 * self.n_local_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class S2Config:
    """Both transformers, the token ids they agree on, and the file as it was read.

    Args:
        slow: The Slow AR.
        fast: The Fast AR; its vocab_size is the codebook size of the tables.
        num_codebooks: N, the semantic codebook included.
        semantic_begin_id: Token id of semantic code 0.
        semantic_end_id: Token id of the last semantic code.
        im_end_id: Token id that ends speech.
        pad_id: Token id for padding.
        raw: config.json, whole.
    """

    slow: TransformerConfig
    fast: TransformerConfig
    num_codebooks: int
    semantic_begin_id: int
    semantic_end_id: int
    im_end_id: int
    pad_id: int
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def codebook_size(self) -> int:
        """Rows per codebook in the embedding tables (4096 in S2 Pro, for all ten)."""
        return self.fast.vocab_size

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str = "config.json") -> S2Config:
        """Check and convert a parsed config.json.

        Args:
            raw: The JSON object.
            where: How messages name the file.

        Returns:
            The configuration.

        Raises:
            UserError: Fields are missing, of a wrong type, or contradict each other; all are listed.
        """
        faults: list[str] = []
        if raw.get("model_type") != MODEL_TYPE:
            faults.append(f"model_type is {raw.get('model_type')!r}, not {MODEL_TYPE!r}")
        slow = _transformer(raw, "text_config", faults)
        fast = _transformer(raw, "audio_decoder_config", faults)
        ids = {
            name: _number(raw, name, "", int, faults)
            for name in ("semantic_start_token_id", "semantic_end_token_id", "eos_token_id", "pad_token_id")
        }
        num_codebooks = _number(raw.get("audio_decoder_config"), "num_codebooks", "audio_decoder_config", int, faults)
        if not faults:
            faults += _contradictions(raw, slow, fast, ids)
        if faults:
            raise UserError(
                f"{where}:\n{shorten_list(faults)}", "the config.json of an S2 Pro checkpoint", "restore the file"
            )
        # The reference gives the Fast AR the text model's rotary base and epsilon, and one position per codebook.
        fast_values = fast | {
            "rope_base": slow["rope_base"],
            "norm_eps": slow["norm_eps"],
            "max_seq_len": num_codebooks,
        }
        return cls(
            slow=TransformerConfig(**slow),
            fast=TransformerConfig(**fast_values),
            num_codebooks=num_codebooks,
            semantic_begin_id=ids["semantic_start_token_id"],
            semantic_end_id=ids["semantic_end_token_id"],
            im_end_id=ids["eos_token_id"],
            pad_id=ids["pad_token_id"],
            raw=dict(raw),
        )

    @classmethod
    def load(cls, path: Path) -> S2Config:
        """Read config.json.

        Args:
            path: The file, or the folder that holds it.

        Returns:
            The configuration.

        Raises:
            UserError: The file is unreadable or not that of an S2 Pro checkpoint.
        """
        file = path / "config.json" if path.is_dir() else path
        return cls.from_json(read_json(file), str(file))


_INTEGERS = (
    "vocab_size",
    "n_layer",
    "n_head",
    "n_local_heads",
    "head_dim",
    "dim",
    "intermediate_size",
    "max_seq_len",
)


def _number(table: Any, name: str, section: str, kind: type, faults: list[str]) -> Any:
    value = table.get(name) if isinstance(table, Mapping) else None
    label = f"{section}.{name}" if section else name
    good = isinstance(value, int | float) if kind is float else isinstance(value, int)
    if not good or isinstance(value, bool):
        faults.append(f"{label} is {value!r}, not a number")
        return None
    assert isinstance(value, int | float)
    if not 0 < value < float("inf"):  # JSON as Python reads it has NaN and Infinity
        faults.append(f"{label} is {value}, not positive")
        return None
    return kind(value)


def _transformer(raw: Mapping[str, Any], section: str, faults: list[str]) -> dict[str, Any]:
    table = raw.get(section)
    if not isinstance(table, Mapping):
        faults.append(f"{section} is missing")
        return {}
    values: dict[str, Any] = {name: _number(table, name, section, int, faults) for name in _INTEGERS}
    values |= {name: _number(table, name, section, float, faults) for name in ("rope_base", "norm_eps")}
    qk_norm = table.get("attention_qk_norm")
    if not isinstance(qk_norm, bool):
        faults.append(f"{section}.attention_qk_norm is {qk_norm!r}, not true or false")
    values["attention_qk_norm"] = qk_norm
    for name in ("attention_qkv_bias", "attention_o_bias", "use_moe"):
        if table.get(name, False):
            faults.append(f"{section}.{name} is true; no S2 Pro checkpoint has it")
    return values


def _contradictions(
    raw: Mapping[str, Any], slow: Mapping[str, Any], fast: Mapping[str, Any], ids: Mapping[str, int]
) -> list[str]:
    faults = []
    for section, values in (("text_config", slow), ("audio_decoder_config", fast)):
        if values["n_head"] % values["n_local_heads"]:
            faults.append(
                f"{section}: n_local_heads {values['n_local_heads']} does not divide n_head {values['n_head']}"
            )
        if values["head_dim"] % 2:
            faults.append(f"{section}: head_dim {values['head_dim']} is odd")
    if raw["text_config"].get("tie_word_embeddings") is not True:
        faults.append("text_config.tie_word_embeddings is not true")
    text_dim = raw["audio_decoder_config"].get("text_dim", slow["dim"])
    if text_dim != slow["dim"]:
        faults.append(f"audio_decoder_config.text_dim {text_dim} is not text_config.dim {slow['dim']}")
    count = ids["semantic_end_token_id"] - ids["semantic_start_token_id"] + 1
    if count < 1 or count > fast["vocab_size"]:
        faults.append(f"{count} semantic token ids, but {fast['vocab_size']} codes")
    for name, value in ids.items():
        if value >= slow["vocab_size"]:
            faults.append(f"{name} {value} is outside the vocabulary of {slow['vocab_size']}")
    return faults
