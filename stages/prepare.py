"""Stage `prepare`: the built-in scenes as webdataset shards."""

from milan_pipe import cli
from stages.layout import IMAGES

if __name__ == "__main__":
    with cli.errors_as_one_line():
        cli.prepare("demo", IMAGES)
