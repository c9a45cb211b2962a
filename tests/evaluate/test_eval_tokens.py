import copy
import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from token_cases import pooled, quantized, token_metrics

from s2quant.errors import UserError
from s2quant.evaluate import token_cache, tokens
from s2quant.evaluate.token_cache import Arm, floor_dtype, folder_arm, measure_arms, model_key, sequence_key
from s2quant.evaluate.token_summary import summarise_tokens, utterance_summary
from s2quant.evaluate.tokens import (
    TokenDamage,
    TokenSequence,
    teacher_forced,
    token_damage,
)
from s2quant.runtime.load import load_model
from s2quant.runtime.speech import Request

# ---- the numbers ---------------------------------------------------------------------------------------------------


def test_the_same_model_differs_by_exactly_nothing(baseline, sequences, size):
    for model in (baseline, copy.deepcopy(baseline).to(torch.bfloat16)):
        for one in token_metrics(model, model, sequences, size):
            for name in ("kl", "delta_nll", "residual_kl", "residual_delta_nll", "shared_kl"):
                assert not getattr(one, name).any(), name
            for name in ("agree", "residual_agree", "shared_agree"):
                assert bool(getattr(one, name).all()), name
            assert np.array_equal(one.end_baseline, one.end_model)


def test_a_copy_of_the_weights_differs_by_exactly_nothing(baseline, sequences, size):
    assert not pooled(token_metrics(baseline, copy.deepcopy(baseline), sequences, size)).any()


def test_fewer_bits_do_more_damage(baseline, sequences, size):
    found = {bits: token_metrics(baseline, quantized(baseline, bits), sequences, size) for bits in (8, 4, 3, 2)}
    for name in ("kl", "residual_kl", "shared_kl"):
        order = [float(pooled(found[bits], name).mean()) for bits in (8, 4, 3, 2)]
        assert order == sorted(order), (name, order)
        assert order[0] > 0
        assert all(2 * low < high for low, high in pairwise(order)), (name, order)
    agreement = [float(pooled(found[bits], "agree").mean()) for bits in (8, 4, 2)]
    assert agreement == sorted(agreement, reverse=True)
    assert agreement[0] > agreement[-1]


def test_damage_of_the_slow_and_of_the_fast_part_are_told_apart(baseline, sequences, size):
    slow = token_metrics(baseline, quantized(baseline, 3, ["slow"]), sequences, size)
    assert pooled(slow, "kl").mean() > 1e-3
    assert pooled(slow, "residual_kl").mean() > 1e-3
    assert not pooled(slow, "shared_kl").any()  # the fast part is the baseline's own
    fast = token_metrics(baseline, quantized(baseline, 3, ["fast"]), sequences, size)
    assert not pooled(fast, "kl").any()
    assert pooled(fast, "residual_kl").mean() > 1e-3
    assert np.array_equal(pooled(fast, "residual_kl"), pooled(fast, "shared_kl"))


