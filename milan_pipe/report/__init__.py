"""Pictures of what a run does."""
