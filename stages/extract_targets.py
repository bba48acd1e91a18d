"""Stage `extract-targets`: teacher features, attention and views of the train shards."""

from milan_pipe import cli
from stages.layout import METRICS, TARGETS, TRAIN
from stages.report import write_metrics

if __name__ == "__main__":
    with cli.errors_as_one_line():
        report = cli.extract_targets(TRAIN, TARGETS)
        write_metrics(
            METRICS / "extract_targets.json",
            {"samples": report.samples, "bad": report.bad, "bytes_per_view": round(report.bytes_per_view)},
        )
