"""Stage 2: the student learns from stored targets; no teacher and no source image is touched.

Shape suffixes: B batch, C channels, H height, W width, S = L + 1 tokens (CLS first), L patches, T feature width.
"""
