"""The special tokens of S2 Pro: their names, their order, and where their ids lie.

The vocabulary is: base BPE tokens, `<|endoftext|> <|im_start|> <|im_end|>`, reserved tokens (Qwen3's other 23 in
S2 Pro, none in a small test tokenizer), then Fish's nine from `<|pad|>` to `<|audio_pad|>`, then one token per
semantic code, contiguous. Anything else is refused.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85c402ee6f0a17c2971d3b0dd8d881ca139/fish_speech/tokenizer.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|pad|>"
TEXT = "<|text|>"
VOICE = "<|voice|>"
INTERLEAVE = "<|interleave|>"
AUDIO_PAD = "<|audio_pad|>"

# In the order of their ids.
CHAT_TOKENS = (ENDOFTEXT, IM_START, IM_END)
FISH_TOKENS = (
    PAD,
    "<|phoneme_start|>",
    "<|phoneme_end|>",
    TEXT,
    VOICE,
    INTERLEAVE,
    "<|audio_start|>",
    "<|audio_end|>",
    AUDIO_PAD,
)
# Qwen3's own, between the two groups; the reference has no use for them, but its tokenizer parses them all the same.
QWEN_TOKENS = (
    *(f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
# Every token that a tokenizer of ours must have, besides the semantic ones.
REQUIRED_TOKENS = CHAT_TOKENS + FISH_TOKENS

# Ordinary text to the tokenizer, but with a meaning for the model: always allowed in a user's text.
SPEAKER_TAG = re.compile(r"<\|speaker:\d+\|>")
# What a tokenizer of this family would parse as a control token.
CONTROL_TOKEN = re.compile(
    "|".join(re.escape(name) for name in REQUIRED_TOKENS + QWEN_TOKENS) + r"|<\|semantic:[0-9]+\|>"
)


def semantic_token(code: int) -> str:
    """Name the token of a semantic code.

    Args:
        code: The code, from 0.

    Returns:
        `<|semantic:CODE|>`.
    """
    return f"<|semantic:{code}|>"


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Where every token id lies.

    Args:
        num_base: Base BPE tokens; the id of `<|endoftext|>`.
        num_reserved: Tokens between `<|im_end|>` and `<|pad|>`.
        num_semantic: Semantic tokens.
    """

    num_base: int
    num_reserved: int
    num_semantic: int

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.num_base + len(CHAT_TOKENS) - 1

    @property
    def pad_id(self) -> int:
        """Id of `<|pad|>`."""
        return self.num_base + len(CHAT_TOKENS) + self.num_reserved

    @property
    def semantic_begin_id(self) -> int:
        """Id of `<|semantic:0|>`."""
        return self.pad_id + len(FISH_TOKENS)

    @property
    def num_tokens(self) -> int:
        """One more than the highest id."""
        return self.semantic_begin_id + self.num_semantic

    def special_ids(self) -> dict[str, int]:
        """Give the id of each token after the base.

        Returns:
            Token name -> id, in the order of the ids.
        """
        reserved = QWEN_TOKENS if self.num_reserved == len(QWEN_TOKENS) else ()
        names = (
            *CHAT_TOKENS,
            *(reserved or (f"<|reserved:{i}|>" for i in range(self.num_reserved))),
            *FISH_TOKENS,
            *(semantic_token(code) for code in range(self.num_semantic)),
        )
        return {name: self.num_base + i for i, name in enumerate(names)}

    @classmethod
    def of(cls, config: S2Config) -> TokenLayout:
        """Read the layout off a checkpoint's configuration.

        Args:
            config: The configuration.

        Returns:
            The layout whose ids are those of the configuration.

        Raises:
            UserError: No layout of this family has these ids.
        """
        layout = cls(
            num_base=config.im_end_id - len(CHAT_TOKENS) + 1,
            num_reserved=config.pad_id - config.im_end_id - 1,
            num_semantic=config.semantic_end_id - config.semantic_begin_id + 1,
        )
        ids = f"im_end {config.im_end_id}, pad {config.pad_id}, first semantic {config.semantic_begin_id}"
        if layout.num_base < 256 or layout.num_reserved < 0 or layout.semantic_begin_id != config.semantic_begin_id:
            raise UserError(
                f"token ids in config.json: {ids}",
                f"im_end >= 258, pad > im_end, first semantic = pad + {len(FISH_TOKENS)}",
                "set eos_token_id, pad_token_id and semantic_start_token_id in that layout",
            )
        return layout
