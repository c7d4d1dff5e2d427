def place():
    return [(pp, dp, tp) for pp in range(4) for dp in range(2) for tp in range(2)]
