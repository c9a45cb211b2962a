"""What users may write, and how long texts are cut."""

import random
import re
import time

import pytest
from prompt_cases import random_text

from s2quant.errors import UserError
from s2quant.prompt import Tokenizer, batch_turns, check_text, split_text, split_turns, tiny_tokenizer
from s2quant.prompt.sentences import split_sentences
from s2quant.prompt.tokens import QWEN_TOKENS, REQUIRED_TOKENS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tiny_tokenizer()["tokenizer.json"])


# ---------------------------------------------------------------- check_text


@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        " [laughing] ",
        "<|speaker:0|>a",
        "<|speaker:99|>[x]",
        "<|semantic:|>",
        "<|im_end |>",
        "\u4f60",
        "|>",
        "...",
    ],
)
def test_good_texts_come_back_unchanged(tokenizer, text):
    assert check_text(text) == text
    assert check_text(text, "escape", tokenizer) == text
    assert check_text(text, "refuse", tokenizer) == text


def test_control_tokens_are_all_named_in_one_error(tokenizer):
    text = "a <|im_end|> b <|voice|><|speaker:0|> c <|semantic:5|><|im_end|>"
    for known in (None, tokenizer):
        with pytest.raises(UserError) as caught:
            check_text(text, tokenizer=known)
        assert caught.value.got == "control tokens in a text: <|im_end|>, <|voice|>, <|semantic:5|>"
        assert "escape" in caught.value.todo
        assert check_text(text, "escape", known) == text
    many = "".join(f"<|semantic:{i}|>" for i in range(100))
    with pytest.raises(UserError, match=r"<\|semantic:19\|> \.\.\."):
        check_text(many)


@pytest.mark.parametrize("name", [*REQUIRED_TOKENS, *QWEN_TOKENS, "<|semantic:0|>", "<|semantic:4095|>"])
def test_each_control_token_is_refused_without_a_tokenizer(name):
    with pytest.raises(UserError, match=re.escape(name)):
        check_text(f"x{name}y")


@pytest.mark.parametrize("text", ["", " ", "\n\t\u3000\u00a0", "<|speaker:0|>", " <|speaker:0|> \n<|speaker:1|>"])
def test_no_words(text):
    with pytest.raises(UserError, match="a text without words"):
        check_text(text)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800", "\udcffb", "a\udfff\0"])
@pytest.mark.parametrize("policy", ["refuse", "escape"])
def test_broken_characters(tokenizer, text, policy):
    with pytest.raises(UserError, match="NUL characters or lone surrogates at"):
        check_text(text, policy, tokenizer)


def test_too_long():
    assert check_text("a" * 20_000)
    with pytest.raises(UserError, match="100,000 characters") as caught:
        check_text("a" * 100_000)
    assert caught.value.expected == "20,000 at most" and len(str(caught.value)) < 300
    assert check_text("a" * 100_000, max_characters=100_000)


def test_unknown_policy():
    with pytest.raises(UserError, match="text policy 'ignore'"):
        check_text("a", "ignore")  # type: ignore[arg-type]


# ---------------------------------------------------------------- turns and batches


def test_turns():
    assert split_turns("No tag at all.") == []
    assert split_turns(" \n<|speaker:0|> a \n <|speaker:1|>b<|speaker:0|>c ") == [
        "<|speaker:0|> a",
        "<|speaker:1|>b",
        "<|speaker:0|>c",
    ]


def test_text_before_the_first_tag_is_not_dropped():
    with pytest.raises(UserError) as caught:
        split_text("Hello there. <|speaker:1|>Hi.<|speaker:2|> <|speaker:0|>")
    assert "'Hello there.', before the first tag <|speaker:1|>" in caught.value.got
    assert "turn 1 has a tag, <|speaker:2|>, and no words" in caught.value.got
    assert "turn 2 has a tag, <|speaker:0|>, and no words" in caught.value.got


def test_batches():
    turns = [f"<|speaker:{i}|>{'x' * 10}" for i in range(12)]  # 23 bytes each, the last two 24
    assert [batch.count("\n") + 1 for batch in batch_turns(turns)] == [5, 5, 2]
    assert [batch.count("\n") + 1 for batch in batch_turns(turns, max_turns=2)] == [2] * 6
    assert [batch.count("\n") + 1 for batch in batch_turns(turns, max_bytes=46)] == [2] * 5 + [1, 1]
    assert batch_turns(turns, max_bytes=1) == turns
    assert batch_turns([]) == []
    assert "\n".join(batch_turns(turns)) == "\n".join(turns)


def test_a_text_without_tags_is_one_batch():
    text = "  A sentence. " * 500
    assert split_text(text) == [text]


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_turns": 0}, {"max_bytes": -5}])
def test_limits_must_be_positive(limits):
    for text in ("a", "<|speaker:0|>a"):
        with pytest.raises(UserError, match="max_turns"):
            split_text(text, **limits)


# ---------------------------------------------------------------- sentences

