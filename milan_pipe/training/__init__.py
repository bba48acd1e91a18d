"""The runner of all training and its parts: steps, optimiser, checkpoints, ranks. It knows no model."""
