import copy
import math

import pytest
import torch
from model_cases import BEGIN, END, IM_END, raw_config, tokens

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.layers import FeedForward, rotary_table, without_values
from s2quant.model import Rotary, causal_attention, check_tokens, softmax_attention


def by_the_definition(q, k, v):
    """Attend in float64 with explicit loops over heads and positions."""
    num_queries, num_heads, head_dim = q.shape[1:]
    past = k.shape[1] - num_queries
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(q.shape[0]):
        for head in range(num_heads):
            shared = head // (num_heads // k.shape[2])
            for t in range(num_queries):
                keys, values = k[b, : past + t + 1, shared].double(), v[b, : past + t + 1, shared].double()
                out[b, t, head] = torch.softmax(keys @ q[b, t, head].double() / math.sqrt(head_dim), 0) @ values
    return out


@pytest.mark.parametrize("attention", [causal_attention, softmax_attention])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (1, 1), (3, 7)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (8, 1)])
def test_attention(attention, num_queries, num_keys, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, num_queries, num_heads, 16, generator=generator)
    k, v = torch.randn(2, 2, num_keys, num_kv_heads, 16, generator=generator)
    torch.testing.assert_close(attention(q, k, v).double(), by_the_definition(q, k, v), atol=1e-5, rtol=0)


