"""Arguments of a wrong type or value: every operation raises one line that names the argument, on every backend."""

import inspect

import pytest
import torch
from torch import nn

import clipkernels as ck
from tests.bad_values import BAD

# Where an argument takes one of the bad values.
OPTIONAL = {"size", "signal", "norm", "weights", "offsets", "bias", "scale"}
NUMBERS = {"alpha", "beta", "beta2", "beta3"}
TAKEN = {
    "None": OPTIONAL,
    "True": {"fuse", "terms"},
    "1.5": NUMBERS,
    "-1": NUMBERS - {"alpha"},
}


def arguments():
    """The arguments of every operation, all of them given."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    q, k, v = normal(3, 2, 2, 9, 16)
    x, scores, vector = normal(2, 9, 16), normal(2, 8), normal(16)
    size, norm = torch.ones(2, 9), (vector, vector, 1e-5)
    mixer = ck.ops.Mixer(*(normal(*axes) for axes in ((16,), (16,), (16, 9), (16,), (9, 16), (9,), (16,), (16,))),
                         *(normal(*axes) for axes in ((128, 16), (128,), (16, 128), (16,), (16,), (1,))))  # fmt: skip
    return {
        "attention": {"q": q, "k": k, "v": v, "size": size, "signal": "cls", "prefix": 1},
        "rank_tokens": {"q": q, "k": k, "heads": "mean", "query": "cls", "size": size, "prefix": 1},
        "predict_scores": {"x": x, "mixer": mixer, "prefix": 1},
        "prune_tokens": {
            "x": x, "scores": scores, "keep": 3, "fuse": True, "heads": "mean", "prefix": 1, "norm": norm,
        },
        "condense_tokens": {
            "x": x, "scores": scores, "keep": 3, "merge": 4, "centers": 2, "weights": scores, "heads": "mean",
            "prefix": 1, "first": 0, "norm": norm,
        },
        "match_tokens": {"metric": x, "r": 2, "prefix": 1},
        "merge_tokens": {"x": x, "match": ck.ops.match_tokens(x, 2), "size": size, "norm": norm},
        "cross_attention": {"visual": x, "text": normal(5, 16), "alpha": 0.5},
        "calip_logits": {
            "visual": x, "pooled": normal(2, 16), "text": normal(5, 16), "alpha": 0.5, "beta2": 1.0, "beta3": 0.1,
            "terms": False,
        },
        "affinity": {
            "queries": normal(2, 16), "support": normal(4, 16), "labels": torch.tensor([0, 0, 1, 2]), "classes": 3,
            "beta": 5.0, "weights": torch.ones(4), "offsets": torch.tensor([0, 2, 3, 4]),
        },
        "targeted_l1": {
            "student": x, "teacher": normal(2, 9, 5), "projection": normal(5, 16), "weights": torch.ones(2, 9),
            "mask": torch.ones(2, 9, dtype=torch.bool),
        },
        "bias_act": {"x": x, "bias": vector, "act": "gelu"},
        "add_norm": {"x": x, "y": x, "bias": vector, "scale": vector, "norm": norm},
    }  # fmt: skip


OPERATIONS = [name for name in ck.ops.__all__ if inspect.isfunction(getattr(ck.ops, name))]


def assert_refused(name, change, shown, backend):
    """Assert that a call with one argument changed raises one line that starts with the argument's name."""
    call, valid = getattr(ck.ops, name), arguments()[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**{**valid, "backend": backend, **change})
    message = str(caught.value)
    assert message.startswith(shown) and "\n" not in message and len(message) < 400, (name, *change, message)


def test_every_argument_of_every_operation_is_tried():
    for name in OPERATIONS:
        expected = set(inspect.signature(getattr(ck.ops, name)).parameters) - {"backend"}
        assert set(arguments()[name]) == expected


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bad_value_is_one_line_that_names_the_argument(backend, name, bad):
    for argument in arguments()[name]:
        if argument not in TAKEN.get(bad, ()):
            assert_refused(name, {argument: BAD[bad]()}, argument, backend)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backend_must_be_one_of_three_names(name):
    for bad in BAD.values():
        assert_refused(name, {}, "backend must be", bad())


@pytest.mark.parametrize("name", ["prune_tokens", "condense_tokens", "merge_tokens", "add_norm"])
def test_every_part_of_a_norm_is_checked(backend, name):
    weight, bias, eps = arguments()[name]["norm"]
    for bad in (make() for make in BAD.values()):
        assert_refused(name, {"norm": (bad, bias, eps)}, "norm's weight", backend)
        assert_refused(name, {"norm": (weight, bad, eps)}, "norm's bias", backend)
    for bad in (*(make() for bad, make in BAD.items() if bad != "1.5"), 0.0, 0):
        assert_refused(name, {"norm": (weight, bias, bad)}, "norm's eps", backend)
    assert_refused(name, {"norm": (weight, bias)}, "norm must be (weight, bias, eps), got 2 values", backend)


