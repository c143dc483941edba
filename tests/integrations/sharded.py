"""A model on compressed tables, trained by one process or by several."""

import logging
import os
import time

import torch
from torch import nn

import embcomp
from embcomp.integrations import sharding
from embcomp.storage.base import MatrixRows
from embcomp.training import RowwiseAdagrad

SIZES = {"user": 300, "item": 50, "genre": 7}
BATCH, STEPS, RATE = 32, 50, 0.1
CASES = {
    "full": {},
    "hash": {"budget": "40%"},
    "hash, two": {"budget": "40%", "num_hashes": 2},
    "hash, weighted": {"budget": "60%", "num_hashes": 2, "combine": "weighted"},
    "mixed_dim": {"budget": "80%"},
    "compact": {"budget": "60%"},
    "compositional": {"budget": "40%"},
    "compositional, quotients of few rows": {"budget": "85%"},
    "unified": {"budget": "40%"},
    "unified, sums and means": {"budget": "80%", "is_pooled": True},
    "low_rank": {"budget": "60%"},
    "quantize": {"budget": "60%"},
    "reduced_dim": {"budget": "60%"},
    "frequency_cut": {"budget": "60%"},
    "full, int4": {"budget": None, "rows": "int4:column"},
    "full, int8 after": {"budget": None, "rows": "int8:row:after"},
}


class Model(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables
        self.out = nn.Linear(3 * tables.embedding_dim, 1)

    def forward(self, ids):
        return self.out(self.tables(ids).flatten(1)).squeeze(1)


class Pooled(nn.Module):
    """Sums of bags of users, and means of bags of items, in tables that share rows."""

    def __init__(self, strategy, budget, dim):
        import torchrec

        super().__init__()
        self.bags = torchrec.EmbeddingBagCollection(
            [
                torchrec.EmbeddingBagConfig(
                    name=name, embedding_dim=dim, num_embeddings=300, feature_names=[name], pooling=pooling
                )
                for name, pooling in (("user", torchrec.PoolingType.SUM), ("item", torchrec.PoolingType.MEAN))
            ]
        )
        embcomp.compress_(self, strategy, budget, verbose=False)
        self.out = nn.Linear(2 * dim, 1)

    def forward(self, ids):
        import torchrec

        lengths = torch.full((2 * len(ids),), 2)
        features = torchrec.KeyedJaggedTensor(
            ["user", "item"], torch.cat([ids[:, :2].flatten(), ids[:, 1:].flatten()]), lengths=lengths
        )
        return self.out(self.bags(features).values()).squeeze(1)


def model_of(case, dim=8):
    options = dict(CASES[case])
    budget = options.pop("budget", None)
    torch.manual_seed(0)
    if options.pop("is_pooled", False):
        return Pooled(case.split(",")[0], budget, dim)
    specs = [embcomp.TableSpec(name, size, dim, init_std=0.5) for name, size in SIZES.items()]
    return Model(embcomp.build_tables(specs, embcomp.make_config(case.split(",")[0], **options), budget))


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.stack([torch.randint(0, size, (BATCH,), generator=generator) for size in SIZES.values()], dim=1)
        yield ids, (ids.sum(1) % 2).float()


def losses_of(model, optimizers, part, steps=STEPS):
    found = []
    for ids, labels in batches(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids[part]), labels[part])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(loss.item())
    return found


def optimizers_of(model, parameters, name):
    """One for rows that are among the parameters, SGD for the others."""
    known = {id(p) for p in parameters}
    stores = [m for m in model.modules() if isinstance(m, MatrixRows) and m.elsewhere is None]
    rows = [store.weight for store in stores if id(store.weight) in known]
    rest = [p for p in parameters if not any(p is row for row in rows)]
    kind = RowwiseAdagrad if name == "rowwise_adagrad" else torch.optim.SGD
    return [torch.optim.SGD(rest, lr=RATE), *([kind(rows, lr=RATE)] if rows else [])]


def alone(case, optimizer, dim=8):
    model = model_of(case, dim)
    return losses_of(model, optimizers_of(model, list(model.parameters()), optimizer), slice(None))


