"""Stage `knn`: nearest neighbours of untrained and trained students and of the teacher."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import EVALUATIONS, FEATURES, METRICS, SUBJECTS, TEST, TRAIN, write_metrics

if __name__ == "__main__":
    with as_command():
        reports = {
            name: cli.knn(checkpoint, TRAIN, TEST, features=str(FEATURES), keep=str(EVALUATIONS / "knn"))
            for checkpoint, name in SUBJECTS.items()
        }
        write_metrics(METRICS / "knn.json", {name: report.best for name, report in reports.items()})
