"""Processes of torch's DataLoader that end by themselves, as those that the system kills for their memory."""

from __future__ import annotations

from typing import Any

from torch.utils.data._utils import signal_handling

from milan_pipe.errors import ProcessLostError, one_line

_TORCH_SAYS = "DataLoader worker"


def lost_where_asked(answers: Any) -> None:
    """Have `next_answer` say that a process of this iterator was lost.

    Else a handler of SIGCHLD raises it wherever the main thread is at that moment.
    """
    signal_handling._remove_worker_pids(id(answers))  # type: ignore[attr-defined]
    answers._worker_pids_set = False


def next_answer(answers: Any, setting: str, processes: int) -> Any:
    """The next value of the iterator, None at its end; raises ProcessLostError, which names the setting."""
    try:
        return next(answers, None)
    except (RuntimeError, EOFError) as error:
        # The pipe of a process may end before torch looks whether it lives; an error in one has words.
        told = str(error) if error.args else f"{_TORCH_SAYS} closed its pipe"
        if not told.startswith(_TORCH_SAYS):
            raise
        raise ProcessLostError(
            f"a process of {setting}={processes} ended by itself: {one_line(told)}. The system may have killed it for "
            f"its memory; try fewer, or {setting}=0"
        ) from error
