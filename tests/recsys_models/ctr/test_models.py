"""Each model against its equations, written as loops over fields, pairs and layers."""

import pytest
import torch
from torch import nn

from embcomp import FullConfig, TableSpec, build_tables
from embcomp.errors import ConfigError, InputError, UnseenIdError
from embcomp.strategies.full import FullTables
from recsys_models.ctr import MODELS, build_model, get_model
from recsys_models.ctr.layers import MLP
from tests.recsys_models.tiny import SIZES, tiny_log, tiny_model

D, B = 3, 5


def make(name, num_dense, **options):
    torch.manual_seed(0)
    model = tiny_model(tiny_log(num_dense=num_dense), name, dim=D, init_std=0.7, **options)
    for parameter in model.parameters():  # biases that are zero would hide mistakes
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ids = torch.stack([torch.randint(0, size, (B,)) for size in SIZES], 1)
    return model, ids, torch.randn(B, num_dense)


def vectors_of(model, row):
    """The vectors of one row of ids, as lists of float."""
    return [model.tables.materialize(t)[i].tolist() for t, i in enumerate(row)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def affine(layer, x):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(w, x) + b for w, b in zip(layer.weight.tolist(), bias, strict=True)]


def perceptron(mlp, x):
    """An MLP of ReLU layers by loops."""
    linears = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    has_output = isinstance(mlp[-1], nn.Linear)
    for depth, layer in enumerate(linears):
        x = affine(layer, x)
        if not (has_output and depth == len(linears) - 1):
            x = [max(v, 0.0) for v in x]
    return x


def flat(vectors):
    return [v for vector in vectors for v in vector]


def factor_fields(model, row, dense):
    """First-order weights and factors of all fields; dense feature p has weight x w and factor x v."""
    vectors = vectors_of(model, row)
    if dense:
        vectors += [
            [x * v for v in weight] for x, weight in zip(dense, model.dense_factors.weight.tolist(), strict=True)
        ]
    return [v[0] for v in vectors], [v[1:] for v in vectors]


def second_order(factors):
    count = len(factors)
    return sum(dot(factors[i], factors[j]) for i in range(count) for j in range(i + 1, count))


def reference_lr(model, row, dense):
    extra = affine(model.dense_weights, dense)[0] if dense else 0.0
    return sum(v[0] for v in vectors_of(model, row)) + extra + model.bias.item()


def reference_fm(model, row, dense):
    weights, factors = factor_fields(model, row, dense)
    return model.bias.item() + sum(weights) + second_order(factors)


def reference_deepfm(model, row, dense):
    weights, factors = factor_fields(model, row, dense)
    return sum(weights) + second_order(factors) + perceptron(model.mlp, flat(factors))[0]


def reference_fnn(model, row, dense):
    return perceptron(model.mlp, flat(vectors_of(model, row)) + dense)[0]


