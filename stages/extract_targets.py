"""Stage `extract-targets`: teacher features, attention and views of the train shards."""

from milan_pipe import cli
from milan_pipe.terminal import errors_as_one_line
from stages.layout import METRICS, TARGETS, TRAIN
from stages.report import write_metrics

if __name__ == "__main__":
    with errors_as_one_line():
        report = cli.extract_targets(TRAIN, TARGETS)
        write_metrics(
            METRICS / "extract_targets.json",
            {"samples": report.samples, "bad": report.bad, "bytes_per_view": round(report.bytes_per_view)},
        )
