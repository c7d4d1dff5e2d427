"""Tests of the cache and of generation."""

import math

import numpy as np
import pytest
import torch
from helpers import build, configs, difference, error, few, seeds, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from flm import FLM, visible_slots
from muP import init_weights
from sample import KVCache, choose, generate

pytestmark = pytest.mark.quick


@settings(max_examples=30)
@given(
    configs(),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 30),
    st.booleans(),
    seeds,
)
def test_cached_logits_are_the_uncached(config, chunks, spare, blockwise, seed):
    """However a sequence is cut into chunks, the logits of every position are those of one call
    without a cache: in a cache of any size, past the trained length, with blockwise attention."""
    T = sum(chunks)
    model, tokens = build(config, seed), some_tokens(config, 2, T, seed=seed)
    cache = KVCache(model, T + spare)
    cached = torch.cat(
        [model(x, cache=cache, blockwise=blockwise) for x in tokens.split(chunks, 1)], 1
    )
    assert cache.length == T
    assert difference(cached, model(tokens, blockwise=blockwise)) < 1e-10


def test_cache_far_past_the_trained_length():
    """The same at 600 positions for a model trained at 16, one token at a time at the end."""
    config = tiny(n_layers=1)
    model, tokens = build(config), some_tokens(config, 1, 600)
    cache = KVCache(model, 2000)
    cached = torch.cat([model(x, cache=cache) for x in tokens.split([590] + [1] * 10, 1)], 1)
    assert difference(cached, model(tokens)) < 1e-10


@few
@given(
    configs(),
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.lists(st.integers(1, 3), max_size=3),
    st.booleans(),
    seeds,
)
def test_left_padding_changes_nothing(config, lengths, chunks, blockwise, seed):
    """Prompts of different lengths, aligned at their ends in one cache, have the logits that each
    has on its own, whatever stands in the padding."""
    longest, total = max(lengths), max(lengths) + sum(chunks)
    model, rows = build(config, seed), some_tokens(config, len(lengths), total, seed=seed)
    pads = torch.tensor([longest - n for n in lengths])
    cache = KVCache(model, total, pads)
    together = torch.cat(
        [model(x, cache=cache, blockwise=blockwise) for x in rows.split([longest] + chunks, 1)], 1
    )
    assert together.isfinite().all()
    for row, logits, pad in zip(rows, together, pads):
        assert difference(logits[pad:], model(row[None, pad:], blockwise=blockwise)[0]) < 1e-10


def test_every_query_sees_something():
    """With padding and blockwise attention every query has a position to attend to, even one in
    the padding: else its softmax were 0 / 0 in some of SDPA's kernels."""
    visible = visible_slots(3, 9, torch.tensor([0, 5, 11]), 4, "cpu")  # (3, 1, 9, 12)
    assert visible.any(-1).all()


def test_a_full_cache_is_refused():
    """One token more than the cache holds is a ValueError that names both numbers."""
    model = build(tiny())
    cache = KVCache(model, 5)
    model(some_tokens(tiny(), 1, 4), cache=cache)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        model(some_tokens(tiny(), 1, 2), cache=cache)