SENTENCES = [
    ("One is here. Two is here! Three? Four.", 20, ["One is here.", "Two is here! Three?", "Four."]),
    ("Short enough, as it is. ", 100, ["Short enough, as it is. "]),
    ("First line\nSecond line\n\nThird line", 12, ["First line", "Second line", "Third line"]),
    (
        "He said \u201cstop.\u201d Then he (really!) left.",
        22,
        ["He said \u201cstop.\u201d", "Then he (really!)", "left."],
    ),
    (
        "Dr. Ada met J. R. Smith. They ate pie etc. and left.",
        30,
        ["Dr. Ada met J. R. Smith.", "They ate pie etc. and left."],
    ),
    ("It costs 3.14 now. Or 2.71 then.", 20, ["It costs 3.14 now.", "Or 2.71 then."]),
    ("one, two, three; four: five \u2014 six", 12, ["one, two,", "three; four:", "five \u2014 six"]),
    ("Hi there. [sigh] We go on. [laughing] Ha.", 18, ["Hi there.", "[sigh] We go on.", "[laughing] Ha."]),
    ("aa bb [a long. tag, of words] cc dd", 6, ["aa bb", "[a long. tag, of words] cc", "dd"]),
    ("It ends. [sigh]\nNext.", 16, ["It ends. [sigh]", "Next."]),
    (
        "\u4f60\u597d\u3002\u518d\u89c1\uff01\u201c\u597d\u3002\u201d\u8d70",
        12,
        ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01", "\u201c\u597d\u3002\u201d", "\u8d70"],
    ),
    (
        "\u4f60\u597d\uff0c\u4e16\u754c\uff0c\u518d\u89c1",
        10,
        ["\u4f60\u597d\uff0c", "\u4e16\u754c\uff0c", "\u518d\u89c1"],
    ),
    (
        "\u300c\u3084\u3042\u3002\u300d\u3068\u8a00\u3046\u3002",
        15,
        ["\u300c\u3084\u3042\u3002\u300d", "\u3068\u8a00\u3046\u3002"],
    ),
    (
        "\u0645\u0631\u062d\u0628\u0627\u061f \u0646\u0639\u0645\u060c \u0644\u0627",
        13,
        ["\u0645\u0631\u062d\u0628\u0627\u061f", "\u0646\u0639\u0645\u060c \u0644\u0627"],
    ),
    ("\u0928\u092e\u0964 \u0930\u092e\u0964", 10, ["\u0928\u092e\u0964", "\u0930\u092e\u0964"]),
    ("\u0e44\u0e17\u0e22 \u0e44\u0e17\u0e22", 10, ["\u0e44\u0e17\u0e22", "\u0e44\u0e17\u0e22"]),
    ("\u4f60\u597d" * 9, 12, ["\u4f60\u597d" * 9]),
    ("Supercalifragilistic.", 5, ["Supercalifragilistic."]),
    ("an unclosed [tag goes. on and on", 12, ["an unclosed", "[tag goes.", "on and on"]),
]


@pytest.mark.parametrize(("text", "max_bytes", "pieces"), SENTENCES)
def test_sentences(text, max_bytes, pieces):
    assert split_sentences(text, max_bytes) == pieces
    assert split_text(text, max_bytes, split_sentences=True) == pieces


def test_no_character_is_lost_and_no_tag_or_word_is_cut():
    generator = random.Random(3)
    for _ in range(400):
        text = random_text(generator, generator.randint(1, 120))
        pieces = split_sentences(text, max_bytes := generator.choice((1, 10, 40, 100)))
        assert "".join("".join(pieces).split()) == "".join(text.split())
        place = 0
        tags = [tag.span() for tag in re.finditer(r"\[[^\[\]\n]*\]", text)]
        for piece in pieces:
            start = text.index(piece, place)
            assert not any(low < start < high for low, high in tags), (text, piece)
            if start and pieces[0] is not piece:
                assert not (text[start - 1].isalnum() and text[start].isalnum()), (text, piece)
            place = start + len(piece)
        if len(pieces) > 1:
            assert all(piece == piece.strip() and piece for piece in pieces)
            assert all(len(p.encode()) <= max_bytes or not re.search(r"\w\s+\w", p) for p in pieces if "[" not in p)


def test_pieces_of_a_turn_keep_its_speaker():
    text = "<|speaker:0|>One is here. Two is here. Three is here.\n<|speaker:1|>No."
    assert split_text(text, 40, split_sentences=True) == [
        "<|speaker:0|>One is here. Two is here.",
        "<|speaker:0|>Three is here.",
        "<|speaker:1|>No.",
    ]
    assert split_text(text, 50, split_sentences=True) == [
        "<|speaker:0|>One is here. Two is here.",
        "<|speaker:0|>Three is here.\n<|speaker:1|>No.",
    ]
    assert len(split_text(text, 40)) == 2


def test_a_text_of_tags_only_stays_whole():
    assert split_sentences("[laughing] [sigh] [pause]", 5) == ["[laughing] [sigh] [pause]"]


def test_splitting_a_very_long_text_is_quick():
    text = "A sentence of some length, with a clause. " * 5000
    pieces = split_sentences(text, 300)
    assert all(200 < len(piece) <= 300 for piece in pieces[:-1]) and " ".join(pieces) == text.strip()
    start = time.perf_counter()
    for run in (".", " ", "\n", "- ", "[x] ", "\u2026", ",", "\u2014", "[", '"', ".)", "a", "a\n"):
        split_sentences(run * 10_000 + "a", 300)
    assert time.perf_counter() - start < 5  # quadratic time would be a minute
