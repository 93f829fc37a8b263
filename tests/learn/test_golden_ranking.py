"""Golden rankings against a loop over images, rounds and windows with the host's blocks; and their files."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

import clipkernels as ck
from bench.naive.ranking import literal_ranking
from clipkernels.learn.patch_ranking import Rankings, golden_ranking
from clipkernels.learn.patch_ranking.golden import windows_of
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower

pytestmark = pytest.mark.usefixtures("one_thread")


def random_inputs(model, classes=5):
    """The model in fp64 with random vectors, images for it, class embeddings and labels."""
    model = randomized(model).double()
    for module in model.modules():
        if type(module).__module__ == "clip.model" and isinstance(module, torch.nn.LayerNorm):
            module.float()  # OpenAI's LayerNorms compute only in fp32
    tower, generator = ck.tower_of(model), torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *tower.image_size, generator=generator, dtype=torch.float64)
    # Close to each other, so that no probability is one or zero up to rounding.
    about = torch.randn(1 + classes, tower.out, generator=generator, dtype=torch.float64)
    return model, images, normalize(about[:1] + 0.1 * about[1:]), torch.tensor([0, 3, 4])


def small():
    return random_inputs(open_clip_tower("ViT-B-32", 4, width=64, image_size=32, patch_size=8))


@pytest.mark.parametrize("score", ["label", "confidence", "feature"])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_rankings_match_a_literal_loop(score, window, stride):
    model, images, classes, labels = small()
    options = {"score": score, "window": window, "stride": stride, "step": 3, "block": 1}
    rankings = golden_ranking(model, images, text=classes, labels=labels, batch_size=7, **options)
    with torch.no_grad():
        expected = literal_ranking(model, images, classes=classes, labels=labels, **options)
    assert torch.equal(rankings.ranks, expected)


SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
TOWERS = {
    "no CLS, a query pools": ("timm", lambda: timm_tower("vit_base_patch16_siglip_224", 3, **SMALL)),
    "CLS, four registers": ("timm", lambda: timm_tower("vit_base_patch14_reg4_dinov2", 3, **{**SMALL, "img_size": 56})),
    "rotary, separate projections": ("timm", lambda: timm_tower("eva02_base_patch16_clip_224", 3, **SMALL)),
    "averages": ("open_clip", lambda: open_clip_tower("ViT-H-14-CLIPA", 3, width=64, image_size=56, head_width=64)),
    "CLIP of transformers": ("transformers", lambda: transformers_tower("CLIPModel", 3, **SIZES)),
    "SigLIP of transformers": ("transformers", lambda: transformers_tower("SiglipModel", 3, **SIZES)),
    "sequence first, norms in fp32": ("clip.model", lambda: openai_tower(3, 64, 16, 64, 32)),
}


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_rankings_on_other_towers_match_the_literal_loop(name, block):
    library, make = TOWERS[name]
    pytest.importorskip(library, reason=f"{library} is not installed")
    model, images, classes, labels = random_inputs(make())
    options = {"score": "label", "window": 2, "stride": 1, "step": 6, "block": block}
    rankings = golden_ranking(model, images[:2], text=classes, labels=labels[:2], **options)
    with torch.no_grad():
        expected = literal_ranking(model, images[:2], classes=classes, labels=labels[:2], **options)
    assert torch.equal(rankings.ranks, expected)


def test_windows_cover_every_edge():
    assert windows_of((3, 3), 2, 2).tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    assert len(windows_of((14, 14), 2, 1)) == 169 and len(windows_of((14, 14), 2, 2)) == 49
    assert windows_of((2, 3), 1, 1).tolist() == [[0], [1], [2], [3], [4], [5]]


def test_equal_scores_remove_the_lower_index_first():
    model, images, classes, _ = small()
    with torch.no_grad():  # nothing depends on the patches
        model.visual.proj.zero_()
        rankings = golden_ranking(model, images, score="confidence", text=classes, step=5, block=1)
    assert torch.equal(rankings.ranks, torch.arange(15, -1, -1).expand(3, -1))


def test_patches_with_nan_scores_stay_longest():
    model, images, classes, _ = small()
    images[1, :, 8:16, 8:16] = float("nan")
    rankings = golden_ranking(model, images, score="confidence", text=classes, block=1)
    alone = golden_ranking(model, images[::2], score="confidence", text=classes, block=1)
    assert torch.equal(rankings.ranks[::2], alone.ranks)
    assert sorted(rankings.ranks[1].tolist()) == list(range(16))


def test_features_that_are_not_finite_are_named_and_not_stored(tmp_path):
    model, images, *_ = small()
    images[1, :, 8:16, 8:16] = float("nan")
    options = {"score": "feature", "block": 1, "path": tmp_path / "ranks.safetensors"}
    with pytest.raises(
        ValueError, match=r"features that are finite, got others for 1 of 3 images, such as .*leave it out"
    ):
        golden_ranking(model, images, **options)
    rankings = golden_ranking(model, images[::2], **options)
    assert rankings.new == 0 and rankings.features.isfinite().all()  # the others were stored


def test_features_are_the_blocks_input_with_pooled_channels():
    model, images, *_ = small()
    rankings = golden_ranking(model, images, score="feature", block=2)
    with torch.no_grad():
        x = model.visual._embeds(images)
        for host in model.visual.transformer.resblocks[:2]:
            x = host(x)
    torch.testing.assert_close(rankings.features.double(), x, atol=1e-6, rtol=1e-6)
    wide = random_inputs(open_clip_tower("ViT-B-32", 2, width=128, image_size=32, patch_size=8))[0]
    assert golden_ranking(wide, images, score="feature", block=1).features.shape == (3, 17, 64)


def test_a_patched_tower_is_ranked_dense_and_stays_patched():
    model, images, classes, labels = small()
    expected = golden_ranking(model, images, text=classes, labels=labels, block=1)
    model.train()
    ck.patch(model, ck.EViT(0.5))
    rankings = golden_ranking(model, images, text=classes, labels=labels, block=1)
    assert torch.equal(rankings.ranks, expected.ranks) and rankings.about == expected.about
    assert ck.method_of(model) == ck.EViT(0.5) and model.training


def test_images_may_be_a_sequence_with_repeats():
    model, images, classes, labels = small()
    expected = golden_ranking(model, images, text=classes, labels=labels, block=1)
    rows = [0, 2, 0, 1]
    calls = []
    rankings = golden_ranking(
        model, [images[row] for row in rows], text=classes, labels=labels[rows].tolist(), block=1,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert torch.equal(rankings.ranks, expected.ranks[rows]) and torch.equal(rankings.features, expected.features[rows])
    assert calls[-1] == (4, 4)


def test_images_on_disk_are_not_ranked_again(tmp_path, monkeypatch):
    from clipkernels.learn.patch_ranking import golden

    model, images, classes, labels = small()
    group_sizes = []
    real = golden._rank_images
    monkeypatch.setattr(golden, "_rank_images", lambda *a: group_sizes.append(len(a[1])) or real(*a))
    file = tmp_path / "ranks.safetensors"
    first = golden_ranking(model, images[:2], text=classes, labels=labels[:2], block=1, path=file)
    assert group_sizes == [2] and [path.name for path in tmp_path.iterdir()] == [file.name]
    again = golden_ranking(model, images[:2], text=classes, labels=labels[:2], block=1, path=file)
    assert group_sizes == [2] and torch.equal(again.ranks, first.ranks)
    more = golden_ranking(model, images[1:], text=classes, labels=labels[1:], block=1, path=file)
    assert group_sizes == [2, 1] and torch.equal(more.ranks[0], first.ranks[1])
    loaded = Rankings.load(file)  # in the order of the last call, then the other images
    assert torch.equal(loaded.ranks, torch.stack([more.ranks[0], more.ranks[1], first.ranks[0]]))
    assert loaded.about == more.about and torch.equal(loaded.features[:2], more.features)
    assert torch.equal(loaded.sha256[:2], more.sha256) and len({bytes(row) for row in loaded.sha256.numpy()}) == 3
    relabelled = golden_ranking(model, images[:1], text=classes, labels=[1], block=1, path=file)
    assert group_sizes == [2, 1, 1] and not torch.equal(relabelled.ranks[0], first.ranks[0])


def test_a_file_of_other_rankings_is_refused_before_any_work(tmp_path, monkeypatch):
    from clipkernels.learn.patch_ranking import golden

    model, images, classes, _ = small()
    file = tmp_path / "ranks.safetensors"
    golden_ranking(model, images, score="feature", block=1, path=file)
    content = file.read_bytes()
    monkeypatch.setattr(golden, "_rank_images", lambda *_: pytest.fail("was ranked"))
    with pytest.raises(ValueError, match=r"expected rankings with the same options, got .* with block 1"):
        golden_ranking(model, images, score="feature", block=2, path=file)
    with torch.no_grad():
        model.visual.transformer.resblocks[3].mlp.c_fc.weight.add_(1)
    with pytest.raises(ValueError, match=r"with tower \{"):
        golden_ranking(model, images, score="feature", block=1, path=file)
    by_class = tmp_path / "classes.safetensors"
    monkeypatch.undo()
    golden_ranking(model, images, score="confidence", text=classes, block=1, path=by_class)
    monkeypatch.setattr(golden, "_rank_images", lambda *_: pytest.fail("was ranked"))
    golden_ranking(model, images, score="confidence", text=2 * classes + 1e-9, block=1, path=by_class)
    with pytest.raises(ValueError, match=r"expected rankings with the same classes and prompts, got .*classes"):
        golden_ranking(model, images, score="confidence", text=classes.flip(0), block=1, path=by_class)
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        golden_ranking(model, images, score="feature", block=1, path=tmp_path / "other.safetensors")
    assert file.read_bytes() == content


def test_images_that_are_none_are_skipped():
    model, images, classes, labels = small()
    expected = golden_ranking(model, images[::2], text=classes, labels=labels[::2], block=1)
    rankings = golden_ranking(model, [images[0], None, images[2]], text=classes, labels=labels, block=1)
    assert torch.equal(rankings.ranks, expected.ranks) and rankings.new == 2
    with pytest.raises(ValueError, match="images must hold at least one image, got 2 that are None"):
        golden_ranking(model, [None, None], score="feature", block=1)


def test_two_concurrent_runs_on_one_file_lose_nothing(tmp_path):
    model, images, *_ = small()
    file = tmp_path / "ranks.safetensors"
    options = {"score": "feature", "block": 1, "path": file}

    def another(done, total):
        golden_ranking(model, images[1:], **options)

    golden_ranking(model, images[:1], progress=another, **options)
    assert len(Rankings.load(file).ranks) == 3 and [path.name for path in tmp_path.iterdir()] == [file.name]


KILLED = """
import sys, torch, clipkernels as ck
from clipkernels.learn.patch_ranking import golden, golden_ranking
torch.set_num_threads(1)
golden.MAX_IMAGES_PER_PART = 2
images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def wait(done, total):
    if done == 4:
        print("half", flush=True)
        sys.stdin.read()

