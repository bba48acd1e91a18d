"""What extraction and pretraining will take, told before either is begun."""
