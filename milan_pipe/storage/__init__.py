"""Folders of files on a local disk or in an object store, behind one small interface."""

from milan_pipe.storage.location import (
    SCHEMES,
    SCRATCH,
    Listing,
    Location,
    is_url,
    local_folder,
    location_of,
    require_writable,
    split_root,
    split_url,
)

__all__ = [
    "SCHEMES", "SCRATCH", "Listing", "Location", "is_url", "local_folder", "location_of", "require_writable",
    "split_root", "split_url",
]  # fmt: skip