def test_every_part_of_a_match_and_of_a_mixer_is_checked(backend):
    match, mixer = arguments()["merge_tokens"]["match"], arguments()["predict_scores"]["mixer"]
    for make in BAD.values():
        for field in match._fields:
            assert_refused("merge_tokens", {"match": match._replace(**{field: make()})}, "match", backend)
    for bad, make in BAD.items():
        for field in mixer._fields[:-1]:
            assert_refused("predict_scores", {"mixer": mixer._replace(**{field: make()})}, field, backend)
        if bad != "1.5":
            assert_refused("predict_scores", {"mixer": mixer._replace(eps=make())}, "eps", backend)
    assert_refused("merge_tokens", {"match": tuple(match)}, "match must be an ops.Match, got tuple", backend)
    assert_refused("predict_scores", {"mixer": tuple(mixer)}, "mixer must be an ops.Mixer, got tuple", backend)


@pytest.mark.parametrize("name", ["attention", "rank_tokens", "merge_tokens"])
def test_sizes_are_real_finite_and_not_negative(backend, name):
    for value in (-1.0, float("nan"), float("inf")):
        size = torch.ones(2, 9)
        size[1, 3] = value
        assert_refused(name, {"size": size}, "size must be finite and at least 0", backend)
    assert_refused(name, {"size": torch.ones(2, 9, dtype=torch.complex64)}, "size must be real", backend)
    assert_refused(name, {"size": torch.ones(2, 9, requires_grad=True)}, "size must not require a gradient", backend)
    getattr(ck.ops, name)(**{**arguments()[name], "size": torch.ones(2, 9, dtype=torch.int64)}, backend=backend)


MATCH = "match's kept and source must hold each of the 5 even tokens once"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kept", 5, MATCH),
        ("kept", -1, MATCH),
        ("source", 2**40, MATCH),
        ("source", None, MATCH),
        ("target", 4, "match's target must be from 0 to N//2 - 1 = 3, got 0 to 4"),
        ("target", -1, "match's target must be from 0 to N//2 - 1 = 3, got -1 to "),
    ],
)
def test_indices_of_a_match_are_in_range_and_once(backend, field, value, message):
    x = arguments()["merge_tokens"]["x"]
    match = ck.ops.Match(torch.tensor([[0, 2, 4]] * 2), torch.tensor([[1, 3]] * 2), torch.tensor([[0, 1]] * 2))
    wrong = getattr(match, field).clone()
    wrong[1, 1] = wrong[1, 0] if value is None else value
    assert_refused("merge_tokens", {"match": match._replace(**{field: wrong})}, message, backend)
    assert ck.ops.merge_tokens(x, match, backend=backend).tokens.shape == (2, 7, 16)


@pytest.mark.parametrize(
    ("labels", "offsets", "message"),
    [
        ([0, 0, 1, 2], [0, 2, 3, 5], "offsets[3] must be 4, the first row of its class, got 5"),
        ([0, 0, 1, 2], [0, 1, 3, 4], "offsets[1] must be 2"),
        ([-1, 0, 1, 7], [0, 2, 3, 4], "offsets[0] must be 1"),
        ([0, 1, 0, 2], [0, 2, 3, 4], "labels must ascend where offsets are given"),
    ],
)
def test_offsets_agree_with_the_labels(backend, labels, offsets, message):
    change = {"labels": torch.tensor(labels), "offsets": torch.tensor(offsets)}
    assert_refused("affinity", change, message, backend)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_values_are_not_read_in_a_graph(device):
    # A check that read them would break the graph, or fix the batch in a trace.
    bad = ck.ops.Match(torch.tensor([[0, 2, 2]] * 2), torch.tensor([[1, 3]] * 2), torch.tensor([[0, 1]] * 2))
    x, size = torch.randn(2, 9, 16), torch.full((2, 9), 2.0)
    compiled = torch.compile(ck.ops.merge_tokens, backend="eager", fullgraph=True)
    assert compiled(x, bad, size).tokens.shape == (2, 7, 16)
    program = torch.export.export(_Merge(), (x, *bad, size))
    assert program.module()(x, *bad, size).shape == (2, 7, 16)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, *bad, size)]
        assert _Merge()(*fake).shape == (2, 7, 16)
    assert _Merge()(*(tensor.to("meta") for tensor in (x, *bad, size))).shape == (2, 7, 16)
    traced = torch.jit.trace(_Merge(), (x, *bad, size), check_trace=False)
    assert traced(*(tensor[:1] for tensor in (x, *bad, size))).shape == (1, 7, 16)
    assert torch.func.vmap(_Merge())(*(tensor[:, None] for tensor in (x, *bad, size))).shape == (2, 1, 7, 16)


class _Merge(nn.Module):
    """A module that merges."""

    def forward(self, x, kept, source, target, size):
        return ck.ops.merge_tokens(x, ck.ops.Match(kept, source, target), size).tokens
