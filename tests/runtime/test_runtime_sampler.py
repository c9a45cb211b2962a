"""The sampler's rules one by one, and the distribution of its draws."""

import numpy as np
import pytest
import torch

from s2quant.runtime.sampler import (
    AHEAD,
    Noise,
    SamplingRows,
    draw,
    draw_semantic,
    filtered_probs,
    frame_uniforms,
    noise_size,
)
from s2quant.sampling import Sampling

CPU = torch.device("cpu")


def rows(*samplings):
    return SamplingRows.of([Sampling(temperature=t, top_p=p, top_k=k) for t, p, k in samplings], CPU)


def logits_of(*probs):
    return torch.tensor([probs], dtype=torch.float64).log().float()


def kept(logits, sampling):
    probs, index = filtered_probs(logits, rows(sampling))
    return sorted(index[0][probs[0] > 0].tolist())


def test_the_rank_that_crosses_top_p_is_dropped_and_the_first_always_stays():
    logits = logits_of(0.2, 0.5, 0.3)
    assert kept(logits, (1.0, 0.79, 30)) == [1]
    assert kept(logits, (1.0, 0.81, 30)) == [1, 2]
    assert kept(logits, (1.0, 0.01, 30)) == [1]
    assert kept(logits, (1.0, 1.0, 30)) == [0, 1, 2]


def test_top_p_looks_at_untempered_probabilities():
    logits = logits_of(0.5, 0.3, 0.2)
    for temperature in (0.1, 1.0, 2.0):  # at 0.1 the first alone would have 0.99 of the tempered mass
        assert kept(logits, (temperature, 0.81, 30)) == [0, 1]


def test_top_k_counts_ranks_and_may_exceed_the_candidates():
    logits = logits_of(0.1, 0.2, 0.3, 0.4)
    assert kept(logits, (1.0, 1.0, 2)) == [2, 3]
    assert kept(logits, (1.0, 1.0, 1)) == [3]
    assert kept(logits, (1.0, 1.0, 1000)) == [0, 1, 2, 3]


def test_the_temperature_sharpens_survivors_and_is_clamped():
    logits = logits_of(0.6, 0.4)
    for temperature in (0.5, 1.0, 2.0):
        probs, index = filtered_probs(logits, rows((temperature, 1.0, 30)))
        oracle = np.array([0.6, 0.4]) ** (1 / temperature)
        np.testing.assert_allclose(probs[0], (oracle / oracle.sum())[index[0]], rtol=1e-5)
    probs, _ = filtered_probs(logits, rows((1e-30, 1.0, 30)))
    assert torch.isfinite(probs).all() and probs[0].tolist() == [1.0, 0.0]


def test_candidates_that_are_not_allowed_are_never_drawn():
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]]).expand(2000, 4)
    uniform = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    assert set(draw(logits, rows(*[(1.0, 1.0, 30)] * 2000), uniform).tolist()) == {0, 2}


def test_low_precision_logits_are_sampled_in_float32():
    logits = (4 * torch.rand(1, 3000, generator=torch.Generator().manual_seed(1))).bfloat16()
    sampling = (0.8, 0.9, 50)
    a, b = filtered_probs(logits, rows(sampling)), filtered_probs(logits.float(), rows(sampling))
    assert a[0].dtype == torch.float32 and torch.equal(a[0], b[0])


def test_every_row_has_its_own_parameters():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    samplings = [(0.7, 0.5, 3), (1.5, 1.0, 40), (0.2, 0.9, 10)]
    together, index = filtered_probs(logits, rows(*samplings))
    for row, sampling in enumerate(samplings):
        alone, alone_index = filtered_probs(logits[row : row + 1], rows(sampling))
        width = alone.shape[1]
        torch.testing.assert_close(together[row, :width], alone[0])
        assert not together[row, width:].any()
        assert torch.equal(index[row, :width], alone_index[0])


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [((1.0, 1.0, 30), 6), ((0.8, 1.0, 30), 6), ((1.7, 0.9, 30), 4), ((1.0, 1.0, 3), 3)],
    ids=["plain", "cold", "hot and top_p", "top_k"],
)
def test_draws_follow_the_filtered_distribution(sampling, allowed):
    plain = np.array([0.3, 0.05, 0.25, 0.1, 0.22, 0.08])
    temperature, top_p, top_k = sampling
    order = np.argsort(-plain)
    keep = order[[rank == 0 or (rank < top_k and plain[order[: rank + 1]].sum() <= top_p) for rank in range(6)]]
    oracle = np.zeros(6)
    oracle[keep] = plain[keep] ** (1 / temperature)
    oracle /= oracle.sum()
    assert (oracle > 0).sum() == allowed
    count = 40_000
    uniform = torch.rand(count, 6, generator=torch.Generator().manual_seed(3))
    drawn = draw(logits_of(*plain).expand(count, 6), rows(*[sampling] * count), uniform)
    found = np.bincount(drawn.numpy(), minlength=6)
    assert not found[oracle == 0].any()
    chi_square = (np.square(found - count * oracle)[oracle > 0] / (count * oracle[oracle > 0])).sum()
    assert chi_square < {2: 13.8, 3: 16.3, 5: 20.5}[allowed - 1]  # exceeded once in a thousand seeds


