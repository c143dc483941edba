"""The protocols, the numbering and the batches once more, in plain Python lists and dicts."""

from collections import Counter


def group(events, days=None):
    """Sessions in the order in which they begin: the items in the order of time, and the end of each.

    Events are (session, item, time) in the order of the source; days are per event.
    """
    histories = {}
    for position, (session, item, time) in enumerate(events):
        histories.setdefault(session, []).append((time, position, item))
    sequences, ends = [], []
    for history in histories.values():
        last_line = history[-1][1]
        history.sort(key=lambda event: event[:2])
        sequences.append([item for *_, item in history])
        ends.append(days[last_line] if days else history[-1][0])
    return sequences, ends


def merge(sequence):
    return [item for i, item in enumerate(sequence) if i == 0 or item != sequence[i - 1]]


def core(sequences, ends, min_item_count, min_length, iterate):
    """Short sessions go, then rare items, then sessions that have become short or empty."""
    pairs = [(s, e) for s, e in zip(sequences, ends, strict=True) if len(s) >= min_length]
    while True:
        counts = Counter(item for sequence, _ in pairs for item in sequence)
        left = [([item for item in s if counts[item] >= min_item_count], e) for s, e in pairs]
        left = [(s, e) for s, e in left if s and len(s) >= min_length]
        done = left == pairs or not iterate
        pairs = left
        if done:
            return [s for s, _ in pairs], [e for _, e in pairs]


def prefixes(sequences):
    return [(s[:i], s[i]) for s in sequences for i in range(1, len(s))]


def leave_one_out(sequences):
    """Training sequences, validation cases and test cases."""
    train = [s[:-2] if len(s) >= 3 else s for s in sequences]
    held = [s for s in sequences if len(s) >= 3]
    return train, [(s[:-2], s[-2]) for s in held], [(s[:-1], s[-1]) for s in held]


def last_days(sequences, ends, test_days, fraction, keep_unseen):
    """Training sequences, before validation sessions are drawn, and test cases."""
    pairs = sorted(zip(ends, sequences, strict=True), key=lambda pair: int(pair[0]))
    middle = int(max(ends)) - test_days * 86_400
    train = [s for end, s in pairs if int(end) < middle]
    test = [s for end, s in pairs if int(end) > middle]
    if not keep_unseen:
        seen = {item for s in train for item in s}
        test = [[item for item in s if item in seen] for s in test]
    return (most_recent(train, fraction) if fraction > 1 else train), prefixes(test)


def most_recent(sequences, fraction):
    """The sequences whose prefixes are the last of all, where those of a session are in order from the longest down."""
    cases = [(row, length) for row, s in enumerate(sequences) for length in range(len(s) - 1, 0, -1)]
    kept = cases[len(cases) - len(cases) // fraction :]
    longest = {}
    for row, length in kept:
        longest[row] = max(length, longest.get(row, 0))
    return [sequences[row][: length + 1] for row, length in longest.items()]


def number(train, others):
    """Raw items in the order of their ids, and the train counts."""
    counts = Counter(item for s in train for item in s)
    items = sorted({*counts, *(item for s in others for item in s)}, key=lambda item: (-counts[item], item))
    return items, [counts[item] for item in items]


def attribute(values_of, items, counts, is_bag):
    """Names in the order of ids, the ids of each item, and the counts, from the raw values of each raw item."""
    values = [list(dict.fromkeys(values_of.get(item, []))) for item in items]
    if not is_bag:
        values = [values_of[item][-1:] if item in values_of else [] for item in items]
    totals = Counter()
    for own, count in zip(values, counts, strict=True):
        for value in own:
            totals[value] += count
    names = sorted((value for value, total in totals.items() if total), key=lambda value: (-totals[value], value))
    ids = [sorted({names.index(v) if v in names else len(names) for v in own}) for own in values]
    if not is_bag:
        ids = [own or [len(names)] for own in ids]
    sums = [sum(c for own, c in zip(ids, counts, strict=True) if i in own) for i in range(len(names) + 1)]
    return names, ids, sums


def windows(sequence, length, every):
    """Inputs and targets of each window of a sequence."""
    found = []
    stop = len(sequence) - 1
    while stop > 0:
        start = max(0, stop - length)
        found.append((sequence[start:stop], sequence[start + 1 : stop + 1]))
        stop = start
        if not every:
            break
    return found[::-1]


def batch(samples, width):
    """Items padded with zeros, lengths, and targets, padded with -100 if there is one per position."""
    items = [inputs + [0] * (width - len(inputs)) for inputs, _ in samples]
    targets = [t + [-100] * (width - len(t)) if isinstance(t, list) else t for _, t in samples]
    return items, [len(inputs) for inputs, _ in samples], targets
