"""Stage `finetune`: every student is trained to classify the scenes."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import METRICS, STUDENTS, TEST, TRAIN, TUNED, write_metrics

if __name__ == "__main__":
    with as_command():
        reports = {
            name: cli.finetune(checkpoint, TRAIN, TEST, str(TUNED / checkpoint.rpartition("/")[2]))
            for checkpoint, name in STUDENTS.items()
        }
        write_metrics(METRICS / "finetune.json", {name: report.scores["top1"] for name, report in reports.items()})
