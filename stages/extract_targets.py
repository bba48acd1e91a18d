"""Stage `extract-targets`: teacher features, attention and views of the train shards."""

from dataclasses import asdict

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import METRICS, TARGETS, TRAIN, write_metrics

if __name__ == "__main__":
    with as_command():
        report = cli.extract_targets([TRAIN], str(TARGETS))
        write_metrics(METRICS / "extract_targets.json", asdict(report))
