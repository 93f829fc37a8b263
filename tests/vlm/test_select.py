"""`Select`: counts, the choice against a literal loop, and the memory of scores."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clipkernels as ck
from clipkernels.block import Ranking
from clipkernels.marks import Marks, cells_of, choose, choose_slots, patches_of, place_rows
from clipkernels.testing import transformers_tower

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("keep", "counts"), [(192 / 576, (162, 30)), (128 / 576, (108, 20)), (64 / 576, (54, 10))])
def test_the_division_is_that_of_visionzip(keep: float, counts: tuple[int, int]) -> None:
    assert ck.Select(keep).counts(576) == counts
    assert ck.Select(keep, merge_rest=False).counts(576) == (sum(counts), 0)


def test_counts_are_the_rounded_share_for_every_number() -> None:
    for tokens in range(1, 200):
        for percent in (1, 10, 25, 50, 99, 100):
            dominant, contextual = ck.Select(percent / 100).counts(tokens)
            assert dominant >= 1 and contextual >= 0
            assert 0 <= dominant + contextual - percent / 100 * tokens < 1 + 1e-9
            assert contextual <= tokens - dominant
    assert ck.Select(1.0).counts(7) == (7, 0)


def literal_choice(x: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Tensor:
    """Rows (S,C) of one image, by loops."""
    slots = len(x)
    order = sorted(range(slots), key=lambda slot: (-float(scores[slot]), slot))
    best, rest = sorted(order[:dominant]), sorted(order[dominant:])
    out = torch.full_like(x, float("nan"))
    for slot in best:
        out[slot] = x[slot]
    leaders = [rest[index * len(rest) // contextual] for index in range(contextual)]
    groups: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    for slot in rest:
        if groups and slot not in groups:
            cosines = [float(torch.cosine_similarity(keys[slot], keys[leader], dim=0)) for leader in leaders]
            groups[leaders[cosines.index(max(cosines))]].append(slot)
    for leader, members in groups.items():
        out[leader] = torch.stack([x[slot] for slot in members]).mean(0)
    return out


@pytest.mark.parametrize("shape", [(36, 9, 4), (36, 6, 0), (25, 24, 1), (7, 1, 3), (9, 9, 0)])
def test_the_choice_equals_a_literal_loop(shape: tuple[int, int, int]) -> None:
    slots, dominant, contextual = shape
    generator = torch.Generator().manual_seed(slots)
    x, scores, keys = (torch.randn(3, slots, *more, generator=generator).double() for more in ((5,), (), (4,)))
    scores = (scores * 3).round()  # ties
    actual = choose_slots(Ranking(scores, keys), dominant, contextual).apply(x)
    for image in range(3):
        expected = literal_choice(x[image], scores[image], keys[image], dominant, contextual)
        torch.testing.assert_close(actual[image], expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_cells_are_chosen_whole_and_patches_stay_in_place() -> None:
    x = torch.arange(2 * 37 * 3.0).view(2, 37, 3)
    assert torch.equal(patches_of(cells_of(x[:, 1:], 3), 3), x[:, 1:])
    assert cells_of(x[:, 1:], 3)[0, 1, :, 0].tolist() == [
        3 * (1 + row * 6 + column) for row in (0, 1, 2) for column in (3, 4, 5)
    ]
    scores = torch.zeros(2, 36)
    scores[:, 6 * 4 + 4] = 1  # in the last of the four cells
    tokens, (other,) = choose(Marks(ck.Select(0.25, merge_rest=False), 3), Ranking(scores, x[:, 1:]), 1, [x, x + 1])
    stays = torch.tensor([row >= 3 and column >= 3 for row in range(6) for column in range(6)])
    assert torch.equal(tokens[:, :1], x[:, :1]) and torch.equal(tokens[:, 1:][:, stays], x[:, 1:][:, stays])
    assert tokens[:, 1:][:, ~stays].isnan().all() and torch.equal(other[:, 1:][:, stays], x[:, 1:][:, stays] + 1)


def test_rows_are_placed_once_and_carry_gradients() -> None:
    x = torch.randn(2, 4, 3, requires_grad=True)
    placed = place_rows(x, torch.tensor([[4, 0, 2], [1, 3, 2]]), 1, 6)
    assert torch.equal(placed[0, [5, 1, 3]], x[0, 1:]) and placed[0, [2, 4]].isnan().all()
    placed.nan_to_num(0).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_scores_that_are_not_finite_rank_last() -> None:
    scores = torch.tensor([[float("nan"), 0.1, float("-inf"), 0.3, float("inf")]])
    choice = choose_slots(Ranking(scores, torch.randn(1, 5, 2)), 3, 0)
    assert choice.dominant.tolist() == [[1, 3, 4]]
    choice = choose_slots(Ranking(scores, torch.full((1, 5, 2), float("nan"))), 1, 2)
    assert choice.shares is not None and choice.shares.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    for arguments, message in (
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"score": "attention"}, "score"),
        ({"layer": 0.5}, "layer"),
        ({"merge_rest": 1}, "merge_rest"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ck.Select(**arguments)
    with pytest.raises(ValueError, match="layer must be one of 4 blocks, -4 to 3, got Select"):
        ck.Select(layer=4).plan(65, 4)
    with pytest.raises(ValueError, match=r"a Rank step: use ck\.Select"):
        ck.Schedule.from_plan(ck.Select().plan(65, 4))
    model = transformers_tower("CLIPModel", 2, hidden_size=64, num_attention_heads=2, image_size=64)
    with pytest.raises(ValueError, match="chooses tokens of a prompt: patch a vision-language model"):
        ck.patch(model, ck.Select())
    assert ck.method_of(model) is None


@pytest.mark.parametrize("merge_rest", [True, False])
@pytest.mark.parametrize(("score", "layer"), [("cls", -2), ("received", -3), ("cls", 0)])
@torch.no_grad()
def test_a_tower_hands_over_what_its_own_attention_ranks_first(score: Any, layer: int, merge_rest: bool) -> None:
    models = pytest.importorskip("tests.vlm.models", reason="transformers 5.23 or later is not installed")
    model, pixels = models.build("Llava"), models.prompts("Llava", [2], [9])["pixel_values"]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    outputs = tower(pixels, output_attentions=True, output_hidden_states=True)
    attention = outputs.attentions[layer].mean(1)
    scores = (attention[:, 0] if score == "cls" else attention.mean(1))[:, 1:]
    block = tower.encoder.layers[layer]
    entering = outputs.hidden_states[layer - 1 if layer < 0 else layer]
    keys = block.self_attn.k_proj(block.layer_norm1(entering)).unflatten(2, (4, -1)).mean(2)[:, 1:]
    counts, rows = ck.Select(0.25, merge_rest=merge_rest).counts(64), outputs.hidden_states[-2][:, 1:]
    chosen = [literal_choice(*image, *counts) for image in zip(rows, scores, keys, strict=True)]
    expected = model.model.multi_modal_projector(torch.stack(chosen))
    ck.patch(model, ck.Select(0.25, score, layer, merge_rest), hand_over=True)
    actual = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(rows.std()), equal_nan=True)
    assert int(actual[..., 0].isnan().sum()) == 2 * (64 - 16)


@torch.no_grad()
def test_a_tower_without_cls_ranks_by_received_attention() -> None:
    models = pytest.importorskip("tests.vlm.models", reason="transformers 5.23 or later is not installed")
    model, pixels = models.build("Gemma3"), models.prompts("Gemma3", [2], [9])["pixel_values"]
    model.model.vision_tower.set_attn_implementation("eager")
    attention = model.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    squares = attention.mean((1, 2)).view(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    ck.patch(model, ck.Select(0.25, merge_rest=False), hand_over=True)
    rows = model.model.get_image_features(pixels).pooler_output
    assert [(~image[:, 0].isnan()).nonzero()[:, 0].tolist() for image in rows] == squares.topk(
        4
    ).indices.sort().values.tolist()


class _Peak(TorchDispatchMode):
    """The largest number of bytes of tensors that were made inside and are alive at once."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.inputs:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def extra_memory(tokens: int, signal: str | None) -> int:
    """Bytes that attention of 16 heads of 64 needs at once, without its inputs."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 16, tokens, 64).unbind()
    gc.collect()
    with torch.no_grad(), _Peak(q, k, v) as peak:
        ck.ops.attention(q, k, v, signal=signal)
    return peak.peak


def test_scores_take_memory_that_grows_with_the_tokens_alone() -> None:
    small, large = extra_memory(2048, "received"), extra_memory(4096, "received")
    dense = 4 * 16 * 4096**2
    assert large <= 2.1 * small and large <= 100e6 < dense / 10, (small, large)
    assert extra_memory(4096, "cls") <= large


@pytest.mark.parametrize("tokens", [577, 2048])
def test_received_scores_equal_the_column_means_of_the_whole_attention(tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 16, tokens, 64).unbind()
    _, scores = ck.ops.attention(q, k, v, signal="received")
    whole = torch.softmax(q.double() @ k.double().mT / 8, -1).mean((1, 2))[:, 1:]
    torch.testing.assert_close(scores.double(), whole, rtol=1e-5, atol=0)
