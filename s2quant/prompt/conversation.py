"""Conversations: messages of text and codes -> the tokens that the model reads.

Every part is encoded on its own, so that BPE never merges across a boundary; that is how the model was trained.
Legend: T positions, F frames, N codebooks.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85c402ee6f0a17c2971d3b0dd8d881ca139/fish_speech/conversation.py
and content_sequence.py beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s2quant.prompt.tokenizer import Tokenizer
from s2quant.prompt.tokens import IM_END, IM_START, INTERLEAVE, TEXT, VOICE

Role = Literal["system", "user", "assistant"]
Modality = Literal["text", "voice", "interleave"]
MODALITY_TOKENS: dict[Modality, str] = {"text": TEXT, "voice": VOICE, "interleave": INTERLEAVE}


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A piece of text.

    Args:
        text: The text.
        template: Whether it is part of the template, so that control tokens in it are parsed.
    """

    text: str
    template: bool = False


@dataclass(frozen=True, kw_only=True)
class CodesPart:
    """A piece of speech.

    Args:
        codes: int64 [N, F], row 0 the semantic codes.
    """

    codes: Tensor


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation.

    Args:
        role: Who speaks.
        parts: What is said.
        modality: Announced after the role, if any.
        open: Whether the message is left for the model to go on with.
    """

    role: Role
    parts: Sequence[TextPart | CodesPart] = ()
    modality: Modality | None = None
    open: bool = False

    def all_parts(self) -> list[TextPart | CodesPart]:
        """List the header, the content and the footer.

        Returns:
            The parts in order; an open message has no footer.
        """
        modality = MODALITY_TOKENS[self.modality] if self.modality else ""
        header = TextPart(text=f"{IM_START}{self.role}\n{modality}", template=True)
        footer = [] if self.open else [TextPart(text=f"{IM_END}\n", template=True)]
        return [header, *self.parts, *footer]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order.

    Args:
        messages: The messages.
    """

    messages: Sequence[Message]

    def encode(self, tokenizer: Tokenizer, num_codebooks: int = 10) -> Tensor:
        """Encode for the model.

        Args:
            tokenizer: The checkpoint's tokenizer.
            num_codebooks: N.

        Returns:
            int64 [1+N, T]: row 0 holds token ids, rows 1 to N the codes where a frame stands and 0 elsewhere.
        """
        columns = [torch.zeros(1 + num_codebooks, 0, dtype=torch.int64)]
        for message in self.messages:
            columns += [_encode_part(part, tokenizer, num_codebooks) for part in message.all_parts()]
        return torch.cat(columns, dim=1)


def _encode_part(part: TextPart | CodesPart, tokenizer: Tokenizer, num_codebooks: int) -> Tensor:
    if isinstance(part, CodesPart):
        codes = part.codes.to(device="cpu", dtype=torch.int64)
        assert codes.ndim == 2 and codes.shape[0] == num_codebooks, codes.shape
        return torch.cat([codes[:1] + tokenizer.semantic_begin_id, codes])  # [1+N, F]
    ids = tokenizer.encode(part.text) if part.template else tokenizer.encode_text(part.text)
    block = torch.zeros(1 + num_codebooks, len(ids), dtype=torch.int64)
    block[0] = torch.tensor(ids, dtype=torch.int64)
    return block
