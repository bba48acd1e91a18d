"""`python -m milan_pipe` is `milan-pipe`."""

from milan_pipe.cli import main

main()
