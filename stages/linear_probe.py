"""Stage `linear-probe`: linear classifier on untrained student, trained student and teacher."""

from milan_pipe import cli
from stages.layout import METRICS, SUBJECTS, TEST, TRAIN
from stages.report import write_metrics

if __name__ == "__main__":
    with cli.errors_as_one_line():
        reports = {name: cli.linear_probe(checkpoint, TRAIN, TEST) for checkpoint, name in SUBJECTS.items()}
        write_metrics(METRICS / "linear_probe.json", {name: report.accuracy for name, report in reports.items()})