def train(rank, world_size, plans):
    found = []
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for case, optimizer, kind, dim in plans:
        options = {"eps": 1e-10} if optimizer == "rowwise_adagrad" else {}
        model = sharding.distribute(model_of(case, dim), optimizer, RATE, kind, **options)
        found.append(losses_of(model, optimizers_of(model, list(sharding.dense_parameters(model)), optimizer), part))
    return found


def refusals(rank, world_size):
    """What is said of tables without values, and of copies with row-sparse gradients."""
    specs = [embcomp.TableSpec(name, size, 8) for name, size in SIZES.items()]
    meta = embcomp.plan(specs, "hash", "40%").build("meta")
    told = []
    for tables, kind in (
        (meta, "row_wise"),
        (embcomp.build_tables(specs, embcomp.FullConfig(sparse=True)), "data_parallel"),
    ):
        try:
            sharding.distribute(Model(tables), "sgd", RATE, kind)
        except embcomp.ConfigError as error:
            told.append(str(error))
    return told


def models_that_differ(rank, world_size):
    """What is said of a model in each process that was seeded by its rank."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 1))
    embcomp.compress_(model, "full", init="trained", verbose=False)
    try:
        sharding.distribute(model, "sgd", RATE)
    except embcomp.ConfigError as error:
        return str(error)


def logged():
    """What embcomp logs from now on."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("embcomp").addHandler(handler)
    return told


def copies_without_their_optimizer(rank, world_size):
    """What is logged where rows are copied, and where they are cut."""
    told = logged()
    sharding.distribute(model_of("hash"), "rowwise_adagrad", RATE, "row_wise")
    cut = list(told)
    sharding.distribute(model_of("hash"), "rowwise_adagrad", RATE, "data_parallel")
    return cut, told


def copies_of_dynamic_tables(rank, world_size):
    """What is logged where each process counts its own lookups."""
    told = logged()
    config = embcomp.DynamicConfig(num_slots={"user": 4}, num_fallback={"user": 2}, unseen="hash", interval=2)
    tables = embcomp.build_tables([embcomp.TableSpec("user", 100, 4)], config)
    copies = nn.parallel.DistributedDataParallel(tables)
    for _ in range(3):
        copies(torch.tensor([rank, 7])).sum().backward()
        tables.step_()
    return told


def save_in_a_group(rank, world_size, folder):
    """The first two of three processes share rows and save them; the last two may not."""
    first, last = torch.distributed.new_group([0, 1]), torch.distributed.new_group([1, 2])
    told = ""
    if rank:
        try:
            sharding.distribute(model_of("hash"), "sgd", RATE, group=last)
        except embcomp.ConfigError as error:
            told = str(error)
    if rank == 2:
        return told, None
    model = sharding.distribute(model_of("hash"), "sgd", RATE, "row_wise", group=first)
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    losses_of(model, optimizers_of(model, list(sharding.dense_parameters(model)), "sgd"), part, 3)
    sharding.save_sharded(model, folder, first)
    return told, answers(model)


IDS = next(batches(1))[0]


def answers(model):
    with torch.no_grad():
        return model(IDS).tolist()


def train_and_save(rank, world_size, folders):
    found = []
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for (case, kind), folder in folders.items():
        model = sharding.distribute(model_of(case, 6), "rowwise_adagrad", RATE, kind)
        losses_of(model, optimizers_of(model, list(sharding.dense_parameters(model)), "sgd"), part, 3)
        sharding.save_sharded(model, folder)
        found.append(answers(model))
    return found


def load_and_answer(rank, world_size, folders):
    """Answers to all, to other numbers of rows in each process, and to no row in the second."""
    found = []
    part = slice(rank * 3, rank * 3 + 1 + 2 * rank)
    for (case, _), folder in folders.items():
        model = model_of(case, 6)
        embcomp.load_pretrained_(model, folder, verbose=False)
        model = sharding.distribute(model, "sgd", RATE, "table_wise")
        with torch.no_grad():
            few, none = model(IDS[part]).tolist(), model(IDS[: 0 if rank else 2]).tolist()
        found.append((answers(model), few, none))
    return found


