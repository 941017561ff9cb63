"""Turns the parser's errors into one sentence that names the option, what was wrong, and the nearest right name."""

import difflib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable

from jsonargparse._parameter_resolvers import get_signature_parameters

__all__ = ["explain", "nearest"]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``"; did you mean X or Y?"``, or nothing if no candidate is near."""
    near = difflib.get_close_matches(name.lstrip("-"), sorted(set(candidates)), n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def explain(message: str, options: list[str]) -> str:
    """Explain a parser error.

    Args:
        message: the error of jsonargparse, possibly over many lines.
        options: names of the options that the parser knows, for suggestions.

    Returns:
        One sentence.
    """
    keys = re.findall(r'Parser key "([\w.+]+)"', message)
    owners = [_import(path) for path in re.findall(r"class_path '([\w.]+)'", message)]
    owner = owners[-1] if owners else None

    if match := re.search(r"Option '(\S+?)' is not accepted", message):
        names = [parameter.name for parameter in get_signature_parameters(owner)] if owner else options
        where = f" of {owner.__name__}" if owner else ""
        return f"unknown option {'.'.join([*keys, match[1]])}{where}{nearest(match[1], names)} (--help lists all)"
    if match := re.search(r"nrecognized arguments?: (\S+)|does not accept option '(\S+)'|Key '(\S+)' is not expected", message):
        option = (match[1] or match[2] or match[3]).split("=")[0]
        return f"unknown option {option}{nearest(option, options)} (--help lists all)"
    if match := re.search(r"Expected a dot import path string: (\S+)|nexpected import path format: (\S+)", message):
        name = match[1] or match[2]
        bases = _bases(owner, keys[-1]) if owner and keys else _classes_in(message)
        found = nearest(name.rpartition(".")[2], (cls.__name__ for base in bases for cls in _descendants(base)))
        return f"unknown class {name} for {'.'.join(keys)}{found} (give a class name, or an import path such as my_file.{name})"
    if match := re.search(r"following arguments are required: (.*)", message):
        needed = " and ".join(f"--{key.strip().rpartition('.')[2]}" for key in match[1].split(","))
        return f"{needed} must be given, or a configuration that holds them: -c bfn/digits (`zoo list` shows all)"
    if keys and (match := re.search(r"Expected a <class '([\w.]+)'>\. Got value: (.*)", message)):
        return f"option {'.'.join(keys)}: expected {_plain_type(match[1])}, got {match[2].strip()}"
    if len(keys) == 1 and (match := re.search(r"Subtypes: \[(.*)\]\s", message)):
        kinds = " or ".join(_plain_type(kind) for kind in re.findall(r"(?:<class ')?([\w.\[\]]+)(?:'>)?(?:,|$)", match[1]))
        value = re.search(r"Given value: (.*)", message)
        return f"option {keys[0]}: expected {kinds}, got {value[1] if value else 'something else'}"
    return " ".join(message.split())


def _plain_type(name: str) -> str:
    return {"NoneType": "null"}.get(name, name.rpartition(".")[2] or name)


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
