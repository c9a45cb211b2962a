"""Text and voices -> the prompt that the Slow AR reads, part by part as the reference writes it.

Control tokens are parsed in the template only. A user's text and transcripts keep every character, inline [tags]
included. Legend: T positions, F frames, N codebooks. Refused: text and voices that `check_text` and `check_voices`
refuse, and prompts over the budget.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85c402ee6f0a17c2971d3b0dd8d881ca139/fish_speech/models/text2semantic/inference.py
(generate_long).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError, shorten_list
from s2quant.prompt.conversation import CodesPart, Conversation, Message, TextPart
from s2quant.prompt.text import TextPolicy, check_text
from s2quant.prompt.tokenizer import Tokenizer
from s2quant.prompt.tokens import SPEAKER_TAG
from s2quant.prompt.voice import CODEBOOK_SIZE, Voice, check_voices, code_faults

# Positions that a prompt leaves free for speech, as in the reference; fewer for a model that is very short.
RESERVED_FRAMES = 2048


def prompt_budget(config: S2Config) -> int:
    """Count the positions that a prompt may take.

    Args:
        config: The checkpoint's configuration.

    Returns:
        max_seq_len less 2048, or half of max_seq_len if that is more.
    """
    length = config.slow.max_seq_len
    return max(length - RESERVED_FRAMES, length // 2)


def system_message(voices: Sequence[Voice] = ()) -> Message:
    """Write the instruction, with the references if there are any.

    Args:
        voices: The references; one without a speaker tag gets that of its place.

    Returns:
        The system message; all voices' codes stand in one part, joined in time.
    """
    if not voices:
        return Message(role="system", parts=[TextPart(text="convert the provided text to speech", template=True)])
    tagged = [v.text if SPEAKER_TAG.search(v.text) else f"<|speaker:{i}|>{v.text}" for i, v in enumerate(voices)]
    instruction = "convert the provided text to speech reference to the following:\n\nText:\n"
    parts: list[TextPart | CodesPart] = [
        TextPart(text=instruction, template=True),
        TextPart(text="\n".join(tagged)),
        TextPart(text="\n\nSpeech:\n", template=True),
        CodesPart(codes=torch.cat([voice.codes for voice in voices], dim=1)),
    ]
    return Message(role="system", parts=parts)


def conversation(text: str, voices: Sequence[Voice] = (), history: Sequence[tuple[str, Tensor]] = ()) -> Conversation:
    """Put together the conversation that ends where speech begins; nothing is checked.

    Args:
        text: What to say next: one batch of `split_text`.
        voices: The references.
        history: Batches said already: text, and codes int64 [N, F].

    Returns:
        The conversation.
    """
    messages = [system_message(voices)]
    for said, codes in history:
        messages.append(Message(role="user", parts=[TextPart(text=said)]))
        messages.append(Message(role="assistant", parts=[CodesPart(codes=codes)], modality="voice"))
    messages.append(Message(role="user", parts=[TextPart(text=text)]))
    messages.append(Message(role="assistant", modality="voice", open=True))
    return Conversation(messages=messages)


def build_prompt(
    tokenizer: Tokenizer,
    text: str,
    voices: Sequence[Voice] = (),
    history: Sequence[tuple[str, Tensor]] = (),
    num_codebooks: int = 10,
    *,
    policy: TextPolicy = "refuse",
    max_tokens: int | None = None,
    codebook_size: int = CODEBOOK_SIZE,
) -> Tensor:
    """Build one prompt, checked.

    Args:
        tokenizer: The checkpoint's tokenizer.
        text: What to say next: one batch of `split_text`, or any text to be said at one go.
        voices: The references, speaker 0 first.
        history: Batches said already in this conversation: text, and codes int64 [N, F].
        num_codebooks: N.
        policy: What to do with control tokens in texts, as in `check_text`.
        max_tokens: The most positions, from `prompt_budget`; no limit if None.
        codebook_size: Rows of a residual codebook in the model's tables, from the configuration.

    Returns:
        int64 [1+N, T]: row 0 holds token ids, rows 1 to N the codes where a frame stands and 0 elsewhere.

    Raises:
        UserError: A text, a voice or the history cannot be used, or the prompt is longer than allowed.
    """
    check_text(text, policy, tokenizer)
    check_voices(voices, tokenizer, num_codebooks, codebook_size, policy)
    faults = []
    for i, (said, codes) in enumerate(history):
        check_text(said, policy, tokenizer)
        found = code_faults(codes, num_codebooks, tokenizer.num_semantic, codebook_size, min_frames=0)
        faults += [f"turn {i}: {fault}" for fault in found]
    if faults:
        raise UserError(f"unusable history:\n{shorten_list(faults)}", "codes of this model", "start a new conversation")
    prompt = conversation(text, voices, history).encode(tokenizer, num_codebooks)
    if max_tokens is not None and prompt.shape[1] > max_tokens:
        raise UserError(
            f"a prompt of {prompt.shape[1]} positions ({_parts(tokenizer, text, voices, history)})",
            f"{max_tokens} at most, which leaves room for speech",
            "say the text in shorter pieces, use shorter reference recordings, or start a new conversation",
        )
    return prompt


def _parts(tokenizer: Tokenizer, text: str, voices: Sequence[Voice], history: Sequence[tuple[str, Tensor]]) -> str:
    voice_frames = sum(voice.codes.shape[1] for voice in voices)
    history_frames = sum(codes.shape[1] for _, codes in history)
    num_tokens = len(tokenizer.encode_text(text))
    return f"{num_tokens} of text, {voice_frames} frames of references, {history_frames} frames of earlier turns"
