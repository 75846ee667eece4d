"""`apportion models`: the models that can be planned by name."""

from typing import Annotated

import typer

from apportion.cli import options

Text = Annotated[str | None, typer.Argument(help="A part of the name.", show_default=False)]
ListDetails = Annotated[
    bool,
    typer.Option("--details", rich_help_panel=options.OUTPUT_PANEL, help="Show where the figures were read."),
]


def models(text: Text = None, details: ListDetails = False) -> None:
    """List the models that can be planned by name; others need their config.json, a GGUF file or a hub id."""
    from rich.console import Console

    from apportion.catalog.families import RUNNABLE
    from apportion.catalog.known_models import known_config, known_models, listed_models
    from apportion.catalog.model_config import read_model_spec
    from apportion.cli.render_catalogue import print_catalogue
    from apportion.types.units import format_bytes

    tables = known_models()
    rows: list[tuple[str, ...]] = []
    sources: dict[str, list[str]] = {}
    for name in listed_models(text or ""):
        spec = read_model_spec(known_config(name))
        parameters = tables[name]["parameters"]
        rows.append(
            (
                name,
                f"{parameters / 1e9:.3g} B",
                str(spec.num_layers),
                f"{spec.max_context_tokens:,}",
                format_bytes(2 * parameters),
                "yes" if spec.family in RUNNABLE else "no",
            )
        )
        sources[name] = [*tables[name]["hub_ids"][:1], *tables[name]["sources"]]
    print_catalogue(
        Console(),
        ("model", "parameters", "layers", "context", "in bf16", "runs here"),
        rows,
        sources if details else {},
        what="model",
        text=text,
        plan="apportion plan {}",
    )
