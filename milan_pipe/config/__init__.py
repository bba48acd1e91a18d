"""Every setting, the file that holds them, recipes, and the command that repeats a run."""
