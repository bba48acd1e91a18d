"""Stage `segment-probe`: patch features of untrained and trained students and of the teacher, judged by the masks."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import EVALUATIONS, METRICS, SUBJECTS, TEST, TRAIN, write_metrics

if __name__ == "__main__":
    with as_command():
        reports = {
            name: cli.segment_probe(checkpoint, TRAIN, TEST, keep=str(EVALUATIONS / "segment-probe"))
            for checkpoint, name in SUBJECTS.items()
        }
        heads = next(iter(reports.values())).heads
        write_metrics(
            METRICS / "segment_probe.json",
            {head: {name: report.heads[head].miou for name, report in reports.items()} for head in heads},
        )
