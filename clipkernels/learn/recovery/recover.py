"""`ck.learn.recover`: distil a reduced tower to its own dense embeddings, on images without labels.

    1. dense embeddings of all images, with the weights that the tower came with
    2. training of the reduced tower on the cosine to them, evaluated on images that are held out
    3. the best weights, in place

An index of dense embeddings and the text tower stay valid, because the dense embeddings are the target.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.arguments import check_int, check_path, check_range
from clipkernels.classifier import eval_mode
from clipkernels.encode import check_images_list
from clipkernels.fingerprint import digest_of, fingerprint, fingerprinted_module
from clipkernels.learn.adamw import flatten, generator_of, write
from clipkernels.learn.checkpoints import check_training
from clipkernels.learn.recovery.batches import Images, is_present
from clipkernels.learn.recovery.results import Closeness, Progress, Recovered, best_of
from clipkernels.learn.recovery.state import Settings, State
from clipkernels.learn.recovery.targets import Targets, dense_targets
from clipkernels.learn.recovery.training import Run, Trained, evaluate, train
from clipkernels.learn.recovery.weights import Adapters, image_weights, original_flags
from clipkernels.messages import quantity
from clipkernels.methods import Dense, Method
from clipkernels.patching import check_method, method_of, patch, patched
from clipkernels.plan import Plan
from clipkernels.tower import make_plan


@torch.enable_grad()
def recover(
    model: nn.Module,
    images: Tensor | Sequence[Tensor | None],
    *,
    method: Method | None = None,
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 2e-4,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    contrast: float = 0.005,
    held_out: float | int = 0.05,
    patience: int = 2,
    lora: int | None = None,
    seed: int = 0,
    workers: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], bool | None] | None = None,
) -> Recovered:
    """Train a reduced tower, in place, to give the embeddings that it gives dense, on images without labels.

    The targets are the dense embeddings with the weights that the tower comes with, computed once. The loss is one
    minus the cosine to them and, in part, the cross-entropy of finding the own one in the batch. The optimizer is
    AdamW; its learning rate rises linearly and then falls along half a cosine to 0, and gradients are clipped to a norm
    of 1. The images that are held out are evaluated before the first step and after each epoch. The model keeps the
    weights of the largest mean cosine there, which may be the first.

    All weights that the embedding of an image depends on are trained, whatever their `requires_grad`; the text tower,
    the scale of the logits and a method's modules (predictor, learnt tokens) are left as they are, bit for bit. The
    tower runs in eval mode, so dropout is off and running statistics stay. A predictor or learnt tokens that name their
    tower by a fingerprint are replaced by copies that name the recovered one.

    Args:
        model: a model that `ck.patch` takes, with an image tower in float32.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S), of which an item is read when it is needed, in every
            epoch; a None in it is skipped. Loader processes pickle it or inherit it.
        method: the method to recover; None is the one that the model is patched with.
        epochs: passes over the images.
        batch_size: images per step and per forward.
        lr: largest learning rate. The default suits a small tower; large ones need less, and adapters more.
        warmup: share of the steps, in [0, 1], in which the learning rate rises.
        weight_decay: weight decay of matrices, 0 or more.
        contrast: weight, 0 or more, of the cross-entropy of an embedding's own dense one among those of the batch, at a
            temperature of 0.01; 0 trains on the cosine alone, which then comes out a little larger, and recall smaller.
        held_out: images that are not trained on: a share in (0, 1), or a number as an int.
        patience: epochs without a better evaluation after which the training ends.
        lora: rank of LoRA adapters on the plain linear layers of the blocks, which are trained instead of all weights
            and merged at the end; None for none. It needs peft.
        seed: seed of the images held out, of the order of the others and of the adapters.
        workers: processes that read images; 0 reads in this process.
        state: folder of checkpoints, with which the same call goes on after it was stopped or killed; it stays when
            the run is done. Four times the trained weights, and the targets.
        progress: called after each batch with a `Progress`; a true result stops the run after the batch.
    Returns:
        Recovered. The model is patched with the method, with the best weights, and otherwise in the mode and with the
        `requires_grad` that it had. If `progress` stopped the run, then with `state` the model is as it was; without
        `state` it has the best weights so far, or is as it was if no epoch has brought better ones.
    Raises:
        ValueError: a method that reduces nothing, or none; numbers out of range; images of another size, fewer than
            two, or others than those that the run in `state` began with; a state of another run; weights in another
            precision than float32 or float64; or a loss that is not finite.
        UnsupportedTower, TypeError: as in `ck.patch`.
        ImportError: lora without peft.
        RuntimeError: in inference mode.
        OSError: the state cannot be read or written.
        On any error the model is as it was.
    Guarantees: the same arguments give the same bits, also if the run was killed and has gone on, on the same CPU with
        the same versions and number of threads. On a GPU sums of gradients may have any order. No generator of the
        caller is moved.
    """
    check_training("recover", epochs, batch_size, seed, progress, lr=lr)
    check_range("warmup", warmup, 0, 1)
    for name, weight in (("weight_decay", weight_decay), ("contrast", contrast)):
        check_range(name, weight, 0, math.inf, "[)")
    check_int("patience", patience, 1)
    check_int("workers", workers, 0)
    if lora is not None:
        check_int("lora", lora, 1)
    if state is not None:
        check_path(state=state)
    check_images_list(images)
    if isinstance(held_out, int):
        check_int("held_out", held_out, 1)
    else:
        check_range("held_out", held_out, 0, 1, "()")
    tower = adapters.find_tower(model)
    chosen = method_of(model) if method is None else method
    plan = _reducing_plan(chosen, tower)
    assert chosen is not None
    settings = Settings(
        tower=fingerprint(model), method=_name_of(chosen), plan=repr(plan), images=len(images),
        epochs=epochs, batch_size=batch_size, lr=float(lr), warmup=float(warmup), weight_decay=float(weight_decay),
        contrast=float(contrast), held_out=held_out, patience=patience, lora=lora, seed=seed,
    )  # fmt: skip
    pictures = Images(images, tower.image_size)
    report = _reporter(progress)
    with (
        State(None if state is None else Path(os.path.abspath(state)), settings) as store,
        eval_mode(model),
        original_flags(model),
        torch.autocast(tower.like.device.type, enabled=False),
    ):
        model.requires_grad_(False)  # so that the host's attention rounds alike, whatever the flags were
        with patched(model, Dense()):
            targets = dense_targets(_encoder(model), pictures, batch_size, workers, store, report)
        if targets is None:
            return Recovered(None, None, 0, 0, (), 0, 0, (), True)
        train_on, others = split(targets, held_out, seed)
        run = Run(settings, _encoder(model), (), pictures, targets, train_on, others, workers, store, report)
        trained, after = _train_in_place(model, run, chosen, method is not None)
    history = tuple(trained.history)
    skipped = (~is_present(targets.digests)).nonzero()[:, 0].tolist()
    return Recovered(
        history[0].closeness if history else None, None if trained.stopped else after, trained.step,
        best_of(history).step if history else 0, history, len(train_on), len(others), tuple(skipped), trained.stopped,
    )  # fmt: skip


def split(targets: Targets, held_out: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of the images to train on, and of those that are held out, both ascending; None counts as neither.

    Raises:
        ValueError: fewer than two images, or no image left to train on.
    """
    present = targets.present
    if len(present) < 2:
        raise ValueError(f"images must hold at least two images, one of them held out, got {len(present)}")
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * len(present)))
    if count >= len(present):
        raise ValueError(
            f"held_out must leave an image to train on, got {held_out!r} of {quantity(len(present), 'image')}"
        )
    order = torch.randperm(len(present), generator=generator_of(seed, "held out"))
    return present[order[count:].sort().values], present[order[:count].sort().values]


