"""Text and voices in, prompts out: tokenizer, conversation, text policy, splitting of long text."""

from s2quant.prompt.build import build_prompt, conversation, prompt_budget, system_message
from s2quant.prompt.conversation import CodesPart, Conversation, Message, TextPart
from s2quant.prompt.synthetic import synthetic_tokenizer, tiny_token_ids, tiny_tokenizer
from s2quant.prompt.text import batch_turns, check_text, split_text, split_turns
from s2quant.prompt.tokenizer import Tokenizer, load_tokenizer
from s2quant.prompt.voice import Voice, check_voices, code_faults

__all__ = [
    "CodesPart",
    "Conversation",
    "Message",
    "TextPart",
    "Tokenizer",
    "Voice",
    "batch_turns",
    "build_prompt",
    "check_text",
    "check_voices",
    "code_faults",
    "conversation",
    "load_tokenizer",
    "prompt_budget",
    "split_text",
    "split_turns",
    "synthetic_tokenizer",
    "system_message",
    "tiny_token_ids",
    "tiny_tokenizer",
]
