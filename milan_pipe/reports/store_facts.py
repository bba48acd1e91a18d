"""Facts of a store: header, size, fidelity, and skipped samples."""

from __future__ import annotations

from milan_pipe.targets.store import TargetStore
from milan_pipe.units import size

_MOST_BAD = 20


def header_facts(store: TargetStore) -> dict[str, str]:
    """Lines to print of a store's header."""
    header, teacher, views = store.header, store.header.teacher, store.header.views
    return {
        "store": str(store.location),
        "format": f"{header.format}, schema {header.schema_version}, written by milan-pipe {header.package_version}",
        "teacher": f"{teacher.model}{f' ({teacher.pretrained})' if teacher.pretrained else ''}, {teacher.image_size} "
        f"pixels, {teacher.precision}, {teacher.normalization} normalisation, weights {teacher.weights_sha256[:12]}",
        "patches": f"{teacher.grid[0]} x {teacher.grid[1]}, features of {teacher.width}",
        "views": f"{views.count} of each image, {views.size} pixels, scale {views.scale[0]:g} to {views.scale[1]:g}, "
        f"mirrored with probability {views.flip:g}, seed {views.seed}",
        "codec": f"{header.codec.name}"
        + (f", fitted for {header.codec.quality:g}" if header.codec.quality is not None else ""),
    }


def store_facts(store: TargetStore) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Read all records of a store: lines to print, and key and reason of the first samples that were skipped.

    Raises:
        DataError: one is damaged.
    """
    header = store.header
    samples = stored = features = files = skipped = 0
    known, known_samples = 0.0, 0
    bad: list[tuple[str, str]] = []
    # Record after record: together they may be larger than memory.
    for shard in store.shards:
        record = store.record(shard)
        samples += record.source.samples
        files += len(record.files)
        stored += sum(file.bytes for file in record.files.values())
        features += sum(f.bytes for path, f in record.files.items() if path.split("/")[0] in ("features", "scale"))
        skipped += len(record.source.bad)
        bad += record.source.bad[: _MOST_BAD - len(bad)]
        if record.mean_cosine is not None:
            known += record.mean_cosine * record.source.samples
            known_samples += record.source.samples
    views, facts = samples * header.views.count, header_facts(store)
    if header.format == "zarr":
        facts["codec"] += f", {8 * features / views / header.tokens / header.teacher.width:.2f} bits a dimension"
    facts["images"] = f"{samples:,} in {len(store.shards)} of {header.source.shards} shards, {skipped} skipped"
    facts["size"] = f"{size(stored)} in {files:,} files, {size(stored / views)} a view"
    facts["fidelity"] = (
        f"mean cosine {known / known_samples:.6f} of decoded and teacher's tokens, over all views"
        if known_samples
        else "not recorded in this store"
    )
    return facts, bad
