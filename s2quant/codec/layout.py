"""The keys of codec.pth: their names, shapes and weight norm, and the sizes that can be read off them.

The file holds one flat state dict. Convolutions of encoder and decoder are weight-normed by torch parametrizations
(`X.conv.parametrizations.weight.original0` = g, `.original1` = v), the projections of the codebooks by the older
hook (`X.in_proj.weight_g`, `.weight_v`); all other weights are plain. Folding gives W = g v / |v|, the norm taken
over all axes but the first - which for a transposed convolution is the input axis.

A `state_dict` wrapper and a `generator.` prefix (as training writes them) are taken off. The attention masks and
rotary tables that the file carries, 302 MB and 3 MB of it, are recomputed here and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import mode

import torch
from torch import Tensor

from s2quant.codec.codec import Codec
from s2quant.codec.config import CodecConfig, TransformerSize
from s2quant.layers import without_values

PARAMETRIZED = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
HOOKED = (".weight_g", ".weight_v")


def weight_norm_styles(name: str) -> tuple[tuple[str, str], ...]:
    """Say how a weight may be stored in codec.pth.

    Args:
        name: Name of a parameter of `Codec`.

    Returns:
        Suffixes of g and v that take the place of ".weight", the released file's first; empty for a plain parameter.
    """
    if re.fullmatch(r"(encoder|decoder)\..*\.conv\.weight", name):
        return (PARAMETRIZED, HOOKED)
    if re.fullmatch(r"quantizer\..*\.(in|out)_proj\.weight", name):
        return (HOOKED, PARAMETRIZED)
    return ()


def parameter_shapes(config: CodecConfig) -> dict[str, tuple[int, ...]]:
    """List the parameters of `Codec`.

    Args:
        config: Sizes.

    Returns:
        Shape by name.
    """
    with without_values():
        return {name: tuple(parameter.shape) for name, parameter in Codec(config).named_parameters()}


def file_shapes(config: CodecConfig) -> dict[str, tuple[int, ...]]:
    """List the keys of a codec.pth, without the buffers.

    Args:
        config: Sizes.

    Returns:
        Shape by key.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        styles = weight_norm_styles(name)
        if not styles:
            shapes[name] = shape
        else:
            stem, style = name.removesuffix(".weight"), styles[0]
            shapes[stem + style[0]] = (shape[0], *[1] * (len(shape) - 1))
            shapes[stem + style[1]] = shape
    return shapes


def buffer_keys(config: CodecConfig) -> set[str]:
    """List the keys that a codec.pth may hold beside its parameters.

    Args:
        config: Sizes.

    Returns:
        Two keys for each transformer.
    """
    names = [f"encoder.block.{i + 1}.block.5" for i, size in enumerate(config.encoder_transformers) if size is not None]
    names += ["quantizer.pre_module", "quantizer.post_module"]
    return {f"{name}.{buffer}" for name in names for buffer in ("freqs_cis", "causal_mask")}


