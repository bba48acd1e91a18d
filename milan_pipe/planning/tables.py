"""A plan as tables for the terminal; each row says whether it is counted, measured or extrapolated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from milan_pipe.terminal import size

if TYPE_CHECKING:
    from milan_pipe.planning.run import PlanReport


def store_table(report: PlanReport) -> Table:
    """What a store takes in each codec and format; the one that the settings name is marked."""
    table = Table(
        "codec",
        "format",
        "a view",
        "mean cosine",
        "in all",
        "files",
        caption="a view and its cosine: measured; in all, files: extrapolated; * as the settings say",
    )
    for store in report.stores:
        table.add_row(
            store.codec,
            f"{store.format} *" if store == report.chosen else store.format,
            size(store.bytes_per_view),
            f"{store.mean_cosine:.8f}",
            size(store.bytes),
            str(store.files),
        )
    return table


def rows(report: PlanReport) -> dict[str, str]:
    """Everything else, line by line."""
    return {**_stage1(report), **_stage2(report), "free disk": _space(report)}


def _stage1(report: PlanReport) -> dict[str, str]:
    extraction = report.extraction
    hours = "; ".join(
        f"{count} device{'s' if count > 1 else ''}: {duration(hours)}" for count, hours in extraction.hours.items()
    )
    return {
        "pictures": str(report.images),
        "views": f"{report.views}, {report.views_per_picture} a picture",
        "measured on": f"{report.sample} pictures ({report.sample_bad} more cannot be read), one view of each",
        "store": f"{report.chosen.codec}, {report.chosen.format}: about {size(report.chosen.bytes)} (extrapolated)",
        "teacher": f"{report.teacher_model} at {report.teacher_image_size} pixels: {report.teacher} (measured)",
        "rendering": f"{report.render_views_per_second:.4g} views a second and thread (measured), "
        f"{report.render_threads} threads",
        "extraction": f"{hours} (extrapolated from {extraction.views_per_second:.4g} views a second, limited by "
        f"{extraction.limited_by}; writing not counted)",
    }


def _stage2(report: PlanReport) -> dict[str, str]:
    plan, online = report.pretraining, report.teacher_online
    offline = plan.pretrain_hours + plan.extraction_hours
    teacher = (
        "no teacher, the target is pixels" if online is None else f"teacher on the same batch: {online} (measured)"
    )
    return {
        "student": f"{report.student} (measured)",
        "online step": f"student and {teacher}",
        "stored targets": f"{plan.epochs} epochs: {duration(plan.pretrain_hours)} of pretraining + "
        f"{duration(plan.extraction_hours)} of extraction = {duration(offline)} of one device (extrapolated)",
        "teacher online": f"{plan.epochs} epochs: {duration(plan.online_hours)} of one device (extrapolated)",
        "saved": _saved(report),
    }


def _saved(report: PlanReport) -> str:
    plan = report.pretraining
    since = (
        f"storing targets pays from {plan.pays_from_epochs} epochs on"
        if plan.pays_from_epochs is not None
        else "without a teacher to save, storing targets never pays"
    )
    if plan.saved_hours >= 0:
        return f"{duration(plan.saved_hours)} of {duration(plan.online_hours)}; {since}"
    return f"nothing: stored targets take {duration(-plan.saved_hours)} more than a teacher online; {since}"


def _space(report: PlanReport) -> str:
    space = report.space
    if space.free_bytes is None:
        return f"not checked: {space.folder} is no local folder"
    verdict = "NOT ENOUGH" if space.short else "enough"
    return f"{size(space.free_bytes)} at {space.folder}, {verdict} for about {size(space.needed_bytes)}"


def duration(hours: float) -> str:
    """Hours, or minutes or seconds where it is less than one of them."""
    if hours >= 1:
        return f"{hours:.1f} h" if hours < 1000 else f"{hours:.0f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
