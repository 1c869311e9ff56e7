"""Encode preference pairs into shards, check the shards and read them.

:func:`as_webdataset` serves training loops of your own.
"""


def __getattr__(name: str):
    if name != "as_webdataset":
        raise AttributeError(f"module 'dde_ds.data' has no attribute {name!r}")
    # Import it on first use, since webdataset takes a second to import.
    from dde_ds.data.adapter import as_webdataset

    return as_webdataset
