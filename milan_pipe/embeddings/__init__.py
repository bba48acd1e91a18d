"""Features of images for other tools: one file a shard, with keys and labels."""