def _train_in_place(model: nn.Module, run: Run, method: Method, changes: bool) -> tuple[Trained, Closeness | None]:
    """Train a model, and return the training, and the closeness of the model's weights if they are kept.

    If `changes`, the model is patched with the method at the end. On any error the model is as it was.
    """
    weights: list[nn.Parameter] = []
    original = torch.empty(0)
    try:
        with patched(model, method):
            weights = image_weights(model)
            original = flatten(weights)
            trained, closeness = _train_weights(model, run, weights)
        if closeness is None:
            write(original, weights)
            return trained, None
        named = _renamed(method, adapters.find_tower(model))
        if changes or named is not method:
            patch(model, named)
        return trained, closeness
    except BaseException:
        write(original, weights)
        raise


def _train_weights(model: nn.Module, run: Run, weights: list[nn.Parameter]) -> tuple[Trained, Closeness | None]:
    """Train the weights of a patched model, or adapters, and write the best ones to it if they are to be kept."""
    lora = None
    if run.settings.lora is not None:
        for weight in weights:
            weight.requires_grad_(False)
        lora = Adapters(adapters.find_tower(model), run.settings.lora, run.settings.seed)
    try:
        run = run._replace(encode=_encoder(model), weights=weights if lora is None else lora.weights)
        trained = train(run)
        best = best_of(trained.history) if trained.history else None
        if best is None or (trained.stopped and (run.state.folder is not None or not best.step)):
            return trained, None
        write(run.state.best(best.step), run.weights)
        if lora is None:
            return trained, best.closeness
        lora.merge()
        # Measured again, because merged weights round differently.
        return trained, evaluate(run._replace(progress=lambda progress: False))
    finally:
        if lora is not None:
            lora.remove()


def _reducing_plan(method: Any, tower: Tower) -> Plan:
    """The plan of a method for a tower; raise ValueError for None, and for one that reduces nothing."""
    if method is None:
        raise ValueError(
            "expected a method to recover, got None and a model that is not patched: pass method=ck.EViT(0.7), or "
            "ck.patch the model first"
        )
    check_method(method)
    plan = make_plan(method, tower, tower.num_tokens)
    if not any(plan.steps) and not plan.learnt:
        raise ValueError(f"expected a method that reduces tokens, got {method!r}, which leaves nothing to recover")
    return plan


def _encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function to the L2-normalised embeddings of images by the present tower of a model."""
    tower = adapters.find_tower(model)
    return lambda images: normalize(tower.encode(images.to(tower.like)), dim=1)


def _reporter(progress: Callable[[Progress], bool | None] | None) -> Callable[[Progress], bool]:
    return lambda state: progress is not None and bool(progress(state))


def _name_of(method: Method) -> str:
    """A method's representation without addresses, and the digests of its modules."""
    text = repr(method)
    modules: dict[str, nn.Module] = method.weights() if hasattr(method, "weights") else {}
    digests = (f"{name} {digest_of(module)}" for name, module in modules.items())
    return ", ".join([type(method).__name__ if " at 0x" in text else text, *digests])


def _renamed(method: Any, tower: Tower) -> Any:
    """The method with copies of those modules that name their tower by its fingerprint, which name this tower.

    It is the method itself if there are none.
    """
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        return method
    copies: dict[str, nn.Module] = {}
    for field in dataclasses.fields(method):
        module = getattr(method, field.name)
        about = getattr(module, "about", None)
        if isinstance(module, nn.Module) and isinstance(about, dict) and "tower" in about:
            renamed: Any = copy.deepcopy(module)
            renamed.about = {**about, "tower": fingerprint(fingerprinted_module(tower))}
            copies[field.name] = renamed
    return dataclasses.replace(method, **copies) if copies else method
