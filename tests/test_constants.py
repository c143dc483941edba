"""Constants outlive meta and to_empty, in every strategy."""

import copy

import pytest
import torch

from embcomp import TableSpec, build_tables, list_strategies
from embcomp.testing._cases import make_specs, planned
from embcomp.views import EmbeddingView


@pytest.mark.parametrize("name", list_strategies())
@pytest.mark.parametrize("final", [False, True])
def test_tables_that_were_on_meta_are_filled(name, final):
    source = planned(name, make_specs(16, {"user": 300, "item": 50}), share=0.5).build().eval()
    source = source.finalize_() if final else source
    filled = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    ids = torch.stack([torch.arange(50), torch.arange(50)], dim=1)
    assert torch.equal(filled(ids), source(ids))


def test_a_view_that_owns_its_group_is_filled():
    view = EmbeddingView(build_tables([TableSpec("user", 40, 4)], "reduced_dim", "50%"), ["user"], owns=True)
    filled = copy.deepcopy(view).to("meta").to_empty(device="cpu")
    filled.load_state_dict(view.state_dict())
    assert torch.equal(filled(torch.arange(40)), view(torch.arange(40)))
