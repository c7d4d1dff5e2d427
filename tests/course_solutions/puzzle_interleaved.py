def orders():
    found = []
    for rank in range(4):
        forward, backward = [], []
        for group in (0, 4):
            for stage in (rank, rank + 4):
                forward += [("F", stage, group + i) for i in range(4)]
            for stage in (rank + 4, rank):
                backward += [("B", stage, group + i) for i in range(4)]
        first = 3 - rank + 4
        work = forward[:first]
        for f, b in zip(forward[first:], backward):
            work += [f, b]
        found.append(work + backward[16 - first :])
    return found
