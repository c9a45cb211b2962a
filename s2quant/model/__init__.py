"""The speech model as pure maths: Slow AR, Fast AR, both together; no cache, no sampling, no files."""

from s2quant.model.attention import (
    Attend,
    Attention,
    Block,
    Rotary,
    causal_attention,
    causal_mask,
    run_blocks,
    softmax_attention,
)
from s2quant.model.dual import DualAR, DualOutput
from s2quant.model.fast import FastAR
from s2quant.model.names import disk_name, module_name
from s2quant.model.slow import SlowAR, SlowOutput, check_tokens

__all__ = [
    "Attend",
    "Attention",
    "Block",
    "DualAR",
    "DualOutput",
    "FastAR",
    "Rotary",
    "SlowAR",
    "SlowOutput",
    "causal_attention",
    "causal_mask",
    "check_tokens",
    "disk_name",
    "module_name",
    "run_blocks",
    "softmax_attention",
]
