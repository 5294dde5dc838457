"""Options from a YAML file: `--config FILE` of every command, and `sparsemem config` that prints one.

A key is an option's name without the dashes. What the command line says has the last word.
"""

import reprlib
from pathlib import Path
from typing import Any

import click

_NOT_IN_FILES = ("config", "help", "version")


def add_config(command: click.Command) -> None:
    """Give a command the option `--config`."""
    option = click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=_use,
        help="Read options from a file; `sparsemem config` prints one.",
    )
    command.params.append(option)


@click.command("config", short_help="Print a configuration file.")
@click.argument("command", metavar="COMMAND")
@click.pass_context
def show_config(context: click.Context, command: str) -> None:
    """Print a configuration file for COMMAND with all its options, their defaults and comments."""
    assert context.parent is not None
    group = context.parent.command
    assert isinstance(group, click.Group)
    # `learn` means `learn teach`; other groups and this command itself take no file
    commands = {name: getattr(one, "teach", one) for name, one in group.commands.items()}
    commands = {n: one for n, one in commands.items() if any(p.name == "config" for p in one.params)}
    if command not in commands:
        raise click.UsageError(
            f"there is no configuration file for {command!r}; choose from {', '.join(commands)}"
        )
    click.echo(template(command, commands[command]), nl=False)


def template(name: str, command: click.Command) -> str:
    """YAML of a command's options: each with its help, those without a default commented out."""
    import yaml

    lines = [f"# sparsemem {name} --config THIS-FILE.yaml", ""]
    for key, parameter in _parameters(command).items():
        if isinstance(parameter, click.Option) and parameter.hidden:
            continue
        about = parameter.help if isinstance(parameter, click.Option) else "The command's argument."
        notes = [" ".join((about or "").split())]
        if isinstance(parameter.type, click.Choice):
            notes.append(f"One of {', '.join(map(str, parameter.type.choices))}.")
        if parameter.required:
            notes.append("Required.")
        lines.append(f"# {' '.join(note for note in notes if note)}".rstrip())
        default = _plain(parameter)
        held = yaml.safe_dump({key: default}, default_flow_style=True).strip().strip("{}")
        shown = f"# {key}: {_placeholder(parameter)}" if default is None else held
        lines += [shown, ""]
    return "\n".join(lines)


def read_config(path: Path, command: click.Command) -> dict[str, Any]:
    """A file's values by parameter name, for click to convert and check as if they were typed.

    Raises:
        ValueError: no file, no YAML, an unknown key, or a value that no option can have.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"--config {path}: is not YAML ({line}); `sparsemem config` prints one") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must have one `key: value` a line; `sparsemem config` prints one")
    known = _parameters(command)
    values = {}
    for given, value in content.items():
        key = str(given).replace("_", "-") if isinstance(given, str) else ""
        if key not in known:
            raise ValueError(f"--config {path}: unknown key {_short(given)}; allowed are {', '.join(known)}")
        if value is not None:
            values[known[key].name] = _typed(path, key, value, known[key])
    return values


def _use(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = read_config(path, context.command)


def _parameters(command: click.Command) -> dict[str, click.Parameter]:
    """A command's parameters by their key in a file."""
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            key = max(parameter.opts, key=len).lstrip("-")
        else:
            key = str(parameter.name)
        if key not in _NOT_IN_FILES:
            found[key] = parameter
    return found


def _typed(path: Path, key: str, value: Any, parameter: click.Parameter) -> Any:
    """A value as click takes it from a map of defaults."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise ValueError(f"--config {path}: {key}={_short(value)} must be true or false")
        return value
    several = isinstance(value, list)
    parts = value if several else [value]
    if not parts or any(isinstance(part, dict | list | bool) or part is None for part in parts):
        raise ValueError(f"--config {path}: {key}={_short(value)} must be text, a number, or a list of them")
    if getattr(parameter, "multiple", False):
        return [str(part) for part in parts]
    # options of several names or numbers take them with commas between
    return ",".join(map(str, parts)) if several else str(value)


def _short(value: Any) -> str:
    """A value in an error message. Aliases in YAML can make a small file hold a value without end."""
    return reprlib.repr(value)


def _plain(parameter: click.Parameter) -> Any:
    """A default as YAML has it; None where there is none."""
    default = parameter.to_info_dict().get("default")
    if isinstance(default, Path):
        return str(default)
    return default if isinstance(default, str | int | float | bool) else None


def _placeholder(parameter: click.Parameter) -> str:
    return parameter.metavar or parameter.type.name.upper()