def test_every_number_against_plain_arithmetic_on_the_whole_models_output(baseline, sequences, size):
    """The oracle reads DualAR.forward, which shares the blocks but neither positions, heads nor masks."""
    model, one = quantized(baseline, 3), sequences[-1]
    damage = token_metrics(baseline, model, [one], size)[0]
    config, length = baseline.config, one.tokens.shape[1]
    ids = [*range(config.semantic_begin_id, config.semantic_end_id + 1), config.im_end_id]
    with torch.inference_mode():
        ours, theirs = baseline(one.tokens[None]), model(one.tokens[None])
        swapped = model.fast(ours.hidden[0, : length - 1], one.tokens[1:, 1:].T.clamp(max=config.codebook_size - 1))
    for index in range(one.num_frames + 1):
        position = length - 1 - one.num_frames + index
        p = np.asarray(ours.logits[0, position - 1][ids].double().softmax(-1))
        q = np.asarray(theirs.logits[0, position - 1][ids].double().softmax(-1))
        drawn = ids.index(int(one.tokens[0, position]))
        assert damage.kl[index] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-3, abs=1e-6)
        assert damage.delta_nll[index] == pytest.approx(math.log(p[drawn] / q[drawn]), rel=1e-3, abs=1e-4)
        assert damage.agree[index] == (p.argmax() == q.argmax())
        assert damage.confidence[index] == pytest.approx(p.max(), rel=1e-4)
        assert damage.end_baseline[index] == pytest.approx(p[-1], rel=1e-3)
        assert damage.end_model[index] == pytest.approx(q[-1], rel=1e-3)
    where = [tuple(row) for row in ours.frames.tolist()]
    for index in range(one.num_frames):
        position = length - 1 - one.num_frames + index
        row = where.index((0, position))
        for codebook in range(1, config.num_codebooks):
            p = np.asarray(ours.fast_logits[row, codebook, :size].double().softmax(-1))
            for logits, kl in (
                (theirs.fast_logits[row], damage.residual_kl),
                (swapped[position - 1], damage.shared_kl),
            ):
                q = np.asarray(logits[codebook, :size].double().softmax(-1))
                expected = float((p * np.log(p / q)).sum())
                assert kl[index, codebook - 1] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_compare_on_numbers_worked_out_by_hand():
    baseline = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    model = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])) + 7
    found = tokens._compare(baseline, model, torch.tensor([0, 1]))
    # 0.5 ln 2 + 0.25 ln 1/2 = 0.25 ln 2; the first token went from 1/2 to 1/4
    assert found["kl"].tolist() == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert found["delta_nll"].tolist() == pytest.approx([math.log(2), 0], abs=1e-6)
    assert found["agree"].tolist() == [0, 1]


def test_a_lower_end_logit_shows_where_speech_ends_and_before(baseline, sequences, size):
    model = copy.deepcopy(baseline)
    hidden = torch.cat([teacher_forced(baseline, one, size).hidden for one in sequences]).mean(0)
    weight = model.slow.embeddings.weight
    weight[model.config.im_end_id] -= 2 * hidden / hidden.norm() ** 2 * hidden.norm()
    summary = summarise_tokens(token_metrics(baseline, model, sequences, size))
    end = summary["im_end"]
    assert end["n"] == sum(one.ended for one in sequences) >= 1
    assert 0 < end["model_at_end"] < end["baseline_at_end"] / 2
    assert 0 < end["model_before"] < end["baseline_before"] / 2
    assert len(end["model_before_frames"]) == 3
    same = summarise_tokens(token_metrics(baseline, baseline, sequences, size))["im_end"]
    assert same["model_at_end"] == same["baseline_at_end"] == end["baseline_at_end"]


def test_only_frames_that_were_drawn_count_and_im_end_only_when_it_was(baseline, sequences, size):
    voiced = sequences[-1]
    semantic = (voiced.tokens[0] >= baseline.config.semantic_begin_id) & (
        voiced.tokens[0] <= baseline.config.semantic_end_id
    )
    assert int(semantic.sum()) == voiced.num_frames + 6  # those of the voice too
    cut = dataclasses.replace(voiced, ended=False)
    whole, short = token_metrics(baseline, quantized(baseline, 3), [voiced, cut], size)
    assert len(whole.kl) == voiced.num_frames + 1 and len(short.kl) == voiced.num_frames
    assert np.allclose(whole.kl[:-1], short.kl, atol=1e-6)
    assert whole.residual_kl.shape == (voiced.num_frames, baseline.config.num_codebooks - 1)
    assert utterance_summary(short)["end_model"] is None
    assert summarise_tokens([short])["im_end"] == {
        "n": 0,
        **{f"{arm}_{key}": None for arm in ("baseline", "model") for key in ("at_end", "before")},
        **{f"{arm}_before_frames": [None] * 3 for arm in ("baseline", "model")},
    }


def test_scores_are_those_of_the_engine_that_spoke(engine, baseline, sequences, size):
    """At a temperature near 0 the engine draws the most likely token, and teacher forcing must name the same."""
    request = Request(
        text="The train.", seed=3, max_frames=8, sampling=dataclasses.replace(Request(text="").sampling, top_k=1)
    )
    speech = engine.speak(request)
    tokens_ = engine.spoken_sequence(request, [speech.codes])
    one = TokenSequence(id="greedy", tokens=tokens_, num_frames=speech.codes.shape[1], ended=False)
    forced = teacher_forced(baseline, one, size)
    assert torch.equal(forced.semantic.argmax(-1), speech.codes[0])
    assert torch.equal(forced.residual.argmax(-1), speech.codes[1:].T)


