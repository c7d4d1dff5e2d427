def plan():
    cuts = {"qkv": "rows", "o": "columns", "up": "rows", "down": "columns"}
    attention = [
        ("a", "norm", "x"),
        ("heads", "linear", "a", "qkv"),
        ("mixed", "attention", "heads"),
        ("part", "linear", "mixed", "o"),
        ("whole", "all_reduce", "part"),
        ("z", "add", "x", "whole"),
    ]
    feed_forward = [
        ("b", "norm", "z"),
        ("hidden", "linear", "b", "up"),
        ("active", "gelu", "hidden"),
        ("part", "linear", "active", "down"),
        ("whole", "all_reduce", "part"),
        ("y", "add", "z", "whole"),
    ]
    return cuts, attention + feed_forward
