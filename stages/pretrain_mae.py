"""Stage `pretrain-mae`: the same student on its own pixels, as MAE has it; what MILAN is measured by."""

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import MAE_RUN, TARGETS

# Pixels have a learning rate of their own, chosen on other scenes: docs/results.md.
_MAE = ["target=pixels", "decoder=plain", "masking=random", "pretrain.lr=0.0015"]

if __name__ == "__main__":
    with as_command():
        cli.pretrain([str(TARGETS)], str(MAE_RUN), overrides=_MAE)
