"""Turn the parser's errors into one sentence that names the option, what was wrong, and the nearest right name."""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from jsonargparse._parameter_resolvers import get_signature_parameters

from zoo.base.nearest import nearest

__all__ = ["explain"]


def explain(
    message: str, options: list[str], example: str = "-c bfn/digits (`zoo list` shows all)", verbs: Iterable[str] = ()
) -> str:
    """Explain a parser error.

    Args:
        message: Error of jsonargparse, possibly over many lines.
        options: Names of the options that the parser knows, for suggestions.
        example: Configuration that holds what is required.
        verbs: Verbs of the command line.

    Returns:
        One sentence.
    """
    keys = re.findall(r'Parser key "([\w.+]+)"', message)
    key = ".".join(keys)
    inner = message[message.rfind("Parser key") :]  # what is said of the innermost key
    owners = [_import(path) for path in re.findall(r"class_path '([\w.]+)'", message)]
    owner = owners[-1] if owners else None

    if match := re.search(r"argument subcommand: invalid choice: '(.*?)'", message):
        return f"unknown verb {match[1]}{nearest(match[1], verbs)} (a verb comes first: {', '.join(verbs)})"
    if match := re.search(r"Option '(\S+?)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?", message):
        owner = _import(match[2]) if match[2] else owner
        names = [parameter.name for parameter in get_signature_parameters(owner)] if owner else options
        if owner and "Type typing.Callable" in inner:
            names = names[1:]  # the first argument, such as the parameters to optimise, comes from the program
        where = f" of {owner.__name__}" if owner else ""
        known = f"it has {', '.join(names)}" if owner else "--help lists all"
        return f"unknown option {'.'.join([*keys, match[1]])}{where}{nearest(match[1], names)} ({known})"
    if keys and (match := re.search(r"nrecognized arguments: --([\w.]+)\.help=(\S+)", message)):
        option = f"--{key}.{match[1]}.help {match[2]}"
        return f"{option} needs to know whose it is: name the class before it, such as --{key} NAME {option}"
    if match := re.search(r"nrecognized arguments?: (\S+)|does not accept option '(\S+)'|Key '(\S+)' is not expected", message):
        option = (match[1] or match[2] or match[3]).split("=")[0]
        if match[1] and not option.startswith("-") and ("/" in option or option.endswith((".yaml", ".yml"))):
            return f"{option} stands alone; did you mean -c {option}?"
        return f"unknown option {option}{nearest(option, options)} (--help lists all)"
    numbers = r"Subtypes: \[(.*<class '(?:float|int)'>.*)\]\s[\s\S]*?Given value: (.*?)(?:\. Got |\n|$)"
    if match := re.search(numbers, inner):
        return f"option {key}: expected {_kinds(match[1])}, got {match[2]}"
    if match := re.search(r"Expected a dot import path string: (\S+)|nexpected import path format: (\S+)", message):
        name = match[1] or match[2]
        bases = _bases(owner, keys[-1]) if owner and keys else _classes_in(message)
        found = nearest(name.rpartition(".")[2], (cls.__name__ for base in bases for cls in _descendants(base)))
        return f"unknown class {name} for {key}{found} (give a class name, or an import path such as my_file.{name})"
    if keys and (match := re.search(r"class_path '([\w.]+)':\s+No module named '([\w.]+)'", inner)):
        return f"option {key}: there is no module {match[2]} for {match[1]}, neither here ({match[2]}.py) nor installed"
    if keys and (match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", inner)):
        module = sys.modules.get(match[1])
        file = Path(getattr(module, "__file__", None) or "")
        where = file.name if file.parent == Path.cwd() else match[1]
        classes = [name for name, value in vars(module).items() if isinstance(value, type)] if module else []
        return f"option {key}: {where} has no {match[2]}{nearest(match[2], classes)}"
    if match := re.search(r"following arguments are required: (.*)", message):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name.strip()) for name in match[1].split(",")]
        needed = [".".join([*keys, name.rpartition(".")[2]]) if keys else name for name in names]
        given = " and ".join(f"--{name}" for name in needed)
        return f"{given} must be given, or a configuration that holds them: {example}"
    expected = r"Expected a (<class '[\w.]+'>|typing\.Literal\[.*?\])\. Got value: (.*?)(?:\. Got |\n|$)"
    if keys and (match := re.search(expected, inner)):
        return f"option {key}: expected {_kinds(match[1])}, got {match[2].strip()}"
    choices = r"Subtypes: \[(typing\.Literal\[.*)\]\s+Errors[\s\S]*?Given value: (.*?)(?:\n|$)"
    if keys and (match := re.search(choices, inner)):
        return f"option {key}: expected {_kinds(match[1])}, got {match[2]}"
    if len(keys) == 1 and (match := re.search(r"Subtypes: \[(.*)\]\s", message)):
        value = re.search(r"Given value: (.*)", message)
        return f"option {key}: expected {_kinds(match[1])}, got {value[1] if value else 'something else'}"
    return " ".join(message.split())


def _kinds(subtypes: str) -> str:
    """Types and choices, as the parser prints them, in words."""
    kinds: list[str] = []
    each = r"(?:^|, )((?:typing\.)?Literal\[(.*?)\]|<class '([\w.]+)'>|[^,\[]+(?:\[.*?\]+)?)"
    for kind, choices, name in re.findall(each, subtypes):
        kinds += [choice.strip("' ") for choice in choices.split(",")] if choices else [_plain_type(name or kind)]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind != "Tensor"]  # of optimizers; not to be typed
    return f"one of {', '.join(kinds)}" if "Literal[" in subtypes else " or ".join(kinds)


def _plain_type(name: str) -> str:
    return {"NoneType": "null", "float": "a number"}.get(name, re.sub(r"[\w.]+\.", "", name))


def _import(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _classes_in(message: str) -> list[type]:
    return [cls for path in re.findall(r"(?:<class '|\[)([\w.]+\.\w+)", message) if (cls := _import(path))]


def _bases(owner: type, key: str) -> list[type]:
    """Classes that an argument accepts, looking into unions and into what callables return."""
    kinds = [p.annotation for p in get_signature_parameters(owner) if p.name == key]
    bases = []
    while kinds:
        kind = kinds.pop()
        if inspect.isclass(kind) and not typing.get_args(kind):
            bases.append(kind)
        elif typing.get_origin(kind) is Callable:
            kinds.append(typing.get_args(kind)[-1])
        else:
            kinds.extend(typing.get_args(kind))
    return [base for base in bases if base is not type(None)]


def _descendants(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [cls, *(found for child in children for found in _descendants(child))]