def reference_ipnn(model, row, dense):
    vectors = vectors_of(model, row)
    products = [dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    return perceptron(model.mlp, flat(vectors) + dense + products)[0]


def reference_widedeep(model, row, dense):
    vectors = vectors_of(model, row)
    wide = sum(v[0] for v in vectors) + (affine(model.dense_weights, dense)[0] if dense else 0.0)
    return wide + perceptron(model.mlp, flat(v[1:] for v in vectors) + dense)[0]


def crossed(model, x0):
    x = x0
    for layer in model.cross.layers:
        mixed = x
        for matrix in layer if isinstance(layer, torch.nn.Sequential) else [layer]:
            mixed = affine(matrix, mixed)
        x = [x0[i] * mixed[i] + x[i] for i in range(len(x0))]
    return x


def reference_stacked(model, row, dense):
    return affine(model.last, perceptron(model.mlp, crossed(model, flat(vectors_of(model, row)) + dense)))[0]


def reference_parallel(model, row, dense):
    x0 = flat(vectors_of(model, row)) + dense
    return affine(model.last, crossed(model, x0) + perceptron(model.mlp, x0))[0]


def reference_crossnet(model, row, dense):
    return affine(model.last, crossed(model, flat(vectors_of(model, row)) + dense))[0]


def reference_dlrm(model, row, dense, interaction):
    vectors, beside = vectors_of(model, row), []
    if dense:
        beside = [max(v, 0.0) for v in perceptron(model.bottom, dense)]
        vectors = [beside, *vectors]
    if interaction == "cat":
        return perceptron(model.top, flat(vectors))[0]
    pairs = [dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    return perceptron(model.top, beside + pairs)[0]


CASES = [
    ("lr", {}, reference_lr),
    ("fm", {}, reference_fm),
    ("fnn", {}, reference_fnn),
    ("fnn", {"hidden_units": ()}, reference_fnn),
    ("ipnn", {}, reference_ipnn),
    ("ipnn", {"hidden_units": ()}, reference_ipnn),
    ("deepfm", {}, reference_deepfm),
    ("widedeep", {}, reference_widedeep),
    ("dcnv2", {"structure": "stacked", "num_cross_layers": 2}, reference_stacked),
    ("dcnv2", {"structure": "parallel", "num_cross_layers": 3}, reference_parallel),
    ("dcnv2", {"structure": "stacked", "num_cross_layers": 2, "cross_rank": 2}, reference_stacked),
    ("dcnv2", {"structure": "parallel", "num_cross_layers": 2, "hidden_units": ()}, reference_crossnet),
    ("dlrm", {"interaction": "dot", "bottom_units": (6,)}, lambda *a: reference_dlrm(*a, "dot")),
    ("dlrm", {"interaction": "cat", "bottom_units": (6,)}, lambda *a: reference_dlrm(*a, "cat")),
]


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize(("name", "options", "reference"), CASES, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_equations(name, options, reference, num_dense):
    model, ids, dense = make(name, num_dense, **options)
    expected = [reference(model, row, x) for row, x in zip(ids.tolist(), dense.tolist(), strict=True)]
    logits = model(ids, dense)
    assert logits.shape == (B,)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-4)


FRAPPE_ROWS = [957, 4082, 7, 7, 2, 3, 2, 9, 80, 240]  # 5389 rows, as BARS has them, in 10 fields
DEEP = {"hidden_units": (400, 400, 400), "batch_norm": True}


@pytest.mark.parametrize(
    ("name", "rows", "num_dense", "options", "expected"),
    [
        ("fm", FRAPPE_ROWS, 0, {}, 59280),
        ("fnn", FRAPPE_ROWS, 0, DEEP, 417891),  # its log says 781892, and counts the MLP twice
        ("ipnn", FRAPPE_ROWS, 0, {**DEEP, "batch_norm": False}, 433491),
        ("deepfm", FRAPPE_ROWS, 0, DEEP, 423280),
        ("widedeep", FRAPPE_ROWS, 0, DEEP, 423280),
        ("dcnv2", FRAPPE_ROWS, 0, {**DEEP, "structure": "parallel", "num_cross_layers": 4}, 458391),
        ("dlrm", FRAPPE_ROWS, 0, {**DEEP, "interaction": "cat"}, 417891),
        ("ipnn", [90239 - 40, 20, 20], 0, {**DEEP, "batch_norm": False}, 1237191),
        ("deepfm", [90239 - 40, 20, 20], 0, DEEP, 1328630),
        ("dcnv2", [90239 - 40, 20, 20], 0, {**DEEP, "structure": "parallel", "num_cross_layers": 5}, 1243071),
        ("dlrm", [2086303 - 25] + 25 * [1], 13, {**DEEP, "bottom_units": (400, 400, 400)}, 21664241),
    ],
)
def test_as_many_parameters_as_the_published_models(name, rows, num_dense, options, expected):
    dim = get_model(name).table_dim(10)
    with torch.device("meta"):
        tables = FullTables([TableSpec(f"f{i}", count, dim) for i, count in enumerate(rows)], FullConfig())
        model = build_model(name, tables, num_dense, **options)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("lr", 1),
        ("fm", 9),
        ("fnn", 8),
        ("ipnn", 8),
        ("deepfm", 9),
        ("widedeep", 9),
        ("dcnv2", 8),
        ("dlrm", 8),
    ],
)
def test_table_specs(name, width):
    specs = get_model(name).table_specs(tiny_log().fields, 8)
    assert [(s.name, s.num_embeddings, s.embedding_dim, s.init_std) for s in specs] == [
        (f"f{i}", size, width, 1e-4) for i, size in enumerate(SIZES)
    ]


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_parameter_is_trained(name, num_dense):
    model, _, _ = make(name, num_dense)
    ids = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    model(ids, torch.randn(len(ids), num_dense)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all()
        if not parameter_name.startswith(("bottom", "top", "mlp")):  # there a ReLU may be dead
            assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]).any(1).all()


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("name", ["fnn", "ipnn"])
def test_every_weight_of_the_mlp_is_trained(name, num_dense):
    model, ids, dense = make(name, num_dense, activation="tanh")
    model(ids, dense).square().sum().backward()
    assert all(parameter.grad.all() for parameter in model.mlp.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_compressed_tables_small_batches_and_one_graph(name):
    torch.manual_seed(0)
    data = tiny_log(num_dense=2)
    strategy = "full" if name == "lr" else "reduced_dim"
    model = tiny_model(data, name, strategy, None if name == "lr" else "60%", dim=8).eval()
    ids, dense = torch.zeros(4, 3, dtype=torch.int64), torch.randn(4, 2)
    logits = model(ids, dense)
    for rows in (0, 1):
        torch.testing.assert_close(model(ids[:rows], dense[:rows]), logits[:rows])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, dense), logits)
    exported = torch.export.export(model, (ids, dense)).module()
    torch.testing.assert_close(exported(ids, dense), logits)


