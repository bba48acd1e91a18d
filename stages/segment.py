"""Stage `segment`: every student under UperNet, on the masks of the scenes."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import METRICS, SEGMENTED, STUDENTS, TEST, TRAIN, write_metrics

if __name__ == "__main__":
    with as_command():
        reports = {
            name: cli.segment(checkpoint, TRAIN, TEST, str(SEGMENTED / checkpoint.rpartition("/")[2]))
            for checkpoint, name in STUDENTS.items()
        }
        write_metrics(METRICS / "segment.json", {name: report.scores["miou"] for name, report in reports.items()})
