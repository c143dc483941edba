"""Evolution: what it asks for, what it remembers, and that it can stop at any moment and go on."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp.training import Evolution

genes = st.tuples(st.integers(1, 4), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))
spaces = st.lists(genes, min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def evolution(space, **options):
    return Evolution([low for low, _ in space], [high for _, high in space], **{"generations": 6, **options})


def widths(number, most, **options):
    return evolution([(1, most)] * number, **options)


def value_of(candidate):
    """Any fixed numbers, of which some are equal."""
    return float(sum((gene * 7919 + place * 104729) % 101 for place, gene in enumerate(candidate)) % 17)


def rounds_of(search, value_of=value_of):
    """Drive a search to its end; the candidates of each round."""
    rounds = []
    while candidates := search.ask():
        search.tell([value_of(candidate) for candidate in candidates])
        rounds.append(candidates)
    return rounds


def distance(one, other):
    return sum(a != b for a, b in zip(one, other, strict=True))


# ---- what it asks for ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(spaces, seeds, st.integers(1, 12), st.integers(0, 12), st.integers(1, 15), st.sampled_from([0.0, 1.0]))
def test_candidates_are_in_range_and_none_is_asked_for_twice(space, seed, mutations, crossovers, parents, power):
    sizes = {"num_mutations": mutations, "num_crossovers": crossovers, "num_parents": parents}
    search = evolution(space, generations=9, power=power, seed=seed, **sizes)
    rounds = rounds_of(search)
    asked = list(itertools.chain(*rounds))
    assert len(set(asked)) == len(asked)
    assert all(low <= gene <= high for c in asked for gene, (low, high) in zip(c, space, strict=True))
    assert all(type(gene) is int for c in asked for gene in c)
    assert all(1 <= len(candidates) <= mutations + crossovers for candidates in rounds)
    assert len(rounds) <= 9
    assert set(search.known) == set(asked)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_random_values_are_drawn_in_proportion_to_a_power(power):
    search = evolution([(1, 8), (3, 6)], power=power)
    drawn = [search._draw() for _ in range(4000)]
    for place, values in enumerate((range(1, 9), range(3, 7))):
        shares = [value**-power for value in values]
        expected = [4000 * share / sum(shares) for share in shares]
        found = [sum(candidate[place] == value for candidate in drawn) for value in values]
        assert sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True)) < 24.3


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 5))
def test_mutation_reaches_every_value_of_every_gene_the_smallest_too(seed, number):
    search = widths(
        number, 4, num_mutations=1, num_crossovers=0, generations=400, seeds=[(4,) * number], seed=seed, num_parents=99
    )
    asked = list(itertools.chain(*rounds_of(search)))
    assert asked[0] == (4,) * number
    for gene in range(number):
        assert {candidate[gene] for candidate in asked} == {1, 2, 3, 4}


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(2, 7))
def test_bug_cut_point_over_dimensions_a_crossover_mixes_two_parents_cut_between_two_fields(seed, fields):
    search = widths(fields, 64, seed=seed)
    parents = [tuple(range(1, fields + 1)), tuple(range(33, 33 + fields))]
    children = {search._cross(parents) for _ in range(40 * fields)}
    cuts = range(1, fields)  # the whole of a parent is no child
    assert children == {one[:cut] + other[cut:] for cut in cuts for one, other in (parents, parents[::-1])}


def test_crossovers_are_as_many_as_wanted_and_mix_the_best():
    parents = [tuple(range(1, 9)), tuple(range(11, 19)), (64,) * 8]
    search = widths(8, 64, num_mutations=0, num_crossovers=3, num_parents=2, generations=4, seeds=parents)
    first, *others = rounds_of(search, lambda c: {parents[0]: 3.0, parents[1]: 2.0}.get(c, 0.0))
    assert first == parents
    mixed = {one[:cut] + other[cut:] for cut in range(1, 8) for one, other in (parents[:2], parents[1::-1])}
    assert [len(candidates) for candidates in others] == [3, 3, 3]
    assert set(itertools.chain(*others)) <= mixed


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 15))
def test_parents_are_the_best_of_all_rounds(seed, best):
    rare = 1e-12  # so that a mutation changes one gene
    search = widths(9, 64, num_mutations=40, num_crossovers=0, num_parents=best, mutation_probability=rare, seed=seed)
    while candidates := search.ask():
        parents = search.best(best)
        assert [search.known[p] for p in parents] == sorted(search.known.values(), reverse=True)[: len(parents)]
        assert not parents or all(any(distance(p, child) == 1 for p in parents) for child in candidates)
        search.tell([value_of(candidate) for candidate in candidates])


@pytest.mark.parametrize("number", [1, 3, 15])
def test_every_one_of_the_best_becomes_a_parent(number):
    search = widths(6, 50, num_mutations=400, num_crossovers=0, num_parents=number, mutation_probability=1e-12)
    search.tell([value_of(candidate) for candidate in search.ask()])
    parents = search.best(number)
    assert {p for p in parents for child in search.ask() if distance(p, child) == 1} == set(parents)


@pytest.mark.parametrize("number", [2, 5, 15])
def test_bug_parents_of_crossovers_each_of_the_best_has_children_and_no_other(number):
    search = widths(6, 50, num_mutations=0, num_crossovers=400, num_parents=number)
    search.tell([value_of(candidate) for candidate in search.ask()])
    mixed = [{one[:cut] + other[cut:] for cut in range(1, 6) for other in search.known} for one in search.known]
    parents, children = search.best(number), set(search.ask())
    firsts = {one for one, own in zip(search.known, mixed, strict=True) if own & children}
    assert set(parents) <= firsts
    allowed = {one[:cut] + other[cut:] for one in parents for other in parents for cut in range(1, 6)}
    assert children <= allowed


# ---- what it remembers ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(spaces, seeds)
def test_bug_aliased_mutation_the_recorded_best_is_not_changed_by_later_rounds(space, seed):
    search, told = evolution(space, seed=seed, mutation_probability=0.5), {}
    while candidates := search.ask():
        values = [value_of(candidate) for candidate in candidates]
        search.tell(values)
        told |= {tuple(candidate): value for candidate, value in zip(candidates, values, strict=True)}
        assert search.known == told
        (best,) = search.best()
        assert told[best] == value_of(best) == max(told.values())
        assert best == next(candidate for candidate, value in told.items() if value == max(told.values()))


@settings(deadline=None, max_examples=25)
@given(spaces, seeds)
def test_asking_again_gives_the_same_candidates_until_they_are_told(space, seed):
    search = evolution(space, seed=seed)
    for _ in range(3):
        asked = search.ask()
        asked_again = search.ask()
        assert asked == asked_again
        asked_again.clear()
        assert search.ask() == asked
        if not asked:
            break
        search.tell([0.5] * len(asked))
        assert set(search.ask()).isdisjoint(asked)


@settings(deadline=None, max_examples=25)
@given(spaces, seeds, st.integers(0, 6), st.booleans())
def test_a_state_by_way_of_json_continues_the_same(space, seed, rounds, asked):
    search, other = (evolution(space, seed=number, patience=3) for number in (seed, seed + 1))
    for _ in range(rounds):
        if candidates := search.ask():
            search.tell([value_of(candidate) for candidate in candidates])
    if asked:
        search.ask()
    other.load(json.loads(json.dumps(search.state())))
    assert rounds_of(other) == rounds_of(search)
    assert other.state() == search.state()
    assert other.progress == search.progress
    assert other.best(3) == search.best(3)


@pytest.mark.parametrize("change", ["genes", "range", "field", "type", "random"])
def test_a_state_of_another_search_is_refused_and_changes_nothing(change):
    search, other = widths(3, 8), widths(3, 8)
    search.tell([value_of(candidate) for candidate in search.ask()])
    state = search.state()
    if change == "genes":
        other = widths(2, 8)
    elif change == "range":
        other = widths(3, 4)
    elif change == "field":
        del state["known"]
    elif change == "type":
        state["known"] = [[3, 1.0]]
    else:
        state["random"] = {"bit_generator": "MT19937"}
    before = json.dumps(other.state())
    with pytest.raises((ValueError, KeyError, TypeError)):
        other.load(state)
    assert json.dumps(other.state()) == before


def test_values_for_other_candidates_than_were_asked_for_change_nothing():
    search = widths(3, 8)
    asked = search.ask()
    before = json.dumps(search.state())
    for values in ([], [1.0] * (len(asked) - 1), [1.0] * (len(asked) + 1)):
        with pytest.raises(ValueError, match="zip"):
            search.tell(values)
        assert json.dumps(search.state()) == before


# ---- when it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_counts_rounds_without_a_better_candidate(patience):
    values = iter([5.0, 5.0, 7.0, 7.0, 6.0, 7.0, 1.0, 1.0, 1.0, 1.0])
    search, rounds = widths(5, 64, generations=10, patience=patience), 0
    while candidates := search.ask():
        search.tell([next(values)] + [0.0] * (len(candidates) - 1))
        rounds += 1
    assert rounds == {1: 2, 2: 5, 4: 7}[patience]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=3), seeds)
def test_a_tiny_space_is_searched_whole_and_then_the_search_ends(pairs, seed):
    space = [(low, low + more) for low, more in pairs]
    search = evolution(space, seed=seed, generations=30)
    rounds = rounds_of(search)
    assert set(search.known) == set(itertools.product(*(range(low, high + 1) for low, high in space)))
    assert len(rounds) < 5


def test_one_field_of_one_dimension_has_one_candidate():
    assert rounds_of(widths(1, 1)) == [[(1,)]]


def test_one_field_is_searched_by_mutation_alone():
    search = widths(1, 40, generations=30, num_mutations=1, num_crossovers=1)
    assert all(len(candidates) == 2 for candidates in rounds_of(search)[:-5])


def test_progress_counts_rounds():
    search = widths(4, 16, generations=3)
    seen = [search.progress]
    while candidates := search.ask():
        search.tell([0.0] * len(candidates))
        seen.append(search.progress)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


# ---- what is allowed -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(2, 5))
def test_repaired_candidates_are_what_is_asked_for(seed, number):
    def repair(candidate, random):
        return tuple(min(gene, int(random.integers(1, 4))) for gene in candidate)

    asked = list(itertools.chain(*rounds_of(widths(number, 64, seed=seed, repair=repair, seeds=[(64,) * number]))))
    assert max(itertools.chain(*asked)) <= 3
    assert len(set(asked)) == len(asked)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(2, 5))
def test_refused_candidates_are_drawn_anew(seed, number):
    search = widths(number, 8, seed=seed, repair=lambda c, _: c if sum(c) % 2 else None, seeds=[(2,) * number])
    rounds = rounds_of(search)
    assert all(sum(candidate) % 2 for candidates in rounds for candidate in candidates)
    assert len(rounds[0]) > 1


def test_where_every_draw_is_refused_the_search_begins_at_the_smallest_and_grows():
    search = widths(8, 64, generations=12, repair=lambda c, _: c if sum(c) <= 12 else None, seeds=[(64,) * 8])
    rounds = rounds_of(search, sum)
    assert rounds[0] == [(1,) * 8]
    assert sum(search.best()[0]) == 12
