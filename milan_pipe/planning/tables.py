"""A plan as tables for the terminal; each row says whether it is counted, measured or extrapolated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from milan_pipe.units import rate, size

if TYPE_CHECKING:
    from milan_pipe.config.recipes import About
    from milan_pipe.extraction.space import FreeSpace
    from milan_pipe.planning.load import Limit
    from milan_pipe.planning.run import PlanReport
    from milan_pipe.planning.speed import PretrainingHours


def store_table(report: PlanReport) -> Table:
    """What a store takes in each codec and format; the one that the settings name is marked."""
    caption = "measured: a view, mean cosine; extrapolated: the rest; *: as set"
    columns = ("codec", "format", "a view", "mean cosine", "in all", "files")
    table = Table(*columns, caption=caption, caption_justify="left")
    for store in report.stores:
        table.add_row(
            store.codec,
            f"{store.format} *" if store == report.chosen else store.format,
            size(store.bytes_per_view),
            f"{store.mean_cosine:.8f}",
            size(store.bytes),
            f"{store.files:,}",
        )
    return table


def recipe_rows(about: About | None) -> dict[str, str]:
    """What a recipe says of itself, beside what is measured here."""
    if about is None:
        return {}
    return {
        "recipe": about.summary,
        "its hardware": about.hardware,
        "its time": f"{about.time} ({about.time_source})",
        "its score": f"{about.score} ({about.score_source})" if about.score_source != "none" else about.score,
    }


def rows(report: PlanReport) -> dict[str, str]:
    """Everything else, line by line."""
    images, extraction, plan = report.images, report.extraction, report.pretraining
    cluster, node, devices = report.cluster, report.node, report.cluster.devices
    first, *more = (
        f"{duration(hours)} on {count}{' device' if count == 1 else ''}" for count, hours in extraction.hours.items()
    )
    sample = f"{report.sample} images, one view of each"
    speed = f"{rate(extraction.views_per_second)} views a second, limited by the {extraction.limited_by}"
    few = f"; of {images.shards} shards each is done by one device" if images.shards < max(extraction.hours) else ""
    offline = plan.pretrain_hours + plan.extraction_hours
    shared = (
        f"{duration(extraction.hours[devices])} of extraction, {duration(plan.pretrain_hours / devices)} of "
        "pretraining (extrapolated, shared without loss)"
    )
    return {
        "images": str(images),
        "views": f"{report.views:,}, {report.views_per_image} of each image",
        "measured on": f"{sample}; {report.sample_bad} more cannot be read" if report.sample_bad else sample,
        "store": f"about {size(report.chosen.bytes)}, {report.chosen.codec} in {report.chosen.format} (extrapolated)",
        "teacher": f"{rate(report.teacher.per_second)} views a second ({report.teacher.source}: {report.teacher_model} "
        f"at {report.teacher_image_size} pixels, {report.teacher})",
        "rendering": f"{rate(report.render_views_per_second)} views a second and thread (measured), "
        f"{report.render_threads} threads",
        "extraction": f"{', '.join([first, *more])} (extrapolated from {speed}; writing is not counted{few})",
        "Dask": f"{cluster.tasks:,} tasks, one a shard, of {duration(cluster.shard_hours)} each; with "
        f"{_devices(devices)} its scheduler is busy for {100 * cluster.scheduler_share:.2g} % of the time "
        "(extrapolated from what a task costs it)",
        "student": f"{rate(report.student.per_second)} images a second ({report.student.source}: {report.student})",
        "stored targets": f"{duration(plan.pretrain_hours)} for {plan.epochs} epochs + "
        f"{duration(plan.extraction_hours)} of extraction = {duration(offline)} on one device (extrapolated)",
        "online teacher": f"{duration(plan.online_hours)} for {plan.epochs} epochs on one device (extrapolated; "
        f"{_online(report)})",
        "saved": _saved(plan),
        **({f"{devices} devices": shared} if devices > 1 else {}),
        "a node": f"{rate(node.images_per_second)} images and {size(node.bytes_per_second)} a second go to "
        f"{_devices(node.devices)}, for which the loader needs {rate(node.cores)} processors (measured: "
        f"{rate(node.loader_per_core)} images a second and processor)",
        "gives in first": _tightest(report.limits[0]),
        "free disk": _space(report.space),
    }


def _devices(count: int) -> str:
    return f"{count} devices" if count > 1 else "1 device"


def _online(report: PlanReport) -> str:
    online = report.teacher_online
    if report.stores_read > 1:
        return "not estimated for two teachers"
    if online is None:
        return "no teacher: the target is pixels"
    if online == report.teacher:
        return "the teacher, as above, in every step"
    return f"the teacher in every step, {rate(online.per_second)} views a second ({online.source}: {online})"


def _tightest(limit: Limit) -> str:
    if limit.share > 1:
        return f"{limit.name}: {limit.what}; do: {limit.advice}"
    return f"nothing; nearest to it: {limit.name} ({limit.what})"


def _saved(plan: PretrainingHours) -> str:
    since = (
        f"storing targets pays from {plan.pays_from_epochs} epochs on"
        if plan.pays_from_epochs is not None
        else "without a teacher to save, storing targets never pays"
    )
    if plan.saved_hours >= 0:
        return f"{duration(plan.saved_hours)} of {duration(plan.online_hours)}; {since}"
    return f"nothing: stored targets take {duration(-plan.saved_hours)} more than an online teacher; {since}"


def _space(space: FreeSpace) -> str:
    if space.free_bytes is None:
        return f"not checked: {space.folder} is no local folder"
    verdict = "NOT ENOUGH" if space.short else "enough"
    return f"{size(space.free_bytes)} at {space.folder}, {verdict} for about {size(space.needed_bytes)}"


def duration(hours: float) -> str:
    """Hours, or minutes or seconds where it is less than one of them."""
    if hours >= 1:
        return f"{hours:.1f} h" if hours < 1000 else f"{hours:.0f} h"
    minutes, seconds = hours * 60, hours * 3600
    return f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.1g} s"
