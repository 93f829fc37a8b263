"""Short names of methods, for tables and pictures."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from clipkernels.methods import Method, PatchRanking, Schedule


def short_name(method: Method) -> str:
    """A method's class, its main argument, and others that differ from their default.

    `EViT(keep=0.7)`, `ToMe(r=8, inflect=-1)`, `PatchRanking(keep=0.6)`, `Schedule(197→41, 3f2a91)`; the repr of a
    method that is not a dataclass.
    """
    if isinstance(method, Schedule):
        return str(method)
    if not is_dataclass(method):
        return repr(method)
    arguments = []
    ranks = isinstance(method, PatchRanking)
    # A predictor has no short form, and its block is the method's.
    hidden = ("predictor", "block") if ranks else ()
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name in hidden or (value == field.default and arguments):
            continue
        if ranks and field.name == "tokens":
            value = value.count
        arguments.append(f"{field.name}={_short(value)}")
    return f"{type(method).__name__}({', '.join(arguments)})"


def _short(value: object) -> str:
    """A value as Python writes it, a whole float without its .0."""
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else repr(value)
