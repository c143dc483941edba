"""State of optimizers of sharded models is saved, and other processes go on with it, however they cut the rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import embcomp
from embcomp import ConfigError, IncompatibleStateError
from tests.integrations.workers import run_workers

pytest.importorskip("torchrec", reason="needs torchrec")

from embcomp.integrations import sharding
from embcomp.integrations.sharding.row_states import WIDTHS, gather_row_states
from tests.integrations.sharded import BATCH, RATE, batches, model_of

pytestmark = pytest.mark.torchrec

# What is trained, the optimizer of its rows, and how rows are cut by those who save, and by four and by two who go on.
PLANS = [
    ("full", "adagrad", "row_wise", "column_wise", "table_wise"),
    ("hash, two", "rowwise_adagrad", "row_wise", "table_wise", "row_wise"),
    ("low_rank", "rowwise_adagrad", "table_wise", "row_wise", "table_wise"),
    ("unified", "rowwise_adagrad", "data_parallel", "data_parallel", "data_parallel"),
    ("full, int4", "adagrad", "column_wise", "row_wise", "column_wise"),
    ("hash", "sgd", "row_wise", "table_wise", "row_wise"),
    ("full", "rowwise_adagrad", "column_wise", "column_wise", "column_wise"),
]


def distributed(model, optimizer, kind):
    model = sharding.distribute(model, optimizer, RATE, kind)
    return model, torch.optim.Adam(sharding.dense_parameters(model), lr=0.05)


def train(model, optimizer, rank, world_size, first, last):
    losses, part = [], slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for ids, labels in list(batches(last))[first:]:
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gathered(model):
    states = gather_row_states(model, dist.group.WORLD, torch.device("cpu")).groups[0].parameters
    return {path: {key: value.tolist() for key, value in state.tensors.items()} for path, state in states.items()}


def begin(rank, world_size, plans, folder):
    """Train, save, and train on; returns the later losses, and the state of rows that was saved."""
    found = []
    for number, (case, rows, kind, *_) in enumerate(plans):
        model, optimizer = distributed(model_of(case), rows, kind)
        train(model, optimizer, rank, world_size, 0, 6)
        sharding.save_sharded(model, folder / str(number), optimizers=[optimizer])
        state = gathered(model)
        found.append((train(model, optimizer, rank, world_size, 6, 12), state))
    return found


def go_on(rank, world_size, plans, folder):
    """The same of what was saved, with the state of optimizers, and without."""
    found = []
    for number, (case, rows, *kinds) in plans.items():
        for with_state in (True, False):
            model = model_of(case)
            embcomp.load_pretrained_(model, folder / str(number), verbose=False)
            model, optimizer = distributed(model, rows, kinds[1 if world_size == 4 else 2])
            if with_state:
                sharding.load_optimizers_(model, folder / str(number), [optimizer])
            state = gathered(model)
            found.append((train(model, optimizer, rank, world_size, 6, 12), state))
    return found


def losses_of(ranks):
    """Losses of each plan, the means over processes."""
    return [torch.tensor([own for own, _ in plan]).mean(0) for plan in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and what four processes found that saved to it."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_workers(begin, 4, PLANS, folder, timeout=120)


@pytest.mark.parametrize("world_size", [2, 4])
def test_others_go_on_with_what_four_processes_had(world_size, saved):
    folder, ranks = saved
    loaded = run_workers(go_on, world_size, dict(enumerate(PLANS)), folder, timeout=120)
    pairs = zip(losses_of(loaded), loaded[0], strict=True)
    for plan, wanted, (_, state), (losses, (_, own)), (others, _) in zip(
        PLANS, losses_of(ranks), ranks[0], pairs, pairs, strict=True
    ):
        assert own == state, plan
        assert torch.allclose(losses, wanted, rtol=0, atol=1e-6), plan
        assert not torch.allclose(others, wanted, rtol=0, atol=1e-3), plan


def test_accumulators_of_parts_become_their_mean_where_rows_are_whole_again(saved):
    folder, ranks = saved
    *_, (_, parts) = ranks[0]
    last, (case, rows, kind, *_) = len(PLANS) - 1, PLANS[-1]
    (_, whole), _ = run_workers(go_on, 2, {last: (case, rows, kind, None, "row_wise")}, folder, timeout=120)[0]
    assert len(parts) == 3
    for path, state in parts.items():
        accumulators = torch.tensor(state["momentum1"]).view(len(state[WIDTHS]), -1)
        assert sum(state[WIDTHS]) == 8
        assert not torch.equal(accumulators[0], accumulators[1])
        assert whole[path].keys() == {"momentum1"}
        assert torch.allclose(torch.tensor(whole[path]["momentum1"]), accumulators.mean(0))


def refusals(rank, world_size, folder):
    """What is said of optimizers that are not those of the checkpoint."""
    model, optimizer = distributed(model_of("hash"), "rowwise_adagrad", "row_wise")
    train(model, optimizer, rank, world_size, 0, 1)
    sharding.save_sharded(model, folder / "with", optimizers=[optimizer])
    sharding.save_sharded(model, folder / "without")
    if rank == 0:
        embcomp.save_pretrained(model_of("hash"), folder / "alone", optimizers=[])
    dist.barrier()
    dense = list(sharding.dense_parameters(model))
    plain, _ = distributed(model_of("hash"), "sgd", "row_wise")
    full, _ = distributed(model_of("hash"), "adagrad", "row_wise")
    copies, of_copies = distributed(model_of("hash"), "rowwise_adagrad", "data_parallel")
    told = []
    for wrong, name, optimizers in (
        (model, "without", [optimizer]),
        (model, "alone", [optimizer]),
        (model, "nowhere" if rank else "with", [optimizer]),
        (model, "with", [torch.optim.SGD(dense)]),
        (model, "with", [torch.optim.Adam(dense[1:] if rank else dense)]),
        (model, "with", []),
        (model, "with", [optimizer, optimizer]),
        (model, "with", optimizer),
        (model, "with", [model.fused_optimizer]),
        (model, "with", [of_copies]),
        (copies, "with", [of_copies]),
        (plain, "with", [torch.optim.Adam(sharding.dense_parameters(plain))]),
        (full, "with", [torch.optim.Adam(sharding.dense_parameters(full))]),
    ):
        try:
            sharding.load_optimizers_(wrong, folder / name, optimizers)
            told.append("")
        except (ConfigError, IncompatibleStateError) as error:
            told.append(str(error))
    for optimizers in ([optimizer] if rank else None, [model.fused_optimizer] if rank else [optimizer]):
        try:
            sharding.save_sharded(model, folder / "other", optimizers=optimizers)
            told.append("")
        except (ConfigError, IncompatibleStateError) as error:
            told.append(str(error))
    return told, (folder / "other").exists()


def test_other_optimizers_are_refused_in_every_process(tmp_path):
    ranks = run_workers(refusals, 2, tmp_path)
    words = [
        "has no state of optimizers",
        "has no state of sharded rows: save_pretrained has written it",
        "nowhere/embcomp_config.json does not exist",
        "has the state of torch.Adam, and is to be loaded by torch.SGD",
        "for other parameters: out.weight",
        "and is to be loaded by none",
        "two of the optimizers train 'out.weight'",
        "give a list of them, [optimizer]",
        "that has its state in others",
        "that is not the model's",
        "for other parameters: tables.rows.weight",
        "it keeps none for rows",
        "it keeps a momentum1 of shape",
        "some processes have optimizers=None and some have not",
        "that has its state in others",
    ]
    for told, is_written in ranks:
        assert all(word in text for word, text in zip(words, told, strict=True)), told
        assert not is_written


class Rows(nn.Module):
    """What has no parameters but its tables'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(300, 8)

    def forward(self, ids):
        return self.item(ids).sum(-1)


