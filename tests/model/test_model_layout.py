"""Names, shapes and counts, on the meta device where the size is the real one."""

from collections import Counter

import pytest
import torch
from model_cases import raw_config, tokens

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.model import DualAR, disk_name, module_name

SIZES = {
    "n_head": 32,
    "n_local_heads": 8,
    "head_dim": 128,
    "dim": 2560,
    "intermediate_size": 9728,
    "rope_base": 1000000,
    "norm_eps": 1e-6,
}
S2_PRO = {
    "model_type": "fish_qwen3_omni",
    "pad_token_id": 151669,
    "eos_token_id": 151645,
    "semantic_start_token_id": 151678,
    "semantic_end_token_id": 155773,
    "text_config": SIZES
    | {
        "vocab_size": 155776,
        "n_layer": 36,
        "max_seq_len": 32768,
        "attention_qk_norm": True,
        "tie_word_embeddings": True,
    },
    "audio_decoder_config": SIZES
    | {"vocab_size": 4096, "n_layer": 4, "max_seq_len": 11, "attention_qk_norm": False, "num_codebooks": 10},
}


@pytest.fixture(scope="module")
def s2_pro():
    with torch.device("meta"):
        return DualAR(S2Config.from_json(S2_PRO)).to(torch.bfloat16)


def expected_shapes():
    slow, fast = "text_model.model.", "audio_decoder."
    shapes = {
        slow + "embeddings.weight": (155776, 2560),
        slow + "norm.weight": (2560,),
        fast + "codebook_embeddings.weight": (40960, 2560),
        fast + "embeddings.weight": (4096, 2560),
        fast + "norm.weight": (2560,),
        fast + "output.weight": (4096, 2560),
    }
    for prefix, count in ((slow, 36), (fast, 4)):
        for i in range(count):
            block = f"{prefix}layers.{i}."
            shapes[block + "attention.wqkv.weight"] = (6144, 2560)
            shapes[block + "attention.wo.weight"] = (2560, 4096)
            shapes[block + "feed_forward.w1.weight"] = shapes[block + "feed_forward.w3.weight"] = (9728, 2560)
            shapes[block + "feed_forward.w2.weight"] = (2560, 9728)
            shapes[block + "attention_norm.weight"] = shapes[block + "ffn_norm.weight"] = (2560,)
            if prefix == slow:
                shapes[block + "attention.q_norm.weight"] = shapes[block + "attention.k_norm.weight"] = (128,)
    return shapes


def test_s2_pro_names_and_shapes(s2_pro):
    found = {disk_name(name): tuple(value.shape) for name, value in s2_pro.state_dict().items()}
    assert found == expected_shapes()
    assert len(found) == 358


def test_s2_pro_counts(s2_pro):
    assert set(s2_pro.state_dict()) == {name for name, _ in s2_pro.named_parameters()}
    assert not list(s2_pro.buffers())
    parts = Counter()
    for name, parameter in s2_pro.named_parameters():
        parts[disk_name(name).split(".")[0]] += parameter.numel()
    assert parts == {"text_model": 4032298496, "audio_decoder": 529553920}
    assert parts.total() == 4561852416
    assert sum(p.numel() * p.element_size() for p in s2_pro.parameters()) == 9123704832
    linears = [m for m in s2_pro.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 201 and all(m.bias is None for m in linears)


def test_project_in_has_a_bias_only_where_it_exists():
    with torch.device("meta"):
        models = {c: DualAR(S2Config.from_json(raw_config(c))) for c in ("project", "shared")}
    names = {c: {disk_name(n): tuple(v.shape) for n, v in m.state_dict().items()} for c, m in models.items()}
    assert names["project"]["audio_decoder.project_in.weight"] == (96, 128)
    assert names["project"]["audio_decoder.project_in.bias"] == (96,)
    assert not [n for n in names["shared"] if "project_in" in n]
    assert not [n for c in names for n in names[c] if n.endswith("bias") and "project_in" not in n]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("slow.layers.0.attention.wqkv.weight", "text_model.model.layers.0.attention.wqkv.weight"),
        ("slow.layers.35.feed_forward.w2.qweight", "text_model.model.layers.35.feed_forward.w2.qweight"),
        ("slow.embeddings", "text_model.model.embeddings"),
        ("slow.codebook_embeddings.weight", "audio_decoder.codebook_embeddings.weight"),
        ("slow.codebook_embeddings", "audio_decoder.codebook_embeddings"),
        ("fast.embeddings.weight", "audio_decoder.embeddings.weight"),
        ("fast.layers.3.attention.wo", "audio_decoder.layers.3.attention.wo"),
        ("fast.project_in.bias", "audio_decoder.project_in.bias"),
    ],
)
def test_names_map_both_ways(ours, theirs):
    assert disk_name(ours) == theirs
    assert module_name(theirs) == ours


def test_unknown_names():
    with pytest.raises(UserError, match=r"(?s)lm_head\.weight.*text_model\.model\."):
        module_name("lm_head.weight")
    with pytest.raises(AssertionError):
        disk_name("layers.0.attention.wqkv")


@torch.inference_mode()
def test_to_empty_gives_a_model_that_works(case, build_model):
    wanted = build_model(case)
    with torch.device("meta"):
        model = DualAR(wanted.config)
    model.to_empty(device="cpu").load_state_dict(wanted.state_dict(), strict=True)
    assert torch.equal(model(tokens(case)).fast_logits, wanted(tokens(case)).fast_logits)
