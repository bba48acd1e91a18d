"""The store between the two stages: features, attention and rendered views, behind one reader and one writer.

Shape suffixes: K views per image, N samples of a shard or run, S = L + 1 tokens (CLS first), L patches,
T feature width.
"""