def rows_alone(rank, world_size, folder):
    """The last loss after a step, and after a step more, of one model and of one that goes on with it."""
    ids, found = torch.arange(40), []
    for step in range(3):
        model = Rows()
        embcomp.compress_(model, "hash", "50%", verbose=False)
        if step == 2:
            embcomp.load_pretrained_(model, folder, verbose=False)
        if step != 1:
            sharded = sharding.distribute(model, "rowwise_adagrad", RATE, "row_wise")
        if step == 2:
            sharding.load_optimizers_(sharded, folder, [])
        loss = sharded(ids).square().mean()
        loss.backward()
        if step == 0:
            sharding.save_sharded(sharded, folder, optimizers=[])
        found.append(sharded(ids).square().mean().item())
    return found


def test_models_without_other_parameters_keep_the_state_of_their_rows(tmp_path):
    for _, wanted, again in run_workers(rows_alone, 2, tmp_path):
        assert again == pytest.approx(wanted, abs=1e-7)


def test_models_that_are_not_sharded_take_the_weights_and_say_whose_state_they_can_not_take(saved):
    folder = saved[0] / "1"
    model = model_of("hash, two")
    embcomp.load_pretrained_(model, folder, verbose=False)
    with pytest.raises(IncompatibleStateError, match=r"has the state of torch.Adam, TorchRec, fused, and is"):
        embcomp.load_optimizers_(model, folder, [torch.optim.Adam(model.parameters())])
