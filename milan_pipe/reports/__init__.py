"""Looking at what was extracted and learned: pictures of targets and predictions, and the report of runs.

Shape suffixes: H x W pixels, C channels, L patches, S = L + 1 tokens, T teacher width, G x G the patch grid.
"""
