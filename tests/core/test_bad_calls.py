"""Arguments of a wrong type: every public class and function raises one line that names the argument."""

import inspect
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels import support
from clipkernels.data import digits, scenes
from clipkernels.data.tokenizer import ByteTokenizer
from clipkernels.learn import distill, patch_ranking, recovery
from clipkernels.learn.calip_fs import FewShotCALIP
from clipkernels.learn.tip_f import TipAdapterF
from clipkernels.messages import quantity
from tests.bad_values import BAD

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, CLASSES, PROMPTS = 8, 3, {"cat": ["a cat."], "dog": ["a dog."], "ship": ["a ship."]}
# The arguments that take a bad value, of any callable or of one.
NUMBERS = {
    "alpha",
    "beta",
    "beta2",
    "beta3",
    "gamma",
    "strength",
    "negative_strength",
    "negative_beta",
    "bias",
    "scale",
    "margin",
    "weight_decay",
    "contrast",
}
FLAGS = {"all_steps", "pad", "shared", "exif", "copy",
         "fuse", "proportional", "self_vote", "frozen", "exact", "cls_path", "source", "regions", "words", "coupled",
         "held_out", "encode_image.tokens", "raw", "by_content", "prune", "retry", "compiled",
         "freeze", "dynamic"}  # fmt: skip
PATHS = {
    "out",
    "sources",
    "search.text",
    "search.image",
    "folder",
    "cache",
    "collection",
    "cupl.source",
    "retrieve.name",
    "retrieve.pretrained",
    "recover.state",
    "tune.state",
    "tune.cost",
    "export.config",  # a name
}
CALLABLE = {"progress", "tokenizer", "join", "head", "report", "note", "preprocess", "source"}
TAKEN = {
    "None": {
        "cache", "limit", "minimum", "name", "pretrained",
        "about", "anchors", "answers", "beta2", "beta3", "bias", "block", "blocks", "capacity", "device", "method",
        "prior", "progress", "seed", "signal", "temperature", "texts", "text_mask", "text_pooled", "visual_mask",
        "visual_pooled", "weight", "Reservoir.strength", "Reservoir.beta", "PatchRanking.tokens",
        "TDA.strength", "TDA.beta", "TDA.from_views.keep",
        "TargetedDistillation.text", "TargetedDistillation.visual", "TargetedDistillation.__call__.text",
        "TargetedDistillation.__call__.visual", "Teacher.__call__.images", "TeacherCache.__call__.images",
        "TeacherFeatures.align.words", "TeacherFeatures.align.regions", "RankPredictor.__call__.prefix",
        "ByteTokenizer.__call__.context_length", "embed.text", "embed.tokenizer", "image_column", "id_column", "dtype",
        "devices", "search.model", "search.preprocess", "search.tokenizer", "image",
        "save.config", "save.tokenizer", "save.preprocess", "fidelity",
        "export.tokenizer", "export.preprocess", "export.config", "export.layout", "calibrate", "check", "min_cosine",
        "show.worst", "show.names", "MultiView.weights", "MultiView.views", "depth_maps.grid", "depth_maps.distance",
        "compile.freeze", "compile.mode", "compile.batch_sizes",
        "lora", "recover.state", "tune.labels", "tune.classes", "tune.captions", "tune.caption_ids", "tune.cost",
        "tune.state",
    },
    "True": FLAGS | {"merge_rest"},
    "1.5": NUMBERS | {"lr", "tau", "temperature", "mlp_ratio", "eps", "distance"},
    "-1": {"TipAdapter.alpha", "TipAdapterF.alpha", "TipX.alpha", "beta", "beta2", "beta3", "gamma", "bias", "scale",
           "Reservoir.strength", "TDA.strength", "negative_strength", "negative_beta", "inflect", "minimum",
           "Select.layer"},
    "infinity": {"TargetedDistillation.temperature"},
    "a list": {"grid", "entropy_range"},
    "a tuple": {"fit_tokens.images", "golden_ranking.images"},  # three images and two labels
    "a dict": {"about", "classes", "texts", "answers", "fidelity", "export.config"},  # iterables of strings
    "a str": {"ByteTokenizer.__call__.texts"} | PATHS,
    "a long str": {"ByteTokenizer.__call__.texts"} | PATHS,
    "a module": CALLABLE | {"ungraphed.model", "uncompile.model"},
    "a type": CALLABLE - {"head"},
}  # fmt: skip


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@cache
def model() -> Any:
    return ck.bundled()[0]


