"""Stage `pretrain`: the student on stored targets."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import RUN, TARGETS

if __name__ == "__main__":
    with as_command():
        cli.pretrain([str(TARGETS)], str(RUN))
