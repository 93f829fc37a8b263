"""Reservoir: a literal stream of single images, evictions by hand, files, and refused input."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

import clipkernels as ck
from bench.naive.tca import Reservoir as Literal
from bench.naive.tca import stream
from clipkernels.heads.presets import RESERVOIR_PRESETS
from tests.mutants import read, write

CLASSES, DEPTH, WIDTH = 5, 4, 12


def features(count, seed=0, dtype=torch.float64, classes=CLASSES):
    """Embeddings and CLS paths of images, several of them similar, and class embeddings."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(classes, 8, generator=generator).to(dtype)
    embedding = torch.randn(count, 8, generator=generator).to(dtype) / 8
    embedding += normalize(text, dim=1)[torch.randint(0, classes, (count,), generator=generator)] / 4
    # Entropies far from 0 and from each other: cosines of a few hundredths at scale 100.
    path = torch.randn(count, DEPTH, WIDTH, generator=generator).to(dtype) + 0.7
    return ck.Encoded(embedding, cls_path=path), text


def part(encoded, start, stop):
    return ck.Encoded(encoded.embedding[start:stop], cls_path=encoded.cls_path[start:stop])


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 32], [40]])
@pytest.mark.parametrize("self_vote", [True, False])
@pytest.mark.parametrize("evict", ["diversity", "similarity", "uncertainty", "fifo"])
def test_a_batch_equals_its_images_one_by_one(sizes, self_vote, evict):
    encoded, text = features(40)
    head = ck.Reservoir(text, evict=evict, self_vote=self_vote, scale=20, temperature=0.3)
    literal = Literal(
        text, *RESERVOIR_PRESETS["imagenet"]._replace(temperature=0.3), evict=evict, self_vote=self_vote, scale=20
    )
    expected = torch.stack([literal.see(*image) for image in zip(encoded.embedding, encoded.cls_path, strict=True)])
    start, logits = 0, []
    for size in sizes:
        logits.append(head(part(encoded, start, start + size)))
        start += size
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-9, rtol=1e-9)
    assert head.counts.tolist() == [len(entries) for entries in literal.classes] and head.seen == 40
    anchors = [head.anchors[place] for place, count in enumerate(head.counts) if count >= 2]
    torch.testing.assert_close(torch.stack(anchors), torch.stack(literal.anchors()), atol=1e-9, rtol=1e-9)
    assert (head.anchors[head.counts < 2] == 0).all()


@pytest.mark.parametrize("evict", ["diversity", "similarity", "uncertainty", "fifo"])
@pytest.mark.parametrize("capacity", [1, 2])
def test_batching_changes_nothing_in_fp32_at_any_capacity(capacity, evict):
    # With two entries each is equally similar to the other, so only rounding could make a difference.
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(4, 8, generator=generator)
    embedding, path = torch.randn(64, 8, generator=generator), torch.randn(64, 12, 768, generator=generator)
    arrivals = []
    for size in (1, 5, 32):
        head = ck.Reservoir(text, capacity=capacity, evict=evict, scale=5)
        for start in range(0, 64, size):
            head(ck.Encoded(embedding[start : start + size], cls_path=path[start : start + size]))
        arrivals.append(head._entries.arrival)
    assert torch.equal(arrivals[0], arrivals[1]) and torch.equal(arrivals[0], arrivals[2])


@pytest.mark.parametrize("size", [1, 8, 32])
def test_equal_images_tie_at_any_position_of_a_batch(size):
    path = torch.randn(1, 12, 768, generator=torch.Generator().manual_seed(3)).expand(32, -1, -1)
    head = ck.Reservoir(torch.eye(2))
    for _ in range(0, 32, size):
        head(ck.Encoded(torch.tensor([[1.0, 0.99]]).expand(size, -1), cls_path=path[:size]))
    assert head._entries.arrival[0].tolist() == [29, 30, 31]


@pytest.mark.parametrize("correction", ["exp", "linear"])
@pytest.mark.parametrize("preset", ["eurosat", "food101"])
def test_presets_correct_by_the_formula(preset, correction):
    encoded, text = features(30, seed=1)
    head = ck.Reservoir(text, preset, correction=correction)
    read = Literal(text, *RESERVOIR_PRESETS[preset], correction=correction)
    expected = torch.stack([read.see(*image) for image in zip(encoded.embedding, encoded.cls_path, strict=True)])
    torch.testing.assert_close(head(encoded), expected, atol=1e-9, rtol=1e-9)
    assert head.capacity == RESERVOIR_PRESETS[preset].capacity


