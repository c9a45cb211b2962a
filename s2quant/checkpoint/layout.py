"""Names, shapes and kinds of every tensor of an S2 Pro checkpoint, derived from its config.json.

The names are those on disk: `text_model.model.*` is the Slow AR, `audio_decoder.*` the Fast AR, except that
`audio_decoder.codebook_embeddings` feeds the Slow AR. The order is the natural one, used when shards are written.
A quantized linear replaces `NAME.weight` by `NAME.qweight`, `.qzeros`, `.scales` and `.g_idx`.

Source: tensor table of the public fishaudio/s2-pro index, as fish-speech 3dd1f85 loads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from s2quant.checkpoint.config import S2Config, TransformerConfig

SLOW = "text_model.model"
FAST = "audio_decoder"
Kind = Literal["linear", "embedding", "norm", "bias"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the dense checkpoint.

    Args:
        name: Name on disk, with its suffix.
        shape: Shape; a linear's weight is (out, in).
        kind: What it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def module(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def expected_tensors(config: S2Config) -> dict[str, TensorSpec]:
    """List the tensors of a dense checkpoint.

    Args:
        config: The model's configuration.

    Returns:
        Specs by name, in natural order.
    """
    slow, fast = config.slow, config.fast
    specs = [
        _spec(f"{SLOW}.embeddings", (slow.vocab_size, slow.dim), "embedding"),
        *(spec for index in range(slow.n_layer) for spec in _block(f"{SLOW}.layers.{index}", slow)),
        _spec(f"{SLOW}.norm", (slow.dim,), "norm"),
        _spec(f"{FAST}.codebook_embeddings", (config.codebook_size * config.num_codebooks, slow.dim), "embedding"),
        _spec(f"{FAST}.embeddings", (fast.vocab_size, fast.dim), "embedding"),
        *(spec for index in range(fast.n_layer) for spec in _block(f"{FAST}.layers.{index}", fast)),
        _spec(f"{FAST}.norm", (fast.dim,), "norm"),
        _spec(f"{FAST}.output", (fast.vocab_size, fast.dim), "linear"),
    ]
    if slow.dim != fast.dim:
        specs.append(_spec(f"{FAST}.project_in", (fast.dim, slow.dim), "linear"))
        specs.append(TensorSpec(name=f"{FAST}.project_in.bias", shape=(fast.dim,), kind="bias"))
    return {spec.name: spec for spec in specs}


def linears(config: S2Config) -> dict[str, tuple[int, int]]:
    """List the linears.

    Args:
        config: The model's configuration.

    Returns:
        (out_features, in_features) by module name on disk, in natural order.
    """
    return {
        spec.module: (spec.shape[0], spec.shape[1])
        for spec in expected_tensors(config).values()
        if spec.kind == "linear"
    }


def _spec(module: str, shape: tuple[int, ...], kind: Kind) -> TensorSpec:
    return TensorSpec(name=f"{module}.weight", shape=shape, kind=kind)


def _block(prefix: str, sizes: TransformerConfig) -> list[TensorSpec]:
    heads = sizes.n_head * sizes.head_dim
    specs = [
        _spec(f"{prefix}.attention.wqkv", (sizes.qkv_dim, sizes.dim), "linear"),
        _spec(f"{prefix}.attention.wo", (sizes.dim, heads), "linear"),
        _spec(f"{prefix}.feed_forward.w1", (sizes.intermediate_size, sizes.dim), "linear"),
        _spec(f"{prefix}.feed_forward.w3", (sizes.intermediate_size, sizes.dim), "linear"),
        _spec(f"{prefix}.feed_forward.w2", (sizes.dim, sizes.intermediate_size), "linear"),
        _spec(f"{prefix}.attention_norm", (sizes.dim,), "norm"),
        _spec(f"{prefix}.ffn_norm", (sizes.dim,), "norm"),
    ]
    if sizes.attention_qk_norm:
        specs += [_spec(f"{prefix}.attention.{name}", (sizes.head_dim,), "norm") for name in ("q_norm", "k_norm")]
    return specs
