import hashlib


def pick(sample, share):
    before, after = sample * share >> 32, (sample + 1) * share >> 32
    if after > before:
        return 0, before
    return 1, sample - before


def noise(*words):
    return int(hashlib.sha1(repr(words).encode()).hexdigest(), 16)


def shuffled(sample, n, seed):
    epoch, place = divmod(sample, n)
    if n < 2000:
        rows = sorted(range(n), key=lambda row: noise(seed, epoch, row))
        return rows[place]
    base = 1
    while base * base < n:
        base += base // 1000 + 1
    while True:
        left, right = place // base, place % base
        for turn in range(5):
            left, right = right, (left + noise(seed, epoch, turn, right)) % base
        place = left * base + right
        if place < n:
            return place
