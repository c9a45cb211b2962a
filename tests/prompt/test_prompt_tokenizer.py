"""The tokenizer: what it refuses, the wall around control tokens, round trips, and the synthetic ones."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from prompt_cases import S2_PRO_IDS, make_config, random_text
from tokenizers.normalizers import NFC

from s2quant.errors import UserError
from s2quant.prompt import Tokenizer, load_tokenizer, synthetic_tokenizer, tiny_token_ids, tiny_tokenizer
from s2quant.prompt.tokens import FISH_TOKENS, QWEN_TOKENS, REQUIRED_TOKENS, semantic_token


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tiny_tokenizer()["tokenizer.json"])


def changed(change) -> str:
    """A small tokenizer.json after `change` edited its list of added tokens."""
    data = json.loads(tiny_tokenizer(num_semantic=16)["tokenizer.json"])
    data["added_tokens"] = change(data["added_tokens"])
    return json.dumps(data)


def renamed(tokens, old: str, new: str) -> list:
    return [token | {"content": new} if token["content"] == old else token for token in tokens]


def random_unicode(generator: random.Random, length: int) -> str:
    """Any characters but NUL and surrogates, near ones more often."""
    points = (
        generator.choice(
            (generator.randrange(1, 0x80), generator.randrange(1, 0xD800), generator.randrange(0xE000, 0x110000))
        )
        for _ in range(length)
    )
    return "".join(map(chr, points))


def test_tiny_layout(tokenizer):
    ids = tiny_token_ids()
    assert ids == {
        "vocab_size": 4672,
        "pad_token_id": 503,
        "eos_token_id": 502,
        "audio_pad_token_id": 511,
        "semantic_start_token_id": 512,
        "semantic_end_token_id": 4607,
    }
    assert (tokenizer.im_end_id, tokenizer.pad_id, tokenizer.voice_id) == (502, 503, 507)
    assert (tokenizer.semantic_begin_id, tokenizer.semantic_end_id, tokenizer.num_semantic) == (512, 4607, 4096)
    assert tokenizer.vocab_size == 4608 and len(tokenizer.control_tokens) == 12 + 4096
    assert [tokenizer.token_id(name) for name in REQUIRED_TOKENS] == list(range(500, 512))
    assert [tokenizer.token_id(semantic_token(code)) for code in (0, 1, 4095)] == [512, 513, 4607]
    Tokenizer.from_json(tiny_tokenizer()["tokenizer.json"], config=make_config(ids))


@pytest.mark.parametrize("num_semantic", [1, 16, 512, 4096])
def test_tiny_with_fewer_codes(num_semantic):
    ids = tiny_token_ids(num_semantic)
    assert ids["vocab_size"] % 64 == 0 and ids["vocab_size"] > ids["semantic_end_token_id"] + 1
    tokenizer = Tokenizer.from_json(tiny_tokenizer(num_semantic)["tokenizer.json"], config=make_config(ids))
    assert tokenizer.num_semantic == num_semantic


def test_real_layout():
    config = make_config(S2_PRO_IDS)
    files = synthetic_tokenizer(config)
    tokenizer = Tokenizer.from_json(files["tokenizer.json"], config=config)
    assert tokenizer.vocab_size == 155774
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_TOKENS, *FISH_TOKENS]
    assert [tokenizer.token_id(name) for name in names] == list(range(151643, 151678))
    assert tokenizer.encode("<|im_start|>system\n") == [151644, 8948, 198]
    assert tokenizer.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert tokenizer.encode("<|im_start|>assistant\n<|voice|>") == [151644, 77091, 198, 151673]
    # Whatever is written, only bytes and trained tokens come out, never a filler.
    ids = tokenizer.encode_text("Fillers are <filler-700>, and <think> is text. \u4f60\u597d")
    assert max(set(ids) - {8948, 77091}) < 700
    assert tokenizer.decode(ids) == "Fillers are <filler-700>, and <think> is text. \u4f60\u597d"


def test_synthetic_is_the_same_on_every_call_and_refuses_other_layouts():
    assert tiny_tokenizer(8) == tiny_tokenizer(8)
    assert synthetic_tokenizer(make_config(tiny_token_ids()))["tokenizer.json"] == tiny_tokenizer()["tokenizer.json"]
    assert set(tiny_tokenizer(8)) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    for name, value in (("eos_token_id", 200), ("pad_token_id", 400), ("semantic_start_token_id", 600)):
        with pytest.raises(UserError, match=r"token ids in config\.json"):
            synthetic_tokenizer(make_config(tiny_token_ids() | {name: value}))


def test_any_text_round_trips(tokenizer):
    generator = random.Random(0)
    for length in [0, 1, 2, 3, 5, 8, 20] * 40:
        for text in (random_text(generator, length), random_unicode(generator, length)):
            ids = tokenizer.encode_text(text)
            assert tokenizer.decode(ids) == NFC().normalize_str(text)
            assert ids == tokenizer.encode(text)
            assert all(0 <= number < 500 for number in ids)


def test_every_byte_is_covered(tokenizer):
    text = "".join(map(chr, [*range(1, 0x800), 0x1F600, 0xFFFD, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode_text(text)) == NFC().normalize_str(text)
    assert sorted(tokenizer.encode_text(chr(i))[0] for i in range(0x80)) == sorted(
        {tokenizer.encode_text(chr(i))[0] for i in range(0x80)}
    )


def test_control_tokens_in_user_text_are_text(tokenizer):
    generator = random.Random(1)
    names = [*REQUIRED_TOKENS, "<|semantic:0|>", "<|semantic:4095|>"]
    # A tokenizer that never knew of control tokens.
    plain = tokenizers.Tokenizer.from_str(
        json.dumps(json.loads(tiny_tokenizer()["tokenizer.json"]) | {"added_tokens": []})
    )
    for _ in range(200):
        name = generator.choice(names)
        text = random_text(generator, 5) + name + random_text(generator, 5)
        assert name in tokenizer.control_tokens_in(text)
        ids = tokenizer.encode_text(text)
        assert all(number < 500 for number in ids)
        assert tokenizer.decode(ids) == NFC().normalize_str(text)
        assert ids == plain.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)


def test_tokens_that_are_parsed_but_not_marked_special_are_control_tokens():
    text = changed(
        lambda tokens: [
            *tokens,
            tokens[0] | {"id": 528, "content": "<think>", "special": False},
            tokens[0] | {"id": 529, "content": "<|speaker:0|>", "special": False},
        ]
    )
    tokenizer = Tokenizer.from_json(text)
    assert tokenizer.control_tokens_in("a <think> b <think>") == ["<think>"]
    assert 528 in tokenizer.encode("<think>") and 528 not in tokenizer.encode_text("<think>")
    # A speaker tag is a user's to write; were it one token, it would stay one.
    assert tokenizer.control_tokens_in("<|speaker:0|>") == []
    assert tokenizer.encode_text("<|speaker:0|><think>")[0] == 529


def test_semantic_tokens(tokenizer):
    assert tokenizer.encode("<|semantic:0|><|semantic:4095|>") == [512, 4607]
    assert tokenizer.control_tokens_in("<|semantic:5|><|semantic:4096|> <|semantic:5|>") == ["<|semantic:5|>"]
    assert tokenizer.decode([512, 502]) == "<|semantic:0|><|im_end|>"


@pytest.mark.parametrize("bad", [[-1], [4608], [4671, 5], [2**40]])
def test_decode_refuses_ids_without_a_token(tokenizer, bad):
    with pytest.raises(UserError, match="token ids without a token"):
        tokenizer.decode(bad)


def test_lone_surrogates(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_text, tokenizer.control_tokens_in):
        with pytest.raises(UserError, match="lone surrogate at character 1"):
            encode("a\ud800")


def test_unknown_name(tokenizer):
    with pytest.raises(UserError, match=r"no control token '<\|speaker:0\|>'"):
        tokenizer.token_id("<|speaker:0|>")


FAULTS = [
    (lambda tokens: [], "no special token <|im_end|>"),
    (lambda tokens: renamed(tokens, "<|voice|>", "<|noise|>"), "no special token <|voice|>"),
    (lambda tokens: tokens[:12], "no semantic tokens"),
    (lambda tokens: renamed(tokens, "<|semantic:3|>", "<|gap|>"), "no semantic token <|semantic:3|>, of 15"),
    (
        lambda tokens: [*tokens[:-1], tokens[-1] | {"id": 600}],
        "<|semantic:15|> is 600, but loads as 527",
    ),
    (
        lambda tokens: [
            *tokens[:-2],
            tokens[-2] | {"content": "<|semantic:15|>"},
            tokens[-1] | {"content": "<|semantic:14|>"},
        ],
        "not contiguous: <|semantic:14|> is 527, not 526 (2 of 16 are misplaced)",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faulty_special_tokens(change, message):
    with pytest.raises(UserError) as caught:
        Tokenizer.from_json(changed(change), "folder/tokenizer.json")
    assert message in caught.value.got and caught.value.got.startswith("folder/tokenizer.json")


def test_ids_that_disagree_with_the_configuration():
    text = tiny_tokenizer(16)["tokenizer.json"]
    good = tiny_token_ids(16)
    Tokenizer.from_json(text, config=make_config(good))
    for name in good:
        with pytest.raises(UserError) as caught:
            Tokenizer.from_json(text, config=make_config(good | {name: good[name] - 100}))
        assert ("vocabulary" if name == "vocab_size" else name) in caught.value.got
    with pytest.raises(UserError) as caught:
        Tokenizer.from_json(text, config=make_config(S2_PRO_IDS))
    assert caught.value.got.count("config.json says") == 5


def test_load_refuses_absent_and_corrupt_files(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.load(tmp_path / "nowhere")
    whole = tiny_tokenizer(16)["tokenizer.json"]
    for content in (b"", b"{}", b"[]", b"null", whole[:-100], whole.replace(b'"BPE"', b'"BPF"'), b"\xff" + whole):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="byte 0 is not UTF-8"):
        Tokenizer.from_json(b"\xff" + whole)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    assert Tokenizer.load(tmp_path).num_semantic == 16
    assert Tokenizer.load(tmp_path / "tokenizer.json").num_semantic == 16
    with pytest.raises(UserError, match=r"config\.json"):
        load_tokenizer(tmp_path)


def test_stored_truncation_and_padding_are_not_applied():
    data = json.loads(tiny_tokenizer(16)["tokenizer.json"])
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 503,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    tokenizer = Tokenizer.from_json(json.dumps(data))
    text = "Neither cut to four nor filled up to fifty."
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_transformers_loads_it_and_agrees(tmp_path: Path, tokenizer, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, content in tiny_tokenizer().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fish_qwen3_omni", **tiny_token_ids()}))
    generator = random.Random(2)
    texts = [random_text(generator, 12) for _ in range(50)] + ["a<|im_end|>\n<|semantic:9|>b <|voice|> c"]
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        other = loader.from_pretrained(str(tmp_path), local_files_only=True)
        assert (other.eos_token_id, other.pad_token_id, len(other)) == (502, 503, 4608)
        assert other.convert_tokens_to_ids("<|semantic:4095|>") == 4607
        for text in texts:
            assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    chat = other.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<|voice|>"
