def orders():
    ranks = ["FFFFBFBFBFBFBBBB", "FFFBFBFBFBFBFBBB", "FFBFBFBFBFBFBFBB", "FBFBFBFBFBFBFBFB"]
    found = []
    for letters in ranks:
        next_one = {"F": iter(range(8)), "B": iter(range(8))}
        found.append([(letter, next(next_one[letter])) for letter in letters])
    return found
