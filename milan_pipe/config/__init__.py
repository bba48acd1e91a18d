"""Every setting: the base of all settings classes, the file of parameters, recipes, and commands to repeat a run."""