def save_and_die(rank, world_size, case, folder, moment):
    """Train, save, and begin a step or a checkpoint more, in which the last process dies.

    Args:
        moment: what the others are in then: "forward", "backward" or "save".
    """
    model = sharding.distribute(model_of(case, 6), "sgd", RATE, "row_wise")
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    losses_of(model, optimizers_of(model, list(sharding.dense_parameters(model)), "sgd"), part, 3)
    sharding.save_sharded(model, folder)
    trained = answers(model)
    loss = model(IDS[part]).sum() if moment == "backward" else None
    if rank == world_size - 1:
        os._exit(9)
    begun = time.monotonic()
    try:
        if moment == "forward":
            model(IDS[part])
        elif moment == "backward":
            loss.backward()
        else:
            sharding.save_sharded(model, folder)
        told = ""
    except (RuntimeError, embcomp.EmbcompError) as error:
        told = str(error)
    return trained, told, time.monotonic() - begun


def fail_to_save(rank, world_size, case, folder):
    model = sharding.distribute(model_of(case, 6), "sgd", RATE, "row_wise")
    try:
        sharding.save_sharded(model, folder)
    except embcomp.IncompatibleStateError as error:
        return str(error)


def collections(strategy):
    """Bags of compressed tables, and a plain collection beside them, which stays plain."""
    import torchrec

    torch.manual_seed(0)
    bags = [
        torchrec.EmbeddingBagConfig(name=f"t{i}", embedding_dim=8, num_embeddings=60, feature_names=[f"f{i}"])
        for i in range(2)
    ]
    plain = [torchrec.EmbeddingConfig(name="p", embedding_dim=8, num_embeddings=60, feature_names=["f0"])]
    model = nn.ModuleDict({"bags": torchrec.EmbeddingBagCollection(bags), "plain": torchrec.EmbeddingCollection(plain)})
    budget = None if strategy == "full" else "60%"
    embcomp.compress_(model, {"bags.*": strategy}, budget, verbose=False)
    return Both(model)


class Both(nn.Module):
    """Pooled vectors of the bags ``(B, 16)``, and vectors of the first feature's ids ``(N, 8)``."""

    def __init__(self, parts):
        super().__init__()
        self.bags, self.plain = parts["bags"], parts["plain"]

    def forward(self, features):
        return self.bags(features).values(), self.plain(features)["f0"].values()


def bags_of(seed, bags):
    import torchrec

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 3, (2 * bags,), generator=generator)
    values = torch.randint(0, 60, (int(lengths.sum()),), generator=generator)
    return torchrec.KeyedJaggedTensor(["f1", "f0"], values, lengths=lengths)


def sums_of(model, optimizers, parts, steps=10):
    """Train on the mean over processes of what is told of each; return what is told of each part at each step."""
    told = []
    for step in range(steps):
        losses = []
        for rank in parts:
            pooled, vectors = model(bags_of(100 * step + rank, rank + 2))
            losses.append(pooled.square().sum() + (vectors - 1).square().sum())
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
        told.append([loss.item() for loss in losses])
    return told


def train_on_bags(rank, world_size, strategy):
    """What is looked up before training, sharded and not, and losses of bags that differ in number by process."""
    model = collections(strategy)
    features = bags_of(rank, rank + 2)
    wanted = [part.tolist() for part in model(features)]
    model = sharding.distribute(model, "sgd", RATE)
    found = [part.tolist() for part in model(features)]
    plain = model.module.plain.embeddings["p"].weight
    dense = list(sharding.dense_parameters(model))
    losses = sums_of(model, [torch.optim.SGD(dense, lr=RATE)], [rank])
    return wanted, found, any(plain is parameter for parameter in dense), [loss for (loss,) in losses]


def bags_alone(strategy, world_size):
    """The losses of `train_on_bags`, in one process: gradients are means over processes."""
    model = collections(strategy)
    return sums_of(model, [torch.optim.SGD(model.parameters(), lr=RATE / world_size)], list(range(world_size)))
