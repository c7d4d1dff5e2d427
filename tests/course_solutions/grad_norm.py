def square_share(pieces, mesh):
    total = 0.0
    for piece, placement in pieces:
        copies = 1
        for axis, ranks in mesh.items():
            if placement[axis] == "replicate":
                copies *= ranks
        total += float((piece * piece).sum()) / copies
    return total


def clipped(pieces, square, max_norm):
    norm = square**0.5
    factor = max_norm / norm if norm > max_norm else 1.0
    return [piece * factor for piece, _ in pieces]