def test_noise_belongs_to_the_candidate_not_to_its_rank():
    uniform = torch.full((1, 8), 0.5)
    uniform[0, 5] = 0.999999  # candidate 5 wins whatever its rank
    for seed in range(5):
        logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        assert int(draw(logits, rows((1.0, 1.0, 8)), uniform)) == 5


def test_a_uniform_of_zero_loses_no_candidate():
    assert int(draw(torch.tensor([[9.0, 0.0]]), rows((1.0, 1.0, 1)), torch.zeros(1, 2))) == 0
    assert int(draw(logits_of(0.999, 0.001), rows((1.0, 1.0, 2)), torch.zeros(1, 2))) == 0


def swap(logits, window, normal, hot, num_semantic=4):
    """Draw where the uniform numbers pick candidate `normal` first and `hot` second."""
    uniform = torch.full((1, 2, num_semantic + 1), 1e-6)
    uniform[0, 0, normal], uniform[0, 1, hot] = 1 - 1e-6, 1 - 1e-6
    window = None if window is None else torch.tensor([window])
    return int(draw_semantic(logits, rows((1.0, 1.0, 30)), uniform, window, num_semantic))


def test_a_repeated_code_is_swapped_once_and_the_end_never():
    flat = torch.zeros(1, 5)
    assert swap(flat, [-1, 0, 1], normal=2, hot=3) == 2  # not in the window
    assert swap(flat, [-1, 2, 1], normal=2, hot=3) == 3
    assert swap(flat, [-1, 2, 2], normal=2, hot=2) == 2  # the swap may repeat again
    assert swap(flat, [-1, 2, 1], normal=2, hot=4) == 4  # or be the end
    assert swap(flat, [4, 4, 4], normal=4, hot=1) == 4  # the end is no code, and nothing to be repeated
    assert swap(flat, None, normal=2, hot=3) == 2  # the first token


def test_the_second_draw_is_hot_whatever_the_first():
    logits = logits_of(0.5, 0.3, 0.12, 0.05, 0.03)
    sampling = rows((1e-3, 0.1, 30))  # the first draw can only be candidate 0; the second may be the best two
    uniform = torch.full((1, 2, 5), 1e-6)
    uniform[0, 1, 1] = 1 - 1e-6
    assert int(draw_semantic(logits, sampling, uniform, torch.tensor([[0]]), 4)) == 1
    uniform[0, 1] = 1e-6
    uniform[0, 1, 3] = 1 - 1e-6  # rank 3 is beyond the cumulative 0.9
    assert int(draw_semantic(logits, sampling, uniform, torch.tensor([[0]]), 4)) == 0


def noises(*seeds):
    return [Noise(torch.Generator().manual_seed(seed)) for seed in seeds]


def test_a_slot_s_numbers_depend_on_its_own_generator_only():
    together = frame_uniforms(noises(1, 2, 3), 16, 9, 32)
    assert [t.shape for t in together] == [(3, 2, 17), (3, 9, 32)]
    for row, seed in enumerate((1, 2, 3)):
        for a, b in zip(together, frame_uniforms(noises(seed), 16, 9, 32), strict=True):
            assert torch.equal(a[row], b[0])
    assert not torch.equal(together[0][0], together[0][1])


@pytest.mark.parametrize("sizes", [(16, 9, 32), (4096, 9, 1024), (2, 1, 3)])
def test_a_block_on_a_cpu_is_a_call_per_frame(sizes):
    size, count = noise_size(*sizes), 2 * AHEAD + 1
    generator = torch.Generator().manual_seed(5)
    single = [torch.rand(size, generator=generator) for _ in range(count)]
    (noise,), (ring,) = noises(5), noises(5)
    assert all(torch.equal(noise.frame(size), frame) for frame in single)
    kept = torch.zeros(2, 2 * AHEAD, size)  # as the fast decoder keeps them
    for start in (0, AHEAD):
        ring.fill(kept[1, start : start + AHEAD])
    assert torch.equal(kept[1], torch.stack(single[:-1])) and not kept[0].any()
    slow, fast = frame_uniforms(noises(5), *sizes)
    assert torch.equal(torch.cat([slow.flatten(), fast.flatten()]), single[0])
    assert float(kept[1].min()) >= 0 and float(kept[1].max()) < 1
