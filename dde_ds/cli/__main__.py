"""``python -m dde_ds.cli``, and over many ranks ``deepspeed --module dde_ds.cli train …``: the same as ``dde-ds``."""

from dde_ds.cli import command

if __name__ == "__main__":
    command()
