"""What extraction and pretraining will take, reported before either is begun."""
