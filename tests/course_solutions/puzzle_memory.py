def orders():
    kinds = ["FffFfffF", "FFffFfFf", "FFFFfFFF", "FFFfFFFF"]
    found = []
    for rank, kind in enumerate(kinds):
        first = 3 - rank
        work = [(kind[i], i) for i in range(first)]
        for i in range(8 - first):
            work += [(kind[first + i], first + i), ("B", i)]
        found.append(work + [("B", i) for i in range(8 - first, 8)])
    return found
