"""Assignment sampler (chapter 2): training samples without state.

Read tutorials/02-training.md, sections 2.5 and 2.7; FLM-101B mixes two signals within every batch
(section 2.2). A run that stops must go on with exactly the samples that it would have seen. It is
enough to remember how many samples it has seen, if the row of a sample is a function of its number.
Grade it: python -m course.grade sampler
"""


def pick(sample: int, share: int) -> tuple[int, int]:
    """Divide the samples 0, 1, 2, ... among two parts.

    share: how much of the samples belongs to part 0, a whole number from 0 to 2**32 in units of
    2**-32: 2**31 is one half, 2**32 is all.
    Returns (part, index): sample number `sample` is number `index` of its part, counted from 0.

    Of the first s samples exactly floor(s * share / 2**32) belong to part 0, for every s. So sample
    number s belongs to part 0 if that count rises between s and s + 1. Use whole numbers alone:
    `sample` may be 10**18, where a float is no longer exact. Nothing may be remembered.

    >>> [pick(sample, 2**30) for sample in range(6)]  # a quarter
    [(1, 0), (1, 1), (1, 2), (0, 0), (1, 3), (1, 4)]
    """
    raise NotImplementedError


def shuffled(sample: int, n: int, seed: int) -> int:
    """The row, 0 .. n-1, of sample number `sample` in an endless stream over n rows.

    Samples 0 .. n-1 are the first epoch, n .. 2n-1 the second, and so on. In each epoch every row
    comes exactly once. Each pair of an epoch and a seed has an order of its own, which looks
    random: the second epoch of seed 0 is not the first of seed 1.
    n: at least 1. seed: a whole number from 0, of any size (those of PyTorch end at 2**64).

    It is a pure function, the same in every process: nothing may be remembered, and Python's `hash`
    of a text will not do (it differs from process to process; hashlib does not). It must work for
    n = 10**13, so no list of n numbers. For small n, up to some thousands, a list is allowed.

    A way that works for large n: write the position in its epoch as two digits of base b, where b
    is the smallest whole number with b * b >= n. Let left, right be the digits. Some rounds of

        left, right = right, (left + noise(round, right)) % b

    where noise is a whole number from a hash of (seed, epoch, round, right), are a permutation of
    0 .. b*b - 1 (a Feistel network). If the result is n or more, put it through again, until it is
    below n.
    """
    raise NotImplementedError
