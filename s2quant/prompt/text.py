"""What a user may write, and how a long text is cut into batches.

`<|speaker:N|>` and inline [tags] are ordinary text. Control tokens such as `<|im_end|>` are refused, or with policy
"escape" encoded as the characters they are written with. Turns and batches are the reference's; text before the
first speaker tag, which the reference drops without a word, is refused. Splitting at sentences goes beyond the
reference and is off unless asked for.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85c402ee6f0a17c2971d3b0dd8d881ca139/fish_speech/models/text2semantic/inference.py
(split_text_by_speaker, group_turns_into_batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from s2quant.errors import UserError, shorten_list
from s2quant.prompt.sentences import split_sentences as cut_sentences
from s2quant.prompt.tokenizer import Tokenizer
from s2quant.prompt.tokens import CONTROL_TOKEN, SPEAKER_TAG

TextPolicy = Literal["refuse", "escape"]
# About twenty minutes of speech; more does not fit into one conversation of the model.
MAX_CHARACTERS = 20_000
MAX_TURNS = 5
MAX_BYTES = 300


def check_text(
    text: str,
    policy: TextPolicy = "refuse",
    tokenizer: Tokenizer | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Refuse a text that cannot be said.

    Args:
        text: What a user wrote.
        policy: "refuse" control tokens, or "escape" them: leave them to be encoded as ordinary text.
        tokenizer: Says what a control token is; without it the known names of S2 Pro's do.
        max_characters: The longest text.

    Returns:
        The text, unchanged.

    Raises:
        UserError: The text is empty, too long, not valid Unicode, or holds control tokens; all of them are named.
    """
    if policy not in ("refuse", "escape"):
        raise UserError(f"text policy {policy!r}", '"refuse" or "escape"', "choose one of them")
    if not SPEAKER_TAG.sub("", text).strip():
        raise UserError(f"a text without words: {text[:40]!r}", "something to say", "write the text")
    if len(text) > max_characters:
        raise UserError(
            f"a text of {len(text):,} characters, starting {text[:40]!r}",
            f"{max_characters:,} at most",
            "cut it into chapters and say each on its own",
        )
    bad = [i for i, character in enumerate(text) if character == "\0" or "\ud800" <= character <= "\udfff"]
    if bad:
        raise UserError(
            f"a text with NUL characters or lone surrogates at {bad[:10]} ({len(bad)} in all)",
            "text in valid Unicode",
            "remove them, or read the file with its true encoding",
        )
    if policy == "refuse":
        found = tokenizer.control_tokens_in(text) if tokenizer else list(dict.fromkeys(CONTROL_TOKEN.findall(text)))
        if found:
            raise UserError(
                f"control tokens in a text: {', '.join(found[:20])}" + (" ..." if len(found) > 20 else ""),
                "plain text, <|speaker:N|> and [tags]",
                'remove them, or use the text policy "escape" to have them read as ordinary characters',
            )
    return text


def split_turns(text: str) -> list[str]:
    """Cut a text where speakers change.

    Args:
        text: A text with or without `<|speaker:N|>`.

    Returns:
        One turn per tag, the tag first, blanks around it removed; nothing if there is no tag.

    Raises:
        UserError: Words stand before the first tag, or a tag has no words; all of them are named.
    """
    tags = list(SPEAKER_TAG.finditer(text))
    if not tags:
        return []
    faults = []
    if before := text[: tags[0].start()].strip():
        faults.append(f"no speaker is named for {before[:60]!r}, before the first tag {tags[0].group()}")
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    turns = [text[tag.start() : end].strip() for tag, end in zip(tags, ends, strict=True)]
    for i, (tag, turn) in enumerate(zip(tags, turns, strict=True)):
        if turn == tag.group():
            faults.append(f"turn {i} has a tag, {turn}, and no words")
    if faults:
        raise UserError(
            f"speaker tags that do not fit:\n{shorten_list(faults)}",
            "each piece of text after the tag of its speaker",
            "put <|speaker:0|> at the start of the text, and words after each tag",
        )
    return turns


def batch_turns(turns: Sequence[str], max_turns: int = MAX_TURNS, max_bytes: int = MAX_BYTES) -> list[str]:
    """Group turns that are said at one go.

    Args:
        turns: Turns in order.
        max_turns: The most turns of a batch.
        max_bytes: The most UTF-8 bytes of a batch, newlines not counted; a turn longer than that is not cut.

    Returns:
        Batches: turns joined by newlines.

    Raises:
        UserError: A limit is not positive.
    """
    _check_limits(max_turns, max_bytes)
    batches: list[list[str]] = []
    size = 0
    for turn in turns:
        num_bytes = len(turn.encode("utf-8"))
        if not batches or len(batches[-1]) >= max_turns or size + num_bytes > max_bytes:
            batches.append([])
            size = 0
        batches[-1].append(turn)
        size += num_bytes
    return ["\n".join(batch) for batch in batches]


def split_text(
    text: str, max_bytes: int = MAX_BYTES, *, max_turns: int = MAX_TURNS, split_sentences: bool = False
) -> list[str]:
    """Cut a text into batches, each said at one go with all before it in the conversation.

    Args:
        text: What to say.
        max_bytes: The most UTF-8 bytes of a batch, where it can be kept.
        max_turns: The most turns of a batch.
        split_sentences: Whether a text without tags, or a turn, that is longer than max_bytes is cut between
            sentences, else between clauses or words; each piece of a turn gets its tag. The model fades in
            single generations past some 800 frames (37 s). Off, a text without tags is one batch.

    Returns:
        Batches in order.

    Raises:
        UserError: Speaker tags do not fit (see `split_turns`), or a limit is not positive.
    """
    _check_limits(max_turns, max_bytes)
    turns = split_turns(text)
    if not turns:
        return cut_sentences(text, max_bytes) if split_sentences else [text]
    if split_sentences:
        turns = [piece for turn in turns for piece in _cut_turn(turn, max_bytes)]
    return batch_turns(turns, max_turns, max_bytes)


def _cut_turn(turn: str, max_bytes: int) -> list[str]:
    tag = SPEAKER_TAG.match(turn)
    assert tag is not None
    if len(turn.encode("utf-8")) <= max_bytes:
        return [turn]
    return [tag.group() + piece for piece in cut_sentences(turn[tag.end() :], max(1, max_bytes - len(tag.group())))]


def _check_limits(max_turns: int, max_bytes: int) -> None:
    if max_turns < 1 or max_bytes < 1:
        raise UserError(f"max_turns {max_turns}, max_bytes {max_bytes}", "1 or more of each", "raise the limit")
