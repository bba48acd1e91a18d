"""Stage `pretrain`: the student on stored targets."""

from milan_pipe import cli
from milan_pipe.cli.console import errors_as_one_line
from stages.layout import RUN, TARGETS

if __name__ == "__main__":
    with errors_as_one_line():
        cli.pretrain(TARGETS, RUN)
