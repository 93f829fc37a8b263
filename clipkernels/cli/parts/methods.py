"""The methods that options describe: one of `clipkernels classify`, several of `clipkernels bench`."""

from __future__ import annotations

import click

from clipkernels.adapters import Tower
from clipkernels.cli.parts.heads import is_set
from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.measure.timing import HOST, gmacs_for, plan_for
from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, ToMe


def choose_method(
    context: click.Context,
    method: str | None,
    keep: float | None,
    r: int,
    rate: float,
    blocks: str | None,
    predictor: str | None,
    tokens: str | None,
    adapt: str | None,
) -> Method | None:
    """The method that the options describe; an option that it would not read is an error."""
    method = method or ("tca" if adapt else None)
    readers = {
        **{"keep": ("evit", "patch-ranking"), "blocks": ("evit", "tca"), "r": ("tome",), "rate": ("tca",)},
        **dict.fromkeys(("predictor", "tokens"), ("patch-ranking",)),
    }
    for option, owners in readers.items():
        if is_set(context, option) and method not in owners:
            raise click.UsageError(
                f"expected --method {' or '.join(owners)} with --{option}, got {method or 'no --method'}"
            )
    try:
        named = tuple(int(block) for block in blocks.split(",")) if blocks is not None else None
    except ValueError:
        raise click.UsageError(f"expected --blocks such as 3,6,9, got {blocks!r}") from None
    if method == "patch-ranking":
        learnt, loaded = None if tokens is None else VisualTokens.load(tokens), load_predictor(predictor)
        return PatchRanking(loaded, loaded.about.get("keep", 0.6) if keep is None else keep, tokens=learnt)
    if method == "evit":
        return EViT(0.7 if keep is None else keep, named)
    if method == "tca":
        return TCA(rate, named)
    if method == "tome":
        return ToMe(r)
    return None if method == "none" else Dense()


def parse_methods(methods: str | None, predictor: str | None, tower: Tower) -> dict[str, Method | None]:
    """What runs, by name: dense by the host (None) and by Dense(), then the methods asked for, or the demo's.

    Raises:
        click.UsageError: a method that is none, or a predictor that is missing or not asked for.
        ValueError: one that does not fit the tower.
    """
    parts = [] if methods is None else [part.strip() for part in methods.split(",")]
    if predictor is not None and not any(part.startswith("patch-ranking") for part in parts):
        raise click.UsageError(f"expected --methods patch-ranking:0.6 with --predictor, got {methods or 'none'}")
    if methods is None:
        return choose_methods(tower)
    chosen: dict[str, Method | None] = {HOST: None, "Dense()": Dense()}
    ranking = None
    if any(part.startswith("patch-ranking") for part in parts):
        ranking = load_predictor(predictor)
        ranking.check_tower(tower)
    for part in parts:
        kind, _, number = part.partition(":")
        try:
            if kind == "evit":
                keep = float(number)
                chosen[f"EViT(keep={keep:g})"] = EViT(keep)
            elif kind == "tome":
                r = int(number)
                chosen[f"ToMe(r={r})"] = ToMe(r)
            elif kind == "tca":
                rate = float(number)
                chosen[f"TCA(rate={rate:g})"] = TCA(rate)
            elif kind == "patch-ranking" and ranking is not None:
                keep = float(number)
                chosen[f"PatchRanking(keep={keep:g})"] = PatchRanking(ranking, keep)
            else:
                raise ValueError("no such method")
        except ValueError as error:
            wanted = "expected --methods such as evit:0.7,tome:8,tca:0.1,patch-ranking:0.6"
            raise click.UsageError(f"{wanted}, got {part!r}: {error}") from error
    for method in chosen.values():
        plan_for(tower, method or Dense())
    return chosen


def choose_methods(tower: Tower) -> dict[str, Method | None]:
    """The rows of a table; ToMe's r is the one whose GMACs come closest to those of EViT at keep 0.7."""

    def gmacs(method: Method) -> float:
        return gmacs_for(tower, plan_for(tower, method))

    target = gmacs(EViT(0.7))
    r = min(range(1, tower.num_tokens), key=lambda r: abs(gmacs(ToMe(r)) - target))
    chosen: list[Method] = [Dense(), EViT(0.7), EViT(0.5), ToMe(r)]
    names = ("Dense()", "EViT(keep=0.7)", "EViT(keep=0.5)", f"ToMe(r={r})")
    return {HOST: None, **dict(zip(names, chosen, strict=True))}


def load_predictor(path: str | None) -> RankPredictor:
    """What `clipkernels train-predictor` left in a file.

    Raises:
        click.UsageError: no file.
        ValueError: one of something else.
    """
    if path is None:
        raise click.UsageError("expected --predictor with patch-ranking, got none: see clipkernels train-predictor")
    return RankPredictor.load(path)
