"""One short script per DVC stage: reads params.yaml, calls what the command line calls, writes metrics."""
