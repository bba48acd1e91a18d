"""Stage `prepare`: the built-in scenes as webdataset shards."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import IMAGES

if __name__ == "__main__":
    with as_command():
        cli.prepare("demo", str(IMAGES))
