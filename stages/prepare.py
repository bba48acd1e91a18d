"""Stage `prepare`: the built-in scenes as webdataset shards."""

from milan_pipe import cli
from milan_pipe.cli.console import errors_as_one_line
from stages.layout import IMAGES

if __name__ == "__main__":
    with errors_as_one_line():
        cli.prepare("demo", IMAGES)
