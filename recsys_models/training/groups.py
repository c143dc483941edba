"""The groups of parameters that a model trains, and the optimizers they get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError
from embcomp.storage import RowStore
from recsys_models.training.config import TrainingConfig
from recsys_models.training.optimizers import DENSE_ONLY, OPTIMIZERS, Groups


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Split a model's trained parameters into three groups.

    Returns:
        ``rows``: the weights of the tables' row stores; ``tables``: what else the tables train (scales, projections,
        codebooks, masks, …); ``network``: everything else.
    """
    tables = [module for module in model.modules() if isinstance(module, EmbeddingTables)]
    stores = [module for group in tables for module in group.modules() if isinstance(module, RowStore)]
    rows = _unique(p for store in stores for name, p in store.named_parameters(recurse=False) if name == "weight")
    others = _unique((p for group in tables for p in group.parameters()), without=rows)
    network = _unique(model.parameters(), without=[*rows, *others])
    return {"rows": rows, "tables": others, "network": network}


def make_optimizers(
    model: nn.Module, config: TrainingConfig, trained: Sequence[nn.Parameter] | None = None
) -> list[Optimizer]:
    """Make the optimizer of a model, or two where the tables have one of their own.

    Args:
        model: with compressed tables.
        config: says which.
        trained: the parameters to train; None for all that require gradients.

    Raises:
        ConfigError: if nothing is trained, or an optimizer does not go with row-sparse gradients or with L2.
    """
    groups = parameter_groups(model)
    if trained is not None:
        chosen = {id(p) for p in trained}
        groups = {name: [p for p in members if id(p) in chosen] for name, members in groups.items()}
    table_optimizer = config.embedding_optimizer or config.optimizer
    rate = config.learning_rate if config.embedding_learning_rate is None else config.embedding_learning_rate
    _check_sparse(model, table_optimizer, config.embedding_l2)
    of_tables: Groups = [{"params": groups["rows"], "lr": rate}, {"params": groups["tables"], "lr": rate}]
    of_tables[0]["weight_decay"] = config.embedding_l2
    of_network: Groups = [{"params": groups["network"], "lr": config.learning_rate}]
    if table_optimizer == config.optimizer:
        wanted = [(config.optimizer, of_tables + of_network)]
    else:
        wanted = [(table_optimizer, of_tables), (config.optimizer, of_network)]
    made = [_make(name, [g for g in members if g["params"]]) for name, members in wanted if _any_params(members)]
    if not made:
        raise ConfigError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train")
    return made


def _make(name: str, groups: Groups) -> Optimizer:
    optimizer = OPTIMIZERS[name](groups)
    if "weight_decay" not in optimizer.defaults and any(group.get("weight_decay") for group in groups):
        raise ConfigError(f"optimizer {name!r} has no L2: set embedding_l2=0, or choose adam, adagrad or sgd")
    return optimizer


def _check_sparse(model: nn.Module, optimizer: str, embedding_l2: float) -> None:
    if not any(isinstance(module, RowStore) and getattr(module, "sparse", False) for module in model.modules()):
        return
    if optimizer in DENSE_ONLY:
        raise ConfigError(
            f"optimizer {optimizer!r} takes no row-sparse gradients: set sparse=False in the strategy's config, or "
            f"embedding_optimizer to one of {', '.join(name for name in OPTIMIZERS if name not in DENSE_ONLY)}"
        )
    if embedding_l2:
        raise ConfigError(
            f"embedding_l2={embedding_l2} decays every row at every step, which row-sparse gradients exist to avoid: "
            "set embedding_l2=0, or sparse=False in the strategy's config"
        )


def _any_params(groups: Groups) -> bool:
    return any(group["params"] for group in groups)


def _unique(parameters: Iterable[nn.Parameter], without: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
    seen = {id(p) for p in without}
    kept = []
    for p in parameters:
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            kept.append(p)
    return kept
