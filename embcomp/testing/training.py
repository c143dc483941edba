"""Checks of training and evaluation: gradients, padding, unseen ids, memory of a lookup."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embcomp.config import make_config
from embcomp.errors import ConfigError, UnseenIdError
from embcomp.io import from_pretrained, load_optimizers_, save_pretrained
from embcomp.storage import RowStore
from embcomp.tables import EmbeddingTables
from embcomp.testing._cases import (
    UNSEEN_IDS,
    Strategy,
    backward,
    build,
    clone_state,
    every_id,
    every_vector,
    make_specs,
    planned,
    require,
    require_close,
    require_error,
    require_finalized,
    require_same,
    train_step,
)
from embcomp.training import reset_rows_

LOOKUP_BYTES = 2**17
"""The largest tensor that a lookup of 64 ids at D = 16 may make, in a table of 200 000 ids."""

LOOKUP_RESULTS = 4
"""The largest tensor that a lookup with a tensor of tables may make, in sizes of its result: a matrix per id is 16."""


def check_gradients(strategy: Strategy) -> None:
    """Gradients are finite and reach every parameter; the penalty is a finite float32 scalar."""
    tables = build(strategy)
    penalty = tables.penalty()
    require(penalty.shape == () and penalty.dtype == torch.float32 and penalty.isfinite(), f"penalty is {penalty}")
    backward(tables)
    trained = {name: p.grad for name, p in tables.named_parameters() if p.requires_grad}
    require(trained, "nothing is trained")
    for name, grad in trained.items():
        require(grad is not None, f"no gradient reaches {name}")
        require(grad is not None and grad.isfinite().all(), f"the gradient of {name} is not finite")
        require(grad is not None and grad.any(), f"the gradient of {name} is zero")


def check_sparse_gradients(strategy: Strategy) -> None:
    """With ``sparse=True`` stored rows get row-sparse gradients, equal to the dense ones."""
    if not supports_sparse(strategy):
        return
    sparse, dense = build(strategy, sparse=True), build(strategy, sparse=False)
    backward(sparse)
    backward(dense)
    stores = {name: module for name, module in sparse.named_modules() if isinstance(module, RowStore)}
    require(stores, "there is no RowStore: let make_row_store keep the rows")
    for name, store in stores.items():
        grads = [p.grad for p in store.parameters() if p.grad is not None]
        require(any(grad.is_sparse for grad in grads), f"no gradient of {name} is sparse")
    wanted = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    for name, parameter in sparse.named_parameters():
        if parameter.grad is not None:
            require_close(parameter.grad.to_dense(), wanted[name].to_dense(), f"sparse gradient of {name}", 1e-4)


def supports_sparse(strategy: Strategy) -> bool:
    """Whether the strategy's config takes ``sparse=True``; it says no by `ConfigError`."""
    try:
        make_config(strategy, sparse=True)
    except ConfigError:
        return False
    return True


