"""The methods that `--method` and `--methods` describe, and their names in tables.

A specification is NAME[:VALUE][:KEY=VALUE]…, with `/` between the items of a list: `evit:0.7`, `evit:0.7:blocks=3/6/9`,
`tome:8:inflect=-1`, `tome:8/8/4`, `tca:0.1`, `patch-ranking:0.6`, `dense`, and `none` for the host library's own
forward; or a path that ends in .json, the file of a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click
from torch import nn

from clipkernels.adapters import Tower, UnsupportedTower, find_exported
from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.measure.timing import HOST, gmacs_for, plan_for
from clipkernels.messages import reason_of
from clipkernels.method_names import short_name
from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, Schedule, ToMe
from clipkernels.patching import method_of, tower_of, unpatch

RANKING = "patch-ranking"
DEFAULT_KEEP = 0.6  # of patch-ranking, for a predictor that does not say which share it was trained for


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected an int, got {text!r}") from None


def _integers(text: str) -> tuple[int, ...]:
    """Return integers that slashes separate."""
    try:
        return tuple(int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"expected ints separated by /, got {text!r}") from None


def _integer_or_list(text: str) -> int | tuple[int, ...]:
    """Return one integer, or a tuple of several that slashes separate."""
    return _integers(text) if "/" in text else _integer(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text == "true"


class Grammar(NamedTuple):
    """The spelling of a method.

    example: a specification, for messages.
    method: its class; None is the host's own forward.
    parameter, default, parse: the parameter that the plain value sets, its default and its parser.
    keys: the parsers of the parameters that keys set.
    """

    example: str
    method: Callable[..., Method] | None
    parameter: str = ""
    default: float | None = None
    parse: Callable[[str], Any] = str
    keys: Mapping[str, Callable[[str], Any]] = {}


EVIT_KEYS: Mapping[str, Callable[[str], Any]] = {
    "blocks": _integers,
    "fuse": _flag,
    "score": str,
    "seed": _integer,
    "multiple": _integer,
}
TCA_KEYS: Mapping[str, Callable[[str], Any]] = {
    "blocks": _integers,
    "centers": _integer,
    "score": str,
    "seed": _integer,
    "multiple": _integer,
}
TOME_KEYS: Mapping[str, Callable[[str], Any]] = {"inflect": _number, "proportional": _flag}
GRAMMARS = {
    "evit": Grammar("evit:0.7:blocks=3/6/9", EViT, "keep", 0.7, _number, EVIT_KEYS),
    "tome": Grammar("tome:8:inflect=-1", ToMe, "r", 8, _integer_or_list, TOME_KEYS),
    "tca": Grammar("tca:0.1:blocks=1/2", TCA, "rate", 0.035, _number, TCA_KEYS),
    RANKING: Grammar("patch-ranking:0.6", PatchRanking, "keep", None, _number, {"multiple": _integer}),
    "dense": Grammar("dense", Dense),
    "none": Grammar("none", None),
}
EXAMPLES = "tome:8, evit:0.7, tca:0.1, patch-ranking:0.6, schedule.json, dense or none"
METHOD_HELP = (
    f"{EXAMPLES}, which is the host library's own forward. The number may be left out. Arguments follow as "
    "evit:0.7:blocks=3/6/9 or tome:8:inflect=-1; tome:8/8/4 is one r per block. A path that ends in .json is a file of "
    "ck.Schedule.save."
)
SUFFIX = ".json"


class Spec(NamedTuple):
    """A specification as text, and in parts."""

    text: str
    name: str
    arguments: dict[str, Any]


def read_methods(specs: Sequence[str], predictor: str | None, tokens: str | None) -> list[Method | None]:
    """Return the methods that specifications describe, in order; None is the host library's own forward.

    Args:
        specs: specifications, as the module describes them.
        predictor: the file of the RankPredictor for patch-ranking.
        tokens: the file of its VisualTokens, or None for none.
    Raises:
        click.UsageError: a specification that describes no method, patch-ranking without a predictor, or a predictor or
            tokens without patch-ranking; or the file of a schedule that cannot be read.
        ValueError: a file that holds neither a predictor nor tokens, or no schedule.
    """
    parsed = [_load_schedule(text) if text.endswith(SUFFIX) else _parse(text) for text in specs]
    ranks = any(isinstance(spec, Spec) and spec.name == RANKING for spec in parsed)
    for option, path in (("predictor", predictor), ("tokens", tokens)):
        if path is not None and not ranks:
            actual = ", ".join(specs) or "no --method"
            raise click.UsageError(f"expected --method {RANKING} with --{option}, got {actual}")
    if ranks and predictor is None:
        raise click.UsageError(f"expected --predictor with {RANKING}, got none: see clipkernels train-predictor")
    trained = RankPredictor.load(predictor) if predictor is not None else None
    learnt = VisualTokens.load(tokens) if tokens is not None else None
    return [_build(spec, trained, learnt) if isinstance(spec, Spec) else spec for spec in parsed]


def settle(model: nn.Module, spec: str | None, method: Method | None) -> Method | None:
    """Return the method that a verb runs: the specified one, else the one that a saved model came with, else `method`.

    The model is unpatched if the host's own forward is specified. A tower that is not supported runs that, unless a
    method is specified for it.

    Raises:
        click.UsageError: a method is specified for an exported model.
    """
    exported = find_exported(model)
    if exported is not None and spec is not None:
        runs = exported.method or "the host's own forward"
        raise click.UsageError(f"expected no --method with an exported model, which runs {runs}, got {spec}")
    try:
        own = method_of(model)
    except UnsupportedTower:
        return method if spec is not None else None
    if spec is None and own is not None:
        return own
    if method is None:
        unpatch(model)
    return method


def is_supported(model: nn.Module) -> bool:
    """Return true if the model's tower can be patched."""
    try:
        tower_of(model)
    except UnsupportedTower:
        return False
    return True