def test_an_utterance_without_frames_is_scored_at_its_end(baseline, sequences, size):
    one = sequences[0]
    prompt = one.tokens[:, : one.tokens.shape[1] - 1 - one.num_frames]
    empty = TokenSequence(id="empty", tokens=torch.cat([prompt, one.tokens[:, -1:]], 1), num_frames=0, ended=True)
    damage = token_metrics(baseline, quantized(baseline, 3), [empty], size)[0]
    assert damage.kl.shape == (1,) and damage.kl[0] > 0
    summary = utterance_summary(damage)
    assert summary["end_before_model"] == [None] * 3 and summary["end_model"] is not None
    assert summary["kl"][0] > 0 and summary["kl"][1:] == [None] * 9
    assert summarise_tokens([damage])["codebooks"][1]["kl_mean"] is None


def test_rounding_is_a_floor_far_below_four_bits(tiny_folder, sequences, size):
    baseline, wide = (load_model(tiny_folder, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    floor = token_metrics(baseline, wide, sequences, size)
    model = token_metrics(baseline, quantized(baseline, 4), sequences, size)
    summary = summarise_tokens(model, floor)
    for row in summary["codebooks"]:
        assert 0 < row["floor_kl_mean"] < row["kl_mean"] / 10
    assert floor_dtype(torch.bfloat16) == torch.float32 and floor_dtype(torch.float32) == torch.bfloat16


# ---- summaries -----------------------------------------------------------------------------------------------------


def damage(kl, confidence=None, agree=None, ended=True, end=None, num_codebooks=3):
    count = len(kl)
    values = np.array(kl, np.float32)
    frames = count - ended
    table = np.arange(frames * (num_codebooks - 1), dtype=np.float32).reshape(frames, -1)
    end = np.array(end if end is not None else np.zeros(count), np.float32)
    return TokenDamage(
        id="x", num_frames=frames, ended=ended, kl=values,
        agree=np.array(agree if agree is not None else np.ones(count), np.float32), delta_nll=-values,
        confidence=np.array(confidence if confidence is not None else np.full(count, 0.6), np.float32),
        end_baseline=end, end_model=end / 2, residual_kl=table, residual_agree=np.ones_like(table),
        residual_delta_nll=table, shared_kl=table / 2, shared_agree=np.ones_like(table),
    )  # fmt: skip


def test_pooled_figures_worked_out_by_hand():
    one = damage(
        [1, 2, 3, 4, 10], confidence=[0.1, 0.25, 0.89, 0.9, 1.0], agree=[0, 1, 1, 1, 0], end=[0, 0.1, 0.2, 0.3, 0.8]
    )
    two = damage([0, 0], ended=True, end=[0.2, 0.4])
    summary = summarise_tokens([one, two], [damage([0.5, 0.5])])
    book = summary["codebooks"][0]
    assert (book["n"], book["kl_mean"], book["kl_median"], book["kl_p90"]) == (7, 20 / 7, 2, pytest.approx(6.4))
    assert book["top1_agreement"] == 5 / 7 and book["delta_nll"] == -20 / 7 and book["floor_kl_mean"] == 0.5
    assert book["kl_own_hidden"] is None and book["kl_baseline_hidden"] is None
    # residual codebook 1 holds 0, 2, 4, 6 and 0; the baseline's hidden vector halves it
    first = summary["codebooks"][1]
    assert (first["kl_mean"], first["kl_own_hidden"], first["kl_baseline_hidden"]) == (2.4, 2.4, 1.2)
    assert [row["codebook"] for row in summary["codebooks"]] == [0, 1, 2]
    buckets = [(row["low"], row["high"], row["n"], row["kl_mean"]) for row in summary["confidence"]]
    assert buckets == [(0, 0.25, 1, 1), (0.25, 0.5, 1, 2), (0.5, 0.75, 2, 0), (0.75, 0.9, 1, 3), (0.9, 1, 2, 7)]
    end = summary["im_end"]
    assert end["baseline_at_end"] == pytest.approx(0.6) and end["model_at_end"] == pytest.approx(0.3)
    assert end["baseline_before_frames"] == pytest.approx([(0.3 + 0.2) / 2, 0.2, 0.1])
    assert end["baseline_before"] == pytest.approx((0.3 + 0.2 + 0.2 + 0.1) / 4)
    assert (summary["num_frames"], summary["num_positions"], summary["num_utterances"]) == (5, 7, 2)
    record = utterance_summary(one)
    assert record["kl_semantic"] == 4 and record["kl"] == [4, 3, 4] and record["kl_baseline_hidden"] == [None, 1.5, 2]
    assert record["end_before_baseline"] == pytest.approx([0.3, 0.2, 0.1]) and record["end_model"] == pytest.approx(0.4)
    json.dumps([summary, record], allow_nan=False)


def test_no_damage_is_no_section_and_an_empty_bucket_is_null():
    assert summarise_tokens([]) is None
    summary = summarise_tokens([damage([1, 1])])
    assert summary["confidence"][0] == {"low": 0.0, "high": 0.25, "n": 0, "kl_mean": None, "top1_agreement": None}
    assert summary["codebooks"][0]["floor_kl_mean"] is None


def test_logits_that_are_not_finite_are_counted_and_never_averaged(baseline, sequences, size):
    model = copy.deepcopy(baseline)
    model.slow.layers[0].attention.wo.weight[0, 0] = torch.nan
    found = token_metrics(baseline, model, sequences[:1], size)
    summary = summarise_tokens(found)
    assert summary["num_not_finite"] == len(found[0].kl)
    assert summary["codebooks"][0]["kl_mean"] is None and summary["codebooks"][0]["top1_agreement"] is None
    assert summary["codebooks"][1]["kl_mean"] is None and summary["codebooks"][1]["kl_baseline_hidden"] == 0
    assert utterance_summary(found[0])["kl_semantic"] is None
    json.dumps(summary, allow_nan=False)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_sequences_that_cannot_be_scored_are_all_named(baseline, sequences, size):
    one = sequences[0]
    other_end = one.tokens.clone()
    other_end[0, -1] = 0
    other_code = one.tokens.clone()
    other_code[1, -2] += 1
    beyond = one.tokens.clone()
    beyond[3, -3] = size
    bad = [
        dataclasses.replace(one, id="a", num_frames=one.tokens.shape[1]),
        dataclasses.replace(one, id="b", tokens=other_end),
        dataclasses.replace(one, id="c", tokens=other_code),
        dataclasses.replace(one, id="d", tokens=beyond),
        dataclasses.replace(one, id="e", tokens=one.tokens[:5]),
    ]
    with pytest.raises(UserError) as error:
        token_metrics(baseline, baseline, [*bad, one], size)
    for part in (
        "a: shape",
        "b: the last token is 0",
        "c: token ids and semantic",
        "d: a residual code",
        "e: shape [5",
    ):
        assert part in str(error.value), part
    assert one.id not in str(error.value)


def test_models_of_different_sizes_are_refused(baseline, sequences, size):
    forced = teacher_forced(baseline, sequences[0], size)
    narrow = dataclasses.replace(forced, hidden=forced.hidden[:, :64])
    with pytest.raises(UserError, match="two models of the same sizes"):
        token_damage(narrow, forced, baseline, sequences[0], size)


# ---- the cache -----------------------------------------------------------------------------------------------------


def counted(model, calls, name):
    def load():
        calls.append(name)
        return model

    return Arm(key=name, load=load)


def test_the_cache_gives_the_same_numbers_and_loads_only_what_is_needed(baseline, sequences, size, tmp_path):
    calls, done = [], []
    low = quantized(baseline, 4)
    arms = {"model": counted(low, calls, "low"), "floor": counted(copy.deepcopy(baseline), calls, "same")}
    base = counted(baseline, calls, "base")
    found = measure_arms(base, arms, sequences, size, tmp_path, lambda *event: done.append(event))
    assert calls == ["base", "low", "same"]
    assert done[-1] == ("floor", len(sequences), len(sequences)) and done[0] == ("baseline", 1, len(sequences))
    assert not pooled(found["floor"]).any()
    direct = token_metrics(baseline, low, sequences, size)
    for one, other in zip(found["model"], direct, strict=True):
        for field in dataclasses.fields(TokenDamage):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    assert not list(tmp_path.glob("baseline-*"))
    again = measure_arms(base, arms, sequences, size, tmp_path)
    assert calls == ["base", "low", "same"]  # nothing was left to do
    assert summarise_tokens(again["model"], again["floor"]) == summarise_tokens(found["model"], found["floor"])


def test_a_stopped_run_goes_on_where_it_was(baseline, sequences, size, tmp_path):
    calls = []
    base, low = counted(baseline, calls, "base"), counted(quantized(baseline, 4), calls, "low")

    def stop(what, done, total):
        if (what, done) == ("low", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_arms(base, {"low": low}, sequences, size, tmp_path, stop)
    events = []
    measure_arms(base, {"low": low}, sequences, size, tmp_path, lambda *event: events.append(event))
    assert events == [("low", done, len(sequences) - 2) for done in range(1, len(sequences) - 1)]
    assert calls == ["base", "low", "low"]
    events.clear()
    measure_arms(base, {"new": Arm(key="new", load=low.load)}, sequences[:1], size, tmp_path, keep_answers=True)
    assert len(list(tmp_path.glob("baseline-*"))) == 1


def test_keys_tell_what_can_move_a_number(sequences, tiny_folder, tiny_quantized):
    one = sequences[0]
    other = one.tokens.clone()
    other[0, 0] += 1
    variants = [
        (one, 1024),
        (one, 512),
        (dataclasses.replace(one, ended=not one.ended), 1024),
        (dataclasses.replace(one, num_frames=one.num_frames - 1), 1024),
        (dataclasses.replace(one, tokens=other), 1024),
    ]
    assert len({sequence_key(*variant) for variant in variants}) == len(variants)
    assert sequence_key(dataclasses.replace(one, id="renamed"), 1024) == sequence_key(one, 1024)
    cpu = torch.device("cpu")
    keys = {
        model_key(tiny_folder, cpu, torch.bfloat16),
        model_key(tiny_folder, cpu, torch.float32),
        model_key(tiny_folder, cpu, torch.bfloat16, "reference"),
        model_key(tiny_quantized, cpu, torch.bfloat16),
    }
    assert len(keys) == 4 and model_key(tiny_folder, cpu, torch.float32) in keys


def test_a_real_quantized_folder_against_its_baseline(tiny_folder, tiny_quantized, sequences, size, tmp_path):
    dtype = torch.bfloat16
    base = folder_arm(tiny_folder, "cpu", dtype)
    arms = {
        "model": folder_arm(tiny_quantized, "cpu", dtype),
        "floor": folder_arm(tiny_folder, "cpu", floor_dtype(dtype)),
    }
    found = measure_arms(base, arms, sequences, size, tmp_path / "cache")
    summary = summarise_tokens(found["model"], found["floor"])
    semantic, *residual = summary["codebooks"]
    assert semantic["kl_mean"] > 10 * semantic["floor_kl_mean"] > 0
    for row in residual:  # the recipe keeps the fast part: all of its damage comes through the hidden vector
        assert row["kl_baseline_hidden"] == 0 < row["kl_own_hidden"]


def test_damaged_cache_files_are_named(tmp_path, baseline, sequences, size):
    path = tmp_path / "damage.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"damage\.npz.*\n.*token metrics"):
        TokenDamage.load(path)
    arm = Arm(key="k", load=lambda: baseline)
    measure_arms(arm, {"a": arm}, sequences[:1], size, tmp_path, keep_answers=True)
    (answers,) = tmp_path.glob("baseline-*")
    answers.write_bytes(b"nothing")
    with pytest.raises(UserError, match="answers of the baseline"):
        token_cache._load(answers)
