"""Names for things that are built in, registered by a program, or offered by an installed package.

A package offers a thing by an entry point in its ``pyproject.toml``::

    [project.entry-points."llmsched_env.policies"]
    my-policy = "my_package:MyPolicy"

and a program by ``register_policy("my-policy", MyPolicy)``, which holds for its own process: worker processes find entry points and
``module:attribute``, but no registration of their parent. The groups are ``llmsched_env.policies``, ``.scenarios``,
``.calibrations``, ``.backends``, ``.rewards`` and ``.routers``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from llmsched_env import checks
from llmsched_env.errors import ConfigError, MissingExtraError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Registry:
    """The things of one kind by name.

    Args:
        kind: what one is called in errors, such as ``policy``.
        group: of the entry points.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._here: dict[str, Any] = {}

    def built_in(self, things: Mapping[str, Any]) -> None:
        """Add what ships with this project."""
        self._here |= things

    def register(self, name: str, thing: Any) -> None:
        """Give a thing a name in this process.

        Raises:
            ConfigError: a name that is taken by another thing, or that is not made of letters, digits, '.', '_' and '-'.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{self.kind}: name {name!r}, must be letters, digits, '.', '_' and '-', a letter or digit first")
        if self._here.get(name, thing) is not thing:
            raise ConfigError(f"{self.kind}: {name!r} is taken, register it under another name")
        self._here[name] = thing

    def names(self) -> list[str]:
        """All names: built in or registered first, then those of installed packages. Nothing is imported."""
        return list(dict.fromkeys([*self._here, *self._offered()]))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._here or name in self._offered())

    def find(self, name: object, also: str = "") -> Any:
        """The thing behind a name or ``module:attribute``. What is built in or registered comes before what a package offers.

        Args:
            also: what else would be allowed, for the error.

        Raises:
            ConfigError: an unknown name (the nearest is given), one that two packages offer, or a package that cannot be imported.
        """
        if isinstance(name, str) and name in self._here:
            return self._here[name]
        if isinstance(name, str) and is_reference(name):
            return load_reference(self.kind, name)
        offers = self._offered().get(name, ()) if isinstance(name, str) else ()
        if not offers:
            known = self.names()
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{self.kind}: {checks.shown(name)} is unknown{hint} (known: {', '.join(known)}{also})")
        if len({point.value for point in offers}) > 1:
            raise ConfigError(f"{self.kind}: {name!r} is offered by {' and by '.join(map(_owner, offers))}; uninstall one of them")
        try:
            return offers[0].load()
        except (ConfigError, MissingExtraError):
            raise
        except (Exception, SystemExit) as error:  # whatever the package does when it is imported
            raise ConfigError(f"{self.kind}: {name!r} of {_owner(offers[0])}: {type(error).__name__}: {error}") from error

    def factory(self, name: str, of: str) -> Callable[..., Any]:
        """The class or factory behind a name or ``module:attribute``.

        Args:
            of: what it is called with, for the error.

        Raises:
            ConfigError: as ``find``, or something that cannot be called.
        """
        found = self.find(name, "; or module:attribute")
        if not callable(found):
            raise ConfigError(f"{self.kind}: {name!r} is {checks.shown(found)}, must be a class or function of {of}")
        return found  # type: ignore[no-any-return]

    def check_options(self, name: str, options: Iterable[str], allowed: Iterable[str]) -> None:
        """Refuse options that the thing behind a name does not take.

        Raises:
            ConfigError: the option, the nearest one and those allowed.
        """
        known = list(allowed)
        for option in options:
            if option not in known:
                hint = did_you_mean(option, known)
                raise ConfigError(f"{self.kind}.{option}: not an option of {name!r}{hint} (options: {', '.join(known) or 'none'})")

    def _offered(self) -> Mapping[str, tuple[EntryPoint, ...]]:
        return _offers(self.group)


def options_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a constructor takes, by name: all its parameters but the first."""
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in parameters if parameter.kind in kinds}


@functools.cache  # reading the metadata of all installed packages takes as long as a reset
def _offers(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _owner(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "a package"
    return f"{package} ({point.value})"


def is_reference(text: str) -> bool:
    """Whether a text has the form ``module:attribute``."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def load_reference(kind: str, text: str) -> Any:
    """What ``module:attribute`` names.

    Raises:
        ConfigError: a module that cannot be imported, or that has no such attribute.
    """
    module, _, attribute = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ConfigError(f"{kind}: {text!r}: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{kind}: {text!r}: no {name!r} there{did_you_mean(name, dir(found))}")
        found = getattr(found, name)
    return found


POLICIES = Registry("policy", "llmsched_env.policies")
SCENARIOS = Registry("scenario", "llmsched_env.scenarios")
CALIBRATIONS = Registry("calibration", "llmsched_env.calibrations")
BACKENDS = Registry("backend", "llmsched_env.backends")
REWARDS = Registry("reward", "llmsched_env.rewards")
ROUTERS = Registry("router", "llmsched_env.routers")


def _callable(kind: str, name: str, factory: Any) -> Any:
    if not callable(factory):
        raise ConfigError(f"{kind}: {name!r} is {checks.shown(factory)}, must be a class or a function")
    return factory


def register_policy(name: str, factory: Callable[..., Any]) -> None:
    """``factory(setting, **options)`` gives a ``llmsched_env.runner.Policy``; mostly its class. Raises as ``Registry.register``."""
    POLICIES.register(name, _callable("policy", name, factory))


def register_scenario(name: str, scenario: Any) -> None:
    """A ``Scenario``, a function without arguments that gives one, or the path of a TOML file. Raises as ``Registry.register``."""
    SCENARIOS.register(name, scenario)


def register_calibration(name: str, calibration: Any) -> None:
    """An ``IterationTimeModel``, a function without arguments that gives one, or the path of a calibration file.

    Raises as ``Registry.register``.
    """
    CALIBRATIONS.register(name, calibration)


def register_backend(name: str, factory: Callable[..., Any]) -> None:
    """``factory(**backend_config)`` gives the ``Backend``; mostly its class. Raises as ``Registry.register``."""
    BACKENDS.register(name, _callable("backend", name, factory))


def register_reward(name: str, factory: Callable[..., Any]) -> None:
    """``factory(**arguments)`` gives a reward, a callable on an outcome or a ``CompiledReward``; or the reward itself.

    Raises as ``Registry.register``.
    """
    REWARDS.register(name, factory)


def register_router(name: str, factory: Callable[..., Any]) -> None:
    """``factory(door, **options)`` gives a ``llmsched_baselines.routers.Router``; mostly its class. Raises as ``Registry.register``."""
    ROUTERS.register(name, _callable("router", name, factory))
