"""How a patch is described on the command line."""

import json
from typing import Any

import click


def show_described(described: dict[str, Any], as_json: bool) -> None:
    """Print what `describe_patch` found."""
    if as_json:
        click.echo(json.dumps(described))
        return
    for name, layer in described["layers"].items():
        change = f"{layer['rows']} rows, largest change {layer['largest_change']:.3g}"
        click.echo(f"{name}: {change}, {layer['centres']} scope centres")
    for name, change in described["tensors"].items():
        click.echo(f"{name}: replaced as a whole, largest change {change:.3g}")
    for key, value in described["info"].items():
        click.echo(f"{key}: {value}")
    for key in ("base", "out"):
        if key in described:
            click.echo(f"{key}: {described[key]}")
