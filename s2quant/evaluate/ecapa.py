"""The speaker model of seed-tts-eval: an ECAPA-TDNN over the hidden states of WavLM-large.

The inputs of all blocks and the normed output of the last are summed with softmax weights, normalized per clip, and go
through a convolution, three squeeze-and-excitation Res2 blocks with growing dilation, and attentive statistics pooling
to 256 numbers.
WavLM is that of transformers; sizes are read from the checkpoint, names are brought from its layout to ours, and a
key that is missing or left over is an error.

Not verified here: the real checkpoint (`wavlm_large_finetune.pth`) was not at hand. What is verified is that random
small weights in its layout give what the public code gives (`tests/golden/evaluate`). Two things stand in no tensor
and are those of WavLM-large: the strides of the convolutions and the longest distance of the position buckets.

Legend: B batch, S samples at 16 kHz, T positions, D width of WavLM, C channels, L layers.

Sources: https://github.com/BytedanceSpeech/seed-tts-eval/blob/752f4297f090c46bb1a55a1f7439e5944ddefe8d/
thirdparty/UniSpeech/downstreams/speaker_verification/models/ecapa_tdnn.py, which takes the hidden states from
https://github.com/s3prl/s3prl/blob/ec8064b5889f81ca460fbe2c094ce576a6f120b7/s3prl/upstream/wavlm/expert.py;
Desplanques et al. 2020, arXiv 2005.07143; Chen et al. 2021, arXiv 2110.13900 (WavLM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2quant.errors import UserError, shorten_list

CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
MAX_BUCKET_DISTANCE = 800
SCALE = 8
# Parts of a training checkpoint that the embedding does not use.
UNUSED = ("loss_calculator.", "feature_extract.model.mask_emb", "feature_extract.model.final_proj.")

_RENAMED = (
    (
        r"^feature_extract\.model\.feature_extractor\.conv_layers\.(\d+)\.0\.",
        r"wavlm.feature_extractor.conv_layers.\1.conv.",
    ),
    (
        r"^feature_extract\.model\.feature_extractor\.conv_layers\.(\d+)\.2\.1\.",
        r"wavlm.feature_extractor.conv_layers.\1.layer_norm.",
    ),
    (r"^feature_extract\.model\.post_extract_proj\.", "wavlm.feature_projection.projection."),
    (r"^feature_extract\.model\.layer_norm\.", "wavlm.feature_projection.layer_norm."),
    (
        r"^feature_extract\.model\.encoder\.pos_conv\.0\.weight_g$",
        "wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    ),
    (
        r"^feature_extract\.model\.encoder\.pos_conv\.0\.weight_v$",
        "wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    ),
    (r"^feature_extract\.model\.encoder\.pos_conv\.0\.bias$", "wavlm.encoder.pos_conv_embed.conv.bias"),
    (r"^feature_extract\.model\.encoder\.", "wavlm.encoder."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
    (r"^layer1\.", "first."),
    (r"^layer([234])\.Conv1dReluBn1\.", r"blocks.\1.enter."),
    (r"^layer([234])\.Res2Conv1dReluBn\.convs\.(\d+)\.", r"blocks.\1.steps.\2.conv."),
    (r"^layer([234])\.Res2Conv1dReluBn\.bns\.(\d+)\.", r"blocks.\1.steps.\2.bn."),
    (r"^layer([234])\.Conv1dReluBn2\.", r"blocks.\1.leave."),
    (r"^layer([234])\.SE_Connect\.linear1\.", r"blocks.\1.squeeze."),
    (r"^layer([234])\.SE_Connect\.linear2\.", r"blocks.\1.excite."),
    (r"^pooling\.linear1\.", "attend."),
    (r"^pooling\.linear2\.", "weigh."),
)  # fmt: skip


class _Conv(nn.Module):
    """Convolution over positions, ReLU, batch norm: in this order."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        return self.bn(F.relu(self.conv(x)))


class _Block(nn.Module):
    """Residual block: each eighth of the channels also sees the eighth before it; then channels are weighed."""

    def __init__(self, channels: int, bottleneck: int, dilation: int) -> None:
        super().__init__()
        self.enter = _Conv(channels, channels, 1)
        self.steps = nn.ModuleList(_Conv(channels // SCALE, channels // SCALE, 3, dilation) for _ in range(SCALE - 1))
        self.leave = _Conv(channels, channels, 1)
        self.squeeze = nn.Linear(channels, bottleneck)
        self.excite = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        parts = self.enter(x).chunk(SCALE, dim=1)
        done = [self.steps[0](parts[0])]
        for step, part in zip(list(self.steps)[1:], parts[1:-1], strict=True):
            done.append(step(part + done[-1]))
        out = self.leave(torch.cat([*done, parts[-1]], dim=1))
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(out.mean(dim=2)))))
        return x + out * weights.unsqueeze(2)