def check_learning(strategy: Strategy) -> None:
    """Adam brings the vectors of a few ids nearer to given ones."""
    tables = build(strategy, 16)
    ids = every_id(tables)[1:40:4]
    target = torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(3))
    target[tables(ids).detach().eq(0).all(-1)] = 0.0
    optimizer = torch.optim.Adam([p for p in tables.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = (tables(ids) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    require(losses[-1] < 0.9 * losses[0], f"30 steps of Adam: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def check_resume(strategy: Strategy) -> None:
    """Training that is saved with its optimizers, and loaded by others, goes on to the same state, bit for bit."""
    tables = build(strategy)
    optimizer = torch.optim.Adam([p for p in tables.parameters() if p.requires_grad], lr=0.05)
    _steps(tables, optimizer, 1)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(tables, folder, [optimizer])
        resumed = from_pretrained(folder).train()
        other = torch.optim.Adam([p for p in resumed.parameters() if p.requires_grad], lr=0.05)
        load_optimizers_(resumed, folder, [other])
    _steps(tables, optimizer, 2)
    _steps(resumed, other, 2)
    wanted, got = clone_state(tables), clone_state(resumed)
    require(wanted.keys() == got.keys(), f"other state: {sorted(wanted.keys() ^ got.keys())}")
    for name, value in wanted.items():
        require_same(got[name], value, f"{name}, resumed")


def _steps(tables: EmbeddingTables, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)  # for strategies that draw what they show
    for _ in range(3):
        backward(tables)
        optimizer.step()
        optimizer.zero_grad()
        tables.step_()
        reset_rows_([tables], optimizer)


def check_padding(strategy: Strategy) -> None:
    """The vector of ``padding_idx`` is zero at first, after training, after `load_dense_`, and finalized."""
    tables = build(strategy)
    _require_padding(tables, "at first")
    for _ in range(3):
        train_step(tables, learning_rate=1.0)
    _require_padding(tables, "after training")
    tables.load_dense_({spec.name: torch.randn(spec.num_embeddings, spec.embedding_dim) for spec in tables.specs})
    _require_padding(tables, "after load_dense_")
    _require_padding(tables.finalize(), "finalized")


def _require_padding(tables: EmbeddingTables, when: str) -> None:
    ids = torch.tensor([0, 3, 0])
    vectors = tables(ids, "item").detach()
    require_same(vectors[[0, 2]], torch.zeros(2, tables.embedding_dim), f"padding {when}")
    require(vectors[1].any() or tables.has_zero_vectors, f"{when}: an id beside the padding is zero too")
    require_same(tables.materialize("item")[0].detach(), vectors[0], f"materialize: padding {when}")
    require_same(tables(torch.zeros(4, dtype=torch.long)).detach()[2], vectors[0], f"padding {when}, table=None")
    pooled = tables.bag(ids[None], None, "item", mode="mean").detach()
    require_close(pooled[0], vectors[1], f"padding {when} in a bag")


def check_unseen_error(strategy: Strategy) -> None:
    """``unseen="error"``: ids outside ``[0, V)`` raise, and the error names table, id and range, in every form."""
    tables = build(strategy, unseen="error")
    for form in (tables.train(), tables.eval(), tables.finalize()):
        for bad in (50, *UNSEEN_IDS):
            ids = torch.tensor([[1, 1, 1, 1], [1, 1, bad, 1]])
            for asked, table in ((ids, None), (ids[:, 2], "item"), (ids[1, 2], 2)):
                call = partial(form, asked, table)
                require_error(UnseenIdError, call, f"id {bad} of table 'item'", "'item'", str(bad), "[0, 50)")


def check_unseen_zero(strategy: Strategy) -> None:
    """``unseen="zero"``: ids outside ``[0, V)`` give zeros in every form, and the others what they give alone."""
    tables = build(strategy, unseen="zero")
    for form, bad in _unseen_forms(tables):
        require_same(bad, torch.zeros_like(bad), f"unseen ids, {form}")


def check_unseen_oov_row(strategy: Strategy) -> None:
    """``unseen="oov_row"``: each table has one more vector, trained like the others, for all ids outside ``[0, V)``."""
    tables = build(strategy, unseen="oov_row")
    before = tables(torch.full((4,), -1)).detach()
    train_step_unseen(tables)
    after = tables(torch.full((4,), -1)).detach()
    require((after != before).any(-1).all(), "training does not reach the OOV rows")
    for form, bad in _unseen_forms(tables):
        require_same(bad, bad[:1].expand_as(bad), f"all unseen ids of a table share a vector, {form}")
        require(bad.any(-1).all() or _may_be_zero(tables, form), f"an OOV row is zero, {form}")


def train_step_unseen(tables: EmbeddingTables) -> None:
    """One step of SGD on unseen ids alone."""
    optimizer = torch.optim.SGD([p for p in tables.parameters() if p.requires_grad], lr=1.0)
    tables(torch.full((4, tables.num_tables), 10**6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_unseen_hash(strategy: Strategy) -> None:
    """``unseen="hash"``: every int64 has a vector, the same in every form; at the largest size not one for all."""
    tables = build(strategy, unseen="hash")
    train_step(tables)
    for form, bad in _unseen_forms(tables):
        require(bad.isfinite().all(), f"vectors of unseen ids are not finite, {form}")
        zero = not bool(bad.any(-1).all())
        require(not zero or _may_be_zero(tables, form), f"the vector of an unseen id is zero, {form}")
    tables = build(strategy, share=1.0, unseen="hash")
    for name in ("user", "item", "genre"):
        different = len(torch.unique(tables(torch.arange(300, 340), name).detach(), dim=0))
        require(different > 1, f"table {name!r} has one vector for all unseen ids")


def _may_be_zero(tables: EmbeddingTables, form: str) -> bool:
    return tables.has_zero_vectors and form != "training"


def _unseen_forms(tables: EmbeddingTables) -> list[tuple[str, Tensor]]:
    """Vectors of unseen ids in training, evaluation and serving form; seen ids beside them keep theirs."""
    seen = every_id(tables)[:8]
    unseen = torch.tensor([*UNSEEN_IDS, *range(300, 340)])[:, None].expand(-1, tables.num_tables)
    forms = {"training": tables.train(), "evaluation": tables.eval(), "finalized": tables.finalize()}
    found = []
    for name, form in forms.items():
        form.train(name == "training")
        vectors = form(torch.cat([seen, unseen])).detach()
        for ids, got, what in ((seen, vectors[:8], "seen"), (unseen, vectors[8:], "unseen")):
            if name == "evaluation":
                require_close(got, form(ids).detach(), f"{what} ids on their own, {name}")
            elif name == "finalized":
                require_finalized(got, tables.eval()(ids).detach(), tables.config)
        for table, owner in enumerate(tables.names):
            require_close(form(unseen[:, table], owner), vectors[8:, table], f"unseen ids of {owner!r}, {name}")
        found.append((name, vectors[8:]))
    return found


def check_evaluation_changes_nothing(strategy: Strategy) -> None:
    """Lookups, bags, whole tables, reports, reprs and `finalize` leave every parameter and buffer as it was."""
    tables = train_step(build(strategy)).eval()
    for form in (tables, tables.finalize()):
        before = clone_state(form)
        with torch.no_grad():
            form(every_id(form))
            form.bag(torch.ones(2, 2, dtype=torch.long))
            form.scores(0, form.materialize(0, torch.tensor([0])))
        form.memory(), form.penalty(), repr(form), form.finalize()
        after = clone_state(form)
        require(before.keys() == after.keys(), "evaluation adds or removes parameters or buffers")
        for name, tensor in before.items():
            require_same(after[name], tensor, f"{name} after evaluation")


def check_autocast(strategy: Strategy) -> None:
    """Lookups work under bfloat16 autocast, forwards and backwards."""
    tables = build(strategy)
    wanted = every_vector(tables)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = tables(every_id(tables))
        whole = torch.cat([tables.materialize(name) for name in tables.names])
    require_close(whole.float(), wanted, "vectors under autocast", 0.1)
    vectors.float().square().sum().backward()
    grads = [p.grad for p in tables.parameters() if p.requires_grad]
    require(any(g is not None and g.any() for g in grads), "no gradient under autocast")


def check_lookup_memory(strategy: Strategy) -> None:
    """A lookup makes no tensor that grows with V, nor one larger than a few vectors for each id, whatever its table.

    Of the training and the serving form; with sparse gradients a whole step grows with the batch alone.
    """
    specs = make_specs(16, {"user": 200_000, "flag": 2})
    tables = planned(strategy, specs, share=1.0, unseen="zero").build()
    ids = torch.stack([torch.arange(64) * 3001, torch.arange(64) % 3], dim=1)
    for name, form in (("training", tables), ("serving", tables.finalize())):
        largest = LargestTensor()
        with largest, torch.no_grad():
            form(ids)
            form(ids[:, 0], "user")
        _require_small(largest, f"a lookup in {name} form", LOOKUP_BYTES)
    if supports_sparse(strategy):
        tables = planned(strategy, specs, share=1.0, unseen="zero", sparse=True).build()
        with (largest := LargestTensor()):
            tables(ids).sum().backward()
        _require_small(largest, "a step with sparse gradients", LOOKUP_BYTES)
    _require_few_vectors_per_id(strategy)


def _require_few_vectors_per_id(strategy: Strategy) -> None:
    """Ids of two tables that take turns, as many as the tables have, so that a dense gradient is no larger either."""
    tables = planned(strategy, make_specs(32, {"user": 2000, "shop": 2000}), share=0.5, unseen="zero").build()
    ids, table = torch.arange(4000) // 2, torch.arange(4000) % 2
    with (largest := LargestTensor()):
        vectors = tables(ids, table)
        vectors.sum().backward()
    _require_small(largest, "a step on a tensor of tables", LOOKUP_RESULTS * vectors.nbytes)
    final = tables.finalize()
    with (largest := LargestTensor()), torch.no_grad():
        final(ids, table)
    _require_small(largest, "a lookup with a tensor of tables, finalized,", LOOKUP_RESULTS * vectors.nbytes)


def _require_small(largest: LargestTensor, what: str, limit: int) -> None:
    require(largest.size <= limit, f"{what} makes a tensor of {largest.size} B, by {largest.by}, above {limit} B")


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that operations make; views of what they are given take no memory and don't count.

    Attributes:
        size: bytes of the largest tensor.
        by: the operation that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage.data_ptr() not in given and storage.nbytes() > self.size:
                self.size, self.by = storage.nbytes(), str(func)
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    dense = [t._values() if t.is_sparse else t for t in tensors]
    return [t.untyped_storage() for t in dense if t.layout == torch.strided]
