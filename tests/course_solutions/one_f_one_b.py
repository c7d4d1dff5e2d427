def order(rank, ranks, micro_batches):
    first = ranks - 1 - rank
    work = [("F", i) for i in range(first)]
    for i in range(micro_batches - first):
        work += [("F", first + i), ("B", i)]
    return work + [("B", i) for i in range(micro_batches - first, micro_batches)]
