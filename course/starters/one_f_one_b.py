"""Assignment one_f_one_b (chapter 5): the order of work in a pipeline.

Read tutorials/05-parallel.md, section 5.5; FLM-101B, section 2.4 (it does not name its schedule);
Narayanan et al., arXiv 2104.04473, section 2.2.
Grade it: python -m course.grade one_f_one_b
"""


def order(rank: int, ranks: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a rank does, in order, under the pipeline schedule 1F1B.

    rank: 0 .. ranks-1; rank r holds pipeline stage r. micro_batches: at least `ranks`.
    Returns a list of ("F", i) and ("B", i): the forward and the backward pass of micro-batch i,
    each once for every i. Both kinds come in the order 0, 1, 2, ...

    A forward pass takes 1 unit of time, a backward pass 2. F i of rank r needs F i of rank r - 1.
    B i of rank r needs B i of rank r + 1; on the last rank it needs F i there. Each rank works in
    its order, and waits where the next work is not possible yet. A rank keeps the activations of a
    micro-batch from its F to its B.

    1F1B: a rank begins with some forward passes, until the first backward pass can reach it. Then
    it does one forward pass and one backward pass in turn. The backward passes that are left come
    at the end. With p ranks and m micro-batches the ranks idle (p - 1) / (m + p - 1) of the time
    from the first pass of all to the last, and rank r keeps at most p - r micro-batches at a time.
    (GPipe, all forward passes first, has the same bubble, but keeps m.)
    """
    raise NotImplementedError