def tokenizer() -> Any:
    return ck.bundled()[2]


@cache
def teacher() -> Any:
    return distill.Teacher(model(), tokenizer())


def images() -> torch.Tensor:
    return normal(2, 3, 32, 32)


def encoded() -> ck.Encoded:
    return ck.Encoded(normal(3, WIDTH), normal(3, 5, WIDTH), normal(3, 4, 6))


def text() -> torch.Tensor:
    return normal(CLASSES, WIDTH)


def labels(n: int = 3) -> torch.Tensor:
    return torch.arange(n)


def tip() -> dict[str, Any]:
    return {"text": text(), "features": normal(3, WIDTH), "labels": labels(), "alpha": 1.0, "beta": 1.0, "scale": 9.0}


def rankings() -> patch_ranking.Rankings:
    ranks = torch.stack([torch.randperm(16) for _ in range(4)])
    return patch_ranking.Rankings(ranks, normal(4, 17, 64), {"prefix": 1, "block": 2})


def training(**more: Any) -> dict[str, Any]:
    return {"epochs": 1, "batch_size": 2, "lr": 0.1, "seed": 0, "progress": None, **more}


@cache
def saved(folder: str) -> Path:
    """An artefact of the bundled model."""
    path = Path(folder, "saved", "other")
    ck.save(model(), path)
    return path


