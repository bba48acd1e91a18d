"""Pretrain vision transformers on stored CLIP features: MILAN as a two-stage offline pipeline."""

__version__ = "0.1.0"
