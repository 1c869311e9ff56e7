"""Preference pairs: how they are encoded into shards, checked and read. :func:`as_webdataset` is for loops of one's own."""


def __getattr__(name: str):
    if name != "as_webdataset":
        raise AttributeError(f"module 'dde_ds.data' has no attribute {name!r}")
    # On first use: webdataset takes a second to import.
    from dde_ds.data.adapter import as_webdataset

    return as_webdataset
