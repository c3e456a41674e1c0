"""Fields that are checked when they are set, and the base of the classes made of them.

An object of these classes never holds a value that cannot be used, and each error names the
field. Which fields there are is config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar, overload

from headgate.checks import Check, Refused, kind_of, short
from headgate.errors import ArgumentError, ConfigError

T = TypeVar("T")


class Field(Generic[T]):
    """One thing that users may set. `secret` keeps its value out of reprs and errors."""

    def __init__(self, default: object, check: Check[T], unit: str = "", *, secret: bool = False) -> None:
        self.name = ""
        self.default = default
        self.check = check
        self.unit = unit
        self.secret = secret

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, options: None, owner: type) -> Field[T]: ...
    @overload
    def __get__(self, options: Options, owner: type) -> T: ...
    def __get__(self, options: Options | None, owner: type) -> Field[T] | T:
        if options is None:
            return self
        value: T = options._values[self.name]
        return value

    def __set__(self, options: Options, value: object) -> None:
        try:
            checked = self.check(value)
        except Refused as refused:
            unit = f" ({self.unit})" if self.unit else ""
            got = f"a {type(value).__name__} that is not shown" if self.secret else short(value)
            where = f"{type(options).__name__}.{self.name}"
            raise ConfigError(f"{where} must be {refused}{unit}, got {got}") from None
        options._values[self.name] = checked
        options._given.add(self.name)

    def show(self, value: object) -> str:
        return "'***'" if self.secret and value is not None else repr(value)


class Options:
    """Named values, each checked when it is set; equal when all values are."""

    _fields: ClassVar[dict[str, Field[Any]]] = {}
    #: Other names under which a field may be set and read.
    _aliases: ClassVar[dict[str, str]] = {}
    _values: dict[str, Any]
    _given: set[str]

    def __init_subclass__(cls) -> None:
        own = {name: field for name, field in vars(cls).items() if isinstance(field, Field)}
        cls._fields = {**cls._fields, **own}

    def __init__(self, /, **values: Any) -> None:
        self._fill(values)

    def _fill(self, values: Mapping[Any, Any]) -> None:
        defaults = {name: field.check(field.default) for name, field in self._fields.items()}
        self.__dict__.update(_values=defaults, _given=set())
        for name, value in values.items():
            canonical = self._canonical(name)
            if canonical in self._given:
                raise ConfigError(f"{type(self).__name__}.{canonical} is given twice, once as an alias of it")
            setattr(self, name, value)

    @classmethod
    def _canonical(cls, name: object) -> str:
        if isinstance(name, str):
            name = cls._aliases.get(name, name)
            if name in cls._fields:
                return name
        raise cls._unknown(name)

    @classmethod
    def _unknown(cls, name: object) -> ConfigError:
        from difflib import get_close_matches  # 3 ms that only an error costs

        close = get_close_matches(str(name), cls._fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(cls._fields)}"
        return ConfigError(f"{cls.__name__} has no field {short(name)}; {hint}")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, self._canonical(name), value)

    def __getattr__(self, name: str) -> Any:  # only what ordinary lookup did not find
        if name in self._aliases:
            return getattr(self, self._aliases[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, or whose value was changed in place, under their canonical names."""
        return {
            name: value
            for name, value in self._values.items()
            if name in self._given or value != self._fields[name].default
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value."""
        return dict(self._values)

    def __repr__(self) -> str:
        shown = (f"{name}={self._fields[name].show(value)}" for name, value in self._values.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(value, other._values[name]) for name, value in self._values.items())

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self), self.given)


def _same(one: object, other: object) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # noqa: BLE001 - arrays have no single truth: those that pickle alike are equal
        return _pickled(one) == _pickled(other)


def _pickled(value: object) -> object:
    import pickle

    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever an object's __reduce__ raises; it is equal to itself only
        return object()


Kind = TypeVar("Kind", bound=Options)


def rebuild(kind: type[Kind], values: Mapping[Any, Any]) -> Kind:
    """Checks again: what comes from a pickle, and what was appended to a list in place."""
    options = kind()
    options._fill(values)
    return options


def convert(kind: type[Kind], argument: str, value: object) -> Kind:
    """An object of its own from None, a dict or such an object; `argument` is its name in errors."""
    if value is None:
        return kind()
    if isinstance(value, kind):
        return rebuild(type(value), value.given)
    if isinstance(value, dict):
        return rebuild(kind, value)
    raise ArgumentError(f"{argument} must be a dict or {kind.__name__}, got {kind_of(value)}")
