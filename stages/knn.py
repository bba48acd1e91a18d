"""Stage `knn`: nearest neighbours of untrained student, trained student and teacher."""

from milan_pipe import cli
from stages.layout import METRICS, SUBJECTS, TEST, TRAIN
from stages.report import write_metrics

if __name__ == "__main__":
    with cli.errors_as_one_line():
        reports = {name: cli.knn(checkpoint, TRAIN, TEST) for checkpoint, name in SUBJECTS.items()}
        write_metrics(METRICS / "knn.json", {name: report.best for name, report in reports.items()})