def fold_weight(g: Tensor, v: Tensor) -> Tensor:
    """Fold weight norm.

    Args:
        g: [M, 1, ...], length of each row.
        v: [M, ...], direction of each row.

    Returns:
        [M, ...].
    """
    return g * v / torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def unfold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn `Codec.state_dict()` into the keys of codec.pth, for the programs that read those.

    Args:
        state: Tensors by the names of `Codec`; not changed.

    Returns:
        Tensors by the keys of codec.pth; v is the folded weight itself.
    """
    keys: dict[str, Tensor] = {}
    for name, tensor in state.items():
        styles = weight_norm_styles(name)
        if not styles:
            keys[name] = tensor
        else:
            stem, style = name.removesuffix(".weight"), styles[0]
            keys[stem + style[0]] = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
            keys[stem + style[1]] = tensor
    return keys


def config_from_state(state: Mapping[str, Tensor]) -> CodecConfig:
    """Read the sizes off a codec.pth.

    A size whose tensors are all absent is taken from the released codec: strict loading names the absent keys.
    The head width (64), the windows (512 and 128) and the sample rate (44.1 kHz) are always the released codec's.

    Args:
        state: Tensors by key, wrapper and prefix taken off; weight-normed or folded.

    Returns:
        The sizes.

    Raises:
        UserError: The sizes contradict each other.
    """
    real, sizes = CodecConfig.s2_pro(), _Sizes(state)
    num_encoder = sizes.count(r"encoder\.block\.(\d+)\.block\.", len(real.encoder_rates) + 1) - 1
    num_decoder = sizes.count(r"decoder\.model\.(\d+)\.block\.", len(real.decoder_rates) + 1) - 1
    num_factors = sizes.count(r"quantizer\.downsample\.(\d+)\.", len(real.downsample_factors))
    pre, post = "quantizer.pre_module", "quantizer.post_module"
    transformers = [f"encoder.block.{i + 1}.block.5" for i in range(num_encoder)]
    return CodecConfig(
        encoder_dim=sizes.common(r"encoder\.block\.(0\.conv\.bias|1\.block\.\d\..*alpha)", real.encoder_dim),
        encoder_rates=sizes.rates("encoder.block.{}.block.4.conv", num_encoder, real.encoder_rates),
        encoder_transformers=tuple(sizes.transformer(name, real.encoder_transformers[-1]) for name in transformers),
        decoder_dim=sizes.common(r"decoder\.model\.(0\.conv\.bias|1\.block\.0\.alpha)", real.decoder_dim),
        decoder_rates=sizes.rates("decoder.model.{}.block.1.conv", num_decoder, real.decoder_rates),
        latent_dim=sizes.common(r"quantizer\..*(norm\.weight|gamma|out_proj\.bias)", real.latent_dim),
        downsample_factors=tuple(
            sizes.common(rf"quantizer\.downsample\.{i}\.0\.conv\.weight", 2, axis=-1) for i in range(num_factors)
        ),
        pre=sizes.transformer(pre, real.pre) or real.pre,
        post=sizes.transformer(post, real.post) or real.post,
        codebook_dim=sizes.common(r".*\.codebook\.weight", real.codebook_dim, axis=1),
        semantic_size=sizes.common(r"quantizer\.semantic_quantizer\..*\.codebook\.weight", real.semantic_size),
        num_residual=sizes.count(r"quantizer\.quantizer\.quantizers\.(\d+)\.", real.num_residual),
        residual_size=sizes.common(r"quantizer\.quantizer\..*\.codebook\.weight", real.residual_size),
    )


class _Sizes:
    """Look sizes up in all tensors that show them; one misshapen tensor is then outvoted, and named later.

    Args:
        state: Tensors by key.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def common(self, pattern: str, default: int, axis: int = 0) -> int:
        """Size that most tensors of a name have on an axis (alphas [1, C, 1]: of C); default when there are none."""
        found = []
        for key, tensor in self.state.items():
            if re.fullmatch(pattern, key) and tensor.ndim == _num_axes(key):
                found.append(tensor.shape[1 if key.endswith(".alpha") else axis])
        return mode(found) if found else default

    def count(self, pattern: str, default: int) -> int:
        """One more than the largest index that the keys have at the start; default when none matches."""
        indices = [int(match[1]) for key in self.state if (match := re.match(pattern, key))]
        return max(indices) + 1 if indices else default

    def rates(self, stem: str, num_blocks: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of blocks 1, 2, ...: half of each kernel."""
        kernels = []
        for index in range(num_blocks):
            name = re.escape(stem.format(index + 1)) + r"(\.parametrizations\.weight\.original1|\.weight_v|\.weight)"
            kernels.append(self.common(name, 2 * default[min(index, len(default) - 1)], axis=-1))
        return tuple(kernel // 2 for kernel in kernels)

    def transformer(self, prefix: str, default: TransformerSize | None) -> TransformerSize | None:
        """Depth and feed-forward width under a prefix; None when nothing is there."""
        if not any(key.startswith(f"{prefix}.") for key in self.state):
            return None
        assert default is not None
        layers = re.escape(prefix) + r"\.layers\.(\d+)\."
        return TransformerSize(
            num_layers=self.count(layers, default.num_layers),
            intermediate_size=self.common(layers + r"feed_forward\.w[13]\.weight", default.intermediate_size),
        )


def _num_axes(key: str) -> int:
    """Axes of the tensors that sizes are read off."""
    if key.endswith((".alpha", ".conv.weight", PARAMETRIZED[1], HOOKED[1])):
        return 3
    return 1 if key.endswith((".bias", "norm.weight", ".gamma")) else 2
