"""Run ``dde-ds`` as ``python -m dde_ds.cli`` or, over many ranks, as ``deepspeed --module dde_ds.cli train …``."""

from dde_ds.cli import command

if __name__ == "__main__":
    command()