def methods_for(
    tower: Tower,
    specs: Sequence[str],
    predictor: str | None,
    tokens: str | None,
    own: Method | None = None,
) -> dict[str, Method | None]:
    """Return the methods of a table by name: the host's forward (None), Dense(), then those that are specified.

    Args:
        tower: the tower that they run on.
        specs, predictor, tokens: as in `read_methods`; without any specification the methods are `default_methods`.
        own: the method that a saved model came with, which takes the place of the default ones; None for none.
    Raises:
        click.UsageError: as in `read_methods`, or a method that does not fit the tower.
        ValueError: as in `read_methods`, or a predictor or tokens of another tower.
    """
    chosen = read_methods(specs, predictor, tokens)
    if not specs:
        return default_methods(tower) if own is None else {name_of(method): method for method in (None, Dense(), own)}
    for text, method in zip(specs, chosen, strict=True):
        if isinstance(method, PatchRanking):
            method.check_tower(tower)
        try:
            plan_for(tower, method or Dense())
        except ValueError as error:
            raise click.UsageError(_expected(text, str(error))) from error
    return {name_of(method): method for method in (None, Dense(), *chosen)}


def default_methods(tower: Tower) -> dict[str, Method | None]:
    """Return the methods of a table by name; ToMe's r is the one whose GMACs come closest to those of EViT(0.7).

    Below the dense ones, the one that loses least on photographs with the bundled model comes first.
    """

    def gmacs(method: Method) -> float:
        return gmacs_for(tower, plan_for(tower, method))

    target = gmacs(EViT(0.7))
    r = min(range(1, tower.num_tokens), key=lambda r: abs(gmacs(ToMe(r)) - target))
    return {name_of(method): method for method in (None, Dense(), ToMe(r), EViT(0.7), EViT(0.5))}


def name_of(method: Method | None) -> str:
    """Return a method's name in tables: its short name, or HOST for None."""
    return HOST if method is None else short_name(method)


def _expected(text: str, reason: str) -> str:
    """Return the message for a specification that describes no method, or none that fits."""
    if text.endswith(SUFFIX):
        return f"expected a schedule for this tower, got {text}: {reason}"
    grammar = GRAMMARS.get(text.partition(":")[0])
    examples = grammar.example if grammar else EXAMPLES
    return f"expected a method such as {examples}, got {text!r}: {reason}"


def _load_schedule(path: str) -> Schedule:
    """Return the schedule of a file; click.UsageError for one that is not there or cannot be read."""
    try:
        return Schedule.load(path)
    except OSError as error:
        raise click.UsageError(f"expected a file of ck.Schedule.save, got {path}: {reason_of(error)}") from error


def _parse(text: str) -> Spec:
    """Return a specification in parts; click.UsageError for an unknown name or key, or a value that does not parse."""
    name, *parts = text.split(":")
    if name not in GRAMMARS:
        raise click.UsageError(_expected(text, "no such method"))
    grammar = GRAMMARS[name]
    arguments: dict[str, Any] = {}
    try:
        for place, part in enumerate(parts):
            key, equals, value = part.partition("=")
            if not equals and place == 0 and grammar.parameter:
                key, value, parse = grammar.parameter, part, grammar.parse
            elif equals and key in grammar.keys:
                parse = grammar.keys[key]
            else:
                known = f"the keys are {', '.join(grammar.keys)}" if grammar.keys else f"{name} has no arguments"
                raise ValueError(f"{known}, got {part!r}")
            if key in arguments:
                raise ValueError(f"{key} is there twice")
            try:
                arguments[key] = parse(value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    except ValueError as error:
        raise click.UsageError(_expected(text, str(error))) from error
    return Spec(text, name, arguments)


def _build(spec: Spec, predictor: RankPredictor | None, tokens: VisualTokens | None) -> Method | None:
    """Return the method of a specification; click.UsageError for an argument that the method refuses."""
    grammar = GRAMMARS[spec.name]
    arguments = dict(spec.arguments)
    if predictor is not None and spec.name == RANKING:
        arguments["predictor"], arguments["tokens"] = predictor, tokens
        arguments.setdefault("keep", predictor.about.get("keep", DEFAULT_KEEP))
    elif grammar.parameter:
        arguments.setdefault(grammar.parameter, grammar.default)
    try:
        return grammar.method(**arguments) if grammar.method else None
    except ValueError as error:
        raise click.UsageError(_expected(spec.text, str(error))) from error
