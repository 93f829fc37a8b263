"""match_tokens and merge_tokens against the definition read one token at a time."""

import pytest
import torch

import clipkernels as ck
from clipkernels.testing import assert_within_budget, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def literal_match(metric, r, prefix):
    """Kept, source, target of one image (N,D), edge by edge."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    even, odd = range(0, len(metric), 2), range(1, len(metric), 2)
    edges = []
    for a in even:
        similarity = [float("-inf") if a < prefix or b < prefix else float(unit[a] @ unit[b]) for b in odd]
        similarity = [float("-inf") if value != value else value for value in similarity]
        best = max(similarity)
        edges.append((best, similarity.index(best)))
    order = sorted(range(len(edges)), key=lambda i: (-edges[i][0], i))
    source = sorted(order[:r])
    return sorted(order[r:]), source, [edges[i][1] for i in source]


def literal_merge(x, kept, source, target, size):
    """Tokens and sizes of one image, in fp64."""
    x, size = x.double(), size.double()
    tokens, sizes = [x[2 * i] for i in kept], [size[2 * i] for i in kept]
    for b in range(len(x) // 2):
        group = [2 * b + 1] + [2 * s for s, t in zip(source, target, strict=True) if t == b]
        weight = sum(size[i] for i in group)
        tokens.append(sum(size[i] * x[i] for i in group) / weight)
        sizes.append(weight)
    return torch.stack(tokens), torch.stack(sizes)


def duplicates(batch=3, tokens=16, width=8):
    """Tokens drawn from four vectors: every similarity is tied many times over."""
    generator = torch.Generator().manual_seed(0)
    # Signed unit axes: similarities are exactly -1, 0 or 1 in every precision.
    pool = torch.cat([torch.eye(width)[:2], -torch.eye(width)[:2]])
    return pool[torch.randint(4, (batch, tokens), generator=generator)]


@pytest.mark.parametrize(
    ("tokens", "prefix", "r"),
    [(2, 1, 0), (3, 1, 1), (4, 0, 2), (63, 1, 31), (64, 0, 32), (65, 1, 13), (65, 5, 30), (257, 1, 16)],
)
def test_matching_is_the_definition_on_random_tokens(tokens, prefix, r):
    metric = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    match = ck.ops.match_tokens(metric, r, prefix)
    for image in range(2):
        expected = literal_match(metric[image], r, prefix)
        assert [index[image].tolist() for index in match] == list(expected)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("r", [0, 1, 4, 7])
def test_matching_is_the_definition_on_tied_and_duplicate_tokens(prefix, r):
    metric = duplicates()
    match = ck.ops.match_tokens(metric, r, prefix)
    for image in range(len(metric)):
        assert [index[image].tolist() for index in match] == list(literal_match(metric[image], r, prefix))


def test_the_prefix_neither_merges_nor_is_merged_into():
    metric = torch.ones(1, 9, 4)
    match = ck.ops.match_tokens(metric, 3, prefix=3)
    assert match.source.tolist() == [[2, 3, 4]]
    assert match.target.tolist() == [[1, 1, 1]]


def test_nan_similarity_counts_as_the_smallest():
    metric = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(2))
    metric[0, 2] = float("nan")
    match = ck.ops.match_tokens(metric, 2, prefix=0)
    assert [index[0].tolist() for index in match] == list(literal_match(metric[0], 2, 0))
    assert 1 in match.kept[0].tolist()


def test_matching_looks_at_directions_only():
    metric = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(3))
    scaled = metric * torch.logspace(-3, 3, 33)[None, :, None]
    for one, other in zip(ck.ops.match_tokens(metric, 9), ck.ops.match_tokens(scaled, 9), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("tokens", "r"), [(1, 0), (2, 0), (3, 1), (63, 20), (65, 32), (257, 13)])
def test_merging_is_the_size_weighted_mean(tokens, r, sized, dtype):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, tokens, 24, generator=generator).to(dtype)
    size = torch.randint(1, 9, (2, tokens), generator=generator).float() if sized else None
    match = ck.ops.match_tokens(torch.randn(2, tokens, 8, generator=generator), r)
    merged = ck.ops.merge_tokens(x, match, size)
    ones = torch.ones(2, tokens)
    for image in range(2):
        indices = [index[image].tolist() for index in match]
        exact, sizes = literal_merge(x[image], *indices, (ones if size is None else size)[image])
        assert_within_budget(merged.tokens[image], exact, exact.to(dtype))
        assert torch.equal(merged.size[image].double(), sizes)


def test_sizes_add_up_to_the_tokens_at_the_start():
    x = torch.randn(3, 65, 16, generator=torch.Generator().manual_seed(5))
    size = None
    for r in (32, 16, 8, 4):
        match = ck.ops.match_tokens(x, r)
        x, size, _ = ck.ops.merge_tokens(x, match, size)
        assert torch.equal(size.sum(1), torch.full((3,), 65.0))
    assert x.shape[1] == 5


def test_the_order_of_the_sources_does_not_matter():
    generator = torch.Generator().manual_seed(6)
    x, size = (
        torch.randn(1, 65, 16, generator=generator, dtype=torch.float64),
        torch.rand(1, 65, generator=generator) + 1,
    )
    match = ck.ops.match_tokens(x, 30)
    shuffle = torch.randperm(30, generator=generator)
    shuffled = ck.ops.Match(match.kept, match.source[:, shuffle], match.target[:, shuffle])
    one, other = ck.ops.merge_tokens(x, match, size.double()), ck.ops.merge_tokens(x, shuffled, size.double())
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(one.size, other.size, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_merge_to_themselves_and_untouched_ones_are_bit_equal(dtype):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 64, 24, generator=generator).to(dtype)
    x[:, ::2] = x[:, 1::2]
    size = torch.randint(1, 9, (1, 64), generator=generator).float()
    match = ck.ops.Match(torch.arange(16, 32)[None], torch.arange(16)[None], torch.arange(16)[None])
    merged = ck.ops.merge_tokens(x, match, size)
    assert torch.equal(merged.tokens, torch.cat([x[:, 32::2], x[:, 1::2]], 1))


def test_any_strides_give_the_same_result():
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(8))
    match = ck.ops.match_tokens(x, 5)
    gaps = ck.ops.match_tokens(strided(x), 5)
    assert all(torch.equal(a, b) for a, b in zip(match, gaps, strict=True))
    assert torch.equal(ck.ops.merge_tokens(x, match).tokens, ck.ops.merge_tokens(strided(x), match).tokens)


def test_norm_is_the_layer_norm_of_the_result():
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(9))
    weight, bias = torch.randn(2, 24, generator=torch.Generator().manual_seed(10))
    merged = ck.ops.merge_tokens(x, ck.ops.match_tokens(x, 5), norm=(weight, bias, 1e-5))
    torch.testing.assert_close(merged.normed, torch.nn.functional.layer_norm(merged.tokens, (24,), weight, bias, 1e-5))


def test_merging_passes_gradcheck_in_double_and_matching_carries_no_gradient():
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64).requires_grad_()
    match = ck.ops.match_tokens(x, 3)
    assert not any(index.requires_grad for index in match)
    size = torch.arange(1.0, 10).expand(2, -1).double()
    assert torch.autograd.gradcheck(lambda x: ck.ops.merge_tokens(x, match, size).tokens, x)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch_size_works(batch):
    x = torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(12))[:batch]
    merged = ck.ops.merge_tokens(x, ck.ops.match_tokens(x, 4))
    assert merged.tokens.shape == (batch, 13, 8) and merged.size.shape == (batch, 13)


@pytest.mark.parametrize(
    ("metric", "r", "prefix", "message"),
    [
        (torch.randn(2, 9), 1, 1, r"metric must be \(B,N,D\), got \(2,9\)"),
        (torch.randn(2, 9, 4), 5, 1, r"r must be an int from 0 to \(N - prefix\)//2 = 4, got 5"),
        (torch.randn(2, 9, 4), -1, 1, "got -1"),
        (torch.randn(2, 9, 4), 1.0, 1, "got 1.0"),
        (torch.randn(2, 9, 4), 1, 10, "prefix must be an int from 0 to N = 9, got 10"),
        (torch.ones(2, 9, 4, dtype=torch.int32), 1, 1, "metric must be float32"),
    ],
)
def test_a_bad_match_is_refused(metric, r, prefix, message):
    with pytest.raises(ValueError, match=message):
        ck.ops.match_tokens(metric, r, prefix)


def test_a_match_of_other_tokens_is_refused():
    x = torch.randn(2, 9, 4)
    match = ck.ops.match_tokens(torch.randn(2, 11, 4), 2)
    with pytest.raises(ValueError, match="match must hold kept, source, target of shapes"):
        ck.ops.merge_tokens(x, match)
    with pytest.raises(ValueError, match="match must be int64"):
        ck.ops.merge_tokens(x, ck.ops.Match(*(i.int() for i in ck.ops.match_tokens(x, 2))))
    with pytest.raises(ValueError, match=r"size must be \(B,N\) = \(2,9\) on cpu, got \(2,8\) on cpu"):
        ck.ops.merge_tokens(x, ck.ops.match_tokens(x, 2), size=torch.ones(2, 8))


def test_the_prefix_stays_even_when_everything_else_is_nan():
    metric = torch.full((1, 9, 4), float("nan"))
    metric[0, :3] = 1
    for prefix in (1, 2, 3):
        match = ck.ops.match_tokens(metric, 3, prefix=prefix)
        assert match.source.min() * 2 >= prefix
        assert match.target.min() * 2 + 1 >= prefix


def test_autocast_does_not_narrow_the_similarities():
    metric = torch.randn(2, 65, 64, generator=torch.Generator().manual_seed(13))
    expected = ck.ops.match_tokens(metric, 26)
    with torch.autocast("cpu", torch.bfloat16):
        came = ck.ops.match_tokens(metric, 26)
    assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))
