"""The training loop and its parts: optimiser, schedule, checkpoint. It knows no model."""
