"""`apportion devices`: the devices that can be planned by name."""

from typing import Annotated

import typer

from apportion.cli import options

Text = Annotated[str | None, typer.Argument(help="A part of the name.", show_default=False)]
ListDetails = Annotated[
    bool,
    typer.Option("--details", rich_help_panel=options.OUTPUT_PANEL, help="Show where the figures were read."),
]


def devices(text: Text = None, details: ListDetails = False) -> None:
    """List the GPUs and computers that can be planned by name; `apportion probe` measures those of this machine."""
    from rich.console import Console

    from apportion.catalog.gpus import Gpu, listed_devices
    from apportion.cli.render_catalogue import print_catalogue
    from apportion.types.units import format_bytes

    found = listed_devices(text or "")
    rows = [
        (
            one.key,
            one.kind if isinstance(one, Gpu) else "cpu",
            _sold([format_bytes(size) for size in one.memory_options_bytes or (one.memory_bytes,)]),
            f"{one.mem_bytes_per_s / 1e9:,.0f} GB/s",
        )
        for one in found
    ]
    print_catalogue(
        Console(),
        ("device", "kind", "memory", "reads"),
        rows,
        {one.key: [one.name, *one.source] for one in found} if details else {},
        what="device",
        text=text,
        plan='apportion plan MODEL --devices "{}"',
    )


def _sold(sizes: list[str]) -> str:
    return sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
