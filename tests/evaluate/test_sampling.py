"""A row's own random numbers draw tokens with the probabilities that the logits say."""

import pytest
import torch
from transformers import GenerationConfig

from tunesmith.evaluate.sampling import RowSampler, is_plain_sampling, row_sampling, seeded

LOGITS = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])


def frequencies(options, count=20_000):
    """How often each token is drawn by as many rows of the same logits."""
    config = GenerationConfig(do_sample=True, max_new_tokens=1, **options)
    greedy, processors = row_sampling(config, [(0, number) for number in range(count)])
    assert not greedy.do_sample
    drawn = processors(None, LOGITS.expand(count, -1)).argmax(-1)
    return torch.bincount(drawn, minlength=5) / count


def test_tokens_are_drawn_as_often_as_they_are_likely():
    expected = (LOGITS / 2).softmax(-1)
    torch.testing.assert_close(frequencies({"temperature": 2.0, "top_k": 0}), expected, atol=0.01, rtol=0)


def test_top_k_and_top_p_leave_the_likeliest_tokens():
    two = torch.tensor([2.0, -torch.inf, -torch.inf, -torch.inf, 1.0]).softmax(-1)
    torch.testing.assert_close(frequencies({"top_k": 2}), two, atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies({"top_p": 0.7, "top_k": 0}), two, atol=0.01, rtol=0)


def test_a_row_draws_other_numbers_at_each_step_and_the_same_ones_again():
    def tokens():
        sampler = RowSampler([(1, 2), (1, 3)], 8)
        return [sampler(None, torch.zeros(2, 100)).argmax(-1).tolist() for _ in range(8)]

    assert tokens() == tokens()
    assert len({tuple(pair) for pair in tokens()}) > 6


def test_the_last_token_can_be_drawn_and_nothing_beyond_it():
    sampler = RowSampler([(0, 0)], 1)
    sampler.draws[:] = 1.0  # more than can be drawn
    assert sampler(None, torch.zeros(1, 3)).argmax(-1).item() == 2


def test_other_ways_of_sampling_are_left_to_transformers():
    assert is_plain_sampling(GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9))
    assert not is_plain_sampling(GenerationConfig(do_sample=True, min_p=0.1))
    assert not is_plain_sampling(GenerationConfig(do_sample=True, num_beams=2))


def test_random_numbers_go_on_after_a_seeded_part():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded((1, 2), torch.device("cpu")):
        inside = torch.rand(1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with seeded((1, 2), torch.device("cpu")):
        assert torch.rand(1) == pytest.approx(inside)
