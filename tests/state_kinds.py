"""A small good file of every kind of state, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import clipkernels as ck
from clipkernels.artefacts.header import read_header
from clipkernels.artefacts.load import read_saved_method
from clipkernels.evaluation import features as split_features
from clipkernels.evaluation import state as evaluation
from clipkernels.evaluation.results import Unread, write_scores
from clipkernels.evaluation.scores import Score
from clipkernels.fingerprint import fingerprint
from clipkernels.learn.calip_fs import FewShotCALIP
from clipkernels.learn.distill import TeacherCache, feature_files
from clipkernels.learn.patch_ranking import Rankings, RankPredictor, VisualTokens
from clipkernels.learn.patch_ranking.rankings import RankingStore
from clipkernels.learn.recovery import state as recovery
from clipkernels.learn.recovery.results import Closeness, Evaluation
from clipkernels.learn.tip_f import TipAdapterF
from clipkernels.measure.timing import Band
from clipkernels.questions import state as distillation
from clipkernels.questions.training import Checkpoint
from clipkernels.state_files import read_json, read_state, write_json, write_state
from clipkernels.support import Picture, SupportSet
from clipkernels.support.features import Encoder, join_names, read_features, write_features
from clipkernels.tuning import evaluations
from clipkernels.tuning import state as tuning
from clipkernels.tuning.cost_table import CURVES, Conditions, CostTable, TowerRecord
from tests.mutants import Kind

TOWER = {"float32": "ab" * 32, "float16": "cd" * 32}


def reservoir(folder: Path) -> Kind:
    generator = torch.Generator().manual_seed(0)
    text, path = torch.randn(3, 6, generator=generator), torch.randn(9, 2, 4, generator=generator)
    head = ck.Reservoir(text)
    head(ck.Encoded(torch.randn(9, 6, generator=generator), cls_path=path))
    head.save(folder / "reservoir.safetensors")
    return Kind(
        folder / "reservoir.safetensors", lambda: head.load(folder / "reservoir.safetensors"), unbounded=("length",)
    )


def tda(folder: Path) -> Kind:
    generator, file = torch.Generator().manual_seed(0), folder / "tda.safetensors"
    head = ck.TDA(torch.randn(3, 6, generator=generator), scale=5.0, entropy_range=(0.05, 0.65))
    head(torch.randn(12, 6, generator=generator))
    head.save(file)
    return Kind(file, lambda: head.load(file))


def rank_predictor(folder: Path) -> Kind:
    file = folder / "predictor.safetensors"
    RankPredictor(9, block=1, channels=4, token_hidden=3, channel_hidden=5, about={"tower": TOWER, "keep": 0.5}).save(
        file
    )
    return Kind(file, lambda: RankPredictor.load(file), ("about.",))


def learnt_tokens(folder: Path) -> Kind:
    file = folder / "tokens.safetensors"
    VisualTokens(2, 3, 4, 5, about={"tower": TOWER, "images": 7}).save(file)
    return Kind(file, lambda: VisualTokens.load(file), ("about.",))


def few_shot(folder: Path) -> Kind:
    head, file = (
        FewShotCALIP(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
        folder / "calip.safetensors",
    )
    head.save(file)
    return Kind(file, lambda: head.load(file))


def tip_f(folder: Path) -> Kind:
    file, generator = folder / "tip_f.safetensors", torch.Generator().manual_seed(0)
    text, support = (torch.randn(rows, 4, generator=generator) for rows in (3, 5))
    head = TipAdapterF(text, support, torch.tensor([0, 0, 1, 1, 2]))
    head.save(file)
    return Kind(file, lambda: head.load(file))


def golden(folder: Path) -> Kind:
    file, generator = folder / "ranks.safetensors", torch.Generator().manual_seed(0)
    about = {"score": "label", "window": 2, "stride": 1, "step": 3, "block": 1, "tower": TOWER, "image_size": [8, 8]}
    about |= {"tokens": 5, "prefix": 1, "width": 16, "blocks": 4, "reader": "1"}
    store = RankingStore(file, about, torch.randn(3, 6, generator=generator))
    digests = [bytes([index]) * 32 for index in range(3)]
    ranks = torch.stack([torch.randperm(4, generator=generator) for _ in digests])
    store.add(digests, ranks, torch.randn(3, 5, 4, generator=generator))
    store.finish(digests)
    return Kind(file, lambda: Rankings.load(file), ("tower.",), unbounded=("features",), separate=("text",))


def collection(folder: Path) -> Kind:
    file, encoder = folder / "features.safetensors", Encoder(TOWER, "host", "resize", "1")
    rows = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    names = join_names(["a.png", "b/c.png", "d\udcff.png"])
    about = {"folder": "..", "model": "ViT", "pretrained": None}
    write_features(file, rows, [bytes([n]) * 32 for n in range(3)], encoder, {"paths": names}, about)
    return Kind(file, lambda: read_features(file, encoder), ("encoder.tower.", "folder", "model", "pretrained"))


def teacher_cache(folder: Path) -> Kind:
    about = {
        **{"image tower": TOWER, "text tower": TOWER, "reading of a few texts": [[0.25, -0.5], [0.125, 0.75]]},
        **{"method": "host", "tokenizer": "0123", "dtype": "float32"},
    }
    teacher: Any = SimpleNamespace(stamp=(1,), joined=None, about={k: v for k, v in about.items() if k != "dtype"})
    file, generator = folder / f"{'a' * 32}.safetensors", torch.Generator().manual_seed(0)
    digests = [feature_files.content_hash(text) for text in ("a", "b")]
    tensors = {"text": torch.randn(2, 4, generator=generator), "words": torch.randn(2, 3, 4, generator=generator)}
    tensors["words_mask"] = torch.tensor([[False, True, False, False]] * 2)
    feature_files.write_features(file, "text", digests, tensors, about)
    return Kind(
        file,
        lambda: TeacherCache(folder, teacher, torch.float32).read(["a", "b"]),
        ("teacher.image tower.", "teacher.text tower."),
        unbounded=("text", "words"),
    )


def support_set(folder: Path) -> Path:
    """A support set of the bundled model: three images of two classes."""
    rows = torch.nn.functional.normalize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    pictures = []
    for index in range(3):
        file = folder / f"{index}.png"
        file.write_bytes(bytes([index]))
        pictures.append(Picture(str(file), sha256(bytes([index])).hexdigest()))
    about: dict[str, Any] = {"kind": "LC", "settings": {"collection": "c", "per_class": 2, "minimum": None}}
    about |= {"model": "bundled", "pretrained": None, "tower": fingerprint(ck.bundled()[0])}
    about |= {"method": "host", "preprocess": "resize", "reader": "1"}
    prompts = {"cat": ["a cat"], "dog": ["a dog", "dogs"]}
    built = SupportSet(rows, torch.tensor([0, 0, 1]), ("cat", "dog"), prompts, tuple(pictures), about)
    built.save(folder / "set")
    return folder / "set"


def support_manifest(folder: Path) -> Kind:
    root, model = support_set(folder), ck.bundled()[0]
    absent = ("tower.", "settings.", "classes.images.source", "classes.images.file")
    return Kind(root / "manifest.json", lambda: SupportSet.load(root, model), absent, ("settings.",))


def support_features(folder: Path) -> Kind:
    root, model = support_set(folder), ck.bundled()[0]
    return Kind(root / "features.safetensors", lambda: SupportSet.load(root, model))


def artefact(folder: Path) -> Kind:
    root, model = folder / "tower", ck.bundled()[0]
    ck.save(ck.patch(model, ck.EViT(0.7, blocks=(1, 3))), root, fidelity={"cosine": [0.9, 0.95]})
    tower = ck.tower_of(model)
    return Kind(
        root / "clipkernels.json", lambda: read_saved_method(root, read_header(root), tower),
        ("tower.", "files.", "versions.", "method.arguments.", "method.modules"),
        ("text_tower", "tokenizer", "fidelity", "method.arguments.seed", "method.arguments.multiple"),
    )  # fmt: skip


def schedule(folder: Path) -> Kind:
    file = folder / "schedule.json"
    steps = (ck.Prune(50, signal="received"), None, ck.Condense(20, 6, 2, "mean", 3), ck.Merge(4, False))
    ck.Schedule(steps, 65).save(file)
    return Kind(file, lambda: ck.Schedule.load(file), free=("steps.arguments.seed",))


def schedule_artefact(folder: Path) -> Kind:
    root, model = folder / "tower", ck.bundled()[0]
    depth = len(ck.tower_of(model).blocks)
    ck.save(ck.patch(model, ck.Schedule([ck.Prune(50), *[None] * (depth - 2), ck.Merge(9)], 65)), root)
    tower = ck.tower_of(model)
    return Kind(
        root / "clipkernels.json", lambda: read_saved_method(root, read_header(root), tower),
        ("tower.", "files.", "versions.", "method.modules", "method.arguments.prefix"),
        ("text_tower", "tokenizer", "fidelity"),
    )  # fmt: skip


def cost_table(folder: Path) -> Kind:
    file = folder / "cost.json"
    about: dict[str, Any] = {"library": "OpenCLIPTower", "block": "0123abcd", "tokens": 9, "blocks": 2, "prefix": 1}
    about |= {"width": 4, "mlp_ratio": 4.0, "patch": 8, "out": 2, "outputs_only_cls": True}
    versions: dict[str, str | None] = {"clipkernels": "0.1.0", "torch": "2.14.1", "triton": None}
    conditions = Conditions(
        tower=TowerRecord(**about),
        device="a CPU",
        dtype="float32",
        batch=8,
        threads=1,
        kernels=False,
        versions=versions,
    )
    curves: dict[str, Any] = dict.fromkeys(CURVES, (0.5, 0.75))
    times: dict[str, Any] = {"dense": 4.5, "scale": 1.25, "embed": 0.25}
    CostTable(conditions=conditions, clock="wall", rounds=3, counts=(5, 9), **times, **curves).save(file)
    return Kind(file, lambda: CostTable.load(file), ("conditions.versions.",))


RECOVERY = recovery.Settings(
    tower=TOWER, method="EViT(keep=0.7)", plan="Plan(...)", images=40, epochs=2, batch_size=8, lr=0.5, warmup=0.25,
    weight_decay=0.5, contrast=0.0, held_out=0.25, patience=2, lora=None, seed=0,
)  # fmt: skip


def recovery_run(folder: Path) -> Kind:
    def load() -> None:
        with recovery.State(folder / "state", RECOVERY):
            pass

    load()
    return Kind(folder / "state" / "run.json", load, ("tower.",))


def recovery_targets(folder: Path) -> Kind:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(3, 4, generator=generator))
    digests = torch.randint(256, (3, 32), generator=generator, dtype=torch.uint8)
    with recovery.State(folder / "state", RECOVERY) as state:
        state.add_targets(0, embeddings, digests)

    def load() -> None:
        with recovery.State(folder / "state", RECOVERY) as state:
            [(rows, hashes)] = state.targets()
        assert torch.equal(rows, embeddings) and torch.equal(hashes, digests)

    return Kind(folder / "state" / "targets-0.safetensors", load)


def recovery_checkpoint(folder: Path) -> Kind:
    weights, first, second = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    history = [
        Evaluation(0, 0.0, Closeness(0.5, 0.25, 0.125, 0.5)),
        Evaluation(4, 0.25, Closeness(0.75, 0.5, 0.25, 1.0)),
    ]
    checkpoint = recovery.Checkpoint(6, 1.5, 16, history, weights, first, second)
    with recovery.State(folder / "state", RECOVERY) as state:
        state.save(checkpoint, best=4)

    def load() -> None:
        with recovery.State(folder / "state", RECOVERY) as state:
            read = state.checkpoint()
        assert read is not None and read[:4] == checkpoint[:4]
        assert all(map(torch.equal, read[4:], checkpoint[4:]))

    unbounded = ("weights", "first", "second")
    return Kind(folder / "state" / "checkpoint.safetensors", load, unbounded=unbounded)


def recovery_best(folder: Path) -> Kind:
    weights = torch.rand(7, generator=torch.Generator().manual_seed(0))
    with recovery.State(folder / "state", RECOVERY) as state:
        state.save_best(4, weights)

    def load() -> None:
        with recovery.State(folder / "state", RECOVERY) as state:
            assert torch.equal(state.best(4), weights)

    return Kind(folder / "state" / "best-4.safetensors", load, unbounded=("weights",))


TUNING = tuning.Settings(
    tower=TOWER, images=40, pixels="ab" * 32, labels="cd" * 32, captions="ef" * 32, budget="cosine_mean>=.97",
    against="dense", cost="gmacs", families=["merge", "prune"], evaluations=20, search_share=0.5, batch_size=8,
    device="cpu", precision="float32", seed=0,
)  # fmt: skip
PLAN = ck.Plan((ck.Prune(50, signal="received"), None, ck.Merge(4, False)), 65, 1)


def tuning_run(folder: Path) -> Kind:
    def load() -> None:
        with tuning.State(folder / "state", TUNING):
            pass

    load()
    return Kind(folder / "state" / "run.json", load, ("tower.",))


def tuning_evaluation(folder: Path) -> Kind:
    evaluation = evaluations.Evaluation(0.25, 0.5, 0.75, (0.875, 0.5), (0.75, 0.25))
    with tuning.State(folder / "state", TUNING) as state:
        state.put("held out", PLAN, evaluation)

    def load() -> None:
        with tuning.State(folder / "state", TUNING) as state:
            assert state.get("held out", PLAN) == evaluation

    [file] = (folder / "state").glob("plan-*")
    return Kind(file, load, free=("plan.steps.arguments.seed",))


def tuning_speed(folder: Path) -> Kind:
    with tuning.State(folder / "state", TUNING) as state:
        state.put_speed(PLAN, Band(1.5, 1.25, 1.75))

    def load() -> None:
        with tuning.State(folder / "state", TUNING) as state:
            assert state.speed(PLAN) == Band(1.5, 1.25, 1.75)

    [file] = (folder / "state").glob("speed-*")
    return Kind(file, load, free=("plan.steps.arguments.seed",))


EVALUATION = evaluation.Settings(
    tower=TOWER, text_tower=TOWER, preprocess="Resize(32)", reader="1", precision="fp32", batch_size=8
)


def evaluation_run(folder: Path) -> Kind:
    def load() -> None:
        evaluation.FOLDER.open(folder / "state", EVALUATION).release()

    load()
    return Kind(folder / "state" / "run.json", load, ("tower.", "text_tower."))


def evaluation_features(folder: Path) -> Kind:
    generator, file = torch.Generator().manual_seed(0), folder / "features.safetensors"
    tensors = {
        "index": torch.tensor([0, 1, 3]),
        "embedding": torch.randn(3, 4, generator=generator),
        "tokens": torch.randn(3, 5, 4, generator=generator),
        "cls_path": torch.randn(3, 2, 6, generator=generator),
    }
    header = {"start": 0, "stop": 4, "prefix": 1, "kinds": ["tokens", "cls_path"], "unread": [(2, "")]}
    write_state(file, split_features.FORMAT, header, tensors)
    return Kind(
        file,
        lambda: read_state(file, split_features.FORMAT),
        unbounded=("embedding", "tokens", "cls_path"),
    )


def evaluation_score(folder: Path) -> Kind:
    file, unread = folder / "row.json", {"test": Unread(1, "a.png", "not an image")}
    write_scores(file, {"accuracy": Score(0.5, 0.25, 0.75, 0.125, 3, 90)}, unread, "published")
    # As `read_rows` reads it, whose message has another remedy.
    return Kind(file, lambda: read_json(file, evaluation.SCORE_FORMAT, evaluation.MAX_BYTES), free=("unread.",))


def evaluation_speed(folder: Path) -> Kind:
    file = folder / "speed.json"
    record = evaluation.SpeedRecord(methods={"Dense()": (1.5, 20.0, 1.25, 0.75)})
    write_json(file, evaluation.SPEED_FORMAT, record, evaluation.MAX_BYTES)
    return Kind(file, lambda: read_json(file, evaluation.SPEED_FORMAT, evaluation.MAX_BYTES))


DISTILLATION = distillation.Settings(
    task="vcr", tower=TOWER, text_tower=TOWER, method="host", reader="1", preprocess="Resize(32)", train="ab" * 32,
    test="cd" * 32, held_out=["source", "lsmdc"], student="", student_source="", tuned="mlp", steps=600,
    batch_size=64, lr=0.5, strength=1.0, keep=0.25, temperature=0.125,
)  # fmt: skip


def distillation_run(folder: Path) -> Kind:
    def load() -> None:
        with distillation.State(folder / "state", DISTILLATION):
            pass

    load()
    return Kind(folder / "state" / "run.json", load, ("tower.", "text_tower.", "held_out."))


def distillation_score(folder: Path) -> Kind:
    record = distillation.ScoreRecord(
        scores={"test": {"Q→A": 0.5, "QA→R": 0.25, "Q→AR": 0.125}}, counts={"test": 40}, train=30, classes=4, steps=600,
        weight=0.5, seconds=1.5,
    )  # fmt: skip
    with distillation.State(folder / "state", DISTILLATION) as state:
        state.save_score("none, 1 %, seed 0", record)

    def load() -> None:
        with distillation.State(folder / "state", DISTILLATION) as state:
            assert state.score("none, 1 %, seed 0") is not None

    [file] = (folder / "state").glob("score-*")
    return Kind(file, load, ("scores.test.",), ("weight",))


def distillation_images(folder: Path) -> Kind:
    record = distillation.ImagesRecord(
        failed={"a.jpg": "not an image"}, regions=True, files="ab" * 32, content="cd" * 32, cut=3
    )
    with distillation.State(folder / "state", DISTILLATION) as state:
        state.save_images("train", record)

    def load() -> None:
        with distillation.State(folder / "state", DISTILLATION) as state:
            assert state.images("train") is not None

    return Kind(folder / "state" / "images-train.json", load, ("failed.",), ("failed.",))


def distillation_checkpoint(folder: Path) -> Kind:
    weights, first, second = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(6, 1.5, 3, weights, first, second, torch.rand(2).double())
    with distillation.State(folder / "state", DISTILLATION) as state:
        state.save_checkpoint("none", lambda: checkpoint, 2.5, at_once=True)

    def load() -> None:
        with distillation.State(folder / "state", DISTILLATION) as state:
            read = state.checkpoint("none")
        assert read is not None and read[1] == 2.5 and read[0][:3] == checkpoint[:3]
        assert all(map(torch.equal, read[0][3:], checkpoint[3:]))

    unbounded = ("weights", "first", "second", "buffers")
    return Kind(folder / "state" / "checkpoint.safetensors", load, unbounded=unbounded, separate=("buffers",))


KINDS: dict[str, Callable[[Path], Kind]] = {
    **{"reservoir": reservoir, "TDA": tda},
    **{"predictor": rank_predictor, "rankings": golden, "learnt tokens": learnt_tokens},
    **{"CALIP-FS": few_shot, "Tip-Adapter-F": tip_f, "features": collection, "teacher": teacher_cache},
    **{"manifest": support_manifest, "support features": support_features, "artefact": artefact},
    **{"schedule": schedule, "schedule artefact": schedule_artefact},
    **{"cost table": cost_table},
    **{"recovery": recovery_run, "recovery targets": recovery_targets, "recovery checkpoint": recovery_checkpoint},
    **{"recovery best": recovery_best},
    **{"evaluation": evaluation_run, "evaluation features": evaluation_features},
    **{"evaluation score": evaluation_score, "evaluation speed": evaluation_speed},
    **{"distillation": distillation_run, "distillation score": distillation_score},
    **{"distillation images": distillation_images, "distillation checkpoint": distillation_checkpoint},
    **{"tuning": tuning_run, "tuning evaluation": tuning_evaluation, "tuning speed": tuning_speed},
}
