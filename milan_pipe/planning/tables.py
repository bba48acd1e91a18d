"""A plan as tables for the terminal; each row says whether it is counted, measured or extrapolated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from milan_pipe.units import rate, size

if TYPE_CHECKING:
    from milan_pipe.config.recipes import About
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
        caption="measured: a view, mean cosine; extrapolated: the rest; *: as set",
        caption_justify="left",
    )
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
    return {**_stage1(report), **_stage2(report), "free disk": _space(report)}


def _stage1(report: PlanReport) -> dict[str, str]:
    extraction, images = report.extraction, report.images
    first, *more = (
        f"{duration(hours)} on {count}{' device' if count == 1 else ''}" for count, hours in extraction.hours.items()
    )
    sample = f"{report.sample} images, one view of each"
    speed = f"{rate(extraction.views_per_second)} views a second, limited by the {extraction.limited_by}"
    cluster = report.cluster
    few = f"; of {images.shards} shards each is done by one device" if images.shards < max(extraction.hours) else ""
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
        f"{_devices(cluster.devices)} its scheduler is busy for {100 * cluster.scheduler_share:.2g} % of the time "
        "(extrapolated from what a task costs it)",
    }


def _stage2(report: PlanReport) -> dict[str, str]:
    plan, online = report.pretraining, report.teacher_online
    offline = plan.pretrain_hours + plan.extraction_hours
    if online is None:
        beside = "no teacher: the target is pixels"
    elif online == report.teacher:
        beside = "the teacher, as above, in every step"
    else:
        beside = f"the teacher in every step, {rate(online.per_second)} views a second ({online.source}: {online})"
    return {
        "student": f"{rate(report.student.per_second)} images a second ({report.student.source}: {report.student})",
        "stored targets": f"{duration(plan.pretrain_hours)} for {plan.epochs} epochs + "
        f"{duration(plan.extraction_hours)} of extraction = {duration(offline)} on one device (extrapolated)",
        "online teacher": f"{duration(plan.online_hours)} for {plan.epochs} epochs on one device (extrapolated; "
        f"{beside})",
        "saved": _saved(report),
        **_shared(report),
    }


def _devices(count: int) -> str:
    return f"{count} devices" if count > 1 else "1 device"


def _shared(report: PlanReport) -> dict[str, str]:
    """Both stages on the devices planned for, and what a node of them reads."""
    devices, node = report.cluster.devices, report.node
    first = report.limits[0]
    if first.share > 1:
        verdict = f"{first.name}: {first.what}; do: {first.advice}"
    else:
        verdict = f"nothing; nearest to it: {first.name} ({first.what})"
    shared = (
        f"{duration(report.extraction.hours[devices])} of extraction, "
        f"{duration(report.pretraining.pretrain_hours / devices)} of pretraining (extrapolated, shared without loss)"
    )
    return {
        **({f"{devices} devices": shared} if devices > 1 else {}),
        "a node": f"{rate(node.images_per_second)} images and {size(node.bytes_per_second)} a second go to "
        f"{_devices(node.devices)}, for which the loader needs {rate(node.cores)} processors (measured: "
        f"{rate(node.loader_per_core)} images a second and processor)",
        "gives in first": verdict,
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
    return f"nothing: stored targets take {duration(-plan.saved_hours)} more than an online teacher; {since}"


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
    minutes, seconds = hours * 60, hours * 3600
    return f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.1g} s"