def calls(folder: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every public callable by name, with arguments that it takes."""
    predictor = patch_ranking.RankPredictor(65)
    features = distill.TeacherFeatures(
        normal(2, 4), normal(2, 4), normal(2, 5, 4), normal(2, 6, 4), answers=normal(2, 3, 4)
    )
    student = {"text": normal(2, 6, 7), "text_pooled": normal(2, 7), "text_mask": torch.ones(2, 6).bool(),
               "prior": torch.ones(2, 6), "visual": normal(2, 5, 9), "visual_pooled": normal(2, 9),
               "visual_mask": torch.ones(2, 5).bool(), "logits": normal(2, 3), "labels": labels(2)}  # fmt: skip
    cache_of = distill.TeacherCache(folder, teacher())
    classifier = ck.Classifier(model(), tokenizer(), list(PROMPTS))
    sequence = {"tokens": 65, "blocks": 12, "prefix": 1}
    schedule = ck.Schedule.from_plan(ck.EViT(0.5).plan(**sequence))
    inputs = {"images": images(), "texts": ["a", "b"], "answers": ["c"], "regions": True, "words": True}
    return {
        "EViT": (ck.EViT, {"keep": 0.5, "blocks": (1,), "fuse": True, "score": "cls", "seed": 0, "multiple": 1}),
        "TCA": (
            ck.TCA, {"rate": 0.1, "blocks": (1,), "centers": 2, "score": "rank", "seed": 0, "multiple": 1},
        ),
        "ToMe": (ck.ToMe, {"r": 3, "inflect": 0.0, "proportional": True}),
        "Select": (ck.Select, {"keep": 0.5, "score": "cls", "layer": -2, "merge_rest": True}),
        "PatchRanking": (
            ck.PatchRanking, {"predictor": predictor, "keep": 0.5, "block": 3, "tokens": None, "multiple": 1},
        ),
        **{f"{type(method).__name__}.plan": (method.plan, sequence) for method in (
            ck.Dense(), ck.EViT(0.5), ck.TCA(0.1), ck.ToMe(3), ck.Select(), ck.PatchRanking(predictor), schedule)},
        "Schedule": (ck.Schedule, {"steps": [ck.Merge(3), None], "tokens": 9, "prefix": 1}),
        "Schedule.from_plan": (ck.Schedule.from_plan, {"plan": ck.Plan((None,), 9)}),
        "Prune": (ck.Prune, {"keep": 3, "fuse": True, "signal": "cls", "seed": 0}),
        "Merge": (ck.Merge, {"r": 3, "proportional": True, "signal": "keys"}),
        "Condense": (ck.Condense, {"keep": 3, "merge": 3, "centers": 2, "heads": "mean", "first": 0, "signal": "cls"}),
        "Predict": (ck.Predict, {"keep": 3, "macs": 0}),
        "Rank": (ck.Rank, {"signal": "cls"}),
        "Plan": (ck.Plan, {"steps": (None,), "entry": 9, "prefix": 1, "learnt": 0}),
        "Plan.gmacs": (
            ck.Plan((None,), 9).gmacs, {"width": 8, "patch": 8, "out": 8, "exact": False, "mlp_ratio": 4.0},
        ),
        "ZeroShot": (ck.ZeroShot, {"text": text(), "scale": 9.0, "bias": 1.0}),
        "ZeroShot.__call__": (ck.ZeroShot(text()), {"features": normal(2, WIDTH)}),
        "CALIP": (ck.CALIP, {"text": text(), "alpha": 0.5, "beta2": 1.0, "beta3": 1.0, "preset": "dtd", "scale": 9.0}),
        "CALIP.__call__": (ck.CALIP(text()), {"features": encoded()}),
        "CALIP.fit": (ck.CALIP(text()).fit, {"features": encoded(), "labels": labels()}),
        "Reservoir": (
            ck.Reservoir,
            {
                "text": text(), "preset": "dtd", "capacity": 3, "temperature": 1.0, "strength": 1.0, "beta": 1.0,
                "evict": "fifo", "correction": "exp", "anchors": "seen", "self_vote": True, "frozen": False,
                "scale": 9.0,
            },
        ),
        "Reservoir.__call__": (ck.Reservoir(text()), {"features": encoded()}),
        "TDA": (
            ck.TDA,
            {
                "text": text(), "preset": "dtd", "strength": 1.0, "beta": 1.0, "capacity": 3, "negative_strength": 0.1,
                "negative_beta": 1.0, "negative_capacity": 2, "entropy_range": (0.2, 0.5), "threshold": 0.03,
                "frozen": False, "scale": 9.0,
            },
        ),
        "TDA.__call__": (ck.TDA(text()), {"features": normal(2, WIDTH)}),
        "TDA.from_views": (ck.TDA(text()).from_views, {"embeddings": normal(2, 5, WIDTH), "keep": 1}),
        "TipAdapter": (ck.TipAdapter, tip()),
        "TipX": (ck.TipX, {**tip(), "gamma": 1.0, "tau": 0.5, "reduce": "mean"}),
        "TipAdapter.__call__": (ck.TipAdapter(**tip()), {"features": normal(2, WIDTH)}),
        "TipAdapter.update": (ck.TipAdapter(**tip()).update, {"features": normal(3, WIDTH), "labels": labels()}),
        **{f"{head.__name__}.fit": (
            head(**tip()).fit, {"features": normal(3, WIDTH), "labels": labels(), "grid": (2.0, 2.0)},
        ) for head in (ck.TipAdapter, ck.TipX)},
        "FewShotCALIP": (FewShotCALIP, {"text": text(), "alpha": 0.5, "beta2": 1.0, "beta3": 1.0, "scale": 9.0}),
        "FewShotCALIP.__call__": (FewShotCALIP(text()), {"features": encoded()}),
        "FewShotCALIP.fit": (FewShotCALIP(text()).fit, training(features=encoded(), labels=labels())),
        "TipAdapterF": (TipAdapterF, tip()),
        "TipAdapterF.__call__": (TipAdapterF(**tip()), {"features": normal(2, WIDTH)}),
        "TipAdapterF.fit": (
            TipAdapterF(**tip()).fit, training(features=normal(3, WIDTH), labels=labels()),
        ),
        "TipAdapterF.search": (
            TipAdapterF(**tip()).search, {"features": normal(3, WIDTH), "labels": labels(), "grid": (2.0, 2.0)},
        ),
        "Classifier": (
            ck.Classifier,
            {
                "model": model(), "tokenizer": tokenizer(), "classes": list(PROMPTS), "templates": ["a {}."],
                "method": None, "head": ck.ZeroShot,
            },
        ),
        "Classifier.__call__": (classifier, {"images": images()}),
        "Classifier.probabilities": (classifier.probabilities, {"logits": normal(2, 3)}),
        "encode_image": (
            ck.encode_image,
            {
                "model": model(), "images": images(), "tokens": False, "cls_path": False, "source": False,
                "anchors": None,
            },
        ),
        "patch": (ck.patch, {"model": model(), "method": ck.Dense(), "hand_over": False}),
        **{name: (getattr(ck, name), {"model": model()}) for name in (
            "unpatch", "method_of", "tower_of", "ungraphed", "uncompile", "compilation_of")},
        "export": (
            ck.export,
            {"model": model(), "folder": str(Path(folder, "exported")), "to": "pt2", "precision": "fp32",
             "tokenizer": None, "preprocess": ck.bundled()[1], "calibrate": None, "min_cosine": None, "config": None,
             "layout": None, "check": images(), "progress": None},
        ),
        "save": (
            ck.save,
            {
                "model": model(), "folder": str(Path(folder, "saved", "tower")), "config": "bundled",
                "tokenizer": tokenizer(), "preprocess": ck.bundled()[1], "fidelity": {"cosine": 0.9},
            },
        ),
        "load": (ck.load, {"folder": str(saved(folder)), "device": "cpu"}),
        "load_method": (ck.load_method, {"model": model(), "folder": str(saved(folder))}),
        "compile": (
            ck.compile,
            {
                "model": ck.bundled()[0].train(), "freeze": True, "mode": "default", "batch_sizes": [1],
                "dynamic": False, "max_sizes": 4, "pad": True,
            },
        ),
        "graphed": (ck.graphed, {"model": model(), "batch_sizes": [1], "pad": True}),
        "patched": (lambda model, method, hand_over: ck.patched(model, method, hand_over=hand_over).__enter__(), {
            "model": model(), "method": ck.Dense(), "hand_over": False,
        }),
        "RankPredictor": (
            patch_ranking.RankPredictor,
            {
                "tokens": 9, "prefix": 1, "block": 3, "channels": 4, "token_hidden": 4, "channel_hidden": 4,
                "eps": 1e-5, "about": None,
            },
        ),
        "RankPredictor.__call__": (predictor, {"x": normal(2, 65, 64), "prefix": 1}),
        "VisualTokens": (
            patch_ranking.VisualTokens, {"count": 2, "depth": 2, "width": 8, "text_width": 0, "about": None},
        ),
        "fit_predictor": (
            patch_ranking.fit_predictor,
            training(
                rankings=rankings(), keep=0.5, held_out=0.0, margin=0.0, weight_decay=0.0, token_hidden=4,
                channel_hidden=4, eps=1e-5, device="cpu",
            ),
        ),
        "fit_tokens": (
            patch_ranking.fit_tokens,
            training(
                model=model(), tokenizer=tokenizer(), prompts=PROMPTS, images=images(), labels=labels(2),
                method=ck.PatchRanking(predictor), count=1, depth=1, coupled=False, weight_decay=0.0, scale=9.0,
            ),
        ),
        "golden_ranking": (
            patch_ranking.golden_ranking,
            {
                "model": model(), "images": images(), "score": "label", "text": normal(CLASSES, 128),
                "labels": [0, 1], "window": 8, "stride": 8, "step": 64, "block": 3, "batch_size": 4, "progress": None,
            },
        ),
        "recover": (
            recovery.recover,
            training(
                model=ck.bundled()[0], images=normal(4, 3, 32, 32), method=ck.EViT(0.5), warmup=0.0, weight_decay=0.0,
                contrast=0.0, held_out=1, patience=1, lora=None, workers=0, state=None,
            ),
        ),
        "overlap": (patch_ranking.overlap, {"scores": normal(2, 9), "ranks": torch.arange(18).view(2, 9), "gone": 3}),
        "Teacher": (distill.Teacher, {"model": model(), "tokenizer": tokenizer(), "join": "{} {}"}),
        "Teacher.__call__": (teacher(), inputs),
        "TeacherCache": (
            distill.TeacherCache,
            {"folder": folder, "teacher": teacher(), "dtype": torch.float16, "batch_size": 4},
        ),
        "TeacherCache.__call__": (cache_of, {**inputs, "device": "cpu"}),
        "TeacherCache.add": (
            cache_of.add, {"images": images(), "texts": ["a"], "regions": True, "words": True, "progress": None},
        ),
        "TargetedDistillation": (
            distill.TargetedDistillation,
            {
                "teacher": 4, "text": 7, "visual": 9, "keep": 0.4, "temperature": 0.1, "weight": "ratio", "scale": 9.0,
                "strength": 1.0,
            },
        ),
        "TargetedDistillation.__call__": (distill.TargetedDistillation(4, 7, 9), {"features": features, **student}),
        "TeacherFeatures.align": (features.align, {"words": torch.zeros(3).long(), "regions": torch.zeros(3).long()}),
        "align_words": (distill.align_words, {"student_pieces": ["a"], "teacher_pieces": ["a"]}),
        "align_grid": (distill.align_grid, {"student": (2, 2), "teacher": (3, 3)}),
        "show": (
            ck.show,
            {
                "model": model(), "images": images(), "methods": ck.ToMe(4), "preprocess": ck.bundled()[1],
                "worst": None, "all_steps": False, "names": None,
            },
        ),
        "tune": (
            ck.tune,
            {
                "model": ck.bundled()[0], "images": normal(16, 3, 32, 32), "budget": "cosine_mean>=.1",
                "against": "dense", "labels": None, "classes": None, "captions": None, "caption_ids": None,
                "cost": "gmacs", "families": ("merge",), "evaluations": 8, "search_share": 0.5, "batch_size": 4,
                "seed": 0, "state": None, "progress": None,
            },
        ),
        "MultiView": (ck.MultiView, {"head": ck.ZeroShot(text()), "weights": (1.0,) * 6, "views": 6}),
        "MultiView.__call__": (ck.MultiView(ck.ZeroShot(text())), {"features": normal(12, WIDTH)}),
        "MultiView.fit": (
            ck.MultiView(ck.ZeroShot(text())).fit,
            {"features": normal(18, WIDTH), "labels": labels(), "grid": (0.5, 1.0)},
        ),
        "depth_maps": (
            ck.data.depth_maps, {"points": normal(2, 9, 3), "views": 6, "size": 8, "grid": 4, "distance": 2.0},
        ),
        "scenes.draw": (scenes.draw, {"n": 1, "seed": 0, "pairs": (0,)}),
        "digits.draw": (digits.draw, {"n": 1, "seed": 0, "held_out": True}),
        "ByteTokenizer": (ByteTokenizer, {"context_length": 8}),
        "ByteTokenizer.__call__": (ByteTokenizer(), {"texts": "a", "context_length": 8}),
    }  # fmt: skip


def support_calls(folder: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The public callables of ck.support, with arguments that they take; those that retrieve need FAISS."""
    (tower, preprocess, tokens), photos = ck.bundled(), Path(folder, "photos")
    photos.mkdir()
    for index, image in enumerate(digits.draw(4, 3).images):
        Image.fromarray(image).save(photos / f"{index}.png")
    lines: list[str] = []
    retrieval = {
        "model": tower, "preprocess": preprocess, "tokenizer": tokens, "prompts": PROMPTS, "collection": str(photos),
        "per_class": 2, "minimum": None, "shared": True, "limit": 4, "seed": 0, "exif": True,
        "cache": str(Path(folder, "features")), "name": None, "pretrained": None, "batch_size": 4, "progress": None,
        "report": lines.append, "note": lines.append,
    }  # fmt: skip
    texts = {
        "photo": (support.photo, {"classes": list(PROMPTS), "templates": ["a {}."]}),
        "cupl": (
            support.cupl,
            {
                "classes": ["a"],
                "source": lambda asked: ["long enough"] * len(asked),
                "questions": ["{}?"],
                "answers": 1,
            },
        ),
        "class_embeddings": (support.class_embeddings, {"model": tower, "tokenizer": tokens, "prompts": PROMPTS}),
    }
    if find_spec("faiss") is None:
        return texts
    built = support.retrieve(**retrieval)
    root = str(Path(folder, "set"))
    built.save(root)
    refreshed = {name: retrieval[name] for name in ("model", "preprocess", "batch_size", "progress", "report")}
    return texts | {
        "retrieve": (support.retrieve, retrieval),
        "refresh": (support.refresh, {"folder": root, **refreshed}),
        "SupportSet.load": (support.SupportSet.load, {"folder": root, "model": tower}),
        "SupportSet.save": (built.save, {"folder": root, "copy": True}),
    }


def collection_calls(folder: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The public callables that embed and search a collection, with arguments that they take; they need pyarrow."""
    if find_spec("pyarrow") is None or find_spec("faiss") is None:
        return {name: (lambda: None, {}) for name in ("embed", "search")}
    (tower, preprocess, tokens), photos = ck.bundled(), Path(folder, "photos")
    photos.mkdir()
    Image.fromarray(digits.draw(1, 3).images[0]).save(photos / "0.png")
    common = {"model": tower, "preprocess": preprocess, "tokenizer": tokens}
    embed = {
        **common, "sources": [str(photos)], "out": str(Path(folder, "collection")), "text": None, "columns": [],
        "image_column": None, "id_column": None, "batch_size": 4, "unit_rows": 4, "workers": 0, "raw": False,
        "dtype": None, "exif": True, "by_content": False, "prune": False, "forget": [],
        "retry": False, "compiled": False,
        "devices": None, "engine": "local", "actors": 1, "name": None, "progress": None, "report": print,
    }  # fmt: skip
    ck.embed(**embed)
    return {
        "embed": (ck.embed, embed),
        "search": (
            ck.search,
            {**common, "folder": embed["out"], "text": "a cat", "image": None, "k": 1, "device": None},
        ),
    }


EXEMPT = {
    *("Dense", "Encoded", "bundled", "UnsupportedTower", "Method", "Head"),  # without arguments that can be checked
    *("Fitted", "FittedTokens", "Rankings", "Distilled", "TeacherFeatures"),  # results
    *("Closeness", "Evaluation", "Progress", "Recovered"),
}


@pytest.fixture(scope="module")
def every_call(tmp_path_factory):
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("cache", "support", "collection")]
    return calls(folders[0]) | support_calls(folders[1]) | collection_calls(folders[2])


def test_every_public_callable_is_tried(every_call):
    modules = (ck, ck.heads, distill, patch_ranking, recovery)
    public = {name for module in modules for name in module.__all__ if callable(getattr(module, name))}
    assert public - EXEMPT <= set(every_call)
    for name, (call, arguments) in every_call.items():
        signature = inspect.signature(call if isinstance(call, type) else getattr(call, "forward", call))
        assert set(arguments) == set(signature.parameters) - {"path", "reader"}, name
        call(**arguments)
        ck.unpatch(model())


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_is_one_line_that_names_the_argument(every_call, bad):
    for name, (call, arguments) in every_call.items():
        for argument in arguments:
            if {argument, f"{name}.{argument}"} & TAKEN.get(bad, set()):
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**{**arguments, argument: BAD[bad]()})
                pytest.fail(f"{name} takes {bad} for {argument}")
            message = str(caught.value)
            assert argument in message or message.startswith("expected "), (name, argument, message)
            assert "\n" not in message and len(message) < 400, (name, argument, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(value):
    wrong = text()
    wrong[1, 2] = value
    makers = (ck.ZeroShot, ck.CALIP, ck.Reservoir, ck.TDA, FewShotCALIP, lambda x: ck.TipAdapter(x, x[:0], labels(0)))
    for make in makers:
        with pytest.raises(ValueError, match="text must be finite, got 1 of 3 rows that are not"):
            make(wrong)
    with pytest.raises(ValueError, match="features must be finite, got 1 of 3 rows that are not"):
        ck.TipX(text(), wrong, labels())
    for ints in (torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match=f"text must be of a floating dtype, got {ints.dtype}"):
            ck.ZeroShot(ints)
        with pytest.raises(ValueError, match=f"features must be of a floating dtype, got {ints.dtype}"):
            ck.ZeroShot(text())(ints)


@pytest.mark.parametrize(
    "wrong", [[0, 1, 2], torch.ones(3), torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0, 1, 3])]
)
def test_labels_are_int64_and_within_the_classes(wrong):
    for call, features in (
        (lambda f, y: ck.TipAdapter(text(), f, y), normal(3, WIDTH)),
        (lambda f, y: TipAdapterF(text(), f, y), normal(3, WIDTH)),
        (TipAdapterF(**tip()).fit, normal(3, WIDTH)),
        (ck.CALIP(text()).fit, encoded()),
        (FewShotCALIP(text()).fit, encoded()),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^labels must be "):
            call(features, wrong)


def test_a_count_agrees_with_its_noun():
    counts = [quantity(number, noun) for number in (0, 1, 2) for noun in ("image", "class", "patch")]
    assert counts == ["0 images", "0 classes", "0 patches", "1 image", "1 class", "1 patch", "2 images", "2 classes",
                      "2 patches"]  # fmt: skip
    with pytest.raises(ValueError, match="block 0 must keep 0 to 1 patch, got 3"):
        ck.Plan((ck.Prune(3),), 2)