def test_a_single_field():
    data = tiny_log(sizes=(6,))
    for name in sorted(MODELS.keys() - {"ipnn"}):
        options = {"interaction": "cat"} if name == "dlrm" else {}
        assert tiny_model(data, name, **options)(torch.zeros(2, 1, dtype=torch.int64)).shape == (2,)


@pytest.mark.parametrize("num_dense", [0, 2])
def test_ipnn_needs_two_fields(num_dense):
    with pytest.raises(ConfigError, match="give two, or use FNN"):
        tiny_model(tiny_log(sizes=(6,), num_dense=num_dense), "ipnn")


def test_mlp_layers_and_initial_weights():
    torch.manual_seed(0)
    mlp = MLP(300, (400, 400), 1, "gelu", dropout=0.5, batch_norm=True)
    kinds = [type(layer).__name__ for layer in mlp]
    assert kinds == 2 * ["Linear", "BatchNorm1d", "GELU", "Dropout"] + ["Linear"]
    assert mlp[0].weight.std().item() == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert not any(layer.bias.any() for layer in mlp if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deepfmm", {}, "did you mean 'deepfm'"),
        ("deepfm", {"hidden_unit": (4,)}, "did you mean 'hidden_units'"),
        ("lr", {"dropout": 0.1}, "no option 'dropout'"),
        ("ipnnn", {}, "did you mean 'ipnn'"),
        ("fnn", {"hidden_unit": (4,)}, "did you mean 'hidden_units'"),
        ("fnn", {"dropout": -0.1}, "dropout=-0.1"),
        ("fnn", {"num_dense": -1}, "num_dense=-1"),
        ("ipnn", {"activation": "tahn"}, "did you mean 'tanh'"),
        ("ipnn", {"hidden_units": (0,)}, "at least one unit"),
        ("deepfm", {"activation": "rellu"}, "did you mean 'relu'"),
        ("deepfm", {"dropout": 1.0}, "dropout=1.0"),
        ("deepfm", {"dropout": "0.1"}, r"DeepFM\(dropout='0.1'\): must be float, not str"),
        ("deepfm", {"batch_norm": "no"}, r"DeepFM\(batch_norm='no'\): must be bool, not str"),
        ("deepfm", {"hidden_units": 4}, r"hidden_units=4\): must be Sequence\[int\], not int"),
        ("deepfm", {"hidden_units": "44"}, "must be Sequence"),
        ("deepfm", {"hidden_units": [4.0]}, "must be Sequence"),
        ("deepfm", {"hidden_units": (4, 0)}, "at least one unit"),
        ("dcnv2", {"structure": "paralel"}, "did you mean 'parallel'"),
        ("dcnv2", {"num_cross_layers": 0}, "num_cross_layers=0"),
        ("dcnv2", {"cross_rank": 0}, "cross_rank=0 must be 1 to 8"),
        ("dcnv2", {"cross_rank": 9}, "cross_rank=9 must be 1 to 8"),
        ("dlrm", {"interaction": "dots"}, "did you mean 'dot'"),
        ("dlrm", {"num_dense": -1}, "num_dense=-1"),
    ],
)
def test_wrong_options(name, options, message):
    tables = build_tables([TableSpec(f"f{i}", 4, 1 if name == "lr" else 4) for i in range(2)])
    with pytest.raises(ConfigError, match=message):
        build_model(name, tables, **options)


def test_tables_of_the_wrong_width():
    one, two = (build_tables([TableSpec("a", 4, dim), TableSpec("b", 4, dim)]) for dim in (1, 2))
    for name in ("fm", "deepfm", "widedeep"):
        with pytest.raises(ConfigError, match="at least 2"):
            build_model(name, one)
    with pytest.raises(ConfigError, match="= 1"):
        build_model("lr", two)


def test_wrong_inputs():
    model = tiny_model(tiny_log(num_dense=2))
    ids = torch.zeros(4, 3, dtype=torch.int64)
    for dense in (None, torch.zeros(4, 3)):
        with pytest.raises(InputError, match="num_dense"):
            model(ids, dense)
    with pytest.raises(InputError, match="num_dense=2"):
        tiny_model(tiny_log())(ids, torch.zeros(4, 2))
    with pytest.raises(InputError, match="column"):
        model(ids[:, :2], torch.zeros(4, 2))
    with pytest.raises(UnseenIdError, match="f2"):
        model(ids + 4, torch.zeros(4, 2))
