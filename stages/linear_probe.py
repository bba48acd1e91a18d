"""Stage `linear-probe`: linear classifier on untrained and trained students and the teacher."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import EVALUATIONS, FEATURES, METRICS, SUBJECTS, TEST, TRAIN, write_metrics

if __name__ == "__main__":
    with as_command():
        reports = {
            name: cli.linear_probe(
                checkpoint, TRAIN, TEST, quick=True, features=str(FEATURES), keep=str(EVALUATIONS / "linear-probe")
            )
            for checkpoint, name in SUBJECTS.items()
        }
        write_metrics(METRICS / "linear_probe.json", {name: report.accuracy for name, report in reports.items()})