def test_embed_by_the_definition(case, build_model):
    slow, given = build_model(case).slow, tokens(case)[..., :24]
    num_codebooks = slow.config.num_codebooks
    for t, vector in enumerate(slow.embed(given)[0]):
        token = int(given[0, 0, t])
        wanted = slow.embeddings.weight[token]
        if BEGIN <= token <= END:
            rows = [int(given[0, 1 + i, t]) + 256 * i for i in range(num_codebooks)]
            wanted = (wanted + slow.codebook_embeddings.weight[rows].sum(0)) / math.sqrt(num_codebooks + 1)
        torch.testing.assert_close(vector, wanted, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_codes_of_text_are_ignored(case, build_model):
    slow, given = build_model(case).slow, tokens(case)
    text = ~slow.is_semantic(given)
    for garbage in (0, 255, -1, 10**6):
        changed = given.clone()
        changed[:, 1:] = changed[:, 1:].masked_fill(text[:, None], garbage)
        assert torch.equal(slow.embed(changed), slow.embed(given))
        check_tokens(slow.config, changed)


@torch.inference_mode()
def test_padding_on_the_right_changes_nothing(case, build_model):
    model, given = build_model(case), tokens(case)[..., :40]
    batch, lengths = given.repeat(3, 1, 1), (40, 25, 11)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    padding = torch.ones(1, batch.shape[1], 1, dtype=torch.int64)
    padding[:, 0] = BEGIN  # what is padded looks like frames, so only the mask tells
    batch = torch.where(mask[:, None], batch, padding)
    out = model(batch, mask)
    assert out.hidden.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(given[..., :length])
        torch.testing.assert_close(out.hidden[row, :length], alone.hidden[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(out.logits[row, :length], alone.logits[0], atol=2e-5, rtol=0)
        mine = out.frames[:, 0] == row
        assert torch.equal(out.frames[mine, 1], alone.frames[:, 1]) and torch.equal(out.codes[mine], alone.codes)
        torch.testing.assert_close(out.fast_logits[mine], alone.fast_logits, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_constrained_logits_are_columns_of_all(case, build_model):
    slow, given = build_model(case).slow, tokens(case)[..., :24]
    hidden = slow.forward_hidden(given)
    ids = slow.constrained_ids()
    assert ids.tolist() == [*range(BEGIN, END + 1), IM_END]
    torch.testing.assert_close(slow.constrained_logits(hidden), slow.head(hidden)[..., ids], atol=1e-5, rtol=0)


def test_frames_need_a_position_before_them(case, build_model):
    model, given = build_model(case), tokens(case)[..., :8].clone()
    given[0, 0] = torch.tensor([BEGIN, 11, END, BEGIN, IM_END, END + 1, BEGIN - 1, END])
    assert model.frames(given).tolist() == [[0, 2], [0, 3], [0, 7]]
    mask = torch.tensor([[True] * 3 + [False] * 5])
    assert model.frames(given, mask).tolist() == [[0, 2]]
    given[0, 0] = 11
    out = model(given)
    assert out.frames.shape == (0, 2) and out.fast_logits.shape == (0, given.shape[1] - 1, 256)


def test_every_parameter_learns(case, build_model):
    model, given = build_model(case), tokens(case)[..., :24]
    with torch.inference_mode():
        model(given)  # tables made here must be usable under autograd below
    out = model.train()(given)
    slow = torch.nn.functional.cross_entropy(out.logits[0, :-1], given[0, 0, 1:])
    fast = torch.nn.functional.cross_entropy(out.fast_logits[:, 1:].flatten(0, 1), out.codes[:, 1:].flatten())
    (slow + fast).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_rotary_table_grows_and_is_not_state(case, build_model):
    model = build_model(case)
    rotary = Rotary(model.config.slow)
    whole = rotary_table(512, rotary.head_dim, rotary.base)
    for length in (3, 2, 40, 512):
        assert torch.equal(rotary.table(length, torch.device("cpu")), whole[:length])
    with pytest.raises(AssertionError):
        rotary.table(513, torch.device("cpu"))
    model.slow.rotary.table(16, torch.device("cpu"))
    assert "rotary" not in " ".join(model.state_dict())
    copy.deepcopy(model)


def test_rotary_table_is_made_rarely():
    raw = raw_config("project")
    raw["text_config"]["max_seq_len"] = 5000
    rotary, cpu = Rotary(S2Config.from_json(raw).slow), torch.device("cpu")
    row_bytes = 2 * rotary.head_dim  # head_dim / 2 pairs in bfloat16
    lengths = [rotary.table(n, cpu).untyped_storage().nbytes() // row_bytes for n in (1, 1025, 2048, 4097)]
    assert lengths == [1024, 2048, 2048, 5000]


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (0, 600, r"1 token id\(s\) outside 0\.\.599, the first is 600"),
        (0, -1, r"1 token id\(s\) outside 0\.\.599, the first is -1"),
        (1, 256, r"1 code\(s\) outside 0\.\.255, the first is 256"),
        (3, -5, r"1 code\(s\) outside 0\.\.255, the first is -5"),
    ],
)
def test_tokens_out_of_range(case, build_model, row, value, message):
    model, given = build_model(case), tokens(case)[..., :24].clone()
    given[0, row, 17] = value  # position 17 is a frame
    with pytest.raises(UserError, match=message):
        model(given)


def test_faults_of_a_batch_are_listed_together(case, build_model):
    config, given = build_model(case).config, tokens(case)[..., :24].repeat(1, 1, 22)
    mask = torch.ones(1, given.shape[2], dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(UserError, match=r"(?s)528 positions, not 1 to 512.*padding before a real position"):
        check_tokens(config, given, mask)


def test_modules_without_values_draw_nothing(monkeypatch):
    """On the meta device, weights as they are declared, and no random number: for some of them torch imports a lot."""

    def drawn(*args, **kwargs):
        raise AssertionError("drawn")

    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, drawn)
    with without_values():
        made = [torch.nn.Linear(3, 5), torch.nn.Embedding(7, 4), FeedForward(4, 8), torch.nn.Conv1d(2, 3, 4)]
    assert all(parameter.is_meta for module in made for parameter in module.parameters())
    assert [tuple(parameter.shape) for parameter in made[0].parameters()] == [(5, 3), (5,)]
    monkeypatch.undo()
    assert float(torch.nn.Linear(64, 64).weight.std()) > 0 and not torch.nn.Linear(3, 5).weight.is_meta