class WavLMEcapa(nn.Module):
    """The speaker model; build it with `ecapa_from_state`.

    Args:
        config: Sizes of WavLM, a `transformers.WavLMConfig`.
        channels: Width of the blocks.
        bottleneck: Width of the channel weighing.
        pooled: Channels that are pooled.
        attention: Width of the pooling's attention.
        embedding: Numbers of an embedding.
    """

    def __init__(
        self, config: Any, channels: int, bottleneck: int, pooled: int, attention: int, embedding: int
    ) -> None:
        super().__init__()
        from transformers import WavLMModel

        self.wavlm = WavLMModel(config)
        self.feature_weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.first = _Conv(config.hidden_size, channels, 5)
        self.blocks = nn.ModuleDict({str(n): _Block(channels, bottleneck, dilation=n) for n in (2, 3, 4)})
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.attend = nn.Conv1d(pooled, attention, 1)
        self.weigh = nn.Conv1d(attention, pooled, 1)
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, embedding)

    def forward(self, audio: Tensor) -> Tensor:
        """Embed clips.

        Args:
            audio: float32 [B, S] at 16 kHz.

        Returns:
            float32 [B, E], not normalized.
        """
        scaled = F.layer_norm(audio, audio.shape[-1:])  # WavLM-large takes clips of mean 0 and variance 1
        seen = self.wavlm(scaled, output_hidden_states=True)
        # The output of the last block counts after the final norm; whether transformers gives it so depends on its
        # version.
        assert len(seen.hidden_states) == len(self.feature_weight)
        states = torch.stack([*seen.hidden_states[:-1], seen.last_hidden_state])  # [L + 1, B, T, D]
        weights = self.feature_weight.softmax(dim=0)[:, None, None, None]
        x = F.instance_norm((weights * states).sum(dim=0).transpose(1, 2) + 1e-6)  # [B, D, T]
        x = self.first(x)
        outputs = []
        for block in self.blocks.values():
            x = block(x)
            outputs.append(x)
        x = F.relu(self.conv(torch.cat(outputs, dim=1)))
        shares = torch.softmax(self.weigh(torch.tanh(self.attend(x))), dim=2)
        mean = (shares * x).sum(dim=2)
        spread = ((shares * x.square()).sum(dim=2) - mean.square()).clamp(min=1e-9).sqrt()
        return self.linear(self.bn(torch.cat([mean, spread], dim=1)))


def ecapa_from_state(state: Mapping[str, Tensor], source: str) -> WavLMEcapa:
    """Build the model that a checkpoint holds.

    Args:
        state: Tensors by name, in the layout of the public checkpoint.
        source: How messages name the checkpoint.

    Returns:
        The model in evaluation mode, float32.

    Raises:
        UserError: Tensors are missing, left over or of another shape; all are listed.
    """
    renamed = {rename(name): tensor.float() for name, tensor in state.items() if not name.startswith(UNUSED)}
    try:
        model = WavLMEcapa(
            _wavlm_config(renamed),
            channels=renamed["first.conv.weight"].shape[0],
            bottleneck=renamed["blocks.2.squeeze.weight"].shape[0],
            pooled=renamed["conv.weight"].shape[0],
            attention=renamed["attend.weight"].shape[0],
            embedding=renamed["linear.weight"].shape[0],
        )
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        raise _faulty(source, [f"no usable tensor for {error}"]) from error
    wanted = model.state_dict()
    faults = [f"missing: {name}" for name in wanted if name not in renamed and not name.endswith("num_batches_tracked")]
    faults += [f"left over: {name}" for name in renamed if name not in wanted]
    faults += [
        f"{name}: shape {list(tensor.shape)}, not {list(wanted[name].shape)}"
        for name, tensor in renamed.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if faults:
        raise _faulty(source, faults)
    model.load_state_dict(renamed, strict=False)  # what may be missing was checked above
    return model.eval()


def rename(name: str) -> str:
    """Bring a name of the public checkpoint to ours.

    Args:
        name: Such as "feature_extract.model.encoder.layers.0.fc1.weight".

    Returns:
        Such as "wavlm.encoder.layers.0.feed_forward.intermediate_dense.weight"; an unknown name as it is.
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _wavlm_config(state: Mapping[str, Tensor]) -> Any:
    """Read the sizes of WavLM from its tensors."""
    from transformers import WavLMConfig

    convs = [key for key in state if re.fullmatch(r"wavlm\.feature_extractor\.conv_layers\.\d+\.conv\.weight", key)]
    shapes = [state[f"wavlm.feature_extractor.conv_layers.{index}.conv.weight"].shape for index in range(len(convs))]
    layers = {key.split(".")[3] for key in state if key.startswith("wavlm.encoder.layers.")}
    position = state["wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original1"].shape  # [D, D / groups, K]
    bias = state["wavlm.encoder.layers.0.attention.rel_attn_embed.weight"].shape  # [buckets, heads]
    return WavLMConfig(
        hidden_size=position[0],
        num_hidden_layers=len(layers),
        num_attention_heads=bias[1],
        intermediate_size=state["wavlm.encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0],
        conv_dim=[shape[0] for shape in shapes],
        conv_kernel=[shape[2] for shape in shapes],
        conv_stride=list(CONV_STRIDES[: len(shapes)]),
        conv_bias="wavlm.feature_extractor.conv_layers.0.conv.bias" in state,
        num_feat_extract_layers=len(shapes),
        num_conv_pos_embeddings=position[2],
        num_conv_pos_embedding_groups=position[0] // position[1],
        num_buckets=bias[0],
        max_bucket_distance=MAX_BUCKET_DISTANCE,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        mask_time_prob=0.0,  # so that there is no tensor for masked positions
        apply_spec_augment=False,
    )


def _faulty(source: str, faults: list[str]) -> UserError:
    return UserError(
        f"{source}: {len(faults)} fault(s)\n{shorten_list(faults)}",
        "the tensors of wavlm_large_finetune.pth, no more and no fewer",
        "take the checkpoint that seed-tts-eval names",
    )