golden_ranking(ck.bundled()[0], images, score="feature", window=8, stride=8, block=5, step=64, path=sys.argv[1],
               progress=wait)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_a_killed_run_resumes(tiny, tmp_path, monkeypatch):
    from clipkernels.learn.patch_ranking import golden

    monkeypatch.setattr(golden, "MAX_IMAGES_PER_PART", 2)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"score": "feature", "window": 8, "stride": 8, "block": 5, "step": 64}
    files = [tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"]
    golden_ranking(tiny, images, **options, path=files[0])
    command = [sys.executable, "-c", KILLED, files[1]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "half\n"
        run.kill()
    assert not files[1].exists() and len(list(tmp_path.glob("killed*.parts/*.safetensors"))) == 2
    half = next(tmp_path.glob("killed*.parts")) / ".half-written"
    half.write_text("")
    os.utime(half, (0, 0))
    finished = []
    golden_ranking(tiny, images, **options, path=files[1], progress=lambda done, total: finished.append(done))
    assert finished == [6, 8, 8]
    assert files[1].read_bytes() == files[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "logit"}, 'score must be "label", "confidence" or "feature", got \'logit\''),
        ({"window": 5}, "window must be an int from 1 to 4, got 5"),
        ({"window": 2, "stride": 3}, "stride must be an int from 1 to 2, got 3"),
        ({"step": 0}, "step must be an int from 1 to 16, got 0"),
        ({"block": 4}, "block must be an int from 0 to 3, got 4"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"text": None}, 'text must be the class embeddings \\(K,E\\) for score="label", got none'),
        ({"text": torch.ones(5, 3)}, r"text must be \(K,E\) with E = 512, got \(5, 3\)"),
        ({"labels": None}, 'labels must be the true classes \\(n,\\) for score="label", got none'),
        ({"labels": torch.tensor([0, 1])}, r"labels must be \(n,\) = \(3\) torch.int64, got \(2\)"),
        ({"labels": torch.tensor([0, 1, 5])}, "labels must be from 0 to 4, got 0 to 5"),
        ({"images": torch.randn(0, 3, 32, 32), "labels": []}, "images must hold at least one image, got none"),
        ({"images": torch.randn(3, 3, 40, 40)}, r"images must be \(B,3,32,32\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(wrong, message):
    model, images, classes, labels = small()
    options = {"text": classes, "labels": labels, "block": 1, **wrong}
    with pytest.raises(ValueError, match=message):
        golden_ranking(model, options.pop("images", images), **options)


def test_a_tower_without_a_grid_is_refused():
    model, images, *_ = small()
    model.visual.positional_embedding = torch.nn.Parameter(model.visual.positional_embedding[:16])
    with pytest.raises(
        ValueError, match=r"must have a grid of patches of side 8, got 15 patches of an image of \(32, 32\)"
    ):
        golden_ranking(model, images, score="feature")


def test_a_block_that_carries_a_hook_is_not_ranked():
    model, images, *_ = small()
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    golden_ranking(model, images, score="feature", block=1)
    model.visual.transformer.resblocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match="block 1 carries a hook, which a ranking of its patches would skip"):
        golden_ranking(model, images, score="feature", block=1)
