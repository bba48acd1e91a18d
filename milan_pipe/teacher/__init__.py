"""CLIP and SigLIP image towers as teachers: pixels to patch features and the pooling query's attention.

Shape suffixes: B views, H height, W width, S = L + 1 tokens (CLS first), L patches, D tower width, T feature width.
"""
