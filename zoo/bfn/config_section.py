"""One section of a foreign configuration, read so that nothing in it is dropped without a word."""

import difflib
from collections.abc import Mapping
from typing import Any

__all__ = ["ConfigSection"]

_REQUIRED = object()


class ConfigSection:
    """Options that are taken out one by one; `close` refuses what nobody asked for.

    Args:
        name: where the section stands in the file, such as ``model.net.parameters``.
        options: the section, parsed; None for an empty one.
        not_applicable: collects options that have no counterpart here: their dotted name and the reason.

    Raises:
        ValueError: it is no section.
    """

    def __init__(self, name: str, options: Any, not_applicable: dict[str, str]) -> None:
        if not isinstance(options, Mapping | None):
            raise ValueError(f"{name}={options!r} must be a section with options of its own.")
        self.name = name
        self.not_applicable = not_applicable
        self._options = dict(options or {})
        self._asked: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._options

    def where(self, key: str) -> str:
        """Dotted name of an option."""
        return f"{self.name}.{key}" if self.name else key

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """An option as it stands.

        Raises:
            ValueError: it is missing and has no default.
        """
        self._asked.append(key)
        if key in self._options:
            return self._options.pop(key)
        if default is _REQUIRED:
            raise ValueError(f"{self.where(key)} is missing in the configuration.")
        return default

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A number, also one like ``1e-6``, which YAML 1.1 takes for text.

        Raises:
            ValueError: it is none.
        """
        value = self.take(key, default)
        try:
            return float(value) if not isinstance(value, bool) else float("no number")
        except (TypeError, ValueError):
            raise ValueError(f"{self.where(key)}={value!r} must be a number.") from None

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number.

        Raises:
            ValueError: it is none.
        """
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{self.where(key)}={value!r} must be a whole number.")
        return int(value)

    def integers(self, key: str, default: Any = _REQUIRED) -> list[int]:
        """A list of whole numbers.

        Raises:
            ValueError: it is none.
        """
        values = self.take(key, default)
        if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
            raise ValueError(f"{self.where(key)}={values!r} must be a list of whole numbers.")
        return list(values)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false.

        Raises:
            ValueError: it is neither.
        """
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where(key)}={value!r} must be true or false.")
        return value

    def section(self, key: str) -> "ConfigSection":
        """A section within, empty if it is missing."""
        return ConfigSection(self.where(key), self.take(key, None), self.not_applicable)

    def require(self, key: str, value: Any, reason: str, default: Any = _REQUIRED) -> None:
        """Take an option that has one possible value here.

        Args:
            key: of the option.
            value: the only value.
            reason: why.
            default: the published code's; the same as ``value`` if not given.

        Raises:
            ValueError: it has another value.
        """
        given = self.take(key, value if default is _REQUIRED else default)
        if str(given) != str(value) and not _same_number(given, value):
            raise ValueError(f"{self.where(key)}={given!r} cannot be used here, only {value!r}: {reason}.")

    def leave(self, reason: str, *keys: str) -> None:
        """Note options as not applicable, all that are left if none is named."""
        for key in keys or tuple(self._options):
            if key in self._options:
                self.not_applicable[self.where(key)] = reason
            self.take(key, None)

    def close(self) -> None:
        """Refuse what is left.

        Raises:
            ValueError: an unknown option, with the nearest known one.
        """
        for key in self._options:
            near = difflib.get_close_matches(str(key), self._asked, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{self.where(key)} is no option of the published code.{hint}")


def _same_number(given: Any, value: Any) -> bool:
    try:
        return not isinstance(given, bool) and not isinstance(value, bool) and float(given) == float(value)
    except (TypeError, ValueError):
        return False
