"""What the pretrained student is worth: neighbours, linear probes, fine-tuning and segmentation.

Shape suffixes in all modules: B images of one forward pass, H and W pixels, C channels, S tokens (CLS first), D token
width, N samples, F feature width, K neighbours, G classes.
"""