def _entry(entropy, direction):
    """An image whose softmax over two classes, the first ahead, has this entropy in nats, and its path (1,2)."""
    low, high = 0.5, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        now = -(middle * math.log(middle) + (1 - middle) * math.log(max(1 - middle, 1e-300)))
        low, high = (middle, high) if now > entropy else (low, middle)
    # 100·(cos a - cos b) = log(p/(1-p)) with text at right angles.
    gap = math.log(low / (1 - low)) / 100
    angle = math.pi / 4 - math.asin(gap / math.sqrt(2))
    return [math.cos(angle), math.sin(angle)], [direction]


def _stream(*entries, **choices):
    head = ck.Reservoir(torch.eye(2, dtype=torch.float64), capacity=2, **choices)
    images = [_entry(entropy, direction) for entropy, direction in entries]
    embedding = torch.tensor([image[0] for image in images], dtype=torch.float64)
    path = torch.tensor([image[1] for image in images], dtype=torch.float64)
    head(ck.Encoded(embedding, cls_path=path))
    return head._entries.entropy[0].tolist(), head._entries.arrival[0].tolist()


EAST, NORTH, NEARLY_EAST = [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]


@pytest.mark.parametrize(
    ("evict", "entries", "arrivals"),
    [
        # Entropies .3, .2, .1: the most uncertain is removed, regardless of the similarities.
        ("uncertainty", [(0.3, EAST), (0.2, EAST), (0.1, EAST)], [2, 1]),
        # The oldest is removed although it is the most certain.
        ("fifo", [(0.1, EAST), (0.2, NORTH), (0.3, NORTH)], [1, 2]),
        # Mean cosines .4, .3, .7 (with north 0, with the one between .8 and .6): .5, .42, .75, the last is removed.
        ("diversity", [(0.1, EAST), (0.12, NORTH), (0.05, NEARLY_EAST)], [0, 1]),
        # 1 - mean: .6, .7, .3; w = int((.5 - .1)/(.7 - .3)) = 0 in floats below one, so entropy decides: .5 is removed.
        ("similarity", [(0.1, EAST), (0.5, NORTH), (0.11, NEARLY_EAST)], [0, 2]),
        # w = int((.65 - .05)/.4) = 1: .05 + .6, .1 + .7 and .65 + .3: the last is removed.
        ("similarity", [(0.05, EAST), (0.1, NORTH), (0.65, NEARLY_EAST)], [0, 1]),
        # w = 1 again: .05 + .3 stays, and .45 + .6 exceeds north's .2 + .7.
        ("similarity", [(0.45, EAST), (0.2, NORTH), (0.05, NEARLY_EAST)], [2, 1]),
    ],
)
def test_each_eviction_rule_keeps_the_expected_entries(evict, entries, arrivals):
    entropy, arrivals_left = _stream(*entries, evict=evict)
    assert arrivals_left == arrivals
    assert entropy == sorted(entropy) == pytest.approx([entries[arrival][0] for arrival in arrivals], abs=1e-6)


def test_ties_evict_the_first_in_order_of_entropy():
    # Equal entries: the list is [0, 1, 2] in order of arrival, and the first of the largest scores is removed.
    same = [(0.2, EAST)] * 4
    for evict in ("diversity", "uncertainty"):
        assert _stream(*same, evict=evict)[1] == [2, 3]


def test_an_image_stored_after_correction_does_not_vote_for_itself():
    encoded, text = features(1)
    plain = ck.ZeroShot(text)(encoded)
    assert torch.equal(ck.Reservoir(text, self_vote=False)(encoded), plain)
    corrected = ck.Reservoir(text, strength=3)(encoded)
    # The image's similarity to itself is one.
    torch.testing.assert_close((corrected - plain).sum().item(), 3.0)


def test_a_frozen_reservoir_stores_nothing():
    encoded, text = features(20)
    head = ck.Reservoir(text, frozen=True)
    assert torch.equal(head(encoded), ck.ZeroShot(text)(encoded)) and head.anchors is None and head.seen == 0
    head.frozen = False
    head(part(encoded, 0, 15))
    entries = {name: value.clone() for name, value in head._entries._asdict().items()}
    head.frozen = True
    once, again = head(part(encoded, 15, 20)), head(part(encoded, 15, 20))
    assert torch.equal(once, again) and not torch.equal(once, ck.ZeroShot(text)(part(encoded, 15, 20)))
    assert all(torch.equal(value, entries[name]) for name, value in head._entries._asdict().items()) and head.seen == 15
    head.reset()
    assert head.counts.sum() == 0 and head.anchors is None


