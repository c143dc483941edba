"""The training form of integer rows: gradients, scales that follow, errors, and what quantization-aware is worth."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from embcomp.errors import EmbcompError, IncompatibleStateError
from embcomp.storage import QuantizedRows, grids, make_row_store
from embcomp.storage.lsq import LearnedGrid

BITS = (8, 4, 3, 2, 1)
LEARNED = ("column", "table", "group4", "column:offset", "group4:offset")


def written_out(values, span, offset, bits):
    """The fake quantization as a formula that autograd differentiates, with the straight-through trick for round."""
    half = (2**bits - 1) / 2
    step = span.abs() / 2 ** (bits - 1)
    scaled = (values - offset) / step
    rounded = scaled + (torch.round(scaled + half) - half - scaled).detach()
    inside = scaled.detach().abs() <= 2 ** (bits - 1)
    return torch.where(inside, rounded, torch.sign(scaled.detach()) * half) * step + offset


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 4), (1,), (4,), (7, 3, 1), (7, 3, 4)])
@pytest.mark.parametrize("with_offset", [False, True])
def test_gradients_of_span_and_offset_are_those_of_the_formula(bits, shape, with_offset):
    torch.manual_seed(bits)
    values = torch.randn(7, 3, 4, requires_grad=True)
    span = grids.span_of(torch.tensor(grids.GAUSSIAN_STEP[bits]), bits) * (0.5 + torch.rand(shape))
    span = ((span * 1024).round() / 1024).requires_grad_()  # few bits, so that the step is not rounded
    with torch.no_grad():
        span.view(-1)[0] *= -1
    offset = (0.3 * torch.randn(shape)).requires_grad_() if with_offset else None
    upstream = torch.randn(7, 3, 4)
    values_per_step = 84 / span.numel()
    found = LearnedGrid.apply(values, span, offset, bits, values_per_step)
    inputs = [tensor for tensor in (span, offset) if tensor is not None]
    grads = torch.autograd.grad(found, inputs, upstream)
    formula = written_out(values, span, offset if with_offset else torch.zeros(()), bits)
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(formula, inputs, upstream)
    lsq = 1 / math.sqrt(values_per_step * (2**bits - 1) / 2)
    # An SGD step must move the step by what LSQ's would: the span has 2^(bits − 1) times the size, twice over.
    factors = [lsq * 4 ** (bits - 1), lsq]
    for grad, reference, factor in zip(grads, expected, factors, strict=False):
        torch.testing.assert_close(grad, reference * factor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_values_out_of_range_can_come_back_and_do_not_run_away(bits):
    edge = 1.0
    span = torch.tensor([edge])
    places = torch.tensor([0.0, 0.99, 1.01, 1.99, 2.01, 50.0])
    values = torch.cat([places, -places]).unsqueeze(1).requires_grad_()
    outward = -torch.sign(values.detach())
    for direction, passes in [(1, [1, 1, 1, 1, 0, 0]), (-1, [1] * 6)]:
        upstream = outward * direction + (values.detach() == 0)
        (grad,) = torch.autograd.grad(LearnedGrid.apply(values, span, None, bits, 1.0), values, upstream)
        assert torch.equal(grad, upstream * torch.tensor(passes * 2)[:, None])


def test_a_span_of_either_sign_means_the_same():
    values = torch.randn(50, 4)
    outputs, grads = [], []
    for sign in (1, -1):
        span = (sign * torch.rand(4, generator=torch.Generator().manual_seed(0))).requires_grad_()
        outputs.append(LearnedGrid.apply(values, span, None, 2, 50.0))
        outputs[-1].square().sum().backward()
        grads.append(span.grad)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(grads[0], -grads[1])


@pytest.mark.parametrize("bits", BITS)
def test_row_grids_pass_gradients_straight_through(bits):
    store = make_row_store(f"int{bits}:row", [20], 6)
    store.reset_parameters([0.1])
    upstream = torch.randn(5, 6)
    store(torch.arange(5)).backward(upstream)
    assert torch.equal(store.weight.grad[:5], upstream)
    assert not store.weight.grad[5:].any()


@pytest.mark.parametrize("row_format", ["int8:row", "int2:column", "int4:table:offset", "int2:group4:offset"])
def test_sparse_gradients_are_sparse_and_equal_the_dense_ones(row_format):
    grads = []
    for sparse in (False, True):
        store = make_row_store(row_format, [12, 20], 4, sparse=sparse)
        store.reset_parameters([0.1, 0.2], torch.Generator().manual_seed(0))
        rows, segment = torch.tensor([3, 3, 30, 12]), torch.tensor([0, 0, 1, 1])
        store(rows, segment).square().sum().backward()
        grads.append({name: p.grad for name, p in store.named_parameters()})
    assert grads[1]["weight"].is_sparse
    assert grads[1]["weight"].coalesce().indices().tolist() == [[3, 12, 30]]
    if "group" in row_format:
        assert grads[1]["span"].is_sparse
    torch.testing.assert_close({n: g.to_dense() for n, g in grads[1].items()}, grads[0])


@pytest.mark.parametrize(("bits", "granularity"), [*((b, "column") for b in BITS), (2, "table"), (2, "group500")])
def test_scales_follow_rows_that_grow_thirtyfold(bits, granularity):
    """From N(0, 0.01²) to rows of N(0, 0.3²), with plain Adam at 1e-3: neither too slow nor jumping."""
    generator = torch.Generator().manual_seed(0)
    target = 0.3 * torch.randn(2000, 4, generator=generator)
    store = make_row_store(f"int{bits}:{granularity}", [2000], 4)
    store.reset_parameters([0.01], generator)
    optimizer, rows = torch.optim.Adam(store.parameters(), lr=1e-3), torch.arange(2000)
    for _ in range(2500 if bits == 8 else 1500):
        optimizer.zero_grad()
        (store(rows, 0) - target).square().sum().backward()
        optimizer.step()
    fitted = make_row_store(f"int{bits}:{granularity}", [2000], 4)
    fitted.write_(0, target)
    fitted.fit_scales_()
    learned, best = ((form(rows, 0) - target).square().mean() for form in (store, fitted))
    assert learned < 2.5 * best  # rounding at random, which is where straight-through training ends, has 2
    torch.testing.assert_close(store.span.abs(), fitted.span, rtol=0.5, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LEARNED)
def test_initial_scales_fit_the_initial_rows_of_each_segment(bits, kind):
    store = make_row_store(f"int{bits}:{kind}", [4000, 2000], 3)
    store.reset_parameters([0.01, 1.0], torch.Generator().manual_seed(0))
    for rows, segment, deviation in [(torch.arange(4000), 0, 0.01), (torch.arange(4000, 6000), 1, 1.0)]:
        error = (store(rows, segment) - store.weight[rows]).square().mean() / deviation**2
        best = {8: 1.0e-4, 4: 0.01154, 3: 0.03744, 2: 0.1188, 1: 0.3634}[bits]
        assert error.item() == pytest.approx(best, rel=0.3 if bits == 8 else 0.1)


def test_rows_that_start_at_zero_train():
    store = make_row_store("int2:column", [10], 2)
    store.reset_parameters([0.0])
    optimizer = torch.optim.Adam(store.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (store(torch.arange(10)) - 0.5).square().sum().backward()
        optimizer.step()
    assert (store(torch.arange(10)) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LEARNED)
def test_fit_scales_after_rows_were_written(bits, kind):
    store = make_row_store(f"int{bits}:{kind}", [30, 0, 7], 4)
    store.reset_parameters([0.01, 0.01, 0.01])
    rows, segment = torch.arange(37), torch.tensor([0] * 30 + [2] * 7)
    store.write_(0, torch.randn(37, 4) * 3)
    before = (store(rows, segment) - store.weight).square().mean()
    store.fit_scales_()
    after = (store(rows, segment) - store.weight).square().mean()
    assert after < 0.6 * before


@pytest.mark.parametrize("granularity", ["row", "column", "table", "group16", "column:offset"])
def test_after_trains_plain_float32_and_rounds_the_better_the_more_bits(granularity):
    errors = []
    for bits in (1, 2, 3, 4, 8):
        store = make_row_store(f"int{bits}:{granularity}:after", [500, 300], 16)
        store.reset_parameters([0.1, 1.0], torch.Generator().manual_seed(0))
        assert [name for name, _ in store.named_parameters()] == ["weight"]
        rows, segment = torch.arange(800), torch.tensor([0] * 500 + [1] * 300)
        assert torch.equal(store(rows, segment), store.weight)
        assert torch.equal(store.eval()(rows, segment), store.weight)
        served = store.finalize()
        assert store.serve_bytes() == served.serve_bytes()
        errors.append((served(rows, segment) - store.weight).square().mean().item())
    assert all(fewer > 2 * more for fewer, more in itertools.pairwise(errors))


def trained_on_shared_tasks(row_format: str, seed: int) -> float:
    """Loss of the served form: rows and a head learned together, for 40 tasks that share 4 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(300, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    labels = torch.bernoulli(torch.sigmoid(truth), generator=generator)
    store = make_row_store(row_format, [300], 4)
    store.reset_parameters([0.01], generator)
    head = torch.randn(4, 40, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([*store.parameters(), head], lr=1e-2)
    for _ in range(1000):
        rows = torch.randint(0, 300, (128,), generator=generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(store(rows) @ head, labels[rows]).backward()
        optimizer.step()
    return F.binary_cross_entropy_with_logits(store.finalize()(torch.arange(300)) @ head, labels).item()


@pytest.mark.parametrize("bits", [2, 1])
def test_quantization_aware_beats_rounding_afterwards(bits):
    full, aware, after = (
        sum(trained_on_shared_tasks(row_format, seed) for seed in range(2))
        for row_format in ("float32", f"int{bits}:column", f"int{bits}:column:after")
    )
    assert full < aware < 0.95 * after


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "row_format", ["int8:row", "int4:row:after", "int2:column", "int2:column:after", "int1:group4"]
)
def test_values_that_are_no_finite_numbers_are_an_error(row_format, value):
    store = make_row_store(row_format, [50], 4)
    store.reset_parameters([0.1])
    store.write_(17, torch.tensor([[0.0, value, 0.0, 0.0]]))
    with pytest.raises(IncompatibleStateError, match=r"rows 0 to 49.*no finite"):
        store.finalize()


def test_scales_that_float16_can_not_hold_are_an_error():
    store = make_row_store("int4:row", [8], 4)
    store.reset_parameters([1e6])
    with pytest.raises(EmbcompError, match="scales"):
        store.finalize()
    with torch.no_grad():
        store = make_row_store("int4:column", [8], 4)
        store.reset_parameters([0.1])
        store.span[0, 0] = math.nan
    with pytest.raises(EmbcompError, match="scales"):
        store.finalize()


@pytest.mark.parametrize("row_format", ["int8:row", "int2:column:offset", "int3:group4", "int4:table:after"])
def test_copy_pickle_and_state_dict_of_the_training_form(row_format):
    store = make_row_store(row_format, [9, 5], 6)
    store.reset_parameters([0.1, 0.2])
    rows, segment = torch.arange(14), torch.tensor([0] * 9 + [1] * 5)
    other = make_row_store(row_format, [9, 5], 6)
    other.load_state_dict(store.state_dict())
    for same in (other, copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert isinstance(same, QuantizedRows)
        assert torch.equal(same(rows, segment), store(rows, segment))
        assert torch.equal(same.finalize()(rows, segment), store.finalize()(rows, segment))


@pytest.mark.parametrize("row_format", ["int8:row", "int2:column", "int2:table:after", "int4:group3"])
def test_finalize_and_evaluation_change_nothing(row_format):
    store = make_row_store(row_format, [9, 5], 6).eval()
    store.reset_parameters([0.1, 0.2])
    before = copy.deepcopy(store.state_dict())
    store(torch.arange(14), torch.zeros(14, dtype=torch.int64))
    served = store.finalize()
    for buffer in served.buffers():
        buffer.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in store.state_dict().items())


@pytest.mark.parametrize("row_format", ["int8:row", "int2:column:after", "int3:column", "int1:group7:after"])
def test_finalize_in_chunks_leaves_no_seam(row_format, monkeypatch):
    store = make_row_store(row_format, [40, 30, 130], 3)
    store.reset_parameters([0.1, 0.2, 0.3])
    whole = store.finalize().state_dict()
    monkeypatch.setattr("embcomp.storage.quantized._CHUNK_VALUES", 64)
    monkeypatch.setattr("embcomp.row_source.CHUNK_VALUES", 64)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in store.finalize().state_dict().items())
