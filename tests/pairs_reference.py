"""The pairs of an epoch, one after the other, in plain Python.

The walk is that of `create_instances_from_document` in Google's create_pretraining_data.py, with a
length to reach for each pair, and with a lot that makes up for pairs that can only have a random
second segment: it is moved until there are as many of those as of others.
"""

from corpora import Document, Pair

WORD, MASK = 2**32, 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
PAIRS_KEY = 0x6E65787473656E74


def philox(key: int, *counter: int) -> tuple[int, ...]:
    """Four words of Philox4x32-10."""
    c, low, high = counter, key % WORD, key // WORD
    for _ in range(10):
        one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (two // WORD ^ c[1] ^ low, two % WORD, one // WORD ^ c[3] ^ high, one % WORD)
        low, high = (low + 0x9E3779B9) % WORD, (high + 0xBB67AE85) % WORD
    return c


def mixed(x: int) -> int:
    """The last steps of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def between(word: int, low: int, high: int) -> int:
    """A number from low to high, both included."""
    return low + word * (high - low + 1) // WORD


def truncated(a: list[int], b: list[int], most: int, words: tuple[int, int]) -> tuple[list, list]:
    """The segments after one token of the longer has gone at a time, until they fit."""
    keep = [len(a), len(b)]
    while sum(keep) > most:
        keep[0 if keep[0] > keep[1] else 1] -= 1
    cut = []
    for segment, kept, word in zip((a, b), keep, words, strict=True):
        begin = between(word, 0, len(segment) - kept)
        cut.append(segment[begin : begin + kept])
    return cut[0], cut[1]


def flat(sentences: list[list[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def reference_pairs(
    documents: list[Document], *, seed: int, epoch: int, max_length: int, short_seq_prob: float
) -> list[Pair]:
    """The pairs in the order of the epoch."""
    key, share, tries = mixed(seed ^ PAIRS_KEY), 0.5, []
    for _ in range(5):
        found = walked(documents, key, epoch, max_length - 3, short_seq_prob, share)
        excess = sum(pair.random for pair in found) - len(found) / 2
        if excess * excess <= len(found) / 4:
            break
        slope = len(found)
        if tries:
            slope = (excess - tries[-1][1]) / (share - tries[-1][0])
        tries.append((share, excess))
        share = min(1.0, max(0.0, share - excess / max(slope, 1.0)))
        if share == tries[-1][0]:
            break
    turn = {p.number: mixed((p.number * GOLDEN + epoch & MASK) ^ key) for p in found}
    return sorted(found, key=lambda pair: turn[pair.number])


def walked(
    documents: list[Document], key: int, epoch: int, most: int, short_seq_prob: float, share: float
) -> list[Pair]:
    """The pairs in the order of the documents."""
    found, base = [], 0
    for own, document in enumerate(documents):
        i = 0
        while i < len(document):
            number = base + i
            counter = 0, number % WORD, number // WORD
            is_short, length, split, lot = philox(key, 2 * epoch, *counter)
            which, where, *cuts = philox(key, 2 * epoch + 1, *counter)
            target = between(length, 2, most) if is_short < short_seq_prob * WORD else most
            chunk = []
            for sentence in document[i:]:
                chunk.append(sentence)
                if len(flat(chunk)) >= target:
                    break
            if len(chunk) == 1:
                a_end, random = 1, True
            else:
                a_end, random = between(split, 1, len(chunk) - 1), lot < round(share * WORD)
            a, b = flat(chunk[:a_end]), flat(chunk[a_end:])
            if random:
                others = [n for n in range(len(documents)) if n != own]
                other = documents[others[between(which, 0, len(others) - 1)]]
                b = []
                for sentence in other[between(where, 0, len(other) - 1) :]:
                    b += sentence
                    if len(b) >= target - len(a):
                        break
            found.append(Pair(number, *truncated(a, b, most, cuts), random))
            i += a_end if random else len(chunk)
        base += len(document)
    return found
