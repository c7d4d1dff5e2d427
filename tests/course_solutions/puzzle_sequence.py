def plan():
    cuts = {"qkv": "rows", "o": "columns", "up": "rows", "down": "columns"}
    attention = [
        ("a", "norm", "x"),
        ("all", "all_gather", "a"),
        ("heads", "linear", "all", "qkv"),
        ("mixed", "attention", "heads"),
        ("part", "linear", "mixed", "o"),
        ("mine", "reduce_scatter", "part"),
        ("z", "add", "x", "mine"),
    ]
    feed_forward = [
        ("b", "norm", "z"),
        ("all", "all_gather", "b"),
        ("hidden", "linear", "all", "up"),
        ("active", "gelu", "hidden"),
        ("part", "linear", "active", "down"),
        ("mine", "reduce_scatter", "part"),
        ("y", "add", "z", "mine"),
    ]
    return cuts, attention + feed_forward
