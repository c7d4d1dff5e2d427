"""Checks of chapter 2: the sampler without state."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from course.checking import check, expect

# --------------------------------------------------------------------------------------------------
# sampler: pick(sample, share) -> (part, index); shuffled(sample, n, seed) -> row

ONE = 2**32
shares = st.integers(0, ONE) | st.sampled_from([0, ONE // 4, ONE // 3, ONE // 2, ONE])
small = st.integers(1, 60)
keys = st.integers(0, 2**70)


# So far out that a float, which has 53 bits, gives another index.
@check("sampler", share=shares, far=st.integers(10**17, 10**18))
def every_prefix_has_its_share(f, share, far):
    """Of the first s samples exactly floor(s * share / 2**32) belong to part 0, for every s; within
    a part the indices count 0, 1, 2, ... without a gap. Also far out."""
    exact, counts = Fraction(share, ONE), [0, 0]
    for s in range(40):
        part, index = f.pick(s, share)
        expect(part in (0, 1), f"pick({s}, {share}) has the part {part!r}, expected 0 or 1")
        text = f"pick({s}, {share}) is {(part, index)}: {counts[part]} of part {part} came before"
        expect(index == counts[part], text)
        counts[part] += 1
        many = int((s + 1) * exact)
        text = f"of the first {s + 1} samples {counts[0]} belong to part 0, expected {many}"
        expect(counts[0] == many, text)
    for share in (share, ONE // 3):
        exact, (part, index) = Fraction(share, ONE), f.pick(far, share)
        right = int((far + 1) * exact) > int(far * exact)
        before = int(far * exact) if right else far - int(far * exact)
        expected = (0 if right else 1, before)
        found = f"pick({far}, {share}) is {(part, index)}, expected {expected}"
        expect((part, index) == expected, found)


@check("sampler", n=small, seed=keys, epoch=st.integers(0, 5))
def every_epoch_visits_every_row_once(f, n, seed, epoch):
    """Samples epoch * n .. epoch * n + n - 1 are all n rows, each once, in every epoch."""
    rows = [f.shuffled(i, n, seed) for i in range(epoch * n, epoch * n + n)]
    expect(sorted(rows) == list(range(n)), f"epoch {epoch} has the rows {rows}")


@check("sampler")
def orders_differ(f):
    """The order of 50 rows depends on the epoch and on the seed, and the same pairs of rows do not
    follow each other in every order."""
    orders = {}
    for seed in (0, 1, 2, 10**9):
        for epoch in (0, 1, 2):
            rows = [f.shuffled(i, 50, seed) for i in range(epoch * 50, epoch * 50 + 50)]
            orders[seed, epoch] = tuple(rows)
    first = {}
    for key, order in orders.items():
        one = first.setdefault(order, key)
        text = f"(seed, epoch) {one} and {key} have the same order of 50 rows"
        expect(one == key, text)
    steps = [{(b - a) % 50 for a, b in zip(rows, rows[1:])} for rows in orders.values()]
    text = "a row follows the one before at a fixed distance: that is no shuffling"
    expect(all(len(set_of) > 10 for set_of in steps), text)


# So many that a list of them fails at once, and does not fill the memory.
@check("sampler", examples=10, n=st.integers(10**12, 10**13), seed=keys)
def large_ranges_are_never_built(f, n, seed):
    """For 10**12 rows and more: the rows lie in the range and differ, and each is found at once,
    without a list of all."""
    places = [0, 1, 2, n // 2, n - 2, n - 1]
    rows = [f.shuffled(i, n, seed) for i in places]
    expect(all(0 <= row < n for row in rows), f"rows {rows} do not lie in 0 .. {n - 1}")
    expect(len(set(rows)) == len(rows), f"samples {places} have the rows {rows}: one is twice")


@check("sampler", examples=10, n=small, seed=keys, sample=st.integers(0, 200))
def nothing_is_remembered(f, n, seed, sample):
    """Asked again, in another order and in another process, a sample has the same row: a run that
    stopped goes on exactly."""
    before = f.shuffled(sample, n, seed)
    for other in (sample + 1, 0, 7):
        f.shuffled(other, n, seed + 1)
    again = f.on_ranks("shuffled", [(sample, n, seed)] * 2)
    expect(again == [before] * 2, f"first the row is {before}, then {again[0]} and {again[1]}")
