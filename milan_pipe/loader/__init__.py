"""Targets to training batches: in which order (`order`), and how they are read (`stream`)."""