def test_anchors_of_all_wait_for_every_class():
    encoded, text = features(60, seed=3)
    head = ck.Reservoir(text, anchors="all", scale=20)
    for start in range(0, 60, 4):
        head(part(encoded, start, start + 4))
        assert (head.anchors is not None) == bool((head.counts >= 2).all())
    assert head.anchors is not None
    alone = ck.Reservoir(text, capacity=1)
    alone(encoded)
    assert alone.anchors is None


def test_features_that_are_not_finite_are_not_stored():
    encoded, text = features(6)
    encoded.embedding[2] = float("nan")
    encoded.cls_path[4, 1, 3] = float("inf")
    head = ck.Reservoir(text)
    logits = head(encoded)
    assert head.counts.sum() == 4 and head._entries.unit.isfinite().all()
    assert logits[2].isnan().all() and logits[[0, 1, 3, 5]].isfinite().all()
    clean = ck.Reservoir(text)
    rest = [0, 1, 3, 5]
    torch.testing.assert_close(
        logits[rest], clean(ck.Encoded(encoded.embedding[rest], cls_path=encoded.cls_path[rest]))
    )


def test_images_that_are_not_finite_leave_other_entries_unchanged():
    """Class 2 gets fewer images than class 1, so its last slot stays free."""
    text = torch.eye(4, 16, dtype=torch.float64)
    path = torch.randn(6, DEPTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path[0, 1, 3] = float("nan")
    head = ck.Reservoir(text)
    head(ck.Encoded(text[[0, 1, 1, 2]], cls_path=path[:4]))
    assert head.counts.tolist() == [0, 2, 1, 0] and all(tensor.isfinite().all() for tensor in head._entries)
    assert head(ck.Encoded(text[:2], cls_path=path[4:])).isfinite().all()
    assert head.anchors.isfinite().all()


def test_anchors_held_by_a_caller_never_change():
    encoded, text = features(40)
    head = ck.Reservoir(text, scale=20)
    head(part(encoded, 0, 20))
    anchors = head.anchors
    expected = anchors.clone()
    head(part(encoded, 20, 40))
    assert torch.equal(anchors, expected) and not torch.equal(head.anchors, expected)


def test_a_thousand_classes_and_sharp_weights_stay_finite():
    encoded, text = features(9, dtype=torch.float16, classes=1000)
    head = ck.Reservoir(text.float(), "food101")
    logits = head(encoded)
    assert logits.dtype == torch.float32 and logits.isfinite().all() and head.counts.sum() <= 9


def test_entries_stored_in_inference_mode_serve_outside_of_it():
    encoded, text = features(12)
    head = ck.Reservoir(text)
    with torch.inference_mode():
        head(part(encoded, 0, 6))
    head(part(encoded, 6, 9))
    with torch.inference_mode():
        head(part(encoded, 9, 12))
    saved = ck.Reservoir(text)
    saved(encoded)
    assert torch.equal(head.counts, saved.counts)
    torch.testing.assert_close(head.anchors, saved.anchors)


def test_a_loaded_reservoir_continues_the_stream(tmp_path):
    encoded, text = features(30)
    head = ck.Reservoir(text)
    head(part(encoded, 0, 20))
    head.save(tmp_path / "reservoir.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["reservoir.safetensors"]
    again = ck.Reservoir(text).load(tmp_path / "reservoir.safetensors")
    assert torch.equal(again.anchors, head.anchors) and again.seen == 20
    assert torch.equal(again(part(encoded, 20, 30)), head(part(encoded, 20, 30)))
    again.save(tmp_path / "reservoir.safetensors")
    with torch.inference_mode():
        third = ck.Reservoir(text).load(tmp_path / "reservoir.safetensors")
    third(part(encoded, 0, 5))
    with torch.inference_mode():
        third(part(encoded, 5, 10))
    # Features of another precision, such as the same model's in fp32, keep that precision.
    single = ck.Encoded(encoded.embedding.float(), cls_path=encoded.cls_path.float())
    assert third(single).isfinite().all() and third._entries.unit.dtype == torch.float32


def test_a_reservoir_that_does_not_fit_is_refused(tmp_path):
    encoded, text = features(10)
    head = ck.Reservoir(text)
    with pytest.raises(ValueError, match="expected a reservoir that has processed images"):
        head.save(tmp_path / "empty")
    head(encoded)
    file = tmp_path / "reservoir.safetensors"
    head.save(file)
    for other in (text.flip(0), text[:4], torch.randn(5, 8)):
        with pytest.raises(ValueError, match=r"expected a reservoir of the same classes, prompts and model"):
            ck.Reservoir(other).load(file)
    with pytest.raises(ValueError, match=r"expected a reservoir of scale 20, got .*reservoir.safetensors of 100.0"):
        ck.Reservoir(text, scale=20).load(file)
    with pytest.raises(
        ValueError, match=r"expected a reservoir of capacity 2, got .*reservoir.safetensors of capacity 3"
    ):
        ck.Reservoir(text, capacity=2).load(file)
    with pytest.raises(ValueError, match="expected the CLS tokens of 4 blocks of width 12, got 3 blocks of width 12"):
        ck.Reservoir(text).load(file)(ck.Encoded(encoded.embedding, cls_path=encoded.cls_path[:, :3]))
    started = ck.Reservoir(text)
    started(ck.Encoded(encoded.embedding, cls_path=encoded.cls_path[:, :, :6]))
    with pytest.raises(ValueError, match="expected the CLS tokens of 4 blocks of width 6, got 4 blocks of width 12"):
        started.load(file)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        head.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a reservoir \(clipkernels.reservoir.2\), got .* with format None"):
        head.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        head.load(tmp_path / "nowhere")
    about, saved = read(file)
    for change in ({"unit": None}, {"more": torch.zeros(1)}, {"text": None}, {"mean": torch.zeros(5, 3, 1)}):
        changed = {name: value for name, value in {**saved, **change}.items() if value is not None}
        write(tmp_path / "odd", about, changed)
        with pytest.raises(ValueError, match=r"expected a reservoir"):
            head.load(tmp_path / "odd")
    write(tmp_path / "odd", {"format": about["format"], "scale": about["scale"]}, saved)
    with pytest.raises(ValueError, match="missing required field `seen`"):
        head.load(tmp_path / "odd")
    assert head.seen == 10 and head.counts.sum() > 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_kill_while_saving_loses_nothing(tmp_path):
    encoded, text = features(10)
    head = ck.Reservoir(text)
    head(encoded)
    file = tmp_path / "reservoir.safetensors"
    head.save(file)
    content = file.read_bytes()
    script = f"""
import os, signal
from safetensors.torch import load_file
import clipkernels as ck
from clipkernels import files
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
head = ck.Reservoir(load_file({str(file)!r})["text"]).load({str(file)!r})
head.seen += 1
head.save({str(file)!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL and file.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "mnist"}, 'preset must be "caltech101", .* or "ucf101", got .mnist.'),
        ({"capacity": 0}, "capacity must be an int of at least 1, got 0"),
        ({"capacity": 2.5}, "capacity must be an int of at least 1, got 2.5"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"strength": "3"}, "strength must be a finite number, got '3'"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"evict": "lru"}, 'evict must be "diversity", "similarity", "uncertainty" or "fifo", got .lru.'),
        ({"correction": "log"}, 'correction must be "exp" or "linear", got .log.'),
        ({"anchors": "none"}, 'anchors must be "seen" or "all", got .none.'),
        ({"text": torch.zeros(3)}, r"text must be class embeddings \(K,E\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ck.Reservoir(**{"text": torch.randn(3, 4), **arguments})


def test_features_without_a_path_are_refused():
    encoded, text = features(3)
    for wrong in (encoded.embedding, ck.Encoded(encoded.embedding)):
        with pytest.raises(ValueError, match="features must be an Encoded with cls_path"):
            ck.Reservoir(text)(wrong)
    with pytest.raises(ValueError, match=r"cls_path must be floating-point \(B,L,C\) with B = 3, got \(2,4,12\)"):
        ck.Reservoir(text)(ck.Encoded(encoded.embedding, cls_path=encoded.cls_path[:2]))


@torch.no_grad()
def test_a_classifier_adapts_like_a_literal_stream(tiny):
    model, _, tokenizer = ck.bundled()
    model.double()
    from clipkernels.classifier import class_embeddings, prompts_of
    from clipkernels.data import digits

    pixels = digits.draw(24, 7)[0]
    images = torch.tensor(pixels).permute(0, 3, 1, 2).double() / 128 - 1
    method = ck.TCA(0.1)
    text = class_embeddings(model, tokenizer, prompts_of(digits.CLASSES, digits.TEMPLATES)).double()
    literal = Literal(text, *RESERVOIR_PRESETS["imagenet"])
    expected = stream(model, images, method, literal)
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, digits.TEMPLATES, method, ck.Reservoir)
    logits = torch.cat([classifier(image) for image in images.split(1)])
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits, 100 * normalize(ck.encode_image(model, images).embedding, dim=1) @ text.T)
    classifier.reset()
    assert classifier.head.seen == 0
    torch.testing.assert_close(classifier(images[:1]), expected[:1], atol=1e-6, rtol=1e-6)
