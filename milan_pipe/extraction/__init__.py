"""Stage 1: images to targets.

Shape suffixes: K views per image, N samples of a block, B views of one teacher batch, S tokens, L patches, T width.
"""
