"""``compact``: its choices against an exhaustive search, its layouts, tiers and shared rows."""

import itertools

import pytest
import torch

from embcomp import CompactConfig, ConfigError, Knowledge, TableSpec, build_tables, plan
from embcomp.strategies.compact import NOISE, _hull, _offers, parse_layout

SPECS = [TableSpec("item", 3000, 8), TableSpec("shop", 700, 8), TableSpec("gender", 2, 8)]
NOTHING = Knowledge()


def test_the_hull_is_the_lower_convex_hull():
    offers = _offers(SPECS[0], 0, 3000, 1.0, CompactConfig(), NOTHING)
    hull = _hull(offers)
    for cost, error, _ in offers:  # no offer lies below the line between its neighbours on the hull
        left = max((p for p in hull if p[0] <= cost), key=lambda p: p[0])
        right = min((p for p in hull if p[0] >= cost), key=lambda p: p[0], default=None)
        if right is None or right[0] == left[0]:
            assert error >= left[1] - 1e-12
            continue
        share = (cost - left[0]) / (right[0] - left[0])
        assert error >= left[1] + share * (right[1] - left[1]) - 1e-12
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    assert all(slope < 0 for slope in slopes)


def test_the_greedy_choice_is_optimal_for_its_bytes():
    """Buying hull steps by error per byte is exact at the budgets that it lands on: all pairs of offers say so."""
    config, specs = CompactConfig(max_share=1), SPECS[:2]
    planned = plan(specs, config, "8%")
    used = planned.report.serve_bytes
    offers = [_offers(spec, 0, spec.num_embeddings, 1.0, config, NOTHING) for spec in specs]
    best = min(a[1] + b[1] for a, b in itertools.product(*offers) if a[0] + b[0] <= used)
    chosen = 0.0
    for spec, offered in zip(specs, offers, strict=True):
        (choice,) = parse_layout(spec.name, planned.config.layout[spec.name])
        chosen += next(error for _, error, offer in offered if offer == choice)
    assert chosen <= best + 1e-9


def test_small_tables_keep_more_bits_than_big_ones():
    layout = plan(SPECS, "compact", "5%").config.layout
    (item,), (gender,) = parse_layout("item", layout["item"]), parse_layout("gender", layout["gender"])
    assert gender.dim * gender.bits > item.dim * item.bits


def test_every_id_has_its_own_row_until_a_bit_per_id_is_too_much():
    assert all("/" not in text for text in plan(SPECS, "compact", "1%").config.layout.values())
    assert any("/" in text for text in plan(SPECS, "compact", "0.2%").config.layout.values())


def test_one_value_of_one_bit_is_a_bit_per_id():
    report = plan([TableSpec("item", 8000, 8)], CompactConfig(layout={"item": "8000<1x1"})).report
    assert report.serve_bytes == 8000 // 8 + 4


def test_tiers_give_frequent_ids_more():
    counts = {"item": 30_000 // torch.arange(1, 3001)}
    planned = plan(SPECS[:1], CompactConfig(tiers=3), "4%", counts=counts)
    choices = parse_layout("item", planned.config.layout["item"])
    widths = [choice.dim * choice.bits for choice in choices]
    assert len(choices) > 1
    assert widths == sorted(widths, reverse=True)
    assert planned.report.serve_bytes <= planned.budget_bytes


def test_ids_that_are_not_ordered_by_frequency_make_one_tier():
    counts = {"item": torch.arange(3000)}
    planned = plan(SPECS[:1], CompactConfig(tiers=3), "4%", counts=counts)
    assert len(parse_layout("item", planned.config.layout["item"])) == 1


def test_a_padding_id_in_front_does_not_hide_the_order_of_the_others():
    counts = 30_000 // torch.arange(1, 3001)
    ordered = plan(SPECS[:1], CompactConfig(), "4%", counts={"item": counts})
    padded = plan(SPECS[:1], CompactConfig(), "4%", counts={"item": torch.cat([torch.zeros(1).long(), counts[:-1]])})
    stops = [[tier.stop for tier in parse_layout("item", p.config.layout["item"])] for p in (ordered, padded)]
    assert len(stops[0]) > 2
    assert stops[1] == [stop + 1 for stop in stops[0][:-1]] + [3000]


def test_a_tier_is_looked_up_in_its_own_rows():
    config = CompactConfig(layout={"item": "10<8x32 3000<2x32", "shop": "700<8x32"})
    tables = build_tables(SPECS[:2], config)
    ids = torch.tensor([[3, 5], [9, 699], [10, 0], [2999, 1]])
    vectors = tables(ids)[:, 0]
    assert (vectors[:2] != 0).all()
    assert (vectors[2:, :2] != 0).all()
    assert torch.equal(vectors[2:, 2:], torch.zeros(2, 6))
    torch.testing.assert_close(tables(ids[:, 0], "item"), vectors)
    torch.testing.assert_close(tables(ids.flatten(), torch.tensor([0, 1] * 4)).view(4, 2, 8), tables(ids))


def test_trained_tables_are_kept_as_well_as_bits_allow():
    torch.manual_seed(0)
    weight = torch.randn(3000, 8)
    for bits in (2, 4, 8):
        config = CompactConfig(layout={"item": f"3000<8x{bits}"})
        served = build_tables(SPECS[:1], config).load_dense_({"item": weight}).finalize_()
        error = (served.materialize() - weight).square().mean().item()
        assert error == pytest.approx(NOISE[bits], rel=0.25)


@pytest.mark.parametrize(
    "text", ["", "3000", "3000<2x5", "3000<0x4", "10<2x4 10<1x4", "x<2x4", "3000<2x4/0", "2999<2x4", "4000<2x4"]
)
def test_a_wrong_layout_is_named(text):
    with pytest.raises(ConfigError, match="layout of table 'item'"):
        plan(SPECS[:1], CompactConfig(layout={"item": text}))