def slow_greedy(model, prompt, n, blockwise=False) -> list[int]:
    """Greedy continuation that recomputes everything for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), blockwise=blockwise)[0, -1].argmax()))
    return ids[len(prompt) :]


@few
@given(
    configs(vocab_size=29),
    st.lists(st.integers(1, 10), min_size=1, max_size=3),
    st.integers(1, 8),
    st.booleans(),
    seeds,
)
def test_greedy_generation_is_a_slow_loop(config, lengths, n, blockwise, seed):
    """At temperature 0 every prompt of a batch continues as in a loop that recomputes all
    without a cache, also past the trained length."""
    model = build(config, seed)
    prompts = [
        some_tokens(config, length, seed=seed + i).tolist() for i, length in enumerate(lengths)
    ]
    new = generate(model, prompts, n, temperature=0, capacity=40, blockwise=blockwise)
    assert new == [slow_greedy(model, prompt, n, blockwise) for prompt in prompts]


@few
@given(
    st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=6), min_size=2, max_size=3), seeds
)
def test_a_rows_draws_depend_on_no_other_row(prompts, seed):
    """Row 0 of a batch draws what it draws alone; the same seed draws the same batch again."""
    model = build(tiny())
    new = generate(model, prompts, 6, seed=seed)
    assert new == generate(model, prompts, 6, seed=seed)
    assert new[:1] == generate(model, prompts[:1], 6, seed=seed)


def test_other_seeds_draw_other_texts():
    """Ten seeds, and the ten rows of one batch with the same prompt, give ten different texts."""
    model = init_weights(FLM(tiny()), 0)  # nearly uniform: 23 ** 10 texts are about equally likely
    texts = [generate(model, [[1]], 10, seed=seed)[0] for seed in range(10)]
    assert len(set(map(tuple, texts))) == 10
    assert len(set(map(tuple, generate(model, [[1]] * 10, 10)))) == 10


@pytest.mark.parametrize("seed", [-3, 10**14, 2**64])
def test_any_seed_is_taken_or_named(seed):
    """A seed of any size works, or the ValueError names it."""
    try:
        assert len(generate(build(tiny()), [[1]], 2, seed=seed)[0]) == 2
    except ValueError as problem:
        assert str(seed) in str(problem)


@few
@given(st.floats(0.1, 5), seeds)
def test_top_k_of_one_is_greedy(temperature, seed):
    """Drawing among the single likeliest token is greedy decoding at any temperature."""
    model = build(tiny())
    assert generate(model, [[3, 1]], 8, temperature=temperature, top_k=1, seed=seed) == [
        slow_greedy(model, [3, 1], 8)
    ]


def slow_distribution(logits, temperature, top_k, top_p) -> dict[int, float]:
    """The probability of each token that may be drawn, in plain Python."""
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = [math.exp((logits[i] - logits[ids[0]]) / temperature) for i in ids]
    kept, reached = {}, 0.0
    for i, weight in zip(ids, weights):
        if reached >= top_p - 1e-12:  # the smallest set that reaches top_p, up to rounding
            break
        kept[i] = weight / sum(weights)
        reached += kept[i]
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@settings(max_examples=50)
@given(
    st.lists(st.integers(-50, 50).map(lambda i: i / 10), min_size=1, max_size=12),
    st.floats(0.1, 3),
    st.integers(0, 14),
    st.floats(0.01, 1),
    seeds,
)
def test_choose_draws_from_the_set(logits, temperature, top_k, top_p, seed):
    """A drawn token is among the top_k likeliest and in the smallest set of them that reaches
    top_p. (Logits in steps of 0.1:
    two that differ by less than rounding are a tie to the one and not to the other.)"""
    allowed = slow_distribution(
        torch.tensor(logits).tolist(), temperature, top_k, top_p - 1e-9
    )  # rounding at the set's edge
    allowed |= slow_distribution(torch.tensor(logits).tolist(), temperature, top_k, top_p + 1e-9)
    generator = torch.Generator().manual_seed(seed)
    assert {
        choose(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(20)
    } <= set(allowed)


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 4, 0.8)],
)
def test_choose_draws_with_the_right_probabilities(temperature, top_k, top_p):
    """Over 4000 draws every token of the set comes as often as its probability says."""
    logits, n = [0.3, 1.5, -0.7, 2.0, 1.4, -3.0], 4000
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount(
        [choose(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(n)],
        minlength=6,
    )
    exact = slow_distribution(logits, temperature, top_k, top_p)
    for i in range(6):
        p = exact.get(i, 0.0)
        deviation = math.sqrt(n * p * (1 - p))  # of a binomial
        assert abs(drawn[i] - n * p) <= 5 * deviation


def test_the_coldest_temperature_is_greedy():
    """As the temperature goes to 0 sampling becomes greedy; the smallest number breaks nothing."""
    model = build(tiny())
    greedy = [slow_greedy(model, [3, 1], 5)]
    for temperature in (1e-3, 1e-100, 5e-324):
        assert generate(model, [[3, 1]], 5, temperature=temperature) == greedy


def test_stop_tokens_end_a_row():
    """A stop token ends its row, is not returned, and leaves the other rows as they were."""
    model, prompts = build(tiny(), 4), [[1, 2], [5], [7, 7, 9]]
    free = generate(model, prompts, 8, temperature=0)
    stop = (free[0][3], free[1][6])
    cut = [row[: min([row.index(s) for s in stop if s in row], default=8)] for row in free]
    assert generate(model, prompts, 8, temperature=0, stop=stop) == cut
    assert cut != free
    assert generate(model, [[1, 2]], 8, temperature=0, stop=(free[0][0],)) == [[]]


@few
@given(
    st.sets(st.integers(0, 22), min_size=1),
    st.booleans(),
    st.integers(0, 5),
    st.integers(23, 30),
    seeds,
)
def test_only_allowed_ids_are_drawn(ids, greedy, top_k, V, seed):
    """Only ids marked in `allowed` are drawn; those past its end are not allowed."""
    model, allowed = build(tiny(vocab_size=V), seed), torch.zeros(23, dtype=torch.bool)
    allowed[list(ids)] = True
    options = dict(temperature=0.0 if greedy else 1.0, top_k=top_k, seed=seed, allowed=allowed)
    new = generate(model, [[1], [2, 3]], 6, **options)
    assert set(sum(new, [])) <= ids and [len(row) for row in new] == [6, 6]


def test_on_token_streams_what_is_returned():
    """on_token gets every returned token of every row, in order, and no other."""
    streamed = [[], []]
    model = build(tiny(), 4)
    stop = (generate(model, [[1], [2, 3]], 8)[0][4],)

    def note(row, token):
        streamed[row].append(token)

    new = generate(model, [[1], [2, 3]], 8, stop=stop, on_token=note)
    assert streamed == new and len(new[0]) < 8


def test_on_token_ends_a_row():
    """A row ends with the token for which on_token returns True; the other rows go on unchanged."""
    model, long = build(tiny(), 4), [[], []]
    expected = generate(model, [[1], [2, 3]], 8)

    def third(row, token):
        long[row].append(token)
        return row == 0 and len(long[0]) == 3

    assert generate(model, [[1], [2, 3]], 8, on_token=third) == [expected[0][:3], expected[1]]
    ends_all = generate(model, [[1], [2, 3]], 8, on_token=lambda row, token: True)
    assert ends_all == [row[:1] for row in expected]


def test_generate_names_every_bad_argument():
    """All bad arguments are in one ValueError, each with its numbers."""
    prompts, bad = [[], [1, 23], [1] * 30], dict(temperature=-1.0, top_k=-2, top_p=0.0)
    message = error(generate, build(tiny()), prompts, 0, **bad)
    assert "prompt 0 is empty" in message
    assert "prompt 1 holds the token 23: the vocabulary ends at 22" in message
    assert "max_new_tokens = 0" in message
    assert "a prompt of 30 tokens" in message and "there are 16" in message
    assert "temperature = -1.0" in message and "top_k = -2" in message and "top_p = 0" in message


@pytest.mark.parametrize(
    "prompts, options, text",
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[-1, 5]], {}, "token -1"),
        ([[22, 99]], {}, "token 99"),
        ([[1] * 14], {}, "need 17 cache slots, there are 16"),
        ([[1] * 4], {"capacity": 6}, "need 7 cache slots, there are 6"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": math.inf}, "temperature"),
        ([[1]], {"top_p": 1.5}, "top_p = 1.5"),
        ([[1]], {"top_p": math.nan}, "top_p"),
        ([[1]], {"capacity": 10**6}, "is past 31,"),
        ([[1]], {"allowed": torch.zeros(23, dtype=torch.bool)}, "allowed"),
        ([[1]], {"allowed": torch.ones(24, dtype=torch.bool)}, "allowed"),
    ],
)
def test_generate_refuses(prompts, options, text):
    """Each bad argument by itself is a ValueError that says which."""
    assert text in error(generate, build(tiny()), prompts, 4, **options)


def test_a_prompt_may_fill_the_cache_to_the_last_slot():
    """Nothing reads the last new token: 13 tokens and 4 new ones fit 16 slots."""
    assert len(generate(build(tiny()), [[1] * 13], 4)[0]) == 4


@pytest.mark.parametrize("blockwise", [False, True])
def test_a_trained_length_of_one(blockwise):
    """A model trained on single tokens draws one token, and with a larger cache any number."""
    model = build(tiny(max_seq_len=1))
    assert len(generate(model, [[1]], 1, blockwise=blockwise)[0]) == 1
    new = generate(model, [[1, 2, 3]], 5, temperature=0, capacity=7, blockwise=blockwise)
    assert new == [slow_greedy(model, [1, 2, 3], 5, blockwise)]
    assert "need 2 cache slots, there are 1" in error(generate, model, [[1]], 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_diverged_model_is_refused(value, temperature):
    """Weights that are not finite draw nothing: a ValueError says that the run diverged."""
    model = build(tiny())
    with torch.no_grad():
        model.layers["1"].ff.down.bias[3] = value
    message = error(generate, model, [[1]], 4, temperature=temperature)
    assert "not finite" in message and "diverged" in message
