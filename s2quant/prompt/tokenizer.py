"""The tokenizer of a checkpoint: text -> ids, with a wall between the template and what a user wrote.

`encode` parses control tokens and is for the template only; `encode_text` never does, whatever the text holds.
Where a text holds no control token both give the same ids, those of the reference. Only `tokenizer.json` is read,
through the `tokenizers` library. Refused: a missing or corrupt file, missing special tokens, semantic ids that are
not contiguous, and ids that disagree with config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text
from s2quant.prompt.tokens import AUDIO_PAD, IM_END, PAD, REQUIRED_TOKENS, SPEAKER_TAG, VOICE, semantic_token

TOKENIZER_FILE = "tokenizer.json"
_TODO = "restore tokenizer.json from the checkpoint's source"


class Tokenizer:
    """Text to token ids and back; `Tokenizer.load` makes one.

    Args:
        backend: A parsed tokenizer.json.
        where: How messages name it.
        config: The checkpoint's configuration, to compare ids with.

    Raises:
        UserError: Special tokens are missing or misplaced; all faults are listed.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, where: str = TOKENIZER_FILE, config: S2Config | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.where = where
        added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self.control_tokens: Mapping[str, int] = {n: i for n, i in added.items() if not SPEAKER_TAG.fullmatch(n)}
        self._control_ids = frozenset(self.control_tokens.values())
        self.num_semantic = sum(name.startswith("<|semantic:") for name in self.control_tokens)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        faults = self._faults()
        if config is not None and not faults:
            faults = self._disagreements(config)
        if faults:
            raise UserError(f"{where}:\n{shorten_list(faults)}", "the tokenizer of an S2 Pro checkpoint", _TODO)

    @classmethod
    def load(cls, folder: Path, config: S2Config | None = None) -> Tokenizer:
        """Read a checkpoint's tokenizer.json.

        Args:
            folder: The checkpoint's folder, or the file itself.
            config: The checkpoint's configuration, to compare ids with.

        Returns:
            The tokenizer.

        Raises:
            UserError: The file is absent or corrupt, or its ids are not those of S2 Pro or of the configuration.
        """
        file = Path(folder)
        file = file / TOKENIZER_FILE if file.is_dir() else file
        return cls.from_json(read_text(file), str(file), config)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = TOKENIZER_FILE, config: S2Config | None = None) -> Tokenizer:
        """Parse the content of a tokenizer.json.

        Args:
            text: The content, UTF-8 if bytes.
            where: How messages name it.
            config: The checkpoint's configuration, to compare ids with.

        Returns:
            The tokenizer.

        Raises:
            UserError: As for `load`.
        """
        try:
            text = text.decode("utf-8") if isinstance(text, bytes) else text
            backend = tokenizers.Tokenizer.from_str(text)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: byte {error.start} is not UTF-8", "the JSON of a fast tokenizer", _TODO
            ) from error
        except Exception as error:
            if type(error) is not Exception:  # the library's own error has no class of its own
                raise
            raise UserError(f"{where}: {error}", "the JSON of a fast tokenizer", _TODO) from error
        # The library numbers added tokens by their place in the list and overlooks an id that says otherwise.
        stated = {token["content"]: token["id"] for token in json.loads(text).get("added_tokens", ())}
        loaded = {name: backend.token_to_id(name) for name in stated}
        if loaded != stated:
            moved = [f"{n} is {stated[n]}, but loads as {loaded[n]}" for n in stated if loaded[n] != stated[n]]
            raise UserError(f"{where}:\n{shorten_list(moved)}", "added tokens in the order of their ids", _TODO)
        return cls(backend, where, config)

    def token_id(self, token: str) -> int:
        """Look up a control token.

        Args:
            token: Its name, such as `<|im_end|>`.

        Returns:
            Its id.

        Raises:
            UserError: The tokenizer has no such control token.
        """
        if token not in self.control_tokens:
            raise UserError(f"{self.where}: no control token {token!r}", "one of the tokenizer's own", _TODO)
        return self.control_tokens[token]

    @property
    def im_end_id(self) -> int:
        """Id of the token that ends a message, and speech."""
        return self.control_tokens[IM_END]

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.control_tokens[PAD]

    @property
    def voice_id(self) -> int:
        """Id of the token that opens speech."""
        return self.control_tokens[VOICE]

    @property
    def semantic_begin_id(self) -> int:
        """Id of semantic code 0."""
        return self.control_tokens[semantic_token(0)]

    @property
    def semantic_end_id(self) -> int:
        """Id of the last semantic code."""
        return self.semantic_begin_id + self.num_semantic - 1

    def encode(self, text: str) -> list[int]:
        """Encode a piece of the template, parsing control tokens; never for a user's text.

        Args:
            text: The piece.

        Returns:
            Token ids; no token is added before or after.

        Raises:
            UserError: The text cannot be written as UTF-8.
        """
        return self._ids(self._backend, text)

    def encode_text(self, text: str) -> list[int]:
        """Encode a user's text, in which nothing is a control token.

        Args:
            text: Any text.

        Returns:
            Token ids, none of them a control token's; no token is added before or after.

        Raises:
            UserError: The text cannot be written as UTF-8, or the tokenizer's base holds a control token.
        """
        ids = self.encode(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        ids = self._ids(self._text_backend, text)
        if not self._control_ids.isdisjoint(ids):
            raise UserError(f"{self.where}: ordinary text gives control tokens", "a base without them", _TODO)
        return ids

    def control_tokens_in(self, text: str) -> list[str]:
        """Name the control tokens that parsing a text would find.

        Args:
            text: Any text.

        Returns:
            Their names, each once, in order of appearance.

        Raises:
            UserError: The text cannot be written as UTF-8.
        """
        names = {number: name for name, number in self.control_tokens.items()}
        return list(dict.fromkeys(names[number] for number in self.encode(text) if number in names))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens included.

        Args:
            ids: Token ids.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: An id has no token.
        """
        known = range(self.vocab_size)
        unknown = sorted({int(i) for i in ids if int(i) not in known or self._backend.id_to_token(int(i)) is None})
        if unknown:
            raise UserError(f"token ids without a token: {unknown[:20]}", f"ids of {self.where}", "check the ids")
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, reading all control tokens as text.

        The library's switch spares tokens that are not marked special (Qwen's `<think>`), so they are marked here.
        """
        data = json.loads(self._backend.to_str())
        for token in data["added_tokens"]:
            token["special"] = token["content"] in self.control_tokens
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        backend.encode_special_tokens = True
        return backend

    def _ids(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"text with a lone surrogate at character {error.start}", "text in valid Unicode", "remove it"
            ) from error
        return list(backend.encode(text, add_special_tokens=False).ids)

    def _faults(self) -> list[str]:
        faults = [f"no special token {name}" for name in REQUIRED_TOKENS if name not in self.control_tokens]
        faults += [
            f"{name} inside a text is not parsed as one token"
            for name in REQUIRED_TOKENS
            if name in self.control_tokens and self.encode(name) != [self.control_tokens[name]]
        ]
        if self.num_semantic == 0:
            return [*faults, f"no semantic tokens such as {semantic_token(0)}"]
        semantic = [self.control_tokens.get(semantic_token(code)) for code in range(self.num_semantic)]
        absent = [semantic_token(code) for code, number in enumerate(semantic) if number is None]
        if absent:
            return [*faults, *(f"no semantic token {name}, of {self.num_semantic}" for name in absent)]
        begin = semantic[0]
        assert begin is not None
        moved = [code for code, number in enumerate(semantic) if number != begin + code]
        if moved:
            code = moved[0]
            faults.append(
                f"the ids of semantic tokens are not contiguous: {semantic_token(code)} is {semantic[code]}, "
                f"not {begin + code} ({len(moved)} of {self.num_semantic} are misplaced)"
            )
        return faults

    def _disagreements(self, config: S2Config) -> list[str]:
        pairs = {
            "eos_token_id": (config.im_end_id, self.im_end_id, IM_END),
            "pad_token_id": (config.pad_id, self.pad_id, PAD),
            "semantic_start_token_id": (config.semantic_begin_id, self.semantic_begin_id, semantic_token(0)),
            "semantic_end_token_id": (config.semantic_end_id, self.semantic_end_id, "the last semantic token"),
        }
        audio_pad = config.raw.get("audio_pad_token_id")
        if audio_pad is not None:
            pairs["audio_pad_token_id"] = (audio_pad, self.control_tokens[AUDIO_PAD], AUDIO_PAD)
        faults = [
            f"{token} has the id {own}, but config.json says {name} {theirs}"
            for name, (theirs, own, token) in pairs.items()
            if theirs != own
        ]
        if self.vocab_size > config.slow.vocab_size:
            faults.append(f"ids up to {self.vocab_size - 1}, but the model's vocabulary is {config.slow.vocab_size}")
        return faults


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder, compared with the config.json beside it.

    Args:
        path: The checkpoint's folder.

    Returns:
        The tokenizer.

    Raises:
        UserError: One of the two files cannot be used, or they disagree.
    """
    folder = Path(path)
    return Tokenizer.load(folder, S2Config.load(folder / "config.json"))
